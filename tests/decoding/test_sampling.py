"""Truncation is that of transformers, and tokens come as often as they are likely."""

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lenvm_lightning.decoding.sampling import RowParams, candidates, invert, sample_candidates, sample_tokens, truncate
from lenvm_lightning.decoding.sampling_params import SamplingParams


def random_logits(rows, size, dtype=torch.float64, seed=0):
    return torch.randn(rows, size, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("size", [100, 2048])
@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_k": 5000}, [TopKLogitsWarper(5000)]),
        ({"top_p": 0.9}, [TopPLogitsWarper(0.9)]),
        ({"top_p": 0.001}, [TopPLogitsWarper(0.001)]),
        ({"top_p": 0.9999}, [TopPLogitsWarper(0.9999)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        ({"top_k": 40, "top_p": 0.8}, [TopKLogitsWarper(40), TopPLogitsWarper(0.8)]),
        (
            {"top_k": 60, "top_p": 0.95, "min_p": 0.02},
            [TopKLogitsWarper(60), TopPLogitsWarper(0.95), MinPLogitsWarper(0.02)],
        ),
    ],
)
def test_truncation_is_that_of_transformers(settings, warpers, size):
    logits = random_logits(40, size)
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    assert torch.equal(truncate(logits, SamplingParams(**settings)), expected)


def test_everything_is_kept_by_default():
    logits = random_logits(3, 50)
    assert truncate(logits, SamplingParams()) is logits


def test_invert_by_hand():
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert invert(weights, uniforms).tolist() == [1, 1, 3, 3, 4, 4]


def test_invert_never_samples_what_cannot_be():
    """Most tokens have weight 0, in whole buckets too, and uniforms stand at the borders of shares."""
    weights = torch.zeros(1, 1000)
    weights[0, [63, 64, 640, 999]] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    uniforms = torch.tensor([0.0, 0.1, 0.3, 0.6, 1 - 2**-53], dtype=torch.float64)
    borders = torch.cat([uniforms, uniforms.nextafter(torch.zeros(())), uniforms.nextafter(torch.ones(()))]).clamp(
        0, 1 - 2**-53
    )
    sampled = invert(weights.expand(len(borders), -1), borders)
    assert set(sampled.tolist()) <= {63, 64, 640, 999}


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"temperature": 1.7, "top_k": 9}, {"top_p": 0.6}])
def test_shares_are_the_probabilities(settings):
    """Uniforms on a fine grid hit every token exactly as often as its probability says, to one in the grid."""
    logits, count = random_logits(1, 300), 20_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ids, logprob = sample_tokens(logits.expand(count, -1), uniforms, SamplingParams(**settings))
    warped = logits / settings.get("temperature", 1.0)
    kept = truncate(warped, SamplingParams(**settings))
    shares = torch.bincount(ids, minlength=300) / count
    assert (shares - kept.softmax(-1)[0]).abs().max() <= 1.01 / count
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[0, ids], rtol=0, atol=1e-12)


def test_greedy_and_forbidden():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    uniforms = torch.tensor([0.5], dtype=torch.float64)
    first = logits.log_softmax(-1)
    ids, logprob = sample_tokens(logits, uniforms, SamplingParams(temperature=0))
    assert ids.tolist() == [1]
    assert logprob.item() == pytest.approx(first[0, 1].item())
    ids, logprob = sample_tokens(logits, uniforms, SamplingParams(temperature=0), torch.tensor([1, 2]))
    assert ids.tolist() == [3]
    assert logprob.item() == pytest.approx(first[0, 3].item())  # what the model said, not what was left
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    ids, _ = sample_tokens(logits.expand(1000, -1), grid, SamplingParams(), torch.tensor([2]))
    assert set(ids.tolist()) == {0, 1, 3}
    assert logits.tolist() == [[1.0, 3.0, 3.0, 2.0]]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"temperature": 2.0}, {"top_p": 0.9}, {"top_k": 3}])
def test_broken_logits_are_told_and_stay_alone(settings):
    logits = random_logits(5, 200, torch.float32)
    fine = sample_tokens(logits.clone(), torch.full((5,), 0.4, dtype=torch.float64), SamplingParams(**settings))
    logits[1, 7] = torch.nan
    logits[2, 7] = torch.inf
    logits[3] = -torch.inf
    ids, logprob = sample_tokens(logits, torch.full((5,), 0.4, dtype=torch.float64), SamplingParams(**settings))
    assert ids.tolist() == [fine[0][0], -1, -1, -1, fine[0][4]]
    assert logprob[0] == fine[1][0]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}, {"min_p": 0.1}])
def test_a_row_does_not_depend_on_its_batch(settings):
    logits = random_logits(64, 2048, torch.float32)
    uniforms = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, logprob = sample_tokens(logits, uniforms, SamplingParams(**settings))
    for rows in (slice(0, 1), slice(5, 8), slice(31, 64)):
        some, some_logprob = sample_tokens(logits[rows], uniforms[rows], SamplingParams(**settings))
        assert torch.equal(some, ids[rows])
        assert torch.equal(some_logprob, logprob[rows])


def test_candidates_are_those_that_truncation_keeps():
    logits = torch.randn(40, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    ways = [
        SamplingParams(top_k=7),
        SamplingParams(top_p=0.9),
        SamplingParams(min_p=0.05),
        SamplingParams(0.7, 20, 0.95, 0.01),
        SamplingParams(1.4, 0, 0.8),
    ]
    params = [ways[row % len(ways)] for row in range(40)]
    forbidden = torch.tensor([int(logits[0].argmax())])
    ids, probs = candidates(logits, RowParams(params), 64, forbidden)
    uniforms = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    chosen = ids.gather(1, sample_candidates(ids, probs, uniforms)[:, None]).squeeze(1)
    for row, way in enumerate(params):
        allowed = logits[row : row + 1].index_fill(1, forbidden, -torch.inf) / way.temperature
        expected = truncate(allowed, way).softmax(-1)[0]
        ours = torch.zeros(300, dtype=torch.float64).scatter(0, ids[row], probs[row])
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
        sampled, _ = sample_tokens(logits[row : row + 1], uniforms[row : row + 1], way, forbidden)
        assert sampled.item() == chosen[row]


@pytest.mark.gpu
def test_truncation_on_a_gpu_is_that_on_a_cpu():
    logits = random_logits(40, 2048)
    for settings in ({"top_k": 7}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.8, "min_p": 0.01}):
        params = SamplingParams(**settings)
        assert torch.equal(truncate(logits.cuda(), params).cpu(), truncate(logits, params))
