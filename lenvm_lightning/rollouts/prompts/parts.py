"""Prompts of one source: all of its rows are read once for what they say, and one again when its prompt is taken."""

import glob
import hashlib
import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import DataError, nearest
from ...utils.images import ImageFolders, open_image
from ..embedded import make_prompts, prompt_sets
from ..generators.interface import Prompt
from ..held_out import role_of
from .mapping import PLAIN_KINDS, ColumnMapping, Draft, PlainMapping, content_digest, missing_columns
from .rows import DatasetRows, JsonlRows, SourceRows, load_splits
from .sources import READY_MADE, ReadyMade, question_lookup

_log = logging.getLogger(__name__)
_COUNT = 600  # prompts of an embedded set where no limit says otherwise
_SHOWN = 20  # problems in a message
_OPENED = "a picture"  # stands for one in digests, so the word stays: others would make folders look changed
_LOOKED_AT = 64  # images of a data set that its digest looks at


@dataclass(frozen=True)
class Source:
    """One source and how to read it; see `load_prompts`.

    Attributes:
        shown: what to call it in messages.
        path: an embedded set, a JSONL file or glob, a folder, or a hub id.
        ready: what is known of it.
        wanted: the split asked for.
        limit: prompts to take; None: all, or 600 of an embedded set.
        seed: of embedded sets and of shuffling.
        options: what else was said.
        allowed: folders from which images that rows name may be opened, beside the one of the data.
    """

    shown: str
    path: str
    ready: ReadyMade | None = None
    wanted: str | None = None
    limit: int | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    allowed: tuple[Path, ...] = ()

    @property
    def is_files(self) -> bool:
        """Whether it is JSONL files, read line by line, and not a data set."""
        return self.path.endswith(".jsonl") or glob.has_magic(self.path)

    def load(self) -> "list[PromptPart]":
        """Its prompts, in as many parts as it has files or splits.

        Raises:
            DataError: it is not there, or holds rows that cannot be used, or no prompts.
        """
        if self.path in prompt_sets():
            return [_embedded(self)]
        parts: list[PromptPart] = []
        left = self.limit
        seen = 0
        for rows, name, role in _files(self) if self.is_files else _splits(self):
            part = _Reading(self, rows, name, role).part(left)
            parts.append(part)
            seen += len(rows)
            left = None if left is None else left - len(part.ids)
            if left == 0:
                break
        if not any(part.ids for part in parts):
            said = f" of split {self.split!r}" if self.split else ""
            raise DataError(f"{self.shown} has no prompts{said} (looked at {seen:,} rows in {self.path}).")
        return parts

    @property
    def split(self) -> str | None:
        """The split asked for, of this source or of all."""
        return self.options.get("split") or self.wanted

    def label(self, default: str) -> str:
        """What ids begin with."""
        return self.options.get("label") or (_name_of(self.ready) if self.ready else default)


@dataclass(frozen=True)
class PromptPart:
    """Prompts that can be taken by number.

    Attributes:
        ids: the ``prompt_id`` of each.
        digest: of their content.
        take: opens one.
        shown: what to call it in messages.
    """

    ids: list[str]
    digest: str
    take: Callable[[int], Prompt]
    shown: str


def _name_of(ready: ReadyMade) -> str:
    return next(name for name, known in READY_MADE.items() if known is ready)


def _embedded(source: Source) -> PromptPart:
    prompts = make_prompts(source.path, source.split, source.limit or _COUNT, source.seed)
    digest, ids = hashlib.blake2b(digest_size=16), []
    for i in range(len(prompts)):
        prompt = prompts[i]
        ids.append(prompt.prompt_id)
        digest.update(json.dumps([prompt.prompt_id, prompt.messages, prompt.split, prompt.meta]).encode())
        for image in prompt.images:
            assert isinstance(image, Image.Image)
            digest.update(image.tobytes())
    return PromptPart(ids, digest.hexdigest(), lambda i: prompts[i], source.shown)


# -- rows -------------------------------------------------------------------------------------------------------------


def _files(source: Source) -> Iterator[tuple[SourceRows, str, str | None]]:
    """Rows, name and role of each JSONL file."""
    files = sorted(path for path in glob.glob(source.path, recursive=True) if os.path.isfile(path))
    if not files:
        raise DataError(f"no file matches {source.path!r} (looked from {Path.cwd()}).")
    if source.split not in (None, "train", "test"):
        raise DataError(f"{source.shown}: split must be train or test for files, found {source.split!r}")
    for path in files:
        stem = os.fsencode(Path(path).stem).decode("utf-8", "replace")  # ids begin with it
        role = source.ready.splits.get(stem, role_of(stem)) if source.ready else None
        if source.ready and source.split and role != source.split:
            continue
        yield JsonlRows(Path(path)), stem, role


def _splits(source: Source) -> Iterator[tuple[SourceRows, str, str | None]]:
    """Rows, name and role of each split of a data set that is asked for."""
    ready, name = source.ready, source.options.get("name")
    call = f"{{source: {_name_of(ready)}, path: /my/copy}}" if ready else "{path: /my/copy, columns: {...}}"
    hint = f"With a copy of it (Parquet, Arrow or JSONL files in a folder), say {call}."
    found = load_splits(source.path, name or (ready.name if ready and not os.path.exists(source.path) else None), hint)
    roles = {split: (ready.splits.get(split) if ready else None) or role_of(split) for split in found}
    explicit = source.options.get("split")
    # A known data set says which split is for what: the `test` of MathVista has no answers, its `testmini` has.
    known = source.wanted in ready.splits.values() if ready else False
    if explicit is None and source.wanted in found and not known:
        explicit = source.wanted
    if explicit is not None:
        if explicit not in found:
            raise DataError(
                f"{source.shown} has no split {explicit!r}{nearest(explicit, found)} (it has {', '.join(found)})."
            )
        chosen = [explicit]
    else:
        usual = [split for split in ready.splits if split in found] if ready else []
        chosen = usual or list(found)
        if source.wanted and not (source.options.get("columns") or {}).get("split"):
            chosen = [split for split in chosen if roles[split] == source.wanted]
            if not chosen:
                raise DataError(f"{source.shown} has no split for {source.wanted!r} (it has {', '.join(found)}).")
    local = Path(source.path)
    folder = local if local.is_dir() else local.parent if local.is_file() else None
    for split in chosen:
        yield DatasetRows(found[split], f"split {split!r} of {source.shown}", folder), split, roles[split]


class _Reading:
    """Reads all rows of one file or split once."""

    def __init__(self, source: Source, rows: SourceRows, name: str, role: str | None) -> None:
        self._source, self._rows, self._name, self._role = source, rows, name, role
        self._mapping = _mapping(source, rows)
        self._folders = ImageFolders(rows.folder, source.allowed)
        columns = self._mapping.columns()
        self._wanted = columns if source.is_files else [name for name in columns if name in rows.columns]
        default = name if source.is_files else Path(source.path.rstrip("/")).stem
        self._label = source.label(default)
        self._problems: list[str] = []
        self._left_out: Counter[str] = Counter()
        self._seen: dict[str, str] = {}
        self._any_split = False

    def part(self, limit: int | None) -> PromptPart:
        """The prompts, at most ``limit``.

        Raises:
            DataError: lines of a file that cannot be used, a missing column, or an id with two prompts.
        """
        ids: list[str] = []
        indices: list[int] = []
        digest = hashlib.blake2b(digest_size=16)
        for index, draft in self._drafts():
            split = draft.split or self._role
            self._any_split |= split is not None
            if self._unwanted(split):
                continue
            prompt_id = self._id(index, draft)
            content = content_digest(draft)
            if prompt_id in self._seen:
                if self._seen[prompt_id] != content and not self._source.options.get("unique"):
                    self._problems.append(f"{self._rows.place(index)}: another prompt has the id {prompt_id!r} too")
                continue
            self._seen[prompt_id] = content
            if limit is None or len(ids) < limit:
                ids.append(prompt_id)
                indices.append(index)
                stamps = [self._stamp(image) for image in draft.images]
                digest.update(json.dumps([prompt_id, draft.messages, stamps, split, draft.meta]).encode())
            elif not self._source.is_files:
                break
        self._complain(not ids)
        part = PromptPart(ids, "", lambda i: self._take(ids[i], indices[i]), self._source.shown)
        for i in range(0, len(ids), max(1, len(ids) // _LOOKED_AT)) if self._mapping.images else ():
            for image in part.take(i).images:
                digest.update(image.tobytes() if isinstance(image, Image.Image) else b"")
        return replace(part, digest=digest.hexdigest())

    def _drafts(self) -> Iterator[tuple[int, Draft]]:
        """Rows that can be used; of others, why they cannot."""
        order = None
        if self._source.options.get("shuffle"):
            order = np.random.default_rng(self._source.seed).permutation(len(self._rows)).tolist()
        unique = self._source.options.get("unique", bool(self._source.ready and self._source.ready.unique))
        known: set[str] = set()
        for index, row in self._rows.scan(self._wanted, self._mapping.images, order):
            try:
                if isinstance(row, ValueError):
                    raise row
                if unique and self._mapping.id and (found := row.get(self._mapping.id)) is not None:
                    if str(found) in known:
                        continue
                    known.add(str(found))
                draft = self._mapping.draft(row)
                for image in draft.images:
                    self._stamp(image)
                yield index, draft
            except ValueError as error:
                if self._source.is_files:
                    self._problems.append(f"{self._rows.place(index)}: {error}")
                else:
                    self._left_out[str(error)] += 1

    def _id(self, index: int, draft: Draft) -> str:
        if draft.id is not None:
            return f"{self._label}/{draft.id}"
        if self._source.is_files and not self._source.ready:
            return f"{self._label}/{content_digest(draft)}"
        return f"{self._label}/{self._name}-{index}"

    def _unwanted(self, split: str | None) -> bool:
        if self._source.is_files:
            return self._source.split is not None and split != self._source.split
        by_row = self._source.wanted in ("train", "test") and self._mapping.split is not None
        return by_row and split != self._source.wanted

    def _stamp(self, image: Any) -> str:
        """What stands for an image in the digest: its path and size."""
        if not isinstance(image, str):
            if self._source.is_files:
                raise ValueError(f"an image is {type(image).__name__}, expected a path")
            if isinstance(image, dict) and isinstance(image.get("path"), str):
                self._folders.find(image["path"])
            return _OPENED
        try:
            status = os.stat(self._folders.find(image))
        except OSError as error:
            raise ValueError(f"image {image} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"image {image} cannot be read: it is no regular file")
        return f"{image}:{status.st_size}"

    def _complain(self, nothing_left: bool) -> None:
        if self._problems:
            more = len(self._problems) - _SHOWN
            raise DataError(
                f"{len(self._problems):,} rows of {self._source.shown} cannot be used:\n  "
                + "\n  ".join(self._problems[:_SHOWN])
                + (f"\n  … and {more:,} more" if more > 0 else "")
            )
        if self._left_out:
            reasons = "; ".join(f"{count:,} × {reason}" for reason, count in self._left_out.most_common(5))
            if nothing_left:
                raise DataError(f"no row of {self._source.shown} can be used: {reasons}.")
            _log.warning("%s: %d rows are left out: %s", self._source.shown, self._left_out.total(), reasons)
        if self._source.is_files and self._source.split and len(self._rows) and not self._any_split:
            raise DataError(
                f"split {self._source.split!r} was asked for, but no row of {self._source.shown} says which split it "
                "belongs to: leave split out."
            )

    def _take(self, prompt_id: str, index: int) -> Prompt:
        draft = self._mapping.draft(self._rows.row(index, self._wanted))
        images = []
        for image in draft.images:
            try:
                images.append(self._folders.find(image) if isinstance(image, str) else _open(image, self._folders))
            except ValueError as error:
                raise DataError(f"{self._rows.place(index)}: {error}") from error
        return Prompt(prompt_id, draft.messages, tuple(images), draft.split or self._role, draft.meta)


def _open(found: Any, folders: ImageFolders) -> Image.Image:
    """An image from its bytes, bare or in the layout of the ``datasets`` library.

    Raises:
        ValueError: it is none, cannot be opened, or may not be.
    """
    content, path = (found.get("bytes"), found.get("path")) if isinstance(found, dict) else (found, None)
    if not isinstance(content, bytes):
        if not isinstance(path, str):
            raise ValueError(f"{type(found).__name__} is no image")
        content = folders.find(path)
    return open_image(content, as_rgb=False)


# -- mappings ---------------------------------------------------------------------------------------------------------


def _mapping(source: Source, rows: SourceRows) -> ColumnMapping:
    """How rows are read.

    Raises:
        DataError: columns that are not there.
    """
    mapping = _chosen(source, rows.columns)
    if isinstance(mapping, PlainMapping):
        plain = [name for name in PLAIN_KINDS if name in rows.columns]
        if not source.is_files and len(plain) != 1:
            found = f"several columns of prompts, {', '.join(plain)}" if plain else "no column of prompts that is known"
            raise DataError(
                f"{source.shown} has {found}. Say which one to take: {{path: {source.path}, columns: "
                f"{{prompt: ...}}}}, or messages: ... for conversations (it has {', '.join(rows.columns)})."
            )
        return mapping
    problems = missing_columns(mapping.columns(), rows.columns)
    if problems and len(rows):
        raise DataError(
            f"{source.shown}, read from {source.path}: {'; '.join(problems)} (it has {', '.join(rows.columns)})."
        )
    return mapping


def _chosen(source: Source, there: list[str]) -> ColumnMapping:
    options = source.options
    columns = dict(options.get("columns") or {})
    changes: dict[str, Any] = {
        key: columns[key] for key in ("prompt", "messages", "options", "id", "split") if key in columns
    }
    if "image" in columns:
        changes["images"] = tuple(columns["image"]) if isinstance(columns["image"], list) else (columns["image"],)
    if "meta" in columns:
        meta = columns["meta"]
        changes["meta"] = (
            meta if isinstance(meta, dict) else {name: name for name in ([meta] if isinstance(meta, str) else meta)}
        )
    changes |= {key: options[key] for key in ("template", "first_turn") if key in options}
    if source.ready is None:
        return ColumnMapping(**changes) if columns else PlainMapping(**changes, images=("images", "image"))
    mapping = replace(source.ready.mapping(there), **changes)
    if source.ready.needs:
        mapping = replace(mapping, fix=question_lookup(source.ready, options.get("questions") or {}))
    return mapping
