"""Rows of a benchmark as its authors publish them: a JSONL file, or a data set by hub id, folder or file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, EvaluationError, nearest
from .settings import list_of, one_of

if TYPE_CHECKING:
    from ..rollouts.prompts.rows import SourceRows

LANGUAGES = ("en", "cn")  # English and Chinese, as LIFEBench calls them
LANGUAGE_LIST = list_of(one_of(*LANGUAGES), f"a list of {', '.join(LANGUAGES)}")
"""Kind of the setting `languages`."""
_SHOWN = 20  # problems in a message


def read_rows(
    source: str | Path, split: str | None = None, name: str | None = None
) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Read all rows.

    Args:
        source: a JSONL file; or a data set by hub id, folder or file.
        split: of a data set; may be left out where it has one only, since small splits often repeat rows of large ones.
        name: configuration of a data set.

    Returns:
        Rows, each after its place for people; and what is wrong with those that cannot be read.

    Raises:
        DataError: the source or the split is not there.
    """
    rows = _rows(str(source), split, name)
    placed: list[tuple[str, dict[str, Any]]] = []
    problems: list[str] = []
    for index, row in rows.scan(rows.columns, [], None):
        if isinstance(row, ValueError):
            problems.append(f"{rows.place(index)}: {row}")
        else:
            placed.append((rows.place(index), row))
    return placed, problems


def refuse(source: str, problems: list[str]) -> None:
    """Stop where there are problems.

    Raises:
        DataError: there are; it lists them.
    """
    if problems:
        more = len(problems) - _SHOWN
        raise DataError(
            f"{len(problems):,} rows of {source} cannot be used:\n  "
            + "\n  ".join(problems[:_SHOWN])
            + (f"\n  … and {more:,} more" if more > 0 else "")
        )


def spread(
    items: list[dict[str, Any]], limit: int | None, kind: Callable[[dict[str, Any]], tuple[Any, ...]]
) -> list[dict[str, Any]]:
    """Every so many-th item of those sorted by kind: each kind keeps its share, rounded; always the same items.

    Args:
        items: in any order, which those that are kept keep.
        limit: how many at most; None for all.
        kind: what items are sorted by.
    """
    if limit is None or limit >= len(items):
        return items
    order = sorted(range(len(items)), key=lambda i: (*kind(items[i]), i))
    taken = sorted(order[(2 * i + 1) * len(items) // (2 * limit)] for i in range(limit))
    return [items[i] for i in taken]


def place_of(data: str | dict[str, Any], task: str) -> tuple[str, dict[str, Any]]:
    """Where `--data` says that a benchmark is, and its split and name as keyword arguments.

    Args:
        data: a place, or a mapping with `path` and perhaps `split` and `name`.
        task: whose, for the message.

    Raises:
        EvaluationError: another mapping.
    """
    given = data if isinstance(data, dict) else {"path": data}
    if set(given) - {"path", "split", "name"} or "path" not in given:
        raise EvaluationError(f"--data: {task} takes a path, and a split and a name of it; found {given}")
    return given["path"], {key: value for key, value in given.items() if key != "path"}


def require_languages(given: Sequence[str]) -> None:
    """Refuse languages that these benchmarks do not have.

    Raises:
        DataError: there are some, or none at all.
    """
    if not given or set(given) - set(LANGUAGES):
        raise DataError(f"languages must be some of en and cn (Chinese), got {list(given)}")


def require_english(languages: Sequence[str] | None) -> None:
    """Refuse languages that the tiny world does not write; None is whatever there is.

    Raises:
        EvaluationError: there are some.
    """
    if languages not in (None, ["en"]):
        raise EvaluationError("--languages: the tiny world writes English only; give --data for other prompts")


def _rows(source: str, split: str | None, name: str | None) -> "SourceRows":
    # The datasets library takes half a second to import, which those who only score need not wait for.
    from ..rollouts.prompts.rows import DatasetRows, JsonlRows, load_splits

    file = Path(source).expanduser()
    if file.suffix == ".jsonl":
        if not file.is_file():
            raise DataError(f"there is no file {source!r} (looked from {Path.cwd()}).")
        if split or name:
            raise DataError(
                f"{source} is a file of items, without splits and configurations: leave split and name out."
            )
        return JsonlRows(file)
    hint = "With a copy of its JSONL file, give the path of that."
    found = load_splits(source, name, hint)
    if split is None and len(found) > 1:
        raise DataError(f"{source} has the splits {', '.join(found)}: say which one to take.")
    chosen = split or next(iter(found))
    if chosen not in found:
        raise DataError(f"{source} has no split {chosen!r}{nearest(chosen, found)} (it has {', '.join(found)}).")
    return DatasetRows(found[chosen], f"split {chosen!r} of {source}", None)
