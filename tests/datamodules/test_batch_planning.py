"""Batches under a token budget: whole, tight, and sampled anew."""

from collections import Counter

import numpy as np
import pytest
from lengths import BUDGET, GROUPED, computed, flat, long_tailed, of_prompts

from datamodules.batch_planning import plan_batches, rows_for_layout_check, split_to_count
from datamodules.report import completions_meeting, packed_padding_share, padding_share
from lenvm_lightning.training.packing import pack, width_of


@pytest.mark.parametrize("completions_per_batch", GROUPED)
@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("seed", [0, 1, None])
def test_every_row_once_and_within_the_budget(seed, bucket, completions_per_batch):
    lengths = [*long_tailed(), 9000, 8192]  # a row above the budget, and one that fills it
    prompts = of_prompts(len(lengths))
    batches = plan_batches(
        lengths, BUDGET, seed=seed, bucket=bucket, prompts=prompts, completions_per_batch=completions_per_batch
    )
    assert sorted(flat(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[row] for row in batch) <= BUDGET or len(batch) == 1
    assert [3000] in batches


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


def test_packed_batches_are_drawn_anew():
    lengths = np.random.default_rng(0).integers(20, 400, 300).tolist()
    plans = [plan_batches(lengths, 2048, seed=seed, packed=True) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    mates = [{row: set(batch) - {row} for batch in plan for row in batch} for plan in plans]
    kept = sum(len(mates[0][row] & mates[2][row]) for row in range(300)) / sum(len(m) for m in mates[0].values())
    assert kept < 0.5
    with pytest.raises(
        ValueError, match="packed batches keep no completions of a prompt together, got completions_per_batch: 2"
    ):
        plan_batches(lengths, 2048, seed=0, prompts=range(300), completions_per_batch=2, packed=True)


def test_completions_meet_in_evaluation_too():
    lengths, prompts = [5, 9, 7, 9, 1, 3], [0, 1, 0, 2, 1, 2]
    assert plan_batches(lengths, 40, seed=None, prompts=prompts, completions_per_batch=2) == [[1, 4, 3, 5], [2, 0]]


def test_rows_to_try_a_layout_with():
    assert rows_for_layout_check([9, 3, 4, 5, 8, 1], [0, 1, 0, 1, 0, 2]) == [
        1,
        3,
        2,
        4,
    ]  # two of each, the shortest pairs
    assert rows_for_layout_check([9, 3, 4], [0, 1, 0]) == [2, 0, 1, 1]
    assert rows_for_layout_check([9], [0]) == [0, 0]


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

    def plan(completions_per_batch, seed=0):
        return plan_batches(
            lengths, 32 * 400, seed=seed, bucket=bucket, prompts=prompts, completions_per_batch=completions_per_batch
        )

    for batch in plan(16):
        assert set(Counter(prompts[row] for row in batch).values()) == {16}
    for batch in plan(5):  # groups of 5, 5, 5 and 1; several of a prompt may meet
        assert {n % 5 for n in Counter(prompts[row] for row in batch).values()} <= {0, 1}
    meeting = [completions_meeting(prompts, plan(count)) for count in (1, 2, 4, 8, 16)]
    assert meeting == sorted(meeting)
    assert meeting[0] < 2 < meeting[1]
    assert meeting[-1] == 16
    # Which completions meet, and which prompts, is sampled anew.
    groups = [{frozenset(row for row in batch if prompts[row] == 0) for batch in plan(4, seed)} for seed in (0, 1)]
    assert groups[0] != groups[1]
    assert {frozenset(batch) for batch in plan(16)} != {frozenset(batch) for batch in plan(16, seed=1)}


def test_a_group_above_the_budget_is_split_into_rows_of_similar_length():
    lengths, prompts = [10, 60, 20, 50, 100, 10, 10, 90], [0, 0, 0, 0, 0, 0, 1, 1]
    batches = plan_batches(lengths, 100, seed=0, prompts=prompts, completions_per_batch=8)
    # 100 | 60 | 50, 20 | 10, 10 of prompt 0, and 90 | 10 of prompt 1; sorted by length 10 meets 10, 10.
    assert sorted(map(sorted, batches)) == [[0, 5, 6], [1], [2, 3], [4], [7]]


def test_without_groups_the_prompts_change_nothing():
    lengths = long_tailed(500)
    plain = plan_batches(lengths, BUDGET, seed=3)
    assert plan_batches(lengths, BUDGET, seed=3, prompts=of_prompts(500)) == plain
    alone = plan_batches(lengths, BUDGET, seed=3, prompts=range(500), completions_per_batch=4)  # no prompt has two
    assert completions_meeting(list(range(500)), alone) == 1.0
    with pytest.raises(ValueError, match="completions_per_batch: 4 needs the prompt of each of the 500 rows"):
        plan_batches(lengths, BUDGET, seed=3, completions_per_batch=4)


def test_groups_are_sorted_by_their_longest_row():
    longest = np.repeat(long_tailed(750), 4)
    lengths = (longest - np.arange(3000) % 4).tolist()  # alike within a prompt: what is lost, is lost between groups
    groups = {"prompts": np.arange(3000) // 4, "completions_per_batch": 4}
    sorted_ = padding_share(lengths, plan_batches(lengths, BUDGET, seed=0, **groups))
    random = padding_share(lengths, plan_batches(lengths, BUDGET, seed=0, bucket=False, **groups))
    assert sorted_ <= 0.08
    assert random > 0.3


def test_evaluation_goes_from_long_to_short():
    lengths = [5, 9, 7, 9, 1]
    assert plan_batches(lengths, 18, seed=None) == [[1, 3], [2, 0], [4]]
    assert plan_batches([], BUDGET, seed=None) == plan_batches([], BUDGET, seed=0) == []


def test_split_to_count():
    batches = [[1], [2, 3, 4, 5], [6, 7]]
    split = split_to_count(batches, 5)
    assert len(split) == 5
    assert flat(split) == flat(batches)
    assert max(map(len, split)) == 2
    assert split_to_count(batches, 3) == batches
    with pytest.raises(ValueError, match="7 rows cannot fill 8 batches"):
        split_to_count(batches, 8)


def test_few_rows_meet_others_in_the_next_epoch():
    lengths = np.random.default_rng(0).integers(20, 400, 300).tolist()
    plans = [plan_batches(lengths, 2048, seed=seed) for seed in (0, 1)]
    mates = [{row: set(batch) - {row} for batch in plan for row in batch} for plan in plans]
    kept = sum(len(mates[0][row] & mates[1][row]) for row in range(300)) / sum(len(m) for m in mates[0].values())
    assert kept < 0.8
