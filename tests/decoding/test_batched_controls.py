"""Every row of a batch has a control of its own."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from candidates_of_rows import GAMMA, random_candidates
from torch import nn

from lenvm_lightning.decoding.batched_controls import per_row
from lenvm_lightning.guidance import AtLeast, AtMost, EqualTo, Gated, Scale, Tilt


def test_every_row_has_its_own_control():
    controls = [
        Tilt(-4),
        None,
        EqualTo(30),
        EqualTo(90),
        EqualTo(50, mode="hard"),
        Tilt(2.5),
        Gated(Tilt(-3), min_entropy=0.2),
        AtMost(9, mode="hard"),
        AtMost(33),
        AtLeast(20, high=math.inf),
        AtLeast(90),
        Gated(EqualTo(12, mode="soft")),
        Scale(0.5),
    ]
    probs, remaining = random_candidates(len(controls))
    generated = torch.arange(len(controls))
    together = per_row(controls)(probs, remaining, generated, GAMMA)
    for row, control in enumerate(controls):
        one = (probs[row : row + 1], remaining[row : row + 1], generated[row : row + 1])
        alone = one[0] if control is None else control(*one, GAMMA)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=0)
    assert torch.equal(together[1], probs[1])


class Mine:
    """A control of somebody who has never heard of tensors of numbers."""

    def __init__(self, beta):
        self.beta = beta

    def __call__(self, probs, remaining, generated, gamma):
        return (probs.log() + (self.beta if self.beta > 0 else -0.1) * remaining).softmax(-1)


@dataclass(frozen=True)
class MineToo(Mine):
    beta: float


class Doubled(nn.Module):
    def forward(self, probs, remaining, generated, gamma):
        return 2 * probs


@pytest.mark.parametrize(
    "pair",
    [
        (Mine(0.2), Mine(-0.2)),
        (MineToo(0.2), MineToo(-0.2)),
        (lambda p, r, t, g: p, lambda p, r, t, g: p.flip(-1)),
        (Doubled(), None),
        (Gated(MineToo(0.2)), Gated(MineToo(-0.2))),
        (Tilt(np.float32(-5)), Tilt(np.float32(5))),
        (EqualTo(torch.tensor(3)), EqualTo(torch.tensor(90))),
        (EqualTo(np.int64(3)), EqualTo(90, strength=7)),
        (Tilt(1), Tilt(-2.5)),
    ],
)
def test_rows_keep_apart_whatever_their_controls_are(pair):
    probs, remaining = random_candidates(2)
    together = per_row(pair)(probs, remaining, torch.zeros(2), GAMMA)
    for row, control in enumerate(pair):
        one = (probs[row : row + 1], remaining[row : row + 1], torch.zeros(1))
        alone = one[0] if control is None else control(*one, GAMMA)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-6, rtol=0)
