"""Errors of predicted lengths: by hand, and the same numbers as validation's."""

import math

import numpy as np
import pytest
import torch

from lenvm_lightning.errors import DataError
from lenvm_lightning.evaluation.length_errors import LengthPredictions, plot_prediction
from lenvm_lightning.evaluation.plots import as_png
from lenvm_lightning.evaluation.statistics import ranks, ratio_and_error, spearman
from lenvm_lightning.metrics import POSITIONS
from lenvm_lightning.training.metrics import LengthErrors, PromptBoundaryMRE

GAMMA = 0.5


def report_of(rows, gamma=GAMMA, limit=60):
    found = LengthPredictions(gamma)
    for prompt_id, predicted, truncated in rows:
        found.add(prompt_id, torch.tensor(predicted), truncated, limit)
    return found.compute()


def at_start(prompt_id, length, predicted, truncated=False):
    """A completion that is predicted right everywhere but at s_0."""
    return prompt_id, [float(predicted), *range(length - 1, -1, -1)], truncated


# mean(1 - 0.5 ** L): a: (1/2 + 7/8) / 2 = 11/16, so L_GT = log2(16/5) = 1.678…; b: L = 2 twice; c has a truncated one.
ROWS = [
    at_start("a", 1, 2.0),
    at_start("b", 2, 3.0),
    at_start("c", 2, 9.0),
    at_start("a", 3, 2.0),
    at_start("c", 3, 9.0, truncated=True),
    at_start("b", 2, 3.0),
]
A = math.log2(16 / 5)


def test_prompt_boundary_by_hand():
    report = report_of(ROWS)
    assert (report.prompts, report.prompts_left_out, report.completions, report.completions_truncated) == (2, 1, 6, 1)
    assert [(p.prompt_id, p.completions) for p in report.by_prompt] == [("a", 2), ("b", 2)]
    assert [p.expected_tokens for p in report.by_prompt] == pytest.approx([A, 2.0], rel=1e-12)
    assert [p.predicted_tokens for p in report.by_prompt] == [2.0, 3.0]
    errors = [(2 - A) / A, 1 / 2]
    assert report.mre == pytest.approx(sum(errors) / 2, rel=1e-12)
    assert report.mre_stderr == pytest.approx(abs(errors[0] - errors[1]) / 2, rel=1e-12)  # sqrt(2) / sqrt(2)
    # Of two prompts the shorter counts more: its length is the best constant, which errs at the other alone.
    assert report.constant_tokens == pytest.approx(A, rel=1e-12)
    assert report.mre_constant == pytest.approx((2 - A) / 2 / 2, rel=1e-12)
    assert report.bias_tokens == pytest.approx((2 - A + 1) / 2, rel=1e-12)
    assert report.spearman == pytest.approx(1.0)
    # a: survivals 1/2 and 1/8: mean 5/16, standard deviation sqrt(2) * 3/16, of the mean 3/16; b has none.
    assert report.mre_of_sampling == pytest.approx(math.sqrt(2 / math.pi) * (3 / 5) / math.log(2) / A / 2, rel=1e-12)


def test_positions_by_hand():
    report = report_of(ROWS)
    # Errors at s_0 of the five completions that ended: |2-1|, |3-2|, |9-2|, |2-3|, |3-2|.
    start = report.positions["start"]
    assert start.mae_tokens == pytest.approx(11 / 5)
    assert start.mae_tokens_constant == pytest.approx(2 / 5)  # lengths 1, 2, 2, 3, 2: median 2
    # By prompt 2, 2 and 7 in sum, of 2, 2 and 1: s - m n = -2.4, -2.4, 4.8.
    assert start.mae_tokens_stderr == pytest.approx(math.sqrt(3 / 2 * (2 * 2.4**2 + 4.8**2)) / 5)
    # Half of two or three tokens is one, at s_1, where it was right; half of one token is none: s_0 again.
    assert report.positions["50"].mae_tokens == pytest.approx(1 / 5)
    assert report.positions["all"].mae_tokens == pytest.approx(11 / 15)


def test_within_the_limit_by_hand():
    # At most 4 tokens: what was predicted beyond them counts as the limit, and truncated completions have a length.
    rows = [at_start("a", 1, 9.0), at_start("b", 2, 3.0), at_start("c", 4, 9.0, truncated=True)]
    start = report_of(rows, limit=4).written[0]
    assert start.completions == 3
    assert start.mae_tokens == pytest.approx((3 + 1 + 0) / 3)  # 4 for 1, 3 for 2, 4 for 4
    assert start.mae_tokens_constant == pytest.approx((1 + 0 + 2) / 3)  # of 1, 2, 4: 2
    assert start.spearman == pytest.approx(0.0)  # ranks 2.5, 1, 2.5 of 1, 2, 3
    # A completion that was truncated sooner, where the context was full, could not have had more than it has.
    early = report_of([at_start("a", 2, 1.0), at_start("c", 3, 9.0, truncated=True)], limit=60).written[0]
    assert early.mae_tokens == pytest.approx(1 / 2)
    # The known length of the others is not touched by it.
    assert report_of(rows, limit=4).positions["start"].mae_tokens == pytest.approx((8 + 1) / 2)


def test_later_states_count_what_is_left_of_the_limit():
    predicted = [50.0] * 21  # 20 tokens, 50 expected throughout
    report = report_of([("a", predicted, False), ("b", [10.0] * 31, True)], limit=40)
    assert report.written[16].mae_tokens == pytest.approx((abs(24 - 4) + abs(10 - 14)) / 2)
    assert report.written[16].completions == 2
    assert 64 not in report.written


def test_validation_prints_the_same_numbers():
    random = np.random.default_rng(0)
    rows = []
    for i in range(40):
        length = int(random.integers(1, 60))
        rows.append((f"p{i % 9}", random.uniform(0, 80, length + 1).astype(np.float32), i % 9 == 4 and i > 20))
    report = report_of(rows, 0.97)
    errors, boundary = LengthErrors(), PromptBoundaryMRE(9, 0.97)
    width = max(len(predicted) for _, predicted, _ in rows)
    predicted, remaining = torch.zeros(40, width), torch.zeros(40, width, dtype=torch.int64)
    mask = torch.zeros(40, width, dtype=torch.bool)
    for i, (_, row, _) in enumerate(rows):
        predicted[i, : len(row)] = torch.from_numpy(row)
        remaining[i, : len(row)] = torch.arange(len(row) - 1, -1, -1)
        mask[i, : len(row)] = True
    truncated = torch.tensor([truncated for *_, truncated in rows])
    errors.update(predicted, remaining, mask, truncated)
    boundary.update(predicted, remaining, mask, truncated, torch.tensor([i % 9 for i in range(40)]))
    wanted = {name: float(x) for name, x in (errors.compute() | boundary.compute()).items()}
    assert report.mre == pytest.approx(wanted["mre"], rel=1e-12)
    assert report.mre_constant == pytest.approx(wanted["mre_constant"], rel=1e-12)
    for name in POSITIONS:
        found = report.positions[name]
        assert found.mae_tokens == pytest.approx(wanted[f"mae_tokens/{name}"], rel=1e-12)
        assert found.mae_tokens_constant == pytest.approx(wanted[f"mae_tokens_constant/{name}"], rel=1e-12)
    assert report.prompts_left_out == 1


def test_a_perfect_predictor_scores_about_what_sampling_alone_costs():
    random, gamma, prompts = np.random.default_rng(1), 0.99, 200
    found = LengthPredictions(gamma)
    for i in range(prompts):
        end = random.uniform(0.01, 0.05)  # a geometric length: E[gamma ** L] = p gamma / (1 - (1 - p) gamma)
        expected = math.log(end * gamma / (1 - (1 - end) * gamma)) / math.log(gamma)
        for length in random.geometric(end, 16):
            found.add(str(i), torch.full((int(length) + 1,), expected, dtype=torch.float64), False, 9999)
    report = found.compute()
    assert report.mre == pytest.approx(report.mre_of_sampling, rel=0.15)  # 0.187 and 0.174: to first order only
    assert abs(report.bias_tokens) < 4 * report.bias_tokens_stderr


def test_every_prompt_has_a_truncated_completion():
    report = report_of([at_start("a", 3, 2.0, truncated=True)])
    assert (report.mre, report.mre_constant, report.bias_tokens, report.spearman) == (None,) * 4
    assert report.positions == {}
    assert (report.prompts, report.prompts_left_out, report.completions_truncated) == (0, 1, 1)
    assert report.written[0].mae_tokens == pytest.approx(1.0)  # 2 for the 3 that there were
    assert as_png(plot_prediction(report)).startswith(b"\x89PNG")
    half = report_of([at_start("a", 3, 2.0, truncated=True), at_start("a", 2, 2.0)])
    assert half.mre is None
    assert half.positions["start"].mae_tokens == 0.0


def test_nothing_to_count():
    with pytest.raises(DataError, match="there are no completions"):
        report_of([])
    with pytest.raises(ValueError, match="no tokens"):
        report_of([("a", [1.0], False)])


def test_one_prompt_has_no_standard_error():
    report = report_of([at_start("a", 3, 2.0)])
    assert (report.mre_stderr, report.bias_tokens_stderr, report.spearman, report.mre_of_sampling) == (None,) * 4


def test_statistics_by_hand():
    assert ranks([5, 1, 5, 9]).tolist() == [2.5, 1.0, 2.5, 4.0]
    assert spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman([1, 2], [3, 3]) is None
    assert ratio_and_error([1.0, 2.0, 6.0], [1, 1, 1]) == (3.0, pytest.approx(math.sqrt(7 / 3)))
    # Groups of one size: the error of the mean of their means.
    assert ratio_and_error([2.0, 4.0, 12.0], [2, 2, 2]) == (3.0, pytest.approx(math.sqrt(7 / 3)))


def test_plot(tmp_path):
    assert as_png(plot_prediction(report_of(ROWS), "tiny world")).startswith(b"\x89PNG")
