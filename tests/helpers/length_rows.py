"""Made-up held-out rows, and the slow numpy reference of every error in tokens."""

import math

import numpy as np
import torch

from lenvm_lightning.metrics import POSITIONS

GAMMA, PROMPTS, ROWS = 0.95, 9, 30


def make_rows(seed=0):
    """Per row: completion length, states kept beyond s_0, predictions of these, censored, prompt."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(ROWS):
        length = int(random.integers(1, 40))
        kept = length if i % 4 else int(random.integers(0, length + 1))  # every fourth is cut to the row's limit
        predicted = random.uniform(0, 50, kept + 1)
        rows.append((length, kept, predicted, i % 7 == 3, int(random.integers(PROMPTS))))
    return rows


def make_batch(rows, prompt_width=3, extra=0):
    """Pad rows to arrays; predictions at padding are wild."""
    width = prompt_width + max(kept for _, kept, *_ in rows) + extra
    remaining = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    predicted = torch.full((len(rows), width), 1e9)
    for i, (length, kept, prediction, _, _) in enumerate(rows):
        states = slice(prompt_width - 1, prompt_width + kept)
        remaining[i, states] = torch.arange(length, length - kept - 1, -1)
        mask[i, states] = True
        predicted[i, states] = torch.as_tensor(prediction).float()
    return predicted, remaining, mask, torch.tensor([row[3] for row in rows])


def least(cost, candidates):
    return min(cost(c) for c in candidates)  # piecewise linear costs have their minimum at a datum


def reference(rows):
    """All numbers from the definitions, constants by trying every one that can be best."""
    known = [row for row in rows if not row[3]]
    out = {}
    for name in POSITIONS:
        truth, predicted = [], []
        for length, kept, prediction, _, _ in known:
            at = 0 if name in ("all", "start") else math.floor(length * int(name) / 100)
            for t in range(kept + 1) if name == "all" else [at] if at <= kept else []:
                truth.append(length - t)
                predicted.append(np.float32(prediction[t]))
        truth, predicted = np.array(truth, float), np.array(predicted, float)
        some = truth > 0
        out[f"mae_tokens/{name}"] = np.abs(predicted - truth).mean()
        out[f"relative_error/{name}"] = (np.abs(predicted - truth)[some] / truth[some]).mean()
        absolute = least(lambda c, x=truth: np.abs(x - c).mean(), truth)
        relative = least(lambda c, x=truth[some]: (np.abs(x - c) / x).mean(), truth[some])
        out[f"mae_tokens_constant/{name}"], out[f"relative_error_constant/{name}"] = absolute, relative
    truth, predicted = [], []
    for prompt in range(PROMPTS):
        own = [row for row in rows if row[4] == prompt]
        if own and not any(row[3] for row in own):
            mean = np.mean([1 - GAMMA ** row[0] for row in own])
            truth.append(math.log(1 - mean) / math.log(GAMMA))
            predicted.append(np.mean([np.float32(row[2][0]) for row in own], dtype=float))
    truth, predicted = np.array(truth), np.array(predicted)
    out["mre"] = (np.abs(predicted - truth) / truth).mean()
    out["mre_constant"] = least(lambda c: (np.abs(truth - c) / truth).mean(), truth)
    return out


EXACT = {"rel": 1e-9}  # double precision sums of float32 predictions
