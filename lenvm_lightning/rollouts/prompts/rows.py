"""Rows of JSONL files and of data sets, read one at a time: all of them once for what they say, each again for use."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import DataError
from ...utils.json_input import parse_object
from .mapping import SourceRow


class SourceRows(Protocol):
    """Numbered rows.

    Attributes:
        columns: names of the columns: of all rows, or of the first hundred where they may differ.
        folder: where relative paths of images start; None where there is no such place.
    """

    columns: list[str]
    folder: Path | None

    def __len__(self) -> int:
        """Return how many there are."""

    def place(self, index: int) -> str:
        """Return where a row is, for people."""

    def scan(
        self, wanted: Sequence[str], images: Sequence[str], order: Sequence[int] | None
    ) -> Iterator[tuple[int, SourceRow | ValueError]]:
        """Yield the number of a row and what it holds, or why it cannot be read.

        Args:
            wanted: columns to read.
            images: those of them that hold images: True stands for each that is no path.
            order: numbers of the rows to read; None: all of them, in order.
        """

    def row(self, index: int, wanted: Sequence[str]) -> SourceRow:
        """Return one row with its images: as bytes, or as paths."""


class JsonlRows:
    """Lines of JSONL files. Their places are kept, not their content.

    Args:
        file: a UTF-8 file with a JSON object a line.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.folder: Path | None = file.parent
        self._offsets: list[int] = []
        self._numbers: list[int] = []
        with file.open("rb") as lines:
            offset = 0
            for number, line in enumerate(lines, 1):
                if line.strip():
                    self._offsets.append(offset)
                    self._numbers.append(number)
                offset += len(line)
        first = [row for _, row in self.scan([], [], range(min(100, len(self)))) if isinstance(row, dict)]
        self.columns = list(dict.fromkeys(key for row in first for key in row))

    def __len__(self) -> int:
        return len(self._offsets)

    def place(self, index: int) -> str:
        """File and line."""
        return f"{self._file}:{self._numbers[index]}"

    def scan(
        self, wanted: Sequence[str], images: Sequence[str], order: Sequence[int] | None
    ) -> Iterator[tuple[int, SourceRow | ValueError]]:
        """Whole lines, whatever is wanted of them; see `SourceRows`."""
        with self._file.open("rb") as file:
            for index in range(len(self)) if order is None else order:
                file.seek(self._offsets[index])
                try:
                    yield index, parse_object(file.readline())
                except ValueError as error:
                    yield index, error

    def row(self, index: int, wanted: Sequence[str]) -> SourceRow:
        """One line; see `SourceRows`."""
        ((_, row),) = self.scan(wanted, [], [index])
        if isinstance(row, ValueError):
            raise DataError(f"{self.place(index)} was changed while it was in use: {row}")
        return row


class DatasetRows:
    """Rows of one split of a data set.

    Args:
        dataset: the split.
        name: what to call it in messages.
        folder: where it lies, for images that are paths.
    """

    def __init__(self, dataset: datasets.Dataset, name: str, folder: Path | None) -> None:
        # Images stay as bytes until somebody looks at them.
        for column, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self._dataset, self._name = dataset, name
        self._selected: dict[tuple[str, ...], datasets.Dataset] = {}
        self.folder = folder
        self.columns = list(dataset.column_names)

    def __len__(self) -> int:
        return len(self._dataset)

    def place(self, index: int) -> str:
        """Row and data set."""
        return f"row {index} of {self._name}"

    def scan(
        self, wanted: Sequence[str], images: Sequence[str], order: Sequence[int] | None
    ) -> Iterator[tuple[int, SourceRow | ValueError]]:
        """Batches of Arrow, of the wanted columns alone; see `SourceRows`."""
        data = self._select(wanted)
        if order is not None:
            data = data.select(order)
        at = 0
        for table in data.iter(batch_size=1000):
            batch = {name: _counted(table[name]) if name in images else self._values(table, name) for name in wanted}
            for i in range(table.num_rows):
                yield (at if order is None else order[at]), {name: column[i] for name, column in batch.items()}
                at += 1

    def row(self, index: int, wanted: Sequence[str]) -> SourceRow:
        """One row, read like all others; see `SourceRows`."""
        table = self._select(wanted)[index : index + 1]
        return {name: self._values(table, name)[0] for name in wanted}

    def _select(self, wanted: Sequence[str]) -> datasets.Dataset:
        key = tuple(wanted)
        if key not in self._selected:
            self._selected[key] = self._dataset.select_columns(list(key)).with_format("arrow")
        return self._selected[key]

    def _values(self, table: pa.Table, name: str) -> list[Any]:
        values, feature = table[name].to_pylist(), self._dataset.features[name]
        if isinstance(feature, datasets.ClassLabel):
            return [None if value is None else feature.int2str(value) for value in values]
        return values


def _counted(column: pa.ChunkedArray) -> list[Any]:
    """Images of each row: paths as they are, True for every other."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if _is_text(kind.value_type):
            return column.to_pylist()
        return [[True] * (count or 0) for count in pc.list_value_length(column).to_pylist()]
    return (
        column.to_pylist() if _is_text(kind) else [True if there else None for there in column.is_valid().to_pylist()]
    )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def load_splits(path: str, name: str | None, hint: str) -> dict[str, datasets.Dataset]:
    """Splits of a data set: a hub id, a folder or file of Parquet, Arrow, JSON or CSV, or what ``save_to_disk`` wrote.

    Args:
        path: which one.
        name: its configuration.
        hint: how to give a local copy, for those without a hub.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    local = Path(os.path.expanduser(path))
    try:
        if local.is_dir() and any((local / file).exists() for file in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(local))
        elif local.is_file():
            kind = {".jsonl": "json", ".feather": "arrow"}.get(local.suffix, local.suffix.lstrip("."))
            loaded = datasets.load_dataset(kind, data_files=str(local))
        else:
            loaded = datasets.load_dataset(str(local) if local.is_dir() else path, name)
    except ConnectionError as error:
        raise DataError(
            f"the data set {path!r} is not on this machine, and the hub cannot be reached ({error}).\n{hint}"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        text = str(error).partition("\n")[0]
        raise DataError(f"the data set {path!r} cannot be read: {type(error).__name__}: {text}\n{hint}") from error
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
