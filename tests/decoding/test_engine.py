"""The decode loop: one forward of each model a step, rows that are freed and filled."""

import dataclasses
import math

import pytest
import torch
from pairs import prompts_of, settings, value_model
from tiny_generators import build

from lenvm_lightning.decoding.engine import Engine
from lenvm_lightning.decoding.generate import generate
from lenvm_lightning.decoding.prefill import Request
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.guidance import EqualTo, Tilt


class Calls:
    """Counts the forwards of a model, and the new tokens of each."""

    def __init__(self, model):
        self.shapes = []
        self.prefills = []
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        shape = tuple(kwargs["input_ids"].shape)
        self.shapes.append(shape)
        if kwargs.get("attention_mask") is None:  # a step has one over the cache
            self.prefills.append(shape)


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
    offered = [len(step.candidates) for step in completion.trace]
    assert [shape[1] - 1 for shape in steps] == [*offered[:-1], offered[-1] - 1]  # the end that is due needs no value


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
    assert [shape[0] for shape in values.prefills] == [1]
    assert len({tuple(completion.token_ids) for completion in completions}) > 3


def test_a_single_candidate_is_not_scored(text_inputs):
    generator, lenvm = in_use()
    values = Calls(lenvm.backbone)
    generate(generator, lenvm, [prompts_of(text_inputs)[0]], control=EqualTo(5), top_k=1, max_tokens=5)
    # With the fifth token the end is due: the model's own token is no longer the only candidate.
    assert [shape[1] for shape in values.shapes if shape[1] <= 16] == [1, 1, 1, 1, 2]


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
    completions = generate(generator, lenvm, [*prompts, [5, poison]], **settings(seed=[5, 6, 7, 8, 9]), trace=True)
    assert completions[4].finish_reason == "error"
    assert "NaN" in completions[4].error
    for one in completions:  # what failed is no token, and has no trace
        assert [step.token_id for step in one.trace or []] == one.token_ids
    for ours, before in zip(completions[:4], expected, strict=True):
        assert ours.token_ids[:6] == before.token_ids[:6]


def requests_of(count, **params):
    return [Request(key, [5 + key, 6, 7], [key], SamplingParams(**{"max_tokens": 5, **params})) for key in range(count)]


def test_an_abandoned_run_leaves_nothing_behind(text):
    engine = Engine(*text)
    first = engine.steps(requests_of(3))
    next(first)
    first.close()
    again = requests_of(2)
    assert {id(one.request) for one in engine.run(again)} == set(map(id, again))


def test_a_limit_may_fall_while_completions_are_written(text):
    """It truncates those beyond it at their next token; those of other requests are written to their own."""
    generator = build("tiny-text", eos_bias=-100.0)
    limit = [9]
    free = Request(0, [5, 6, 7], [0], SamplingParams(max_tokens=8))
    limited = Request(1, [6, 6, 7], [1, 2], SamplingParams(max_tokens=8), limit=lambda: limit[0])
    lengths = {}
    for step, written in enumerate(Engine(generator).steps([free, limited]), 1):
        for completion in written:
            if completion.finish_reason:
                assert completion.finish_reason == "length"
                lengths[completion.request.key, completion.index] = len(completion.token_ids)
        if step == 4:
            limit[0] = 3
    assert lengths == {(0, 0): 8, (1, 0): 5, (1, 1): 5}
    begun = [Request(2, [5], [3], SamplingParams(max_tokens=8), limit=lambda: 3)]
    [completion] = Engine(generator).run(begun)
    assert (len(completion.token_ids), completion.finish_reason) == (3, "length")


def test_what_is_no_request_is_passed_on_even_none(text):
    [request] = requests_of(1)
    seen = list(Engine(*text).run([None, "a", request, None]))
    assert [item for item in seen if item is None or item == "a"] == [None, "a", None]
    assert sum(getattr(item, "request", None) is request for item in seen) == 1


@pytest.mark.parametrize(("top_k", "tried"), [(0, 64), (500, 64), (15, 15)])
def test_rows_have_room_for_the_candidates_that_are_scored(text, top_k, tried, monkeypatch):
    engine = Engine(*text)
    layouts = {"generator": [], "scorer": []}
    for name, cache in (("generator", engine._cache), ("scorer", engine._scorer.cache)):
        lay_out = cache.lay_out
        monkeypatch.setattr(
            cache,
            "lay_out",
            lambda order, widths, of=layouts[name], real=lay_out: of.append(list(widths)) or real(order, widths),
        )
    requests = requests_of(2, top_k=top_k, max_tokens=40)
    list(engine.run([dataclasses.replace(one, control=Tilt(-1.0)) for one in requests]))
    together = layouts["generator"][-1], layouts["scorer"][-1]
    assert [scorer - own for own, scorer in zip(*together, strict=True)] == [tried + 1] * len(together[0])
