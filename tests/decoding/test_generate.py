"""Guided decoding: what the length value model says beside a cache is what it says without one, and rows keep apart."""

import importlib
import pkgutil
from random import Random

import pytest
import torch
from pairs import (
    END,
    prompts_of,
    random_ids,
    settings,
    value_model,
)
from tiny_generators import build
from transformers import AutoModelForCausalLM, Qwen2Config

import lenvm_lightning
from lenvm_lightning.decoding.generate import generate, stream
from lenvm_lightning.decoding.sampling import sample_tokens
from lenvm_lightning.decoding.sampling_params import SamplingParams, completion_seed
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.guidance import AtLeast, AtMost, EqualTo, Gated, Tilt
from lenvm_lightning.rollouts.generators.interface import GeneratedText, Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator

# -- names people type ------------------------------------------------------------------------------------------------


def test_the_names_people_type_are_the_packages_own():
    """`generate` is a function whatever was imported before: no module of that name may hide it."""
    modules = {module.name for module in pkgutil.iter_modules(lenvm_lightning.__path__)}
    assert modules.isdisjoint(lenvm_lightning.__all__)
    importlib.import_module("lenvm_lightning.decoding.generate")
    names = ("generate", "stream", "guided", "Tilt", "EqualTo", "AtMost", "AtLeast", "Scale", "Gated", "LenVMModule")
    for name in names:
        assert callable(getattr(lenvm_lightning, name)), name
    assert lenvm_lightning.generate is generate
    assert set(names) <= set(dir(lenvm_lightning))


# -- parity -----------------------------------------------------------------------------------------------------------


def test_together_or_one_by_one(text, text_inputs):
    controls = [EqualTo(12), Tilt(-4), None, AtMost(9)]
    together = generate(*text, text_inputs, **settings(control=controls), n=2)
    assert len({len(completion.token_ids) for completion in together}) > 1
    for row, prompt in enumerate(prompts_of(text_inputs)):
        alone = generate(*text, [prompt], control=controls[row], max_tokens=16, seed=5 + row, n=2)
        ours = [completion for completion in together if completion.prompt == row]
        assert [completion.token_ids for completion in alone] == [completion.token_ids for completion in ours]
        assert [c.logprob for c in alone] == pytest.approx([c.logprob for c in ours], abs=1e-9)


def test_pictures_together_or_one_by_one(vision, vision_inputs):
    together, alone = vision_inputs
    ours = generate(*vision, together, control=EqualTo(5), max_tokens=6, seed=[1, 2, 3])
    for row, inputs in enumerate(alone):
        assert generate(*vision, inputs, control=EqualTo(5), max_tokens=6, seed=row + 1)[0].token_ids == (
            ours[row].token_ids
        )


def test_padding_on_the_right_is_padding_too(text, text_inputs):
    prompts = prompts_of(text_inputs)
    width = max(map(len, prompts))
    right = {
        "input_ids": torch.tensor([[*prompt, *[9] * (width - len(prompt))] for prompt in prompts]),
        "attention_mask": torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts]),
    }
    left = [completion.token_ids for completion in generate(*text, text_inputs, **settings())]
    assert [completion.token_ids for completion in generate(*text, right, **settings())] == left


# -- the base model ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_by_hand(model, ids, seed, max_tokens):
    """The base model's own completion: the whole sequence through it for every token, and one uniform number."""
    uniforms, written = Random(completion_seed(seed, "", 0)), []
    while len(written) < max_tokens and END not in written:
        logits = model(torch.tensor([[*ids, *written]])).logits[:, -1]
        number = torch.tensor([uniforms.random()], dtype=torch.float64)
        written.append(sample_tokens(logits, number, SamplingParams(top_k=15, top_p=0.999))[0].item())
    return written


def test_without_a_control_it_is_the_base_model(text, text_inputs):
    generator, lenvm = text
    expected = [sample_by_hand(generator, ids, 5 + row, 16) for row, ids in enumerate(prompts_of(text_inputs))]
    for with_lenvm in (None, lenvm):
        free = generate(generator, with_lenvm, text_inputs, **settings(control=None))
        assert [completion.token_ids for completion in free] == expected
    nothing = generate(*text, text_inputs, **settings(control=Tilt(0.0)))
    assert [completion.token_ids for completion in nothing] == expected
    mixed = generate(*text, text_inputs, **settings(control=[None, EqualTo(3), None, Tilt(9.0)]))
    assert [mixed[row].token_ids for row in (0, 2)] == [expected[row] for row in (0, 2)]
    assert mixed[1].token_ids != expected[1]


def test_the_likeliest_token_is_guided_too(text, text_inputs):
    greedy = generate(*text, text_inputs, **settings(control=None), temperature=0.0)
    short, long = (
        generate(*text, text_inputs, **settings(control=control, seed=seed), temperature=0.0)
        for control, seed in ((Tilt(-30), 0), (Tilt(30), 99))
    )
    assert greedy[0].token_ids[0] == generate(text[0], None, text_inputs, temperature=0.0)[0].token_ids[0]
    assert [c.token_ids for c in short] != [c.token_ids for c in long]
    again = generate(*text, text_inputs, **settings(control=Tilt(-30), seed=123), temperature=0.0)
    assert [c.token_ids for c in again] == [c.token_ids for c in short]


def test_rows_keep_their_own_settings(text, text_inputs):
    columns = {"temperature": [0.0, 0.7, 1.3, 1.0], "top_k": [3, 15, 0, 6], "min_p": [0.0, 0.05, 0.1, 0.0]}
    together = generate(*text, text_inputs, **settings(), **columns)
    for row, prompt in enumerate(prompts_of(text_inputs)):
        own = {name: values[row] for name, values in columns.items()}
        alone = generate(*text, [prompt], control=EqualTo(12), max_tokens=16, seed=5 + row, **own)
        assert alone[0].token_ids == together[row].token_ids


# -- the loop ---------------------------------------------------------------------------------------------------------


def test_stop_strings_and_limits(tiny_text):
    text = build("tiny-text"), value_model("tiny-text", torch.float32)  # hardly ever ends
    prompt = tiny_text("Once", add_special_tokens=False)["input_ids"]
    [free] = generate(*text, [prompt], control=Tilt(1.0), max_tokens=12)
    assert free.finish_reason == "length"
    assert len(free.token_ids) == 12
    word = tiny_text.decode(free.token_ids[:6])[-4:]
    [stopped] = generate(*text, [prompt], control=Tilt(1.0), max_tokens=12, stop=word, tokenizer=tiny_text)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert word in tiny_text.decode(stopped.token_ids)
    assert word not in tiny_text.decode(stopped.token_ids[:-1])


def test_streamed_tokens_are_the_completions(text, text_inputs):
    tokens = list(stream(*text, text_inputs, **settings()))
    written = {row: [token.token_id for token in tokens if token.prompt == row] for row in range(4)}
    for completion in generate(*text, text_inputs, **settings()):
        assert written[completion.prompt] == completion.token_ids
    assert all(token.remaining >= 0 for token in tokens)
    assert [token.finish_reason for token in tokens if token.finish_reason] != []
    assert all(token.remaining == 0 for token in tokens if token.token_id == END)


def test_requests_to_a_local_generator_are_guided(text, tiny_text):
    generator = LocalGenerator(text[0], tiny_text, "shape", lenvm=text[1])
    prompts = [Prompt(str(i), [{"role": "user", "content": f"Write {i}."}]) for i in range(3)]
    controls = [None, Tilt(-20), Tilt(20)]
    asked = [PromptRequest(prompt, (0, 1), control) for prompt, control in zip(prompts, controls, strict=True)]
    sampling = SamplingParams(max_tokens=20, top_k=15, seed=3)
    answers = {(a.prompt_id, a.number): a.result for a in generator.sample(asked, sampling)}
    plain = LocalGenerator(text[0], tiny_text, "shape")
    expected = {
        (a.prompt_id, a.number): a.result for a in plain.sample([PromptRequest(p, (0, 1)) for p in prompts], sampling)
    }
    assert all(isinstance(result, GeneratedText) for result in answers.values())
    same = {key for key in answers if answers[key].token_ids == expected[key].token_ids}
    assert {("0", 0), ("0", 1)} <= same
    assert len(same) < 6


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"control": EqualTo(12), "max_tokens": 8}, "max_tokens=8 contradict each other"),
        ({"control": Gated(AtLeast(99)), "max_tokens": 98}, "contradict each other"),
        ({"control": "short"}, "control 'short' of prompt 0 is none"),
        ({"control": [Tilt(1.0)]}, "control has 1 entries for 4 prompts"),
        ({"n": 0, "top_p": 0.0, "temperature": -1.0}, r"n must be at least 1.*temperature must.*top_p must"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"control": EqualTo(10**6)}, r"no prompt can be answered: control EqualTo.*pass the context window"),
        ({"stop": "x"}, "stop needs tokenizer"),
    ],
)
def test_arguments_are_checked_before_anything_runs(text, text_inputs, changes, words):
    with pytest.raises(GenerationError, match=words):
        generate(*text, text_inputs, **changes)


def test_controls_need_a_model_of_the_same_vocabulary(text, text_inputs):
    generator, lenvm = text
    with pytest.raises(GenerationError, match="control needs lenvm"):
        generate(generator, None, text_inputs, control=EqualTo(5))
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=9000, hidden_size=64, num_hidden_layers=1))
    with pytest.raises(GenerationError, match="different vocabularies"):
        generate(other, lenvm, text_inputs, control=EqualTo(5))


def test_pictures_for_a_model_that_reads_text(text, vision_inputs):
    with pytest.raises(GenerationError, match="inputs has images, but generator"):
        generate(*text, vision_inputs[0], control=EqualTo(5))


def test_a_bad_prompt_among_pictures_fails_alone(vision, vision_inputs):
    together, _ = vision_inputs
    expected = generate(*vision, together, control=EqualTo(4), max_tokens=4, seed=[1, 2, 3])
    for change, words in ((0, "the prompt is empty"), (9999, "the models know no token 9999")):
        rows = {name: torch.cat([value, value[:1]]) for name, value in together.items() if value.ndim == 2}
        rows["pixel_values"], rows["image_grid_thw"] = together["pixel_values"], together["image_grid_thw"]
        rows["input_ids"][3] = change  # the picture's tokens are gone too
        rows["mm_token_type_ids"][3] = 0
        rows["attention_mask"][3] = int(change > 0)
        completions = generate(*vision, rows, control=EqualTo(4), max_tokens=4, seed=[1, 2, 3, 4])
        assert words in completions[3].error
        assert [c.token_ids for c in completions[:3]] == [c.token_ids for c in expected]


def test_pictures_that_do_not_fit_are_named(vision, vision_inputs):
    together, _ = vision_inputs
    whole = dict(together)
    for pixels in (whole["pixel_values"][:-4], whole["pixel_values"][:, :100]):
        with pytest.raises(GenerationError, match="inputs: the models cannot take these images"):
            generate(*vision, {**whole, "pixel_values": pixels}, control=EqualTo(4))
    without = {name: whole[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with pytest.raises(GenerationError, match="inputs: the models cannot take these images"):
        generate(*vision, without, control=EqualTo(4))
    with pytest.raises(GenerationError, match="an image or video token of the model stands where there is no image"):
        generate(*vision, {name: whole[name] for name in ("input_ids", "attention_mask")}, control=EqualTo(4))


def test_a_bad_prompt_fails_alone(text, text_inputs):
    prompts = prompts_of(text_inputs)
    window = text[0].config.max_position_embeddings
    bad = [prompts[0], [], random_ids(window - 5), prompts[2]]
    completions = generate(*text, bad, **settings())
    assert [completion.finish_reason == "error" for completion in completions] == [False, True, True, False]
    assert completions[1].error == "inputs: the prompt is empty"
    assert "pass the context window" in completions[2].error
    for row in (0, 3):
        alone = generate(*text, [bad[row]], control=EqualTo(12), max_tokens=16, seed=5 + row)
        assert completions[row].token_ids == alone[0].token_ids
