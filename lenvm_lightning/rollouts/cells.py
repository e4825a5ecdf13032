"""Cells of data sets as plain values. `datasets` would decode them itself: open images in any format, at any path."""

from typing import Any

import datasets
import pyarrow as pa

from ..utils.json_input import parse_json

_JSON = getattr(datasets, "Json", ())  # columns of mixed kinds, kept as text; older versions have none


def cells_of(column: pa.ChunkedArray, name: str, feature: Any) -> list[Any]:
    """The values of a column: texts, numbers, lists, objects; media as their bytes and paths.

    Args:
        column: of some rows.
        name: what it is called.
        feature: what the data set says of it.

    Returns:
        A value for each row, or a ValueError that says why it cannot be read.
    """
    try:
        return [_plain(value, feature) for value in column.to_pylist()]
    except ValueError:  # not UTF-8, or broken JSON: find out where
        return [_cell(column, row, name, feature) for row in range(len(column))]


def _cell(column: pa.ChunkedArray, row: int, name: str, feature: Any) -> Any:
    try:
        return _plain(column[row].as_py(), feature)
    except UnicodeDecodeError as error:
        return ValueError(f"{name}: it is not UTF-8: {error.reason} at byte {error.start}")
    except ValueError as error:
        return ValueError(f"{name}: {error}")


def _plain(value: Any, feature: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, _JSON):
        return parse_json(value)
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(value)
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _plain(inner, feature.get(key)) for key, inner in value.items()}
    if isinstance(feature, datasets.List | datasets.LargeList) and not isinstance(feature.feature, datasets.Value):
        return [_plain(inner, feature.feature) for inner in value]
    return value


def first_error(row: dict[str, Any]) -> ValueError | None:
    """Why a row cannot be read; None where it can."""
    return next((value for value in row.values() if isinstance(value, ValueError)), None)
