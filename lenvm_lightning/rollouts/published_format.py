"""Rollouts in the published layout and back: one object a line, or all completions of a prompt on one.

The published layout has no place for generated token ids: read back, a completion's ids come from its text. Length,
finish reason, sampling settings and the prompt's own facts stay.
"""

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, StoreError
from ..utils.json_input import parse_json
from .read import rollouts_file
from .record import parse_record

_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
_SHOWN = 20


def convert(source: Path, target: Path, *, to: Literal["published", "ours"], grouped: bool = False) -> int:
    """Write rollouts in another layout.

    Args:
        source: folder of sampled rollouts, or a JSONL file in any layout that `parse_record` reads.
        target: JSONL file; appears when it is whole.
        to: the layout to write.
        grouped: published only: neighbouring completions of a prompt become a JSON list on one line.

    Returns:
        Number of completions.

    Raises:
        StoreError: the source is not there or not complete, or the target is there already.
        DataError: lines that cannot be read or written otherwise, all of them.
    """
    if grouped and to != "published":
        raise StoreError("only the published layout is written grouped")
    file = rollouts_file(source)
    if target.exists():
        raise StoreError(f"{target} is there already; choose another name, or delete it.")
    problems: list[str] = []
    records = (_publish if to == "published" else _take_in)(_lines(file, problems), target.parent, problems)
    part = target.with_name(f".{target.name}")
    count = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as out:
            for _, group in itertools.groupby(records, key=lambda pair: pair[0]):
                items = [record for _, record in group]
                count += len(items)
                out.writelines(json.dumps(line) + "\n" for line in ([items] if grouped else items))
        if not problems:
            part.replace(target)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error.strerror or error} ({error.filename})") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    if problems:
        more = f"\n  … and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise DataError(f"{file} cannot be converted:\n  " + "\n  ".join(problems[:_SHOWN]) + more)
    return count


def _lines(file: Path, problems: list[str]) -> Iterator[tuple[str, Path, Any]]:
    """(place, folder, record) of each completion or published group that can be read."""
    try:
        lines = file.open("rb")
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from error
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                records = parse_json(line)
                parse_record(records, file.parent)
            except ValueError as error:
                problems.append(f"{place}: {error}")
                continue
            for record in _flat(records):
                yield place, file.parent, record


def _flat(records: Any) -> Iterator[dict[str, Any]]:
    """Records of a line: `parse_record` takes lists of lists, too."""
    for record in records if isinstance(records, list) else []:
        yield from _flat(record)
    if isinstance(records, dict):
        yield records


def _publish(
    records: Iterator[tuple[str, Path, Any]], target: Path, problems: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(prompt, published record) of each completion."""
    for place, folder, record in records:
        rollout = parse_record(record, folder)[0][0]
        prompt = rollout.prompt_id
        if "conversations" in record:
            yield prompt, _moved(record, folder, target)
            continue
        for item in record.get("completions") or [record]:
            whole = {**record, **item, "messages": rollout.messages}  # with the roles that chats have
            if whole.get("completion") is None:
                problems.append(f"{place}: it has token ids only; the published layout needs text")
                continue
            yield prompt, to_published(_moved(whole, folder, target), prompt)


def to_published(record: dict[str, Any], prompt_id: str) -> dict[str, Any]:
    """One of our records, of one completion, in the published layout.

    Args:
        record: with its text.
        prompt_id: of its prompt, which the record need not name.
    """
    turns = [{"from": _ROLES[m["role"]], "value": m["content"]} for m in record["messages"]]
    ids = record.get("token_ids")
    sampling = record.get("sampling") or {}
    return {
        "conversations": [*turns, {"from": "gpt", "value": record["completion"]}],
        **({"images": record["images"]} if record.get("images") else {}),
        "meta_info": {
            "answer_token_length": None if ids is None else len(ids),
            "finish_reason": record.get("finish_reason") or "stop",
            "lenvm_idx": prompt_id,
            "split": record.get("split"),
            "model_name": record.get("generator"),
            **sampling,
        },
        "source_fields": record.get("meta") or {},
    }


def _take_in(
    records: Iterator[tuple[str, Path, Any]], target: Path, problems: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(prompt, our record) of each completion."""
    seen: Counter[str] = Counter()
    for _, folder, record in records:
        published = "conversations" in record
        for rollout in parse_record(record, folder)[0]:
            number = seen[rollout.prompt_id]
            seen[rollout.prompt_id] += 1
            ours = {
                "prompt_id": rollout.prompt_id,
                "number": number,
                "messages": rollout.messages,
                "images": [os.path.relpath(image, target) for image in rollout.images],
                "completion": rollout.completion,
                "token_ids": rollout.token_ids,
                "finish_reason": "length" if rollout.censored else "stop",
                "sampling": rollout.sampling,
                "generator": rollout.generator,
                "split": rollout.split,
                "meta": record.get("source_fields" if published else "meta"),
            }
            yield rollout.prompt_id, {key: value for key, value in ours.items() if value not in (None, [], {})}


def _moved(record: dict[str, Any], folder: Path, target: Path) -> dict[str, Any]:
    """A record whose image paths start at another folder."""
    images = record.get("images")
    if not images:
        return record
    paths = [images] if isinstance(images, str) else images
    return {**record, "images": [os.path.relpath(folder / path, target) for path in paths]}
