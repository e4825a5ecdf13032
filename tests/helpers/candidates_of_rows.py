"""Candidates of a step, and what would follow each of them."""

import torch

GAMMA = 0.99


def random_candidates(rows=64, count=15, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, count, generator=generator, dtype=torch.float64)
    remaining = 200 * torch.rand(rows, count, generator=generator, dtype=torch.float64)
    missing = torch.rand(rows, count, generator=generator) < 0.3
    missing[:, :2] = False
    return logits.masked_fill(missing, -torch.inf).softmax(-1), remaining
