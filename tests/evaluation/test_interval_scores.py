"""Scores of predicted distributions: by hand, within the limit, and by slice; and predictors that are easy to have."""

import math

import numpy as np
import pytest
import torch

from lenvm_lightning.distributions.length_distribution import LengthDistribution, lognormal
from lenvm_lightning.errors import DataError
from lenvm_lightning.evaluation.interval_scores import COVERAGES, IntervalScores
from lenvm_lightning.evaluation.interval_tables import interval_tables, plot_intervals
from lenvm_lightning.evaluation.plots import as_png
from lenvm_lightning.evaluation.simple_distributions import ConstantDistribution, QuantileRegression
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.rollouts.generators.interface import Prompt

LIMIT = 100


def certain(length: float):
    """Predicts that a completion has `length` tokens, and is sure of it."""

    def predict(written):
        top = (length - written).double().clamp(min=0.01)
        curve = torch.stack([top - 1e-6, top], 1)
        found = LengthDistribution(curve, torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(curve), 1.0)
        return found, found.quantiles

    return predict


def test_errors_and_coverage_by_hand():
    scores = IntervalScores()
    scores.add("a", "math", 40, False, LIMIT, certain(45))  # places 0 and 16, 5 too long
    scores.add("b", "code", 100, True, LIMIT, certain(300))  # 0, 16, 64, cut at the limit: right
    scores.add("c", "math", 12, False, LIMIT, certain(12))
    report = scores.compute()
    assert {at: place.states for at, place in report.written.items()} == {0: 3, 16: 2, 64: 1}
    assert report.written[0].crps_tokens == pytest.approx(5 / 3, abs=0.01)
    assert report.written[16].crps_tokens == pytest.approx(5 / 2, abs=0.01)
    assert report.written[64].crps_tokens == pytest.approx(0.0, abs=0.01)
    assert report.written[0].coverage[0.9].value == pytest.approx(1 / 3)  # b, whose interval is cut; c is just missed
    assert report.written[0].pinball_tokens == pytest.approx(0.1 * 5 / 3, abs=0.01)
    assert report.written[0].concordance == 1.0
    assert set(report.slices) == {"math", "code", "predicted short", "predicted long"}
    assert report.slices["code"].crps_tokens == pytest.approx(0.0, abs=0.01)
    assert report.slices["math"].states == 3


def test_the_truth_is_covered_as_often_as_it_says_and_the_histogram_is_even():
    generator = torch.Generator().manual_seed(0)
    scores, too_sure = IntervalScores(), IntervalScores()
    for number in range(800):
        median = float(torch.randint(20, 200, (), generator=generator))
        length = median * math.exp(0.5 * float(torch.randn((), generator=generator)))
        seen = max(1, min(round(length), 250))

        def predict(written, median=median, sigma=0.5):
            # What is left of a log-normal length when some of it is written: only the start is used here.
            found = lognormal(torch.full((len(written),), median, dtype=torch.float64), sigma)
            return found, found.quantiles

        scores.add(str(number), "all", seen, length > 250, 250, lambda w, p=predict: p(w))
        too_sure.add(str(number), "all", seen, length > 250, 250, lambda w, p=predict: p(w, sigma=0.2))
    start = scores.compute().written[0]
    for share in COVERAGES:
        assert start.coverage[share].value == pytest.approx(share, abs=0.05)
        assert start.coverage[share].stderr == pytest.approx(math.sqrt(share * (1 - share) / 800), rel=0.3)
    sure = too_sure.compute()
    assert sure.written[0].coverage[0.9].value < 0.6
    assert sure.written[0].crps_tokens > start.crps_tokens
    assert sure.written[0].width_tokens[0.9] < start.width_tokens[0.9]


def test_tables_and_figure():
    scores = IntervalScores()
    for number in range(6):
        scores.add(str(number), "math" if number % 2 else "code", 20 + number, False, LIMIT, certain(22))
    report = scores.compute()
    by_written, slices = interval_tables({"LenVM": report, "constant": report})
    assert [row.label["written"] for row in by_written.rows] == ["0", "0", "16", "16", "all of these", "all of these"]
    assert [row.label["slice"] for row in slices.rows][:2] == ["code", "math"]
    for table in (by_written, slices):
        for row in table.rows:
            assert set(row.measures) <= {column.name for column in table.columns}
    assert sum(report.pit) == pytest.approx(1.0)
    assert as_png(plot_intervals(report, "tiny world")).startswith(b"\x89PNG")


def completions(count: int):
    """Answers to long questions are four times as long."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        words, scale = (4, 30) if number % 2 else (60, 120)
        prompt = Prompt(str(number), [{"role": "user", "content": "one " * words}])
        rows.append((prompt, [5] * int(scale * np.exp(0.2 * random.standard_normal()))))
    return rows


def test_easy_predictors_know_what_they_may():
    known = completions(200)
    constant = ConstantDistribution(known)
    start = constant.predict(torch.tensor([0, 64, 10_000]))
    assert float(start.quantile(0.25)[0]) == pytest.approx(30, rel=0.2)
    assert float(start.quantile(0.75)[0]) == pytest.approx(120, rel=0.2)
    assert float(start.median()[1]) == pytest.approx(120 - 64, rel=0.2)  # only the long ones get there
    assert float(start.median()[2]) == 1.0
    regression = QuantileRegression(load_processor("tiny-text"), known)
    short, long = (regression.predict(prompt, torch.tensor([0])) for prompt, _ in (known[1], known[0]))
    assert float(short.median()[0]) == pytest.approx(30, rel=0.15)
    assert float(long.median()[0]) == pytest.approx(120, rel=0.15)
    assert float(long.quantile(0.9)[0] / long.median()[0]) == pytest.approx(math.exp(0.2 * 1.28), rel=0.15)
    with pytest.raises(DataError, match="5 completions are too few"):
        ConstantDistribution(known[:5])
