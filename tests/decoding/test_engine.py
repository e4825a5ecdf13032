"""The decode loop: one forward of each model a step, rows that are freed and filled."""

import math

import torch
from pairs import (
    prompts_of,
    settings,
    value_model,
)
from tiny_generators import build

from lenvm_lightning.decoding.generate import generate
from lenvm_lightning.guidance import EqualTo, Tilt


class Calls:
    """Counts the forwards of a model, and the new tokens of each."""

    def __init__(self, model):
        self.shapes = []
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))


def in_use():
    """Models in single precision that have been checked in rows, as each is once."""
    models = build("tiny-text"), value_model("tiny-text", torch.float32)
    generate(*models, [[5]], control=Tilt(-1), max_tokens=1)
    return models


def test_one_forward_of_each_model_a_step(text_inputs):
    generator, lenvm = in_use()
    base, values = Calls(generator), Calls(lenvm.backbone)
    prompt = prompts_of(text_inputs)[1]
    [completion] = generate(generator, lenvm, [prompt], control=EqualTo(12), max_tokens=12, trace=True)
    steps = [shape for shape in values.shapes if shape[1] <= 16]
    assert len(values.shapes) - len(steps) == 1  # the prefill
    assert len(base.shapes) == len(steps) == len(completion.token_ids)
    assert [shape[1] - 1 for shape in steps] == [len(step.candidates) for step in completion.trace]


def test_small_models_write_with_one_thread(text_inputs, monkeypatch):
    generator, lenvm = build("tiny-text"), value_model("tiny-text", torch.float32)
    seen = []
    generator.register_forward_pre_hook(lambda module, args: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        generate(generator, lenvm, text_inputs, control=EqualTo(3), max_tokens=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert set(seen[-3:]) == {1}  # those before are of the compatibility check


def test_n_completions_share_a_prefill(text_inputs):
    generator, lenvm = in_use()
    values = Calls(lenvm.backbone)
    completions = generate(generator, lenvm, [prompts_of(text_inputs)[1]], control=Tilt(-1), n=6, max_tokens=9)
    assert [shape[0] for shape in values.shapes if shape[1] > 16] == [1]
    assert len({tuple(completion.token_ids) for completion in completions}) > 3


def test_a_single_candidate_is_not_scored(text_inputs):
    generator, lenvm = in_use()
    values = Calls(lenvm.backbone)
    generate(generator, lenvm, [prompts_of(text_inputs)[0]], control=EqualTo(5), top_k=1, max_tokens=5)
    assert [shape[1] for shape in values.shapes if shape[1] <= 16] == [1] * 5


def test_finished_rows_leave(text_inputs):
    generator, lenvm = in_use()
    base = Calls(generator)
    limits = [2, 2, 2, 20]
    generate(generator, lenvm, text_inputs, control=Tilt(-1), max_tokens=limits)
    steps = [shape for shape in base.shapes if shape[1] == 1]
    assert [shape[0] for shape in steps[:2]] == [4, 4]
    assert steps[-1][0] == 1


def test_logits_that_are_not_numbers_fail_alone(text_inputs):
    generator, lenvm = build("tiny-text"), value_model("tiny-text", torch.float32)
    prompts = prompts_of(text_inputs)
    expected = generate(generator, lenvm, prompts, **settings())
    poison = 1999
    assert not any(poison in prompt for prompt in prompts)
    generator.get_input_embeddings().weight.data[poison] = math.nan
    completions = generate(generator, lenvm, [*prompts, [5, poison]], **settings(seed=[5, 6, 7, 8, 9]))
    assert completions[4].finish_reason == "error"
    assert "NaN" in completions[4].error
    for ours, before in zip(completions[:4], expected, strict=True):
        assert ours.token_ids[:6] == before.token_ids[:6]
