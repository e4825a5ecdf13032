"""Facts of rows of rollouts that no table holds."""

from collections.abc import Callable, Sequence

from datamodules.split import RowFacts


def row_facts(lengths: Sequence[int], censored: Callable[[int], bool]) -> list[RowFacts]:
    """Completions of one prompt, of these lengths; those are truncated whose length says so."""
    return [
        RowFacts(
            row=row, prompt_id="a", split="", tokens=length + 4, prompt_length=4, length=length,
            censored=censored(length), sampling="", generator="",
        )
        for row, length in enumerate(lengths)
    ]  # fmt: skip
