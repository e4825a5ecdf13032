"""Rows are cut into the cheapest groups."""

import itertools

import torch

from lenvm_lightning.decoding.kv_layout import ROW_GROUP_COST, cut_row_groups


def cost(groups):
    return sum(ROW_GROUP_COST + (stop - start) * width for start, stop, width in groups)


def test_row_groups_are_the_cheapest():
    """Against every way to cut ten rows."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        widths = [64 * int(n) for n in torch.randint(1, 12, (10,), generator=generator)]
        groups = cut_row_groups(widths)
        assert [row for group in groups for row in range(group.start, group.stop)] == list(range(10))
        assert all(group.width >= max(widths[group.start : group.stop]) for group in groups)
        lines = [group.before for group in groups] + [sum((s.stop - s.start) * s.width for s in groups)]
        assert [b - a for a, b in itertools.pairwise(lines)] == [(s.stop - s.start) * s.width for s in groups]
        every = []
        for size in range(10):
            for cuts in itertools.combinations(range(1, 10), size):
                pairs = itertools.pairwise([0, *cuts, 10])
                every.append([(a, b, max(widths[a:])) for a, b in pairs])
        assert cost([(group.start, group.stop, group.width) for group in groups]) == min(map(cost, every))
