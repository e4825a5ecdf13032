import json
import runpy
import sys
from collections import Counter

import pytest
import torch
from asked import logprob_of, picture, requests, results, text_prompts, tokens, vision_prompts
from forks import code, finish
from pairs import value_model
from places import BENCHMARKS
from tiny_generators import build

from datamodules.tokenise import encode_prompt as encode_for_training
from lenvm_lightning import LengthValueModel
from lenvm_lightning.decoding.sampling_params import SamplingParams, completion_seed
from lenvm_lightning.guidance import Tilt
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.rollouts.generators.interface import Failure, GeneratedText, Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.rollouts.generators.local import generator as generator_module
from lenvm_lightning.rollouts.prompts import load_prompts
from lenvm_lightning.rollouts.record import Rollout

# -- completions ------------------------------------------------------------------------------------------------------


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
        ids, inputs = generator.encode(prompt, SamplingParams(max_tokens=50))
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
    ids, _ = text.encode(prompt, SamplingParams(max_tokens=1))
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
            ids, _ = generator.encode(prompt, SamplingParams(max_tokens=1))
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
    encoded = {prompt.prompt_id: generator.encode(prompt, sampling)[0] for prompt in prompts}
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
    program = """
import resource
from pathlib import Path
from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.decoding.sampling_params import completion_seed
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.rollouts.generators.interface import Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.rollouts.generators.local import generator as generator_module
generator = LocalGenerator.load("tiny-text", rows=64)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**27,) * 2)
request = PromptRequest(Prompt("0", [{"role": "user", "content": "word " * 1500}]), tuple(range(64)))
try:
    list(generator.sample([request], SamplingParams(max_tokens=5)))
except GeneratorError as error:
    print(error)
"""
    assert "out of memory on cpu with 64 rows. Use fewer (rows=32)" in finish(code(program))


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


def test_guided_completions_do_not_depend_on_those_beside_them():
    """What makes a killed run the same: after a kill other completions are written side by side."""
    requests = [PromptRequest(prompt, (0,), Tilt(-5)) for prompt in load_prompts("tiny-math", limit=3)]

    def write(rows):
        generator = LocalGenerator.load("tiny-text", rows=rows)
        generator.lenvm = LengthValueModel.from_pretrained("tiny-text-lenvm", dtype="float32")
        answers = generator.sample(requests, SamplingParams(max_tokens=12, seed=1))
        return {answer.prompt_id: (answer.result.token_ids, answer.result.logprob) for answer in answers}

    assert write(1) == write(3)


def test_engines_side_by_side_write_the_same(monkeypatch):
    prompts = text_prompts(5)

    def write(engines):
        monkeypatch.setattr(generator_module, "_engines_for", lambda model, rows: engines)
        generator = LocalGenerator.load("tiny-text", rows=6)
        found = results(generator, requests(prompts, 2), SamplingParams(max_tokens=12, seed=1))
        assert generator.tokens_written == sum(len(one.token_ids) for one in found.values())
        return found

    assert write(2) == write(1)


def test_the_number_of_engines(monkeypatch):
    monkeypatch.setattr(generator_module, "is_small", lambda model: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    model = build("tiny-text")
    assert [generator_module._engines_for(model, rows) for rows in (1, 16, 32, 64, 256)] == [1, 1, 2, 4, 4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert generator_module._engines_for(model, 256) == 1


def test_requests_to_a_local_generator_are_guided(tiny_text):
    model = build("tiny-text", torch.float64, eos_bias=6.0)
    generator = LocalGenerator(model, tiny_text, "shape", lenvm=value_model("tiny-text"))
    prompts = [Prompt(str(i), [{"role": "user", "content": f"Write {i}."}]) for i in range(3)]
    controls = [None, Tilt(-20), Tilt(20)]
    asked = [PromptRequest(prompt, (0, 1), control) for prompt, control in zip(prompts, controls, strict=True)]
    sampling = SamplingParams(max_tokens=20, top_k=15, seed=3)
    answers = {(a.prompt_id, a.number): a.result for a in generator.sample(asked, sampling)}
    plain = LocalGenerator(model, tiny_text, "shape")
    expected = {
        (a.prompt_id, a.number): a.result for a in plain.sample([PromptRequest(p, (0, 1)) for p in prompts], sampling)
    }
    assert all(isinstance(result, GeneratedText) for result in answers.values())
    same = {key for key in answers if answers[key].token_ids == expected[key].token_ids}
    assert {("0", 0), ("0", 1)} <= same
    assert len(same) < 6
