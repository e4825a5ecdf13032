"""Rows of JSONL files and of data sets, read one at a time: all of them once for what they say, each again for use."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import DataError
from ...utils.json_input import parse_object
from ..cells import cells_of, first_error
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
            images: those of them that hold images: True stands for each that has its bytes.
            order: numbers of the rows to read; None: all of them, in order.
        """

    def row(self, index: int, wanted: Sequence[str]) -> SourceRow:
        """Return one row with its images: as bytes, or as paths."""


class JsonlRows:
    """Lines of JSONL files. Their places are kept, not their content.

    Args:
        file: a UTF-8 file with a JSON object a line.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.folder: Path | None = file.parent
        self._offsets: list[int] = []
        self._numbers: list[int] = []
        with self._opened() as lines:
            offset = 0
            for number, line in enumerate(lines, 1):
                if line.strip():
                    self._offsets.append(offset)
                    self._numbers.append(number)
                offset += len(line)
        first = [row for _, row in self.scan([], [], range(min(100, len(self)))) if isinstance(row, dict)]
        self.columns = list(dict.fromkeys(key for row in first for key in row))

    def _opened(self) -> BinaryIO:
        try:
            return self._file.open("rb")
        except OSError as error:
            raise DataError(f"{self._file} cannot be read: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self._offsets)

    def place(self, index: int) -> str:
        """File and line."""
        return f"{self._file}:{self._numbers[index]}"

    def scan(
        self, wanted: Sequence[str], images: Sequence[str], order: Sequence[int] | None
    ) -> Iterator[tuple[int, SourceRow | ValueError]]:
        """Whole lines, whatever is wanted of them; see `SourceRows`."""
        with self._opened() as file:
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
            batch = {name: self._cells(table, name, counted=name in images) for name in wanted}
            for i in range(table.num_rows):
                row = {name: column[i] for name, column in batch.items()}
                yield (at if order is None else order[at]), first_error(row) or row
                at += 1

    def row(self, index: int, wanted: Sequence[str]) -> SourceRow:
        """One row, read like all others; see `SourceRows`."""
        table = self._select(wanted)[index : index + 1]
        row = {name: self._cells(table, name)[0] for name in wanted}
        if error := first_error(row):
            raise DataError(f"{self.place(index)}: {error}")
        return row

    def _select(self, wanted: Sequence[str]) -> datasets.Dataset:
        key = tuple(wanted)
        if key not in self._selected:
            self._selected[key] = self._dataset.select_columns(list(key)).with_format("arrow")
        return self._selected[key]

    def _cells(self, table: pa.Table, name: str, counted: bool = False) -> list[Any]:
        kind = table[name].type
        if counted and not _is_text(kind) and not (_is_list(kind) and _is_text(kind.value_type)):
            return _counted(table[name])
        return cells_of(table[name], name, self._dataset.features[name])


def _counted(column: pa.ChunkedArray) -> list[Any]:
    """Images of each row without their bytes: True for each, or its path, in a mapping, where it has no bytes."""
    if _is_list(column.type):
        images = iter(_counted(pc.list_flatten(column)))
        return [list(itertools.islice(images, count or 0)) for count in pc.list_value_length(column).to_pylist()]
    there = column.is_valid().to_pylist()
    if not pa.types.is_struct(column.type) or {"bytes", "path"} - {field.name for field in column.type}:
        return [True if one else None for one in there]
    has_bytes, paths = pc.struct_field(column, "bytes").is_valid().to_pylist(), pc.struct_field(column, "path")
    return [
        (True if has_bytes[row] else {"path": paths[row].as_py()}) if one else None for row, one in enumerate(there)
    ]


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


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
    except Exception as error:  # readers of broken files raise whatever their format makes of them
        text = str(error).partition("\n")[0]
        raise DataError(f"the data set {path!r} cannot be read: {type(error).__name__}: {text}\n{hint}") from error
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
