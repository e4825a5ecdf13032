"""The Arrow table of tokenised rollouts: built once by several processes, cached by content and settings."""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from datasets import Dataset, Features, Value
from datasets import List as ArrowList

from lenvm_lightning.errors import DataError, StoreError
from lenvm_lightning.models.processors import tokenizer_of
from lenvm_lightning.rollouts.cells import cells_of, first_error
from lenvm_lightning.rollouts.record import parse_record
from lenvm_lightning.utils.images import ImageFolders, allowed_folders
from lenvm_lightning.utils.json_input import parse_json
from lenvm_lightning.utils.locked_folder import FolderLock

from .tokenise import Limits, encode_rollout, stamp

_YOUNG = 3600.0  # seconds in which a folder may not be locked yet
FORMAT = 2  # raise it when rows change their meaning, so that older caches are left alone
_FEATURES = Features(
    {
        "input_ids": ArrowList(Value("int32")),
        "prompt_length": Value("int32"),
        "length": Value("int32"),
        "censored": Value("bool"),
        "prompt_id": Value("string"),
        "split": Value("string"),
        "images": ArrowList(Value("string")),
        "image_stamps": ArrowList(Value("string")),
        "sampling": Value("string"),
        "generator": Value("string"),
        "place": Value("string"),
        "problem": Value("string"),
        "notes": ArrowList(Value("string")),
    }
)
_EMPTY_ROW: dict[str, Any] = {
    "input_ids": [], "prompt_length": 0, "length": 0, "censored": False, "prompt_id": "", "split": "", "images": [],
    "image_stamps": [], "sampling": "", "generator": "",
}  # fmt: skip


def default_cache_dir() -> Path:
    """`$LENVM_CACHE`, else a folder in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LENVM_CACHE") or Path(home) / "lenvm_lightning")


def find_files(patterns: Sequence[str]) -> list[str]:
    """Files for names and globs, sorted and without repetition.

    Raises:
        DataError: a name or glob that matches nothing, or files whose names are no text; all of them are listed.
    """
    files: list[str] = []
    missing = []
    for pattern in patterns:
        found = sorted(p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p))
        if not found:
            missing.append(pattern)
        files += [path for path in found if path not in files]
    if missing:
        raise DataError(
            f"no rollout files match {', '.join(repr(m) for m in missing)} (looked from {Path.cwd()}). "
            "Give JSONL files or globs with --fit.data.files."
        )
    if unnamed := [path for path in files if os.fsencode(path).decode("utf-8", "replace") != path]:
        raise DataError(f"names of rollout files that are not UTF-8: {', '.join(map(ascii, unnamed))}. Rename them.")
    return files


def _index_lines(files: list[str]) -> tuple[list[dict[str, Any]], str]:
    """Where each line of the files starts, and a hash of their content."""
    lines: list[dict[str, Any]] = []
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        digest.update(os.fsencode(os.path.abspath(path)) + b"\0")  # relative image paths start at the file's folder
        offset = 0
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    if line.strip():
                        lines.append({"file": path, "line": number, "offset": offset})
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return lines, digest.hexdigest()


def _read_lines(batch: dict[str, list[Any]], allowed: tuple[Path, ...]) -> list[tuple[str, bytes, ImageFolders]]:
    """(place, content, where its images may lie) of each indexed line."""
    lines = []
    with contextlib.ExitStack() as opened:
        files = {path: opened.enter_context(open(path, "rb")) for path in set(batch["file"])}
        folders = {path: ImageFolders(Path(path).parent, allowed) for path in files}
        for row in range(len(batch["file"])):
            path = batch["file"][row]
            files[path].seek(batch["offset"][row])
            place = f"{path}:{batch['line'][row]}"
            lines.append((place, files[path].readline(), folders[path]))
    return lines


def _encode_line(
    place: str, record: Any, folders: ImageFolders, processor: Any, limits: Limits, prompts: dict[str, list[int]]
) -> list[dict[str, Any]]:
    try:
        rollouts, notes = parse_record(record, folders.home or Path())
    except ValueError as error:
        return [{**_EMPTY_ROW, "place": place, "problem": str(error), "notes": []}]
    rows = []
    for number, rollout in enumerate(rollouts):
        try:
            for image in rollout.images:
                folders.find(str(Path(image).absolute()))  # it starts at the folder already
            row, cuts = encode_rollout(processor, rollout, limits, prompts)
            rows.append({**row, "place": place, "problem": "", "notes": (notes if number == 0 else []) + cuts})
        except ValueError as error:
            # With its images, so that the table is made anew once they are fixed.
            images = {"images": rollout.images, "image_stamps": [stamp(path) for path in rollout.images]}
            rows.append({**_EMPTY_ROW, **images, "place": place, "problem": str(error), "notes": []})
    return rows


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in _FEATURES}


def _encode_lines(
    batch: dict[str, list[Any]], allowed: tuple[Path, ...], processor: Any, limits: Limits
) -> dict[str, list[Any]]:
    rows: list[dict[str, Any]] = []
    prompts: dict[str, list[int]] = {}
    for place, line, folders in _read_lines(batch, allowed):
        try:
            record = parse_json(line)
        except ValueError as error:
            rows.append({**_EMPTY_ROW, "place": place, "problem": str(error), "notes": []})
            continue
        rows += _encode_line(place, record, folders, processor, limits, prompts)
    return _columns(rows)


def _encode_in_process(
    *batch: Any, encode: Callable[..., dict[str, list[Any]]], parent: int, **options: Any
) -> dict[str, list[Any]]:
    """`encode`, in a forked worker with one thread: no fork takes OpenMP's along, and it would wait forever."""
    if os.getpid() != parent:
        torch.set_num_threads(1)
    return encode(*batch, **options)


def _encode_items(
    batch: pa.Table,
    indices: list[int],
    name: str,
    features: Features,
    folders: ImageFolders,
    processor: Any,
    limits: Limits,
) -> dict[str, list[Any]]:
    rows: list[dict[str, Any]] = []
    prompts: dict[str, list[int]] = {}
    columns = {key: cells_of(batch[key], key, features[key]) for key in batch.column_names}
    for position, index in enumerate(indices):
        # Arrow gives absent keys back as None; the JSON line would not have had them.
        record = {key: column[position] for key, column in columns.items() if column[position] is not None}
        place = f"{name}[{index}]"
        if error := first_error(record):
            rows.append({**_EMPTY_ROW, "place": place, "problem": str(error), "notes": []})
        else:
            rows += _encode_line(place, record, folders, processor, limits, prompts)
    return _columns(rows)


def _processor_key(processor: Any) -> str:
    """Everything about a processor that decides what it makes of a rollout."""
    tokenizer = tokenizer_of(processor)
    parts = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), str(tokenizer.eos_token_id)]
    if hasattr(processor, "image_processor"):
        parts += [processor.to_json_string(), processor.image_processor.to_json_string()]
    return "\0".join(parts)


def _home_of(dataset: dict[str, Any]) -> Path | None:
    """The one folder on this machine that a data set is read from; None where there is no such one.

    Args:
        dataset: arguments of `datasets.load_dataset`.
    """
    path, folder, files = str(dataset.get("path")), dataset.get("data_dir"), dataset.get("data_files")
    if os.path.isdir(path) and (os.sep in path or not (folder or files)):  # else it is the name of a format
        return Path(path)
    groups = files.values() if isinstance(files, dict) else [files or []]
    named = [str(file) for group in groups for file in (group if isinstance(group, list | tuple) else [group])]
    homes = {os.path.dirname(file) or os.curdir for file in named} | ({str(folder)} if folder else set())
    home = homes.pop() if len(homes) == 1 else ""
    return Path(home) if os.path.isdir(home) else None


def _source(
    files: Sequence[str], dataset: dict[str, Any] | None, allowed: tuple[Path, ...]
) -> tuple[Dataset, str, Callable[..., Any]]:
    """What is to be tokenised, something that changes with its content, and the function that tokenises a batch.

    Raises:
        DataError: there is not a single line, or the dataset cannot be loaded.
    """
    if dataset is None:
        lines, content = _index_lines(list(files))
        if not lines:
            raise DataError(f"no rollouts in {', '.join(files) or 'the given files'}: every line is empty")
        return Dataset.from_list(lines), content, partial(_encode_lines, allowed=allowed)
    try:
        source = datasets.load_dataset(**{"split": "train", **dataset})
    except (TypeError, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"datasets.load_dataset({dataset}) failed: {error}") from error
    if not isinstance(source, Dataset):
        kind = type(source).__name__
        raise DataError(f"datasets.load_dataset({dataset}) gives {kind}: name one split, and do not stream it")
    home = _home_of(dataset)
    name, folders = str(dataset.get("path")), ImageFolders(home, allowed)
    encode = partial(_encode_items, name=name, features=source.features, folders=folders)
    return source.with_format("arrow"), f"{source._fingerprint} {home}", encode


def build_table(
    processor: Any,
    limits: Limits,
    *,
    files: Sequence[str] = (),
    dataset: dict[str, Any] | None = None,
    cache_dir: Path | None = None,
    num_proc: int | None = None,
    allow_images_from: str | Sequence[str] | None = None,
) -> tuple[Dataset, str]:
    """Tokenise rollouts, or find them tokenised.

    Args:
        processor: tokenizer or processor of the backbone.
        limits: sizes to truncate to.
        files: JSONL files.
        dataset: arguments of `datasets.load_dataset` for rollouts kept as a dataset, in either layout.
        cache_dir: where tables are kept.
        num_proc: processes; by default one a core, fewer for few rows.
        allow_images_from: other folders than those of the data from which images that rows name may be opened.

    Returns:
        The table, one row a completion, rows with a `problem` included, and its key.

    Raises:
        DataError: there is not a single line, the dataset cannot be loaded, or the cache not be written.
    """
    allowed = allowed_folders(allow_images_from)
    source, content, encode = _source(files, dataset, allowed)
    where = [os.path.realpath(folder) for folder in allowed]
    settings = json.dumps([FORMAT, content, dataclasses.asdict(limits), where]) + _processor_key(processor)
    key = hashlib.blake2b(settings.encode(), digest_size=12).hexdigest()
    root = cache_dir or default_cache_dir()
    folder = root / f"rollouts-{key}"
    if folder.exists():
        table = datasets.load_from_disk(str(folder))
        if _images_unchanged(table):
            return table, key
    if num_proc is None:
        num_proc = max(1, min(os.cpu_count() or 1, len(source) // 500))
    with _building(root) as building:
        table = source.map(
            partial(_encode_in_process, encode=encode, parent=os.getpid(), processor=processor, limits=limits),
            batched=True,
            batch_size=200,
            with_indices=dataset is not None,
            remove_columns=source.column_names,
            features=_FEATURES,
            num_proc=num_proc if num_proc > 1 else None,
            cache_file_name=f"{building}/rows.arrow",
            load_from_cache_file=False,
            desc="Tokenising rollouts",
        ).with_format(None)
        table.save_to_disk(f"{building}/table")
        try:
            if folder.exists():  # its images changed; moved and not deleted, so that it is whole wherever it is there
                os.rename(folder, f"{building}/outdated")
            os.rename(f"{building}/table", folder)
        except OSError:  # another process was faster with the same table
            if not folder.exists():
                raise
    return datasets.load_from_disk(str(folder)), key


@contextlib.contextmanager
def _building(root: Path) -> Iterator[Path]:
    """A folder in the cache to build a table in; it goes, and with it those that killed processes left behind.

    Raises:
        DataError: the cache cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob("building-*"):
            if time.time() - left.stat().st_mtime > _YOUNG:
                with contextlib.suppress(StoreError), FolderLock(left):  # its owner holds the lock while it lives
                    shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=root, prefix="building-") as folder, FolderLock(Path(folder)):
            yield Path(folder)
    except OSError as error:
        raise DataError(
            f"the tokenised rollouts cannot be written to {root}: {error.strerror or error}. Make room, or name "
            "another place with data.cache_dir or $LENVM_CACHE."
        ) from error


def _images_unchanged(table: Dataset) -> bool:
    """Whether every image is the file that it was when its rows were tokenised."""
    stamps: dict[str, str] = {}
    for paths, stamps_of_row in zip(table["images"], table["image_stamps"], strict=True):
        stamps.update(zip(paths, stamps_of_row, strict=True))
    return all(stamp(path) == before for path, before in stamps.items())
