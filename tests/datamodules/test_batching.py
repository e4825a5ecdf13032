"""Batches under a token budget: whole, tight, the same again, and resumable."""

import itertools
from collections import Counter

import numpy as np
import pytest

from datamodules.batching import ResumableLoader, TokenBudgetBatches, plan_batches, split_to_count, trial_rows
from datamodules.report import completions_meeting, packed_padding_share, padding_share, shared_share
from lenvm_lightning.training.packing import fill_bins, pack, take_batch, width_of

BUDGET = 8192


def long_tailed(rows=3000, seed=0):
    """Lengths like completions': median 265 tokens, 99% within 1600."""
    random = np.random.default_rng(seed)
    return np.minimum(20 + random.lognormal(5.5, 0.8, rows), 4096).astype(int).tolist()


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def of_prompts(rows, seed=0):
    """Prompts of 1 to 31 rows each, which lie anywhere."""
    random = np.random.default_rng(seed)
    return random.permutation(np.repeat(np.arange(rows), random.integers(1, 32, rows))[:rows]).tolist()


TOGETHER = [1, 2, 16, 1000]


@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("seed", [0, 1, None])
def test_every_row_once_and_within_the_budget(seed, bucket, together):
    lengths = [*long_tailed(), 9000, 8192]  # a row above the budget, and one that fills it
    prompts = of_prompts(len(lengths))
    batches = plan_batches(lengths, BUDGET, seed=seed, bucket=bucket, prompts=prompts, together=together)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[row] for row in batch) <= BUDGET or len(batch) == 1
    assert [3000] in batches


def computed(lengths, batch):
    """Positions of a packed batch."""
    sizes = [lengths[row] for row in batch]
    bins = pack(sizes)
    assert sorted(flat(bins)) == list(range(len(sizes)))
    return len(bins) * width_of(bins, sizes)


@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("seed", [0, 1, None])
def test_packed_batches_hold_every_row_once_within_the_budget(seed, bucket):
    lengths = [*long_tailed(), 9000, 8192]  # a row above the budget, and one that fills it
    batches = plan_batches(lengths, BUDGET, seed=seed, bucket=bucket, packed=True)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    assert all(computed(lengths, batch) <= BUDGET for batch in batches if len(batch) > 1)
    assert [3000] in batches
    assert [3001] in batches


def test_packing_saves_padding():
    lengths = long_tailed()
    packed = plan_batches(lengths, BUDGET, seed=0, packed=True)
    padding = 1 - sum(lengths) / sum(computed(lengths, batch) for batch in packed)
    assert padding <= 0.02
    assert packed_padding_share(lengths, packed) == pytest.approx(padding)
    assert len(packed) <= 1.02 * len(plan_batches(lengths, BUDGET, seed=0))  # not by way of half-empty batches
    random = plan_batches(lengths, BUDGET, seed=0, bucket=False, packed=True)
    assert packed_padding_share(lengths, random) <= 0.03
    # Wider bins would waste nothing, but attention goes by their square.
    widths = [width_of(pack(sizes), sizes) / max(sizes) for sizes in ([lengths[i] for i in batch] for batch in packed)]
    assert np.mean(widths) < 2


def test_bins_by_hand():
    lengths = [7, 3, 5, 2, 8]
    assert fill_bins(lengths, [3, 1, 2, 0, 4], 10, 5) == ([[4, 3], [0, 1], [2]], [])  # 8 + 2, 7 + 3, 5
    assert fill_bins(lengths, [3, 1, 2, 0, 4], 10, 2) == ([[4, 3], [0, 1]], [2])
    assert take_batch(lengths, [3, 1, 2, 0, 4], 8) == ([4], [3, 1, 2, 0])
    assert take_batch([9], [0], 8) == ([0], [])
    assert pack([90, 10, 60, 30, 50, 40]) == [[0, 1], [2, 4], [5, 3]]  # 3 of 110; 4 of 90 or 2 of 180 are more
    assert pack([1]) == [[0]]
    assert packed_padding_share([], []) == 0.0


def test_packed_batches_are_drawn_anew():
    lengths = np.random.default_rng(0).integers(20, 400, 300).tolist()
    plans = [plan_batches(lengths, 2048, seed=seed, packed=True) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    mates = [{row: set(batch) - {row} for batch in plan for row in batch} for plan in plans]
    kept = sum(len(mates[0][row] & mates[2][row]) for row in range(300)) / sum(len(m) for m in mates[0].values())
    assert kept < 0.5
    with pytest.raises(ValueError, match="packed batches keep no completions of a prompt together, got together: 2"):
        plan_batches(lengths, 2048, seed=0, prompts=range(300), together=2, packed=True)


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_share_out_packed_batches_evenly(world_size):
    lengths = long_tailed(1500)
    samplers = [
        TokenBudgetBatches(lengths, BUDGET, epochs=3, rank=rank, world_size=world_size, packed=True)
        for rank in range(world_size)
    ]
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert {len(share) for share in shares} == {len(samplers[0])}
        assert sorted(flat(flat(shares))) == list(range(1500))
        assert all(computed(lengths, batch) <= BUDGET for batch in flat(shares))


def test_completions_meet_in_evaluation_too():
    lengths, prompts = [5, 9, 7, 9, 1, 3], [0, 1, 0, 2, 1, 2]
    assert plan_batches(lengths, 40, seed=None, prompts=prompts, together=2) == [[1, 4, 3, 5], [2, 0]]


def test_what_sharing_leaves_by_hand():
    assert shared_share([6, 8, 5, 6], [4, 4, 3, 4], [0, 0, 1, 0], [[0, 1, 2], [3]]) == (25 - 4) / 25


def test_rows_to_try_a_layout_with():
    assert trial_rows([9, 3, 4, 5, 8, 1], [0, 1, 0, 1, 0, 2]) == [1, 3, 2, 4]  # two of each, the shortest pairs
    assert trial_rows([9, 3, 4], [0, 1, 0]) == [2, 0, 1, 1]
    assert trial_rows([9], [0]) == [0, 0]


def test_sorting_saves_padding():
    lengths = long_tailed()
    sorted_ = padding_share(lengths, plan_batches(lengths, BUDGET, seed=0))
    random = padding_share(lengths, plan_batches(lengths, BUDGET, seed=0, bucket=False))
    assert sorted_ <= 0.08  # the most that is worth losing
    assert random > 0.4


def test_sorted_batches_come_in_random_order():
    lengths = long_tailed()
    longest = np.array([max(lengths[row] for row in batch) for batch in plan_batches(lengths, BUDGET, seed=0)])
    order = np.arange(len(longest))
    # Of 130 batches in random order |correlation| exceeds 0.3 once in 2,000 seeds; in order of length it is near 1.
    assert abs(np.corrcoef(order, longest)[0, 1]) < 0.3


@pytest.mark.parametrize("bucket", [True, False])
def test_completions_of_a_prompt_stay_together(bucket):
    """The budget holds 32 rows of 20 to 400 tokens, so no group is split."""
    lengths = np.random.default_rng(0).integers(20, 400, 1600).tolist()
    prompts = np.random.default_rng(1).permutation(np.repeat(np.arange(100), 16)).tolist()

    def plan(together, seed=0):
        return plan_batches(lengths, 32 * 400, seed=seed, bucket=bucket, prompts=prompts, together=together)

    for batch in plan(16):
        assert set(Counter(prompts[row] for row in batch).values()) == {16}
    for batch in plan(5):  # groups of 5, 5, 5 and 1; several of a prompt may meet
        assert {n % 5 for n in Counter(prompts[row] for row in batch).values()} <= {0, 1}
    meeting = [completions_meeting(prompts, plan(together)) for together in (1, 2, 4, 8, 16)]
    assert meeting == sorted(meeting)
    assert meeting[0] < 2 < meeting[1]
    assert meeting[-1] == 16
    # Which completions meet, and which prompts, is drawn anew.
    groups = [{frozenset(row for row in batch if prompts[row] == 0) for batch in plan(4, seed)} for seed in (0, 1)]
    assert groups[0] != groups[1]
    assert {frozenset(batch) for batch in plan(16)} != {frozenset(batch) for batch in plan(16, seed=1)}


def test_a_group_above_the_budget_is_split_into_rows_of_similar_length():
    lengths, prompts = [10, 60, 20, 50, 100, 10, 10, 90], [0, 0, 0, 0, 0, 0, 1, 1]
    batches = plan_batches(lengths, 100, seed=0, prompts=prompts, together=8)
    # 100 | 60 | 50, 20 | 10, 10 of prompt 0, and 90 | 10 of prompt 1; sorted by length 10 meets 10, 10.
    assert sorted(map(sorted, batches)) == [[0, 5, 6], [1], [2, 3], [4], [7]]


def test_without_together_the_prompts_change_nothing():
    lengths = long_tailed(500)
    plain = plan_batches(lengths, BUDGET, seed=3)
    assert plan_batches(lengths, BUDGET, seed=3, prompts=of_prompts(500)) == plain
    alone = plan_batches(lengths, BUDGET, seed=3, prompts=range(500), together=4)  # no prompt has two
    assert completions_meeting(list(range(500)), alone) == 1.0
    with pytest.raises(ValueError, match="together: 4 needs the prompt of each of the 500 rows"):
        plan_batches(lengths, BUDGET, seed=3, together=4)


def test_groups_are_sorted_by_their_longest_row():
    longest = np.repeat(long_tailed(750), 4)
    lengths = (longest - np.arange(3000) % 4).tolist()  # alike within a prompt: what is lost, is lost between groups
    groups = {"prompts": np.arange(3000) // 4, "together": 4}
    sorted_ = padding_share(lengths, plan_batches(lengths, BUDGET, seed=0, **groups))
    random = padding_share(lengths, plan_batches(lengths, BUDGET, seed=0, bucket=False, **groups))
    assert sorted_ <= 0.08
    assert random > 0.3


def test_completions_meeting_by_hand():
    assert completions_meeting([0, 0, 0, 1], [[0, 1, 3], [2]]) == (2 + 2 + 1 + 1) / 4
    assert completions_meeting([], []) == 0.0


def test_evaluation_goes_from_long_to_short():
    lengths = [5, 9, 7, 9, 1]
    assert plan_batches(lengths, 18, seed=None) == [[1, 3], [2, 0], [4]]
    assert plan_batches([], BUDGET, seed=None) == plan_batches([], BUDGET, seed=0) == []


def test_padding_share_by_hand():
    assert padding_share([4, 2, 3], [[0, 1], [2]]) == pytest.approx(2 / 11)
    assert padding_share([], []) == 0.0


def test_split_to_count():
    batches = [[1], [2, 3, 4, 5], [6, 7]]
    split = split_to_count(batches, 5)
    assert len(split) == 5
    assert flat(split) == flat(batches)
    assert max(map(len, split)) == 2
    assert split_to_count(batches, 3) == batches
    with pytest.raises(ValueError, match="7 rows cannot fill 8 batches"):
        split_to_count(batches, 8)


@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_out_every_epoch_evenly(world_size, together):
    lengths = long_tailed(1500)
    options = {"world_size": world_size, "prompts": of_prompts(1500), "together": together}
    samplers = [TokenBudgetBatches(lengths, BUDGET, epochs=6, rank=rank, **options) for rank in range(world_size)]
    natural = {len(samplers[0]._plan(epoch)) for epoch in range(6)}
    assert len(natural) > 1  # epochs would differ in number, if they were left alone
    epochs = []
    for epoch in range(6):
        shares = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
        assert {len(share) for share in shares} == {len(samplers[0])}
        assert sorted(flat(flat(shares))) == list(range(1500))
        for batch in flat(shares):
            assert len(batch) * max(lengths[row] for row in batch) <= BUDGET
        epochs.append(shares)
    assert all(a != b for a, b in itertools.pairwise(epochs))


@pytest.mark.parametrize("together", TOGETHER)
def test_reproducible(together):
    def batches(seed, epoch):
        groups = {"prompts": of_prompts(300), "together": together}
        sampler = TokenBudgetBatches(long_tailed(300), BUDGET, seed=seed, epochs=3, **groups)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(0, 1) == batches(0, 1) != batches(1, 1)
    assert batches(0, 3) == batches(0, 0) != batches(0, 1)  # beyond the plan its epochs come again


def test_too_few_rows_for_the_ranks_is_said_at_once():
    with pytest.raises(ValueError, match="2 rows cannot fill 3 batches"):
        TokenBudgetBatches([5, 5], BUDGET, world_size=3)


def new_loader(workers, together=1):
    how = {"packed": True} if together is None else {"prompts": of_prompts(300), "together": together}
    sampler = TokenBudgetBatches(long_tailed(300), BUDGET, epochs=3, **how)
    return ResumableLoader(range(300), batch_sampler=sampler, collate_fn=list, num_workers=workers)


def run_epoch(loader, epoch):
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize(("workers", "together"), [(0, 1), (0, 16), (2, 1), (0, None)])
def test_resuming_gives_exactly_what_was_left(workers, together):
    whole = [run_epoch(new_loader(0, together), epoch) for epoch in range(3)]
    first = new_loader(workers, together)
    assert run_epoch(first, 0) == whole[0]
    first.batch_sampler.set_epoch(1)
    taken = list(itertools.islice(first, 4))  # workers have read further ahead by now
    state = first.state_dict()
    assert state == {"epoch": 1, "batches": 4}

    second = new_loader(workers, together)
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


def test_few_rows_meet_others_in_the_next_epoch():
    lengths = np.random.default_rng(0).integers(20, 400, 300).tolist()
    plans = [plan_batches(lengths, 2048, seed=seed) for seed in (0, 1)]
    mates = [{row: set(batch) - {row} for batch in plan for row in batch} for plan in plans]
    kept = sum(len(mates[0][row] & mates[1][row]) for row in range(300)) / sum(len(m) for m in mates[0].values())
    assert kept < 0.8
