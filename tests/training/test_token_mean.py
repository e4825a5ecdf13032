"""The gradient is that of the token mean over the whole optimizer step, however the step is split."""

import pytest
import torch
from gradients import ROWS, TOLERANCE, gradient, relative


@pytest.fixture(scope="module")
def whole(text_rollouts):
    return gradient(text_rollouts, [list(range(ROWS))])[0]


@pytest.mark.parametrize(
    "batches", [[[i] for i in range(ROWS)], [[0], [1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11]]], ids=["single", "uneven"]
)
def test_accumulation_equals_one_batch(text_rollouts, whole, batches):
    (split,) = gradient(text_rollouts, batches, accumulate=len(batches))
    assert relative(split, whole) < TOLERANCE


def test_short_last_window(text_rollouts):
    """Five batches in windows of three: the second step has two, and is still the mean over its own tokens."""
    batches = [[0, 1], [2], [3, 4, 5], [6], [7, 8, 9]]
    first, last = gradient(text_rollouts, batches, accumulate=3)
    assert relative(first, gradient(text_rollouts, [[0, 1, 2, 3, 4, 5]])[0]) < TOLERANCE
    assert relative(last, gradient(text_rollouts, [[6, 7, 8, 9]])[0]) < TOLERANCE


def test_mean_of_micro_batch_means_is_something_else(text_rollouts, whole):
    """Negative control: what automatic optimization alone would do."""
    batches = [[0], [1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11]]
    naive = torch.stack([gradient(text_rollouts, [batch])[0] for batch in batches]).mean(dim=0)
    assert relative(naive, whole) > 0.01


def test_clipping_sees_the_mean(text_rollouts, whole):
    (clipped,) = gradient(text_rollouts, [[i] for i in range(ROWS)], accumulate=ROWS, clip=float(whole.norm()) / 2)
    assert float(clipped.norm()) == pytest.approx(
        float(whole.norm()) / 2, rel=1e-4
    )  # torch adds 1e-6 to a norm of 0.025


def test_lambda_returns_and_censoring_split_alike(text_rollouts):
    options = {"lam": 0.5, "censored": "one_sided"}
    one = gradient(text_rollouts, [list(range(ROWS))], model_options=options)[0]
    many = gradient(text_rollouts, [[i] for i in range(ROWS)], accumulate=ROWS, model_options=options)[0]
    assert relative(many, one) < TOLERANCE


def test_completions_count_alike_in_batches_of_few_and_of_many(text_rollouts, whole):
    """Steps of one batch each: their mean is the gradient of all completions in one batch, none counts more."""
    alike = {"weight": "completion"}
    batches = [[0], [1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11]]
    one = gradient(text_rollouts, [list(range(ROWS))], model_options=alike)[0]
    steps = gradient(text_rollouts, batches, model_options=alike)
    (accumulated,) = gradient(text_rollouts, batches, model_options=alike, accumulate=len(batches))
    assert relative(torch.stack(steps).mean(dim=0), one) < TOLERANCE
    assert relative(accumulated, one) < TOLERANCE
    assert relative(whole, one) > 0.01  # negative control: what counts every token alike is something else
