"""Which rows are trained on, and which are held out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info

from lenvm_lightning.errors import DataError
from lenvm_lightning.rollouts.held_out import is_held_out, role_of

from .settings import DataSettings


class RowFacts(NamedTuple):
    """What is known of a usable row without looking at its tokens.

    Attributes:
        row: its number in the table.
        prompt_id: of its prompt.
        split: as the rollout says; empty where it says nothing.
        tokens: of the row, prompt and what is kept of the completion.
        prompt_length: tokens of the prompt in the row.
        length: tokens of the whole completion, EOS included.
        censored: True = the completion was truncated at its token limit.
        sampling: settings it was sampled with, as text; empty where unknown.
        generator: what wrote it; empty where unknown.
    """

    row: int
    prompt_id: str
    split: str
    tokens: int
    prompt_length: int
    length: int
    censored: bool
    sampling: str
    generator: str


def usable_rows(table: Dataset) -> list[RowFacts]:
    """The rows of a table without a problem, in its order."""
    # Whole columns, and no tokens as objects of Python: row by row, a start took 20 seconds for every 100,000 rows.
    columns = table.with_format("arrow")[:]
    is_usable = pc.equal(columns["problem"], "")
    found = {
        "row": pa.chunked_array([pa.array(range(len(table)))]),
        "tokens": pc.list_value_length(columns["input_ids"]),
        **{name: columns[name] for name in columns.column_names},
    }
    of_usable = [found[name].filter(is_usable).to_pylist() for name in RowFacts._fields]
    return list(map(RowFacts._make, zip(*of_usable, strict=True)))


@dataclass(frozen=True)
class Split:
    """Rows to train on, and held-out rows; at least one of each."""

    train: list[RowFacts]
    held_out: list[RowFacts]


def split_rows(rows: Sequence[RowFacts], settings: DataSettings) -> Split:
    """Hold out the rows that say so, or a part of the prompts where none does, and train on the others.

    Raises:
        DataError: nothing to train or to validate on.
    """
    tests = {split for split in {row.split for row in rows} if role_of(split) == "test"}
    held_out = [row for row in rows if row.split in tests]
    if not held_out:
        chosen = {name for name in {row.prompt_id for row in rows} if is_held_out(name, settings.val_share)}
        held_out = [row for row in rows if row.prompt_id in chosen]
    numbers_held_out = {row.row for row in held_out}
    train = _take([row for row in rows if row.row not in numbers_held_out], settings)
    on_both_sides = {row.prompt_id for row in held_out} & {row.prompt_id for row in train}
    if on_both_sides:
        rank_zero_info(
            f"{len(on_both_sides):,} of the held-out prompts are trained on too, going by prompt_id, such as "
            f"{min(on_both_sides)!r}: errors on them say little"
        )
    if settings.val_completions is not None:
        held_out = held_out[: settings.val_completions]
    if not train or not held_out:
        empty = "train on" if not train else "validate on"
        raise DataError(
            f"no rows are left to {empty}: {len(train)} training and {len(held_out)} held-out completions. Give more "
            "prompts, mark some with split: test, or change data.val_share."
        )
    return Split(train, held_out)


def number_prompts(rows: Sequence[RowFacts]) -> list[int]:
    """Number of each row's prompt, in order of first appearance."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(row.prompt_id, len(numbers)) for row in rows]


def _take(rows: Sequence[RowFacts], settings: DataSettings) -> list[RowFacts]:
    """The training rows that train_prompts and train_completions ask for, and a note where there are too few."""
    prompts, completions = settings.train_prompts, settings.train_completions
    met: Counter[int] = Counter()  # completions of each prompt so far
    taken = []
    for row, prompt in zip(rows, number_prompts(rows), strict=True):
        met[prompt] += 1
        is_wanted = prompts is None or prompt < prompts
        if is_wanted and (completions is None or met[prompt] <= completions):
            taken.append(row)
    if prompts is not None and prompts > len(met):
        rank_zero_info(f"train_prompts asks for {prompts:,} prompts to train on, there are {len(met):,}")
    if completions is not None:
        of_wanted = [count for prompt, count in met.items() if prompts is None or prompt < prompts]
        too_few = sum(count < completions for count in of_wanted)
        if too_few:
            rank_zero_info(
                f"train_completions asks for {completions:,} completions of each prompt, {too_few:,} of the "
                f"{len(of_wanted):,} training prompts have fewer"
            )
    return taken
