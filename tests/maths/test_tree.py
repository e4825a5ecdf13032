from types import SimpleNamespace

import pytest
import torch

from lenvm_lightning.tree import step_mask, tree_layout


@pytest.mark.parametrize(("kind", "size"), [("sliding_attention", 4), ("chunked_attention", 8)])
def test_candidates_see_what_they_would_see_as_the_next_token(kind, size):
    """Whatever the place in a window or a chunk: a token chosen, and two that may follow it."""
    config = SimpleNamespace(sliding_window=size, attention_chunk_size=size)
    within, depth = tree_layout([-1, 0, 0])
    for length in range(20):
        columns = torch.tensor([[length, length + 1, length + 2]])
        seen = step_mask(columns, 32, within, depth, kind, config)[0]
        for token, place in ((0, length), (1, length + 1), (2, length + 1)):
            first = place - size + 1 if kind == "sliding_attention" else place // size * size
            wanted = {column for column in range(32) if max(0, first) <= column < length}
            wanted |= {length} if first <= length else set()
            wanted |= {length + token}
            assert set(seen[token].nonzero().flatten().tolist()) == wanted, (length, token)
