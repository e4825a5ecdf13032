"""Labels of a row, by hand."""

import pytest

from lenvm_lightning.batch import label_states


@pytest.mark.parametrize(
    ("prompt", "kept", "length", "remaining", "mask"),
    [
        (2, 3, 3, [0, 3, 2, 1, 0, 0], [0, 1, 1, 1, 1, 0]),  # to the end, and a place of padding
        (2, 2, 5, [0, 5, 4, 3, 0, 0], [0, 1, 1, 1, 0, 0]),  # a cut completion: counts do not shift
        (1, 5, 5, [5, 4, 3, 2, 1, 0], [1, 1, 1, 1, 1, 1]),
        (3, 0, 4, [0, 0, 4, 0, 0, 0], [0, 0, 1, 0, 0, 0]),  # nothing but the end of the prompt
    ],
)
def test_states_count_what_is_still_to_come(prompt, kept, length, remaining, mask):
    found = label_states(prompt, kept, length, 6)
    assert found[0].tolist() == remaining
    assert found[1].int().tolist() == mask
