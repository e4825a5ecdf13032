"""The metrics against slow numpy references, however the rows are split over batches and processes."""

import datetime

import numpy as np
import pytest
import torch
import torch.distributed as dist
from length_rows import EXACT, GAMMA, PROMPTS, ROWS, make_batch, make_rows, reference

from lenvm_lightning.metrics import POSITIONS
from lenvm_lightning.training.metrics import LengthErrors, PromptBoundaryMRE, TokenMean


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


def test_rows_truncated_at_their_limit_are_left_out():
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
