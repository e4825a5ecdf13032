"""Packing, by hand."""

from datamodules.report import packed_padding_share
from lenvm_lightning.training.packing import fill_bins, pack, take_batch


def test_bins_by_hand():
    lengths = [7, 3, 5, 2, 8]
    assert fill_bins(lengths, [3, 1, 2, 0, 4], 10, 5) == ([[4, 3], [0, 1], [2]], [])  # 8 + 2, 7 + 3, 5
    assert fill_bins(lengths, [3, 1, 2, 0, 4], 10, 2) == ([[4, 3], [0, 1]], [2])
    assert take_batch(lengths, [3, 1, 2, 0, 4], 8) == ([4], [3, 1, 2, 0])
    assert take_batch([9], [0], 8) == ([0], [])
    assert pack([90, 10, 60, 30, 50, 40]) == [[0, 1], [2, 4], [5, 3]]  # 3 of 110; 4 of 90 or 2 of 180 are more
    assert pack([1]) == [[0]]
    assert packed_padding_share([], []) == 0.0
