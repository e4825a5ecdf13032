"""Who of those that wait is next: by hand."""

import random
from types import SimpleNamespace

import pytest

from lenvm_lightning.serving.waiting import WaitingQueue, rank


def waiting(expected=512.0, priority=0, arrived=0, number=0):
    return SimpleNamespace(priority=priority, expected=expected, arrived=arrived, number=number)


def queue_of(*items, patience=8.0):
    queue = WaitingQueue(patience)
    for item in items:
        queue.add(item, item.arrived)
    return queue


def names(queue, items, now):
    return [items.index(queue.pop(now)) for _ in range(len(queue))]


def test_without_priorities_and_predictions_as_they_came():
    items = [waiting(arrived=k // 2) for k in range(6)]
    for now in (0, 4000, 5000, 10**6):  # nobody, some and all are due
        assert names(queue_of(*items), items, now) == list(range(6))


def test_small_priorities_first_then_short_ones_then_as_they_came():
    items = [waiting(30), waiting(10), waiting(30, -1), waiting(10), waiting(5, 2), waiting(90, -1)]
    assert names(queue_of(*items), items, 0) == [2, 5, 1, 3, 0, 4]


def test_rank_by_hand():
    """20 tokens and a patience of 8: due 160 steps after it came at 100, late 8 * 512 steps after it."""
    item = waiting(20, 3, arrived=100, number=7)
    assert rank(item, now=100) == rank(item, now=4195) == (True, 3, 260.0, 7)
    assert rank(item, now=4196) == (False, 0, 260.0, 7)
    assert rank(waiting(1000, -1), now=7999) == (True, -1, 8000.0, 0)
    assert rank(waiting(1000, -1), now=8000) == (False, 0, 8000.0, 0)


def test_who_waits_comes_nearer_and_is_due_before_later_ones():
    """A patience of 2: 100 tokens that came at 0 are due at 200, 10 tokens before those that come at 180."""
    items = [waiting(100, arrived=0), waiting(10, arrived=179), waiting(10, arrived=180), waiting(10, arrived=181)]
    assert names(queue_of(*items, patience=2), items, 181) == [1, 0, 2, 3]


def test_who_is_late_goes_before_any_priority_and_the_one_due_first_before_others():
    old = waiting(100, priority=9, arrived=0)  # due at 200, late at 1024
    older = waiting(600, priority=0, arrived=-300)  # due and late at 900
    items = [old, older, waiting(1, -5, arrived=899)]
    assert names(queue_of(*items, patience=2), items, 899) == [2, 1, 0]
    assert names(queue_of(*items, patience=2), items, 900) == [1, 2, 0]
    assert names(queue_of(*items, patience=2), items, 1024) == [0, 1, 2]


@pytest.mark.parametrize("patience", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("priorities", [(0,), (-1, 0)])
def test_nobody_waits_for_ever(patience, priorities):
    """One row, and more work than it can write: short requests, or more important ones, come all the time."""
    rng = random.Random(0)
    queue, now, started = WaitingQueue(patience), 0, []
    long = waiting(40.0)
    queue.add(long, 0)
    for _ in range(2000):
        for _ in range(2):
            queue.add(waiting(rng.choice([1.0, 3.0]), priority=rng.choice(priorities)), now)
        started.append((now, queue.pop(now)))
        now += int(started[-1][1].expected)
    order = [item for _, item in started]
    overtaking = [item for item in order[: order.index(long)] if item.number > 0]
    assert (len(overtaking) > 0) == (patience > 0)
    assert all(item.arrived < patience * (40 if priorities == (0,) else 512) for item in overtaking)
    for place, item in enumerate(order):
        due = item.arrived + patience * item.expected
        late = item.arrived + patience * 512
        later = [one for one in order[max(0, place - 100) : place] if one.number > item.number]
        assert all(one.arrived < late for one in later)
        assert all(one.arrived < due for one in later if one.priority >= item.priority)


def test_one_that_leaves_does_not_wait():
    items = [waiting(), waiting()]
    queue = queue_of(*items)
    assert queue.remove(items[0])
    assert not queue.remove(items[0])
    assert list(queue) == [items[1]]
    assert queue.pop(0) is items[1]
    assert len(queue) == 0
