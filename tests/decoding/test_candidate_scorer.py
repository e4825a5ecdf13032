"""Values of candidates are those of the whole sequence, recomputed."""

from weakref import WeakKeyDictionary

import pytest
import torch
from pairs import (
    largest_difference,
    prompts_of,
    value_model,
)
from tiny_generators import build

from lenvm_lightning.decoding import candidate_scorer, compatibility
from lenvm_lightning.decoding.generate import generate
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.guidance import EqualTo, Tilt
from lenvm_lightning.tree import tree_layout


def test_values_are_those_of_full_recomputation_text(text, text_inputs):
    completions = generate(*text, text_inputs, control=EqualTo(7), max_tokens=9, trace=True)
    assert sum(len(step.candidates) > 1 for completion in completions for step in completion.trace) > 20
    assert largest_difference(text[1], prompts_of(text_inputs), completions) < 1e-12


def test_values_are_those_of_full_recomputation_pictures(vision, vision_inputs):
    together, alone = vision_inputs
    completions = generate(*vision, together, control=EqualTo(6), max_tokens=6, trace=True)
    assert together["image_grid_thw"].unique(dim=0).shape[0] == 3
    assert largest_difference(vision[1], prompts_of(together), completions, alone) < 1e-12


def test_values_in_single_precision(text_inputs):
    generator, lenvm = build("tiny-text"), value_model("tiny-text", torch.float32)
    completions = generate(generator, lenvm, text_inputs, control=Tilt(-3), max_tokens=9, trace=True)
    assert largest_difference(lenvm, prompts_of(text_inputs), completions) < 1e-5


def test_causal_candidates_fail(text, text_inputs, monkeypatch):
    """A control that must fail: candidates that see each other."""
    generate(*text, text_inputs, max_tokens=1)  # the check of both models, while they are right
    monkeypatch.setattr(candidate_scorer, "_star", lambda count, device: tree_layout(range(-1, count)))
    completions = generate(*text, text_inputs, control=EqualTo(4), max_tokens=4, trace=True)
    assert largest_difference(text[1], prompts_of(text_inputs), completions) > 1e-3


def test_forgotten_rope_offsets_fail(vision, vision_inputs, monkeypatch):
    """A control that must fail: tokens after an image counted as if it were text."""
    whole = candidate_scorer.ModelRunner.prefill_inputs

    def forgetful(self, inputs):
        output, cache, offsets = whole(self, inputs)
        return output, cache, [0] * len(offsets)

    together, alone = vision_inputs
    generate(*vision, together, max_tokens=1)  # the check of both models, while they are right
    monkeypatch.setattr(candidate_scorer.ModelRunner, "prefill_inputs", forgetful)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(compatibility, "_found", WeakKeyDictionary())
        with pytest.raises(GenerationError, match="cannot be decoded in rows after images"):
            generate(*vision, together, control=EqualTo(3), max_tokens=3)
    completions = generate(*vision, together, control=EqualTo(3), max_tokens=3, trace=True)
    assert largest_difference(vision[1], prompts_of(together), completions, alone) > 1e-3
