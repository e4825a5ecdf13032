"""Prompts on their way into rows."""

import pytest
import torch
from pairs import random_ids

from lenvm_lightning.decoding.prefill import Prefiller, Request


def request(key, length, seeds=(0,)):
    return Request(key, random_ids(length, key), seeds)


@pytest.mark.parametrize(("length", "width"), [(1, 0), (2, 64), (65, 64), (66, 128)])
def test_the_last_token_is_not_prefilled(length, width):
    assert request(0, length).width == width


def test_a_few_requests_are_looked_at_and_other_items_passed_on(exact):
    prefiller = Prefiller([(exact, None)])
    source = iter([None, *(request(key, 5) for key in range(20)), "last"])
    assert list(prefiller.look_ahead(source)) == [None]
    assert next(source).key == 16
    assert list(prefiller.look_ahead(source)) == []  # there is no room for more
    assert prefiller.has_unread
    prefiller.clear()
    assert not prefiller.has_waiting
    assert list(prefiller.look_ahead(source)) == ["last"]
    prefiller.prefill()
    assert [one.request.key for one in prefiller.prefilled] == [17, 18, 19]


def test_prompts_of_one_width_are_prefilled_together(exact):
    prefiller = Prefiller([(exact, None)])
    asked = [request(0, 9, seeds=(1, 2)), request(1, 70), request(2, 40)]
    assert list(prefiller.look_ahead(iter(asked))) == []
    prefiller.prefill()
    assert [one.request.key for one in prefiller.prefilled] == [0, 2]
    assert list(prefiller.prefilled[0].left) == [0, 1]
    assert prefiller.has_unread
    prefiller.prefill()
    assert [one.request.key for one in prefiller.prefilled] == [0, 2, 1]
    assert not prefiller.has_unread
    assert asked[0].prefills[0].cache is asked[2].prefills[0].cache is not asked[1].prefills[0].cache
    for one in asked:
        (found,) = one.prefills
        ids = one.prompt_ids[:-1]
        alone = exact.prefill([ids])
        for layer, expected in zip(found.cache.layers, alone.layers, strict=True):
            torch.testing.assert_close(
                layer.keys[found.row, :, : len(ids)], expected.keys[0, :, : len(ids)], rtol=0, atol=1e-12
            )


def test_long_prompts_are_prefilled_a_few_at_a_time(exact):
    prefiller = Prefiller([(exact, None)])
    assert list(prefiller.look_ahead(request(key, 449) for key in range(3))) == []
    prefiller.prefill()  # 448 columns each, of 1024
    assert [one.request.key for one in prefiller.prefilled] == [0, 1]
