"""The Arrow table of tokenised rollouts: built once by several processes, cached by content and settings."""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, Value
from datasets import List as ArrowList

from lenvm_lightning.errors import DataError
from lenvm_lightning.models.processors import tokenizer_of
from lenvm_lightning.rollouts.cells import cells_of, first_error
from lenvm_lightning.rollouts.record import parse_record
from lenvm_lightning.utils.images import ImageFolders, allowed_folders
from lenvm_lightning.utils.json_input import parse_json

from .table_cache import building_folder, default_cache_dir, give_name, load_table, save_table
from .tokenise import Limits, encode_rollout, stamp

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


def find_files(patterns: Sequence[str]) -> list[str]:
    """Files for names and globs, sorted and without repetition.

    Raises:
        DataError: a name or glob that matches nothing; all of them are listed.
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
    return files


def _digest_of(files: Sequence[str]) -> str:
    """Digest of the content of files, and of their places: relative image paths start there.

    Raises:
        DataError: one cannot be read, or has a name that is no text.
    """
    if unnamed := [path for path in files if os.fsencode(path).decode("utf-8", "replace") != path]:
        raise DataError(f"names of rollout files that are not UTF-8: {', '.join(map(ascii, unnamed))}. Rename them.")
    digest = hashlib.sha256()
    for path in files:
        digest.update(os.path.abspath(path).encode() + b"\0")
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _index_lines(files: Sequence[str]) -> Dataset:
    """Where each line of the files starts.

    Raises:
        DataError: there is none.
    """
    index: dict[str, list[Any]] = {"file": [], "line": [], "offset": []}
    for path in files:
        offset = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    for name, value in (("file", path), ("line", number), ("offset", offset)):
                        index[name].append(value)
                offset += len(line)
    if not index["file"]:
        raise DataError(f"no rollouts in {', '.join(files) or 'the given files'}: every line is empty")
    return Dataset.from_dict(index)


def _read_lines(batch: dict[str, list[Any]], allowed: tuple[Path, ...]) -> list[tuple[str, bytes, ImageFolders]]:
    """(place, content, where its images may lie) of each indexed line.

    Raises:
        DataError: a file cannot be read any more.
    """
    lines = []
    with contextlib.ExitStack() as opened:
        try:
            files = {path: opened.enter_context(open(path, "rb")) for path in set(batch["file"])}
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
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


@dataclass(frozen=True)
class _Source:
    """What is to be tokenised.

    Attributes:
        content: changes with it.
        load: its rows; costly for files, and needed only where they are not tokenised yet.
        encode: tokenises a batch of them.
        numbered: True = `encode` gets the numbers of the rows, too.
    """

    content: str
    load: Callable[[], Dataset]
    encode: Callable[..., dict[str, list[Any]]]
    numbered: bool = False


def _source(files: Sequence[str], dataset: dict[str, Any] | None, allowed: tuple[Path, ...]) -> _Source:
    """Files, or a data set.

    Raises:
        DataError: a file cannot be read, or the dataset cannot be loaded.
    """
    if dataset is None:
        encode: Callable[..., Any] = partial(_encode_lines, allowed=allowed)
        return _Source(_digest_of(files), partial(_index_lines, files), encode)
    try:
        source = datasets.load_dataset(**{"split": "train", **dataset})
    except Exception as error:  # readers of broken files raise whatever their format makes of them
        raise DataError(f"datasets.load_dataset({dataset}) failed: {error}") from error
    if not isinstance(source, Dataset):
        kind = type(source).__name__
        raise DataError(f"datasets.load_dataset({dataset}) gives {kind}: name one split, and do not stream it")
    home, name = _home_of(dataset), str(dataset.get("path"))
    encode = partial(_encode_items, name=name, features=source.features, folders=ImageFolders(home, allowed))
    return _Source(f"{source._fingerprint} {home}", lambda: source.with_format("arrow"), encode, numbered=True)


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
    source = _source(files, dataset, allowed)
    where = [os.path.realpath(folder) for folder in allowed]
    sizes = dataclasses.asdict(limits)
    if limits.until is None:  # as before there were segments: tables and runs from then go on
        del sizes["until"]
    settings = json.dumps([FORMAT, source.content, sizes, where]) + _processor_key(processor)
    key = hashlib.blake2b(settings.encode(), digest_size=12).hexdigest()
    root = cache_dir or default_cache_dir()
    folder = root / f"rollouts-{key}"
    table = load_table(folder)
    if table is not None and _images_unchanged(table):
        return table, key
    encode = partial(_encode_in_process, encode=source.encode, parent=os.getpid(), processor=processor, limits=limits)
    rows = source.load()
    with building_folder(root) as building:
        table = _tokenised(rows, encode, source.numbered, building, num_proc)
        save_table(table, building / "table")
        give_name(building / "table", folder, building)
    table = load_table(folder)
    if table is None:
        raise DataError(f"the tokenised rollouts in {folder} were changed by somebody else. Start again.")
    return table, key


def _tokenised(
    rows: Dataset, encode: Callable[..., Any], numbered: bool, building: Path, num_proc: int | None
) -> Dataset:
    """The table of all rows, in a folder that is about to go."""
    if num_proc is None:
        num_proc = max(1, min(os.cpu_count() or 1, len(rows) // 500))
    return rows.map(
        encode,
        batched=True,
        batch_size=200,
        with_indices=numbered,
        remove_columns=rows.column_names,
        features=_FEATURES,
        num_proc=num_proc if num_proc > 1 else None,
        cache_file_name=f"{building}/rows.arrow",
        load_from_cache_file=False,
        desc="Tokenising rollouts",
    ).with_format(None)


def _images_unchanged(table: Dataset) -> bool:
    """Whether every image is the file that it was when its rows were tokenised."""
    columns = table.with_format("arrow")[:]
    paths, stamps = (pc.list_flatten(columns[name]).to_pylist() for name in ("images", "image_stamps"))
    return all(stamp(path) == before for path, before in dict(zip(paths, stamps, strict=True)).items())
