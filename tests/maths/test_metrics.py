"""The errors in tokens against slow numpy references, from the sums of any split of the rows."""

import math

import numpy as np
import pytest
import torch
from length_rows import EXACT, GAMMA, PROMPTS, ROWS, least, make_batch, make_rows, reference

from lenvm_lightning.metrics import (
    POSITIONS,
    ErrorSums,
    boundary_errors,
    boundary_lengths,
    boundary_rows,
    error_sums,
    errors_by_position,
    tokens_at,
    weighted_median,
)


def added(parts):
    """The sums of several batches as those of one."""
    totals = [torch.stack(column).sum(dim=0) for column in list(zip(*parts, strict=True))[:4]]
    lists = [torch.cat(column) for column in list(zip(*parts, strict=True))[4:]]
    return ErrorSums(*totals, *lists)


def errors(rows, sizes, gamma=GAMMA, prompts=PROMPTS):
    """All errors of the rows in batches of these sizes, as plain numbers."""
    parts, boundary = [], torch.zeros(prompts, 4, dtype=torch.float64)
    for part in np.split(np.array(rows, dtype=object), np.cumsum(sizes)[:-1]):
        batch = make_batch(part)
        parts.append(error_sums(*batch))
        boundary.index_add_(0, torch.tensor([row[4] for row in part]), boundary_rows(*batch, gamma))
    known = boundary[(boundary[:, 0] > 0) & (boundary[:, 3] == 0)]
    found = errors_by_position(added(parts)) | boundary_errors(*boundary_lengths(known, gamma))
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [[ROWS], [7, 23], [1] * ROWS])
def test_equal_the_definitions(seed, sizes):
    rows = make_rows(seed)
    got = errors(rows, sizes)
    assert got == pytest.approx(reference(rows), **EXACT)
    assert len(got) == 4 * len(POSITIONS) + 2


def test_by_hand():
    rows = [(1, 1, [3.0, 0.0], False, 0), (2, 2, [2.0, 2.0, 1.0], False, 0), (4, 0, [1.0], False, 1)]
    got = errors(rows, [3], gamma=0.5, prompts=2)
    assert got["mae_tokens/all"] == pytest.approx((2 + 0 + 0 + 1 + 1 + 3) / 6, **EXACT)
    assert got["mae_tokens/start"] == pytest.approx((2 + 0 + 3) / 3, **EXACT)
    assert got["relative_error/start"] == pytest.approx((2 / 1 + 0 / 2 + 3 / 4) / 3, **EXACT)
    assert got["mae_tokens/50"] == pytest.approx((2 + 1) / 2, **EXACT)  # s_0 of 1 token, s_1 of 2; not kept of 4
    assert got["mae_tokens_constant/start"] == pytest.approx((1 + 0 + 2) / 3, **EXACT)  # 2 is the median
    # Prompt 0: mean of 1/2 and 3/4 is 5/8, L_GT = log2(8/3), predicted 2.5; prompt 1: L_GT = 4, predicted 1.
    first = math.log2(8 / 3)
    assert got["mre"] == pytest.approx(((2.5 - first) / first + 3 / 4) / 2, **EXACT)


def test_nothing_known_gives_no_numbers():
    rows = [(length, kept, prediction, True, prompt) for length, kept, prediction, _, prompt in make_rows()]
    assert errors(rows, [ROWS]) == {}


def test_weighted_median_minimises_the_weighted_distance():
    random = np.random.default_rng(0)
    for _ in range(50):
        x, weight = random.integers(0, 9, 7).astype(float), random.uniform(0.1, 3, 7)
        got = weighted_median(torch.tensor(x), torch.tensor(weight)).item()
        best = least(lambda c, x=x, w=weight: (w * np.abs(x - c)).sum(), x)
        assert (weight * np.abs(x - got)).sum() == pytest.approx(best, rel=1e-12)  # double precision


def test_tokens_at_a_share_are_rounded_down():
    assert tokens_at(torch.tensor([1, 3, 4, 7, 1001]), 0.75).tolist() == [0, 2, 3, 5, 750]
