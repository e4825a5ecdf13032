"""Loaders: each rank its part, the same again, and resumable."""

import itertools

import pytest
from lengths import BUDGET, GROUPED, computed, flat, long_tailed, of_prompts

from datamodules.batching import ResumableLoader, TokenBudgetBatches


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_divide_packed_batches_evenly(world_size):
    lengths = long_tailed(1500)
    samplers = [
        TokenBudgetBatches(lengths, BUDGET, epochs=3, rank=rank, world_size=world_size, packed=True)
        for rank in range(world_size)
    ]
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        parts = [list(sampler) for sampler in samplers]
        assert {len(part) for part in parts} == {len(samplers[0])}
        assert sorted(flat(flat(parts))) == list(range(1500))
        assert all(computed(lengths, batch) <= BUDGET for batch in flat(parts))


@pytest.mark.parametrize("completions_per_batch", GROUPED)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_divide_every_epoch_evenly(world_size, completions_per_batch):
    lengths = long_tailed(1500)
    options = {"world_size": world_size, "prompts": of_prompts(1500), "completions_per_batch": completions_per_batch}
    samplers = [TokenBudgetBatches(lengths, BUDGET, epochs=6, rank=rank, **options) for rank in range(world_size)]
    natural = {len(samplers[0].plan(epoch)) for epoch in range(6)}
    assert len(natural) > 1  # epochs would differ in number, if they were left alone
    epochs = []
    for epoch in range(6):
        parts = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            parts.append(list(sampler))
        assert {len(part) for part in parts} == {len(samplers[0])}
        assert sorted(flat(flat(parts))) == list(range(1500))
        for batch in flat(parts):
            assert len(batch) * max(lengths[row] for row in batch) <= BUDGET
        epochs.append(parts)
    assert all(a != b for a, b in itertools.pairwise(epochs))


@pytest.mark.parametrize("completions_per_batch", GROUPED)
def test_reproducible(completions_per_batch):
    def batches(seed, epoch):
        groups = {"prompts": of_prompts(300), "completions_per_batch": completions_per_batch}
        sampler = TokenBudgetBatches(long_tailed(300), BUDGET, seed=seed, epochs=3, **groups)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(0, 1) == batches(0, 1) != batches(1, 1)
    assert batches(0, 3) == batches(0, 0) != batches(0, 1)  # beyond the plan its epochs come again


def test_too_few_rows_for_the_ranks_is_said_at_once():
    with pytest.raises(ValueError, match="2 rows cannot fill 3 batches"):
        TokenBudgetBatches([5, 5], BUDGET, world_size=3)


def new_loader(workers, completions_per_batch=1):
    how = (
        {"packed": True}
        if completions_per_batch is None
        else {"prompts": of_prompts(300), "completions_per_batch": completions_per_batch}
    )
    sampler = TokenBudgetBatches(long_tailed(300), BUDGET, epochs=3, **how)
    return ResumableLoader(range(300), batch_sampler=sampler, collate_fn=list, num_workers=workers)


def run_epoch(loader, epoch):
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize(("workers", "completions_per_batch"), [(0, 1), (0, 16), (2, 1), (0, None)])
def test_resuming_gives_exactly_what_was_left(workers, completions_per_batch):
    whole = [run_epoch(new_loader(0, completions_per_batch), epoch) for epoch in range(3)]
    first = new_loader(workers, completions_per_batch)
    assert run_epoch(first, 0) == whole[0]
    first.batch_sampler.set_epoch(1)
    taken = list(itertools.islice(first, 4))  # workers have read further ahead by now
    state = first.state_dict()
    assert state == {"epoch": 1, "batches": 4}

    second = new_loader(workers, completions_per_batch)
    second.load_state_dict(state)
    assert second.state_dict() == state  # stopped again before its first batch
    rest = run_epoch(second, 1)
    assert taken + rest == whole[1]
    assert second.state_dict() == {"epoch": 1, "batches": len(whole[1])}
    assert run_epoch(second, 2) == whole[2]


def test_a_resumed_run_can_be_resumed():
    whole = run_epoch(new_loader(0), 1)
    state = {"epoch": 1, "batches": 2}
    for _ in range(3):
        loader = new_loader(0)
        loader.load_state_dict(state)
        loader.batch_sampler.set_epoch(1)
        assert next(iter(loader)) == whole[state["batches"]]
        state = loader.state_dict()
    assert state == {"epoch": 1, "batches": 5}


def test_after_a_finished_epoch_the_next_is_whole():
    loader = new_loader(0)
    epoch = run_epoch(loader, 0)
    other = new_loader(0)
    other.load_state_dict(loader.state_dict())
    assert run_epoch(other, 1) == run_epoch(new_loader(0), 1)
    assert len(epoch) == len(other)
