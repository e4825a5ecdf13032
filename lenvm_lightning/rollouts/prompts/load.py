"""Prompts from wherever they are: embedded sets, JSONL files, data sets, and the paper's by name."""

import bisect
import glob
import hashlib
import json
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from ...errors import DataError, nearest
from ...utils.images import allowed_folders
from ..embedded import prompt_sets
from ..generators.interface import Prompt
from .parts import PromptPart, Source
from .sources import READY_MADE

_KEYS = {
    "source": str, "path": str, "name": str, "split": str, "columns": dict, "template": str, "first_turn": bool,
    "unique": bool, "label": str, "limit": int, "shuffle": bool, "seed": int, "questions": dict,
}  # fmt: skip
_COLUMNS = ("prompt", "messages", "image", "options", "id", "split", "meta")


class LoadedPrompts(Sequence[Prompt]):
    """Prompts of several sources, one after the other. Images are opened when a prompt is taken.

    Attributes:
        ids: the ``prompt_id`` of each, without taking any.
        description: where they come from and a digest of their content, as JSON values: what a run was sampled with.
    """

    def __init__(self, parts: list[PromptPart], given: dict[str, Any]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part.ids) for part in parts))
        self.ids = [prompt_id for part in parts for prompt_id in part.ids]
        digest = hashlib.blake2b("\n".join(part.digest for part in parts).encode(), digest_size=16).hexdigest()
        self.description = {**given, "count": len(self.ids), "digest": digest}

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        part = bisect.bisect_right(self._ends, place)
        return self._parts[part].take(place - (self._ends[part - 1] if part else 0))


def load_prompts(
    sources: str | dict[str, Any] | list[str | dict[str, Any]],
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    allow_images_from: str | Sequence[str] | None = None,
) -> LoadedPrompts:
    """Prompts of one or several sources, in their order.

    A source is a name or a mapping. Names: an embedded set (``tiny-math``, ``tiny-write``, ``tiny-vqa``); a data set of
    the paper (``deepmath``, ``wildchat``, ``opencodereasoning``, ``gsm8k``, ``math500``, ``mathvista``,
    ``mathvision``); JSONL files, as a path or glob; a data set by hub id, folder or file. A mapping has one of these as
    ``source`` or ``path``, and any of:

    * ``path``: beside the ``source`` of a data set of the paper: a local copy of it;
    * ``name``: configuration of a data set; ``split``: the one of its splits to take;
    * ``columns``: which column is the ``prompt`` (a text) or ``messages`` (a conversation), the ``image`` (one or a
      list), the ``options``, the ``id``, the ``split``; and which ones to remember as ``meta`` (a list, or new name to
      column). Without it rows have to hold ``messages``, ``conversations`` or ``prompt``;
    * ``template``: a text with ``{prompt}``, and other ``{columns}``, in it;
    * ``first_turn``: of a conversation, only what stands before the first answer;
    * ``unique``: of rows with the same id, only the first;
    * ``label``: what ids begin with; ``limit``, ``seed``: instead of the ones given for all; ``shuffle``: take rows in
      an order drawn with the seed;
    * ``questions``: local copies of the data sets that hold the questions of ``opencodereasoning``.

    Broken lines of a JSONL file are an error; rows of a data set without a question are left out, and counted.

    Args:
        sources: one or a list of them.
        split: ``train`` or ``test`` prompts alone; or a split of a data set, by its name.
        limit: prompts of each source, from the first; 600 of an embedded set where None.
        seed: of embedded sets and of shuffling.
        allow_images_from: other folders than those of the data from which images that rows name may be opened.

    Raises:
        DataError: a source that is not there, or rows that cannot be used; all that is wrong with one, at once.
    """
    listed = sources if isinstance(sources, list) else [sources]
    if not listed:
        raise DataError("there is no source of prompts: give at least one")
    allowed = allowed_folders(allow_images_from)
    sources_read = _read_sources(listed, split, limit, seed, allowed)
    parts = [part for source in sources_read for part in source.load()]
    _check_ids(parts)
    given = {"sources": json.loads(json.dumps(listed)), "split": split, "limit": limit, "seed": seed}
    return LoadedPrompts(parts, given)


def _check_ids(parts: list[PromptPart]) -> None:
    """Refuse ids that two sources have."""
    owner: dict[str, PromptPart] = {}
    for part in parts:
        for prompt_id in part.ids:
            other = owner.setdefault(prompt_id, part)
            if other is not part:
                raise DataError(
                    f"{other.shown} and {part.shown} both have a prompt {prompt_id!r}: the same one twice, or two that "
                    "are called the same. Leave one out, or give it a name of its own: {source: ..., label: ...}."
                )


def _read_sources(
    listed: list[Any], split: str | None, limit: int | None, seed: int, allowed: tuple[Path, ...]
) -> list[Source]:
    """What is asked for.

    Raises:
        DataError: it cannot be; all that is wrong, at once.
    """
    problems = []
    read = []
    for source in listed:
        given = {"source": source} if isinstance(source, str) else source
        wrong = _wrong(given, limit)
        problems += [f"{source!r}: {text}" for text in wrong]
        if not wrong:
            options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
            name = options.get("source") or options["path"]
            ready = READY_MADE.get(name)
            read.append(
                Source(
                    shown=name,
                    path=os.path.expanduser(options.get("path") or (ready.path if ready else name)),
                    ready=ready,
                    wanted=split,
                    limit=options.get("limit", limit),
                    seed=options.get("seed", seed),
                    options=options,
                    allowed=allowed,
                )
            )
    if problems:
        raise DataError("the prompts cannot be loaded:\n  " + "\n  ".join(problems))
    return read


def _wrong(given: Any, limit: int | None) -> list[str]:
    """What is wrong with a source."""
    if not isinstance(given, dict):
        return ["a source of prompts is a name or a mapping"]
    wrong = []
    for key, value in given.items():
        if key not in _KEYS:
            wrong.append(f"unknown key {key!r}{nearest(str(key), _KEYS)} (known: {', '.join(_KEYS)})")
        elif value is not None and type(value) is not _KEYS[key]:
            wrong.append(f"{key} must be {_KEYS[key].__name__}, found {value!r}")
    if wrong:
        return wrong
    try:
        json.dumps(given, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, TypeError, RecursionError):
        return ["it holds something that is no text (names of files that are not UTF-8, or half of a character)"]
    limit = given.get("limit", limit)
    if limit is not None and limit < 1:
        wrong.append(f"limit must be at least 1, found {limit}")
    name, path, columns = given.get("source"), given.get("path"), given.get("columns")
    if not name and not path:
        wrong.append("it has neither source nor path")
    elif name and path and name not in READY_MADE:
        wrong.append(f"both source and path: only {', '.join(READY_MADE)} can be given as a local copy")
    elif name and not path and not _is_place(name):
        known = [*prompt_sets(), *READY_MADE]
        wrong.append(
            f"no such source{nearest(name, known)} (known: {', '.join(known)}; JSONL files; data sets by folder or "
            "hub id)"
        )
    if columns is not None:
        unknown = [key for key in columns if key not in _COLUMNS]
        wrong += [
            f"columns: {key} must be the name of a column, found {value!r}"
            for key, value in columns.items()
            if not _names_columns(value, several=key in ("image", "meta"))
        ]
        wrong += [
            f"columns: unknown {key!r}{nearest(str(key), _COLUMNS)} (known: {', '.join(_COLUMNS)})" for key in unknown
        ]
        if not unknown and name not in READY_MADE and ("prompt" in columns) == ("messages" in columns):
            wrong.append("columns: give either prompt, a text, or messages, a conversation")
    return wrong


def _names_columns(value: Any, several: bool) -> bool:
    if isinstance(value, (list, dict)) and several:
        return all(isinstance(name, str) for name in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, str)


def _is_place(name: str) -> bool:
    """Whether a name may be that of files, a folder or a data set on the hub."""
    known = name in prompt_sets() or name in READY_MADE
    return known or "/" in name or name.endswith(".jsonl") or glob.has_magic(name) or os.path.exists(name)
