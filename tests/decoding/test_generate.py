"""Guided decoding: what the length value model says beside a cache is what it says without one, and rows keep apart."""

import importlib
import pkgutil
from random import Random

import pytest
import torch
from pairs import END, prompts_of, settings, value_model
from tiny_generators import build

import lenvm_lightning
from lenvm_lightning.decoding.generate import generate, stream
from lenvm_lightning.decoding.sampling import sample_tokens
from lenvm_lightning.decoding.sampling_params import SamplingParams, completion_seed
from lenvm_lightning.guidance import AtMost, EqualTo, Tilt

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
