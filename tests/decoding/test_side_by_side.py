"""Engines in threads write what one engine writes, and leave no thread behind."""

import itertools
import threading

import pytest

from lenvm_lightning.decoding.engine import Engine
from lenvm_lightning.decoding.prefill import Request
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.decoding.side_by_side import written
from lenvm_lightning.guidance import EqualTo

PARAMS = SamplingParams(max_tokens=12)


def requests(count=7, control=None):
    return [Request(number, [3 + number, 8, 9], [number, 50 + number], PARAMS, control) for number in range(count)]


def tokens_of(engines, items):
    """Ids of each completion by request and number, and how many were told as written."""
    found, told = {}, 0
    for item in written(engines, iter(items)):
        told += item.tokens
        for completion in item.ended:
            key = completion.request.key, completion.index
            assert key not in found
            found[key] = completion.token_ids
    return found, told


@pytest.mark.parametrize("control", [None, EqualTo(7)])
def test_what_is_written_does_not_depend_on_the_number_of_engines(text, control):
    alone, _ = tokens_of([Engine(*text, max_rows=6)], requests(control=control))
    for count in (2, 3):
        engines = [Engine(*text, max_rows=2) for _ in range(count)]
        found, told = tokens_of(engines, requests(control=control))
        assert found == alone
        assert told == sum(map(len, found.values()))
    assert len(alone) == 14


def test_requests_are_dealt_in_turn(text):
    engines = [Engine(*text, max_rows=2) for _ in range(2)]
    seen = {0: [], 1: []}
    for place, engine in enumerate(engines):
        steps = engine.steps

        def spied(source, place=place, steps=steps):
            return steps(_seen(source, seen[place]))

        engine.steps = spied
    tokens_of(engines, requests(5))
    assert seen == {0: [0, 2, 4], 1: [1, 3]}


def _seen(source, into):
    for request in source:
        into.append(request.key)
        yield request


def test_what_is_no_request_is_passed_on(text):
    engines = [Engine(*text, max_rows=2) for _ in range(2)]
    items = list(written(engines, iter(["a", *requests(2), "b"])))
    assert sorted(item for item in items if isinstance(item, str)) == ["a", "b"]
    assert sum(len(item.ended) for item in items if not isinstance(item, str)) == 4


def test_an_error_is_raised_and_ends_all_engines(text):
    def failing():
        yield from requests(3)
        raise ValueError("no more prompts")

    engines = [Engine(*text, max_rows=2) for _ in range(2)]
    with pytest.raises(ValueError, match="no more prompts"):
        list(written(engines, failing()))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine")]
    assert len(tokens_of(engines, requests(3))[0]) == 6  # they can be used again


def test_a_run_that_is_abandoned_ends_its_threads(text):
    endless = (Request(number, [3, 4], [number], PARAMS) for number in itertools.count())
    steps = written([Engine(*text, max_rows=2) for _ in range(2)], endless)
    next(steps)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine")]
