"""Values of candidates are those of the whole sequence, recomputed."""

from dataclasses import dataclass
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
from lenvm_lightning.decoding.end_tokens import EndTokens
from lenvm_lightning.decoding.generate import generate
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.guidance import Ends, EqualTo, Tilt
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


def test_a_row_pays_for_its_own_candidates(text, text_inputs, monkeypatch):
    """Rows with few candidates beside rows with many: nothing is computed that nobody asks for, and nothing changes."""
    fed = []
    whole = candidate_scorer.ModelRunner.forward

    def forward(self, cache, ids, within=None, depth=None, present=None):
        fed.append((ids.numel(), ids.numel() if present is None else int(present.sum())))
        return whole(self, cache, ids, within, depth, present)

    monkeypatch.setattr(candidate_scorer.ModelRunner, "forward", forward)
    settings = {"control": Tilt(-3), "max_tokens": 12, "n": 4, "min_p": 0.02, "trace": True}
    found = generate(*text, text_inputs, **settings)
    assert sum(least for _, least in fed) < 0.7 * sum(most for most, _ in fed)
    assert largest_difference(text[1], prompts_of(text_inputs), found) < 1e-12
    fed.clear()
    monkeypatch.setattr(candidate_scorer.ModelRunner, "leaves_out", False)
    assert [one.token_ids for one in generate(*text, text_inputs, **settings)] == [one.token_ids for one in found]
    assert all(most == least for most, least in fed)


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


# -- the end ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Between:
    """Ends with one of the tokens from ``least`` to ``most``, and else leaves the base model alone."""

    least: int
    most: int

    def ends(self, generated):
        return Ends(generated + 1 < self.least, generated + 1 >= self.most)

    def __call__(self, probs, remaining, generated, gamma):
        must = (generated[:, None] + 1 >= self.most) & (remaining > 0)
        return probs.masked_fill(must, 0.0)


def test_an_end_comes_in_and_stays_out_as_the_control_says(text, text_inputs):
    completions = generate(*text, text_inputs, control=Between(5, 8), top_k=3, n=8, max_tokens=20, seed=3)
    lengths = {len(completion.token_ids) for completion in completions}
    assert lengths <= {5, 6, 7, 8}
    assert len(lengths) > 1
    assert {completion.finish_reason for completion in completions} == {"stop"}
    free = generate(*text, text_inputs, top_k=3, n=8, max_tokens=20, seed=3)
    assert {len(completion.token_ids) for completion in free} - {5, 6, 7, 8}


def test_rows_beside_it_end_as_they_would_alone(text, text_inputs):
    settings = {"top_k": 5, "max_tokens": 12, "seed": [1, 2, 3, 4]}
    mixed = generate(*text, text_inputs, control=[Between(3, 4), None, Tilt(-2), Between(6, 6)], **settings)
    alone = generate(*text, text_inputs, control=[None, None, Tilt(-2), None], **settings)
    assert [completion.token_ids for completion in mixed[1:3]] == [completion.token_ids for completion in alone[1:3]]
    assert [len(mixed[row].token_ids) for row in (0, 3)] in ([3, 6], [4, 6])


def test_an_end_that_is_brought_in_has_the_probability_of_the_model():
    """Three candidates and an end, of logits 2, 1, 0 and -1 at temperature 2; the end of another row is one already."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [2.0, 1.0, 0.0, 9.0]], dtype=torch.float64)
    ids = torch.tensor([[0, 1, 2], [3, 0, 1]])
    probs = (logits.gather(1, ids) / 2).softmax(-1)
    temperature, ends, due = torch.full((2, 1), 2.0), torch.tensor([3]), torch.tensor([True, True])
    found_ids, found, remaining = candidate_scorer._with_end(
        ids, probs, torch.ones(2, 3), logits, due, temperature, EndTokens(ends)
    )
    assert found_ids.tolist() == [[0, 1, 2, 3], [3, 0, 1, 3]]
    torch.testing.assert_close(found[0], (logits[0] / 2).softmax(-1))
    assert found[1].tolist() == [*probs[1].tolist(), 0.0]
    assert remaining[:, 3].tolist() == [0.0, 0.0]
    undue = candidate_scorer._with_end(ids, probs, torch.ones(2, 3), logits, ~due, temperature, EndTokens(ends))
    assert undue[1][:, 3].tolist() == [0.0, 0.0]


def test_an_end_is_no_candidate_while_it_is_early():
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    found = EndTokens(torch.tensor([0, 2])).left_in(logits, torch.tensor([True, False]), True)
    assert found.tolist() == [[-torch.inf, 1.0, -torch.inf], [2.0, 1.0, 0.0]]
