"""The metrics against slow numpy references, however the rows are split over batches and processes."""

import datetime
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lenvm_lightning.metrics import POSITIONS, LengthErrors, PromptBoundaryMRE, TokenMean, tokens_at, weighted_median

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


def fill(metrics, rows, sizes, **layout):
    """Update both metrics with the rows in batches of these sizes."""
    errors, boundary = metrics
    start = 0
    for size in sizes:
        part = rows[start : start + size]
        batch = make_batch(part, **layout)
        errors.update(*batch)
        boundary.update(*batch, torch.tensor([row[4] for row in part]))
        start += size
    assert start == len(rows)


def computed(metrics):
    return {name: float(value) for metric in metrics for name, value in metric.compute().items()}


def new_metrics():
    return LengthErrors(), PromptBoundaryMRE(PROMPTS, GAMMA)


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


@pytest.mark.parametrize("seed", range(3))
def test_equal_the_definitions(seed):
    rows = make_rows(seed)
    assert 0 < sum(row[3] for row in rows) < ROWS
    assert any(row[1] < row[0] for row in rows)
    metrics = new_metrics()
    fill(metrics, rows, [7, 23])
    got, expected = computed(metrics), reference(rows)
    assert len({row[4] for row in rows if row[3]}) < PROMPTS  # prompts remain
    assert got == pytest.approx(expected, **EXACT)
    assert len(got) == 4 * len(POSITIONS) + 2


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [([ROWS], {}), ([1] * ROWS, {}), ([10, 20], {"prompt_width": 1}), ([29, 1], {"prompt_width": 8, "extra": 5})],
)
def test_do_not_depend_on_batches_or_padding(sizes, layout):
    rows = make_rows()
    metrics = new_metrics()
    fill(metrics, rows, sizes, **layout)
    assert computed(metrics) == pytest.approx(reference(rows), **EXACT)


def test_by_hand():
    errors, boundary = LengthErrors(), PromptBoundaryMRE(2, 0.5)
    rows = [(1, 1, [3.0, 0.0], False, 0), (2, 2, [2.0, 2.0, 1.0], False, 0), (4, 0, [1.0], False, 1)]
    batch = make_batch(rows)
    errors.update(*batch)
    boundary.update(*batch, torch.tensor([0, 0, 1]))
    got = {name: float(value) for name, value in errors.compute().items()}
    assert got["mae_tokens/all"] == pytest.approx((2 + 0 + 0 + 1 + 1 + 3) / 6, **EXACT)
    assert got["mae_tokens/start"] == pytest.approx((2 + 0 + 3) / 3, **EXACT)
    assert got["relative_error/start"] == pytest.approx((2 / 1 + 0 / 2 + 3 / 4) / 3, **EXACT)
    assert got["mae_tokens/50"] == pytest.approx((2 + 1) / 2, **EXACT)  # s_0 of 1 token, s_1 of 2; not kept of 4
    assert got["mae_tokens_constant/start"] == pytest.approx((1 + 0 + 2) / 3, **EXACT)  # 2 is the median
    # Prompt 0: mean of 1/2 and 3/4 is 5/8, L_GT = log2(8/3), predicted 2.5; prompt 1: L_GT = 4, predicted 1.
    first = math.log2(8 / 3)
    assert float(boundary.compute()["mre"]) == pytest.approx(((2.5 - first) / first + 3 / 4) / 2, **EXACT)


def test_cut_at_their_limit_rows_are_left_out():
    rows = make_rows()
    finished = [row for row in rows if not row[3]]
    metrics, without = new_metrics(), new_metrics()
    fill(metrics, rows, [ROWS])
    fill(without, finished, [len(finished)])
    assert computed([metrics[0]]) == computed([without[0]])
    prompts = {row[4] for row in rows if row[3]}
    whole = [row for row in rows if row[4] not in prompts]
    without = new_metrics()
    fill(without, whole, [len(whole)])
    assert computed([metrics[1]]) == computed([without[1]])


def test_nothing_known_gives_no_numbers():
    rows = [(length, kept, prediction, True, prompt) for length, kept, prediction, _, prompt in make_rows()]
    metrics = new_metrics()
    fill(metrics, rows, [ROWS])
    assert computed(metrics) == {}


def test_a_perfect_prediction_has_no_error():
    rows = [(length, kept, np.arange(length, length - kept - 1, -1), c, p) for length, kept, _, c, p in make_rows()]
    metrics = new_metrics()
    fill(metrics, rows, [ROWS])
    got = computed([metrics[0]])
    assert all(got[f"{error}/{name}"] == 0 for error in ("mae_tokens", "relative_error") for name in POSITIONS)
    assert all(got[f"mae_tokens_constant/{name}"] > 0 for name in POSITIONS)


def test_weighted_median_minimises_the_weighted_distance():
    random = np.random.default_rng(0)
    for _ in range(50):
        x, weight = random.integers(0, 9, 7).astype(float), random.uniform(0.1, 3, 7)
        got = weighted_median(torch.tensor(x), torch.tensor(weight)).item()
        best = least(lambda c, x=x, w=weight: (w * np.abs(x - c)).sum(), x)
        assert (weight * np.abs(x - got)).sum() == pytest.approx(best, rel=1e-12)  # double precision


def test_tokens_at_a_share_are_rounded_down():
    assert tokens_at(torch.tensor([1, 3, 4, 7, 1001]), 0.75).tolist() == [0, 2, 3, 5, 750]


def test_sums_stay_precise_in_a_model_of_half_precision():
    """As Lightning's bf16-true casts it. A count kept in bfloat16 would stand still at 256."""
    holder = torch.nn.ModuleList([*new_metrics(), TokenMean()]).to(torch.bfloat16)
    errors, boundary, mean = holder
    one = make_batch([(1, 0, [1.5], False, 0)])
    for _ in range(300):
        errors.update(*one)
        boundary.update(*one, torch.tensor([0]))
        mean.update(torch.tensor(0.1), torch.tensor(1.0, dtype=torch.float64))
    assert float(errors.count[0]) == float(boundary.sums[0, 0]) == float(mean.weight) == 300
    assert float(errors.compute()["mae_tokens/all"]) == pytest.approx(0.5)
    assert float(mean.compute()) == pytest.approx(0.1, rel=1e-5)


def _rank(rank, file, shares, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    try:
        for number, share in enumerate(shares):
            metrics = new_metrics()
            rows = make_rows()
            mine = rows[:share] if rank == 0 else rows[share:]
            fill(metrics, mine, [len(mine)] if mine else [])
            torch.save(computed(metrics), out / f"{number}-{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path):
    shares = [11, 0, ROWS]  # uneven, and each rank once without a single batch
    arguments = (tmp_path / "meeting", shares, tmp_path)
    torch.multiprocessing.start_processes(
        _rank, arguments, nprocs=2, start_method="fork"
    )  # spawning imports anew: 15 s
    expected = reference(make_rows())
    for number in range(len(shares)):
        for rank in range(2):
            assert torch.load(tmp_path / f"{number}-{rank}.pt") == pytest.approx(expected, **EXACT)
