import json
import runpy
import subprocess
import sys
import warnings
from collections import Counter
from random import Random

import pytest
import torch
from PIL import Image
from places import BENCHMARKS
from safetensors.torch import load_file, save_file
from tiny_generators import build, save
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    MambaConfig,
)

from datamodules.tokenise import encode_prompt as encode_for_training
from lenvm_lightning.decoding.sampling_params import SamplingParams, completion_seed
from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.rollouts.generators.interface import Failure, GeneratedText, Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator, loading
from lenvm_lightning.rollouts.record import Rollout

# -- completions ------------------------------------------------------------------------------------------------------

WORDS = ("apples", "books", "seven", "three", "gives", "left", "how", "many", "shop", "then", "each", "bag", "takes")


def text_prompts(count, seed=0):
    rng = Random(seed)
    lengths = [rng.choice((1, 5, 20, 60, 61, 62, 63, 64, 65, 120, 190)) for _ in range(count)]
    return [
        Prompt(f"p{number}", [{"role": "user", "content": " ".join(rng.choices(WORDS, k=length))}])
        for number, length in enumerate(lengths)
    ]


def picture(width, height, seed):
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def vision_prompts():
    """Pictures of different sizes, two in one prompt, and a prompt without."""
    ask = [{"role": "user", "content": "<image>How many?"}]
    return [
        Prompt("wide", ask, (picture(112, 56, 0),)),
        Prompt("high", ask, (picture(56, 140, 1),)),
        Prompt("two", [{"role": "user", "content": "<image>or <image>?"}], (picture(84, 84, 2), picture(60, 90, 3))),
        Prompt("none", [{"role": "user", "content": "How many?"}]),
        Prompt("square", ask, (picture(84, 84, 4),)),
    ]


def requests(prompts, n=1):
    return [PromptRequest(prompt, tuple(range(n))) for prompt in prompts]


def results(generator, asked, sampling):
    found = {(answer.prompt_id, answer.number): answer.result for answer in generator.sample(asked, sampling)}
    wanted = [(request.prompt.prompt_id, number) for request in asked for number in request.numbers]
    assert sorted(found) == sorted(wanted)
    return found


@pytest.fixture(scope="module")
def text(tiny_text):
    """Completions of about sixty tokens."""
    return LocalGenerator(build("tiny-text", sharpness=2.0, eos_bias=3.5), tiny_text, "text", rows=24)


@pytest.fixture(scope="module")
def vision(tiny_vl):
    return LocalGenerator(build("tiny-vl", sharpness=2.0, eos_bias=3.0), tiny_vl, "vision", rows=24)


@pytest.fixture(scope="module")
def expected(text):
    """Of one run, uninterrupted."""
    return results(text, requests(text_prompts(10), 3), SamplingParams(max_tokens=120, seed=7))


def test_the_fixture_has_both_endings_and_a_long_tail(expected):
    lengths = sorted(len(completion.token_ids) for completion in expected.values())
    assert Counter(completion.finish_reason for completion in expected.values()).keys() == {"stop", "length"}
    assert lengths[0] < 15
    assert lengths[-1] == 120
    assert 20 < lengths[len(lengths) // 2] < 100


def tokens(found):
    return {key: (completion.token_ids, completion.logprob) for key, completion in found.items()}


def test_order_and_interruption_do_not_matter(text, expected):
    """The same requests in another order; and in two runs, the second asking for what the first left out."""
    prompts, sampling = text_prompts(10), SamplingParams(max_tokens=120, seed=7)
    backwards = [PromptRequest(prompt, (2, 0, 1)) for prompt in reversed(prompts)]
    assert tokens(results(text, backwards, sampling)) == tokens(expected)
    done = {key for number, key in enumerate(expected) if number % 3}
    halves = [
        [PromptRequest(p, tuple(n for n in range(3) if ((p.prompt_id, n) in done) == half)) for p in prompts]
        for half in (True, False)
    ]
    found = {}
    for half in halves:
        found |= results(text, [request for request in half if request.numbers], sampling)
    assert tokens(found) == tokens(expected)


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_the_number_of_rows_does_not_matter(text, tiny_text, expected, rows):
    few = requests(text_prompts(10), 3) if rows == 64 else requests(text_prompts(10)[:rows], 2)
    other = LocalGenerator(text.model, tiny_text, "text", rows=rows)
    found = tokens(results(other, few, SamplingParams(max_tokens=120, seed=7)))
    assert found == {key: value for key, value in tokens(expected).items() if key in found}


def test_together_or_alone(text, expected):
    for prompt in text_prompts(10)[2:5]:
        for number in (0, 2):
            found = results(text, [PromptRequest(prompt, (number,))], SamplingParams(max_tokens=120, seed=7))
            assert tokens(found).items() <= tokens(expected).items()


def test_seeds(text, expected):
    assert len({tuple(expected["p3", number].token_ids) for number in range(3)}) == 3
    assert expected["p3", 2].seed == completion_seed(7, "p3", 2)
    other = results(text, requests(text_prompts(4), 1), SamplingParams(max_tokens=120, seed=8))
    assert all(other[key].token_ids != expected[key].token_ids for key in other)


def logprob_of(generator, prompt, completion):
    """Log-probability of a completion by one forward of the whole sequence, without any cache."""
    ids, inputs = generator._encode(prompt, SamplingParams(max_tokens=1))
    all_ids = torch.tensor([ids + completion.token_ids])
    inputs = {name: value for name, value in inputs.items() if name.startswith(("pixel", "image"))}
    if inputs:
        inputs["mm_token_type_ids"] = (all_ids == generator.model.config.image_token_id).long()
    with torch.inference_mode():
        logits = generator.model(input_ids=all_ids, use_cache=False, **inputs).logits[0, len(ids) - 1 : -1]
    chosen = logits.double().log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])
    return float(chosen.sum())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_every_token_is_drawn_from_the_distribution_of_the_whole_sequence(text, vision, dtype, tolerance):
    """Two rows for many completions: all but the first are written in rows that others left."""
    for source, prompts in ((text, text_prompts(4, seed=1)), (vision, vision_prompts())):
        model = build("tiny-vl" if source is vision else "tiny-text", dtype, sharpness=2.0, eos_bias=3.0)
        generator = LocalGenerator(model, source.processor, "exact", rows=2)
        for settings, n in (({}, 2), ({"temperature": 1.5, "top_k": 50, "top_p": 0.9}, 1)):
            found = results(generator, requests(prompts, n), SamplingParams(max_tokens=30, **settings))
            for prompt in prompts:
                completion = found[prompt.prompt_id, n - 1]
                whole = logprob_of(generator, prompt, completion)
                assert abs(completion.logprob - whole) <= tolerance * len(completion.token_ids)


@pytest.mark.parametrize("which", ["text", "vision"])
def test_greedy_is_that_of_generate(which, request):
    generator = request.getfixturevalue(which)
    prompts = text_prompts(6) if which == "text" else vision_prompts()
    found = results(generator, requests(prompts, 2), SamplingParams(temperature=0, max_tokens=50))
    for prompt in prompts:
        ids, inputs = generator._encode(prompt, SamplingParams(max_tokens=50))
        inputs = inputs or {"input_ids": torch.tensor([ids])}
        whole = generator.model.generate(**inputs, max_new_tokens=50, do_sample=False)[0, len(ids) :].tolist()
        assert found[prompt.prompt_id, 0].token_ids == whole
        assert found[prompt.prompt_id, 1].token_ids == whole


def test_vision_does_not_depend_on_its_batch(vision, tiny_vl):
    sampling = SamplingParams(max_tokens=40)
    together = tokens(results(vision, requests(vision_prompts(), 4), sampling))
    assert len({len(ids) for ids, _ in together.values()}) > 5
    for prompt in vision_prompts()[1:4]:
        assert tokens(results(vision, [PromptRequest(prompt, (1,))], sampling)).items() <= together.items()
    other = LocalGenerator(vision.model, tiny_vl, "vision", rows=5)
    assert tokens(results(other, requests(vision_prompts()[::-1], 4), sampling)) == together


def test_first_tokens_come_as_often_as_they_are_likely(text):
    """Chi-squared of 3,000 first tokens over the twenty likeliest and the rest; the seed is fixed, so is the result."""
    count, prompt = 3000, text_prompts(1)[0]
    found = results(
        text, [PromptRequest(prompt, tuple(range(count)))], SamplingParams(temperature=0.5, max_tokens=1, seed=3)
    )
    ids, _ = text._encode(prompt, SamplingParams(max_tokens=1))
    with torch.inference_mode():
        likely = (text.model(torch.tensor([ids])).logits[0, -1].double() / 0.5).softmax(-1)
    drawn = torch.bincount(torch.tensor([c.token_ids[0] for c in found.values()]), minlength=len(likely)).double()
    best = likely.topk(20).indices
    observed = torch.cat([drawn[best], (count - drawn[best].sum())[None]])
    wanted = torch.cat([likely[best], (1 - likely[best].sum())[None]]) * count
    assert wanted.min() > 5
    assert ((observed - wanted) ** 2 / wanted).sum() < 45.3  # 0.999 quantile of 20 degrees of freedom


def test_what_a_completion_says(text, expected):
    eos = text.model.config.eos_token_id
    for completion in expected.values():
        ended = completion.finish_reason == "stop"
        assert (completion.token_ids[-1] == eos) == ended
        assert eos not in completion.token_ids[:-1]
        assert ended or len(completion.token_ids) == 120
        assert completion.text == text.processor.decode(completion.token_ids, skip_special_tokens=True)
        assert completion.logprob < 0
        assert not completion.reencoded


def test_attentions_that_know_no_spans(text, tiny_text):
    """Eager attention reads one wide cache, as every attention on a GPU does; it writes the same, but not the bits."""
    model = build("tiny-text", torch.float64, sharpness=2.0, eos_bias=3.5)
    sampling = SamplingParams(max_tokens=40)
    asked = requests(text_prompts(6), 3)
    expected = results(LocalGenerator(model, tiny_text, "sdpa", rows=10), asked, sampling)
    model.set_attn_implementation("eager")
    found = results(LocalGenerator(model, tiny_text, "eager", rows=10), asked, sampling)
    for key, completion in found.items():
        assert completion.token_ids == expected[key].token_ids
        assert completion.logprob == pytest.approx(expected[key].logprob, abs=1e-4)
        assert completion.logprob != expected[key].logprob


def test_several_ids_may_end_a_completion(tiny_text):
    model = build("tiny-text")
    eos = model.config.eos_token_id
    model.generation_config.eos_token_id = [eos, *range(300)]
    found = results(LocalGenerator(model, tiny_text, "t"), requests(text_prompts(4), 2), SamplingParams(max_tokens=60))
    last = [completion.token_ids[-1] for completion in found.values() if completion.finish_reason == "stop"]
    assert last
    assert all(token < 300 or token == eos for token in last)


def test_placeholders_are_never_drawn(tiny_vl):
    """Not even by a model that wants nothing else; and of a vocabulary padded beyond the tokenizer, no padding."""
    model = build("tiny-vl")
    banned = [tiny_vl.image_token_id, tiny_vl.video_token_id]
    bias = torch.zeros(model.config.text_config.vocab_size)
    bias[banned] = 50.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    generator = LocalGenerator(model, tiny_vl, "v")
    for temperature in (0.0, 1.0):
        found = results(
            generator, requests(vision_prompts(), 2), SamplingParams(temperature=temperature, max_tokens=20)
        )
        assert all(set(completion.token_ids).isdisjoint(banned) for completion in found.values())
        assert all(completion.logprob < -40 for completion in found.values())  # the model wanted something else


def test_training_sees_the_ids_that_sampling_fed(text, vision, tmp_path):
    for generator, prompts in ((text, text_prompts(3)), (vision, vision_prompts())):
        for prompt in prompts:
            ids, _ = generator._encode(prompt, SamplingParams(max_tokens=1))
            rollout = Rollout(prompt.prompt_id, prompt.messages, [], "")
            assert encode_for_training(generator.processor, rollout, list(prompt.images)) == ids


# -- what fails -------------------------------------------------------------------------------------------------------


def ask(content, prompt_id="bad", images=()):
    return Prompt(prompt_id, [{"role": "user", "content": content}], tuple(images))


def test_bad_prompts_fail_alone(text, vision, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    good = text_prompts(2)
    cases = [
        (text, ask("word " * 5000), "context window of 4096"),
        (text, ask("<image>?", images=[picture(56, 56, 0)]), "reads text only"),
        (text, ask("<image>?"), "1 <image> marks in the prompt but 0 images"),
        (vision, ask("<image>?", images=[picture(56, 56, 0)] * 2), "1 <image> marks in the prompt but 2 images"),
        (vision, ask("<image>?", images=[str(broken)]), "cannot be read"),
        (vision, ask("<image>?", images=[str(tmp_path / "none.png")]), "does not exist"),
        (vision, ask("what is <|image_pad|>?"), "where there is no image"),
        (text, Prompt("bad", [{"role": "user"}]), "KeyError: 'content'"),
    ]
    for generator, bad, reason in cases:
        found = results(generator, requests([good[0], bad, good[1]], 2), SamplingParams(max_tokens=5))
        for number in range(2):
            failure = found["bad", number]
            assert isinstance(failure, Failure)
            assert failure.final
            assert reason in failure.reason
            assert isinstance(found["p0", number], GeneratedText)
            assert isinstance(found["p1", number], GeneratedText)


def test_an_empty_prompt(text, tiny_text):
    tokenizer = load_processor("tiny-text")
    tokenizer.chat_template = None  # a base model
    generator = LocalGenerator(text.model, tokenizer, "base")
    found = results(generator, requests([ask("")]), SamplingParams(max_tokens=5))
    assert found["bad", 0] == Failure("the prompt is empty", final=True)
    # One token is enough: there is nothing to prefill.
    alone = results(
        generator, requests([ask("a", "one"), ask("a b", "two")], 2), SamplingParams(temperature=0, max_tokens=9)
    )
    ids = torch.tensor([tokenizer("a")["input_ids"]])
    assert ids.shape == (1, 1)
    assert alone["one", 1].token_ids == text.model.generate(ids, max_new_tokens=9, do_sample=False)[0, 1:].tolist()


def test_nan_fails_alone(tiny_text):
    """One token has a NaN embedding: whoever reads or draws it fails, the others write what they always write."""
    model = build("tiny-text", sharpness=2.0, eos_bias=3.5)
    prompts = text_prompts(8)
    generator = LocalGenerator(model, tiny_text, "t", rows=6)
    sampling = SamplingParams(max_tokens=60)
    before = results(generator, requests(prompts, 3), sampling)
    word = tiny_text(" seven", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[word[0]] = torch.nan
    after = results(generator, requests(prompts, 3), sampling)
    encoded = {prompt.prompt_id: generator._encode(prompt, sampling)[0] for prompt in prompts}
    for key, result in after.items():
        read = encoded[key[0]] + before[key].token_ids[:-1]
        if word[0] in read:
            assert isinstance(result, Failure), key
            assert "NaN" in result.reason
        else:
            assert result == before[key]
    assert {type(result) for result in after.values()} == {Failure, GeneratedText}


def test_memory():
    """The address space is limited for real, in a process of its own: this one may have room left from other tests."""
    code = """
import resource
from pathlib import Path
from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.decoding.sampling_params import completion_seed
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.rollouts.generators.interface import Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator
generator = LocalGenerator.load("tiny-text", rows=64)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**27,) * 2)
request = PromptRequest(Prompt("0", [{"role": "user", "content": "word " * 1500}]), tuple(range(64)))
try:
    list(generator.sample([request], SamplingParams(max_tokens=5)))
except GeneratorError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "out of memory on cpu with 64 rows. Use fewer (rows=32)" in ended.stdout, ended.stderr


# -- families that rows do not fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=2048, hidden_size=32, n_layer=2, n_head=4, eos_token_id=2043),  # makes its own biases
        MambaConfig(vocab_size=2048, hidden_size=32, num_hidden_layers=2, eos_token_id=2043),  # has no keys at all
    ],
    ids=["bloom", "mamba"],
)
def test_other_families_sample_prompt_by_prompt(tiny_text, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.mul_(4)
    prompts = text_prompts(3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        generator = LocalGenerator(model, tiny_text, "other")
        greedy = results(generator, requests(prompts, 1), SamplingParams(temperature=0, max_tokens=12))
    assert any("does not work with continuous batching" in str(warning.message) for warning in said)
    for prompt in prompts:
        ids, _ = generator._encode(prompt, SamplingParams(max_tokens=12))
        whole = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        assert greedy[prompt.prompt_id, 0].token_ids == whole
    drawn = results(generator, requests(prompts, 3), SamplingParams(max_tokens=12))
    assert drawn == results(generator, requests(prompts, 3), SamplingParams(max_tokens=12))
    assert len({tuple(completion.token_ids) for completion in drawn.values()}) == 9
    for prompt in prompts:
        whole = logprob_of(generator, prompt, drawn[prompt.prompt_id, 1])
        assert drawn[prompt.prompt_id, 1].logprob == pytest.approx(whole, abs=1e-3)


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(build("tiny-text"), "tiny-text", tmp_path_factory.mktemp("models") / "my-model")


def test_load(folder, tmp_path):
    generator = LocalGenerator.load(str(folder), rows=3)
    assert generator.name == "my-model"
    assert generator.rows == 3
    assert generator.model.dtype == torch.float32
    found = results(generator, requests(text_prompts(2)), SamplingParams(temperature=0, max_tokens=8))
    same = LocalGenerator(build("tiny-text"), generator.processor, "same")
    assert tokens(found) == tokens(
        results(same, requests(text_prompts(2)), SamplingParams(temperature=0, max_tokens=8))
    )
    assert LocalGenerator.load(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    assert 16 <= LocalGenerator.load(str(folder)).rows <= 256


def test_a_vision_model_loads_with_its_processor(tmp_path):
    folder = save(build("tiny-vl"), "tiny-vl", tmp_path / "v")
    generator = LocalGenerator.load(str(folder))
    found = results(generator, requests(vision_prompts()), SamplingParams(max_tokens=4))
    assert all(isinstance(result, GeneratedText) for result in found.values())


def test_fingerprint(folder, tmp_path):
    first = LocalGenerator.load(str(folder)).fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert {key: first[key] for key in ("kind", "name", "dtype")} == {
        "kind": "transformers", "name": "my-model", "dtype": "float32",
    }  # fmt: skip
    elsewhere = tmp_path / "deeper" / "my-model"
    elsewhere.parent.mkdir()
    elsewhere.symlink_to(folder)
    assert LocalGenerator.load(str(elsewhere)).fingerprint() == first
    assert LocalGenerator.load(str(folder), dtype="float64").fingerprint() == {**first, "dtype": "float64"}
    changed = save(build("tiny-text", sharpness=2.0), "tiny-text", tmp_path / "my-model")
    assert LocalGenerator.load(str(changed)).fingerprint()["digest"] != first["digest"]


def test_large_models_are_told_apart_by_their_headers(folder, tmp_path, monkeypatch):
    """Pretending that everything is large: other numbers are not seen then, other shapes and names are."""
    monkeypatch.setattr(loading, "_WHOLE", 1000)
    copy = save(build("tiny-text", sharpness=2.0), "tiny-text", tmp_path / "copy")
    assert loading.digest(str(copy)) == loading.digest(str(folder))
    weights = load_file(copy / "model.safetensors")
    save_file({f"{key}.": value for key, value in weights.items()}, copy / "model.safetensors")
    assert loading.digest(str(copy)) != loading.digest(str(folder))


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(GeneratorError, match="no model could be read from 'no/such-model'"):
        LocalGenerator.load("no/such-model")
    with pytest.raises(GeneratorError, match="unknown dtype 'float23'; did you mean 'float32'"):
        LocalGenerator.load(str(folder), dtype="float23")
    with pytest.raises(GeneratorError, match="there is no device 'gpu0'"):
        LocalGenerator.load(str(folder), device="gpu0")
    with pytest.raises(GeneratorError, match="rows must be at least 1"):
        LocalGenerator.load(str(folder), rows=0)
    broken = save(build("tiny-text"), "tiny-text", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    removed = weights.pop("lm_head.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GeneratorError, match=r"lm_head\.weight is not there"):
        LocalGenerator.load(str(broken))
    weights["lm_head.weight"] = removed[:, :64].contiguous()
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GeneratorError, match=r"lm_head\.weight is \(2048, 64\), expected \(2048, 128\)"):
        LocalGenerator.load(str(broken))
    (broken / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(GeneratorError, match="no generator could be loaded from"):
        LocalGenerator.load(str(broken))
    (broken / "model.safetensors").unlink()
    with pytest.raises(GeneratorError, match="no generator could be loaded from"):
        LocalGenerator.load(str(broken))
    whole = save(build("tiny-text"), "tiny-text", tmp_path / "mute")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (whole / file).unlink()
    with pytest.raises(GeneratorError, match="tokenizer"):
        LocalGenerator.load(str(whole))


# -- benchmark and GPU ------------------------------------------------------------------------------------------------


def test_the_benchmark_runs(monkeypatch, capsys):
    benchmark = BENCHMARKS / "sampling.py"
    monkeypatch.setattr(sys, "argv", [str(benchmark), "--quick"])
    runpy.run_path(str(benchmark), run_name="__main__")
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert "same tokens" in output
    assert result["continuous_tokens_per_s"] > 0
    assert result["speedup_ratio"] > 0
    assert 15 < result["length_p50_tokens"] <= result["length_p99_tokens"] <= 64


@pytest.mark.gpu
def test_greedy_on_a_gpu_is_that_on_a_cpu(text, vision):
    for generator, prompts in ((text, text_prompts(6)), (vision, vision_prompts())):
        name = "tiny-vl" if generator is vision else "tiny-text"
        model = build(name, torch.float64, sharpness=2.0, eos_bias=3.0)
        sampling = SamplingParams(temperature=0, max_tokens=30)
        slow = results(LocalGenerator(model, generator.processor, name), requests(prompts, 2), sampling)
        fast = results(LocalGenerator(model.to("cuda"), generator.processor, name), requests(prompts, 2), sampling)
        assert {key: c.token_ids for key, c in slow.items()} == {key: c.token_ids for key, c in fast.items()}
