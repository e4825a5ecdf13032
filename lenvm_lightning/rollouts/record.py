"""The rollout record: one completion of one prompt, in our own JSONL layout or in the published one.

Ours, one object a line (``completions`` may group several of one prompt)::

    {"prompt_id": "7", "messages": [{"role": "user", "content": "<image>How many?"}], "images": ["7.png"],
     "completion": "Three.", "token_ids": [5, 9, 2], "finish_reason": "stop", "split": "train",
     "sampling": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 512}, "generator": "tiny-vl"}

Published::

    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "images": [...],
     "meta_info": {"lenvm_idx": 7, "split": "train", ...}, "source_fields": {...}}

where consecutive ``gpt`` turns at the end, or a JSON list on one line, group several completions of a prompt. With
consecutive turns, ``answer_token_length`` and ``finish_reason`` are lists, an entry a completion.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import nearest

IMAGE_MARK = "<image>"
MOST_TOKEN_ID = 2**31 - 1  # no vocabulary comes near; tables of ids are 32 bits wide
_MOST_LOGPROB = 1e12  # nats, of a completion in either direction: sums of millions stay finite
_OURS = {
    "prompt_id", "number", "messages", "images", "completion", "token_ids", "finish_reason", "split", "sampling",
    "generator", "reencoded", "completions", "logprob", "correct", "meta",
}  # fmt: skip
_PUBLISHED = {"conversations", "images", "meta_info", "source_fields", "id"}
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
FINISH = ("stop", "length")


@dataclass(frozen=True)
class Rollout:
    """One completion.

    Attributes:
        prompt_id: same for all completions of a prompt.
        messages: the prompt as chat messages, roles system / user / assistant; ``<image>`` marks an image.
        images: paths, absolute or relative to the working directory, in the order of their marks.
        completion: text of the completion.
        token_ids: generated ids, EOS included where it was generated; None where only text is known.
        censored: True = it hit its token limit, so its length is only known to be greater than what was seen.
        split: ``train`` or ``test``; None where the file does not say.
        sampling: temperature, top_p, … it was sampled with, as far as known; without the completion's own seed.
        generator: name of the model that wrote it.
    """

    prompt_id: str
    messages: list[dict[str, str]]
    images: list[str]
    completion: str
    token_ids: list[int] | None = None
    censored: bool = False
    split: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    generator: str | None = None


def require_sound(text: Any, token_ids: Any, logprob: Any = None) -> None:
    """Refuse a completion that cannot have been written, or that would break whoever reads it.

    Args:
        text: of the completion.
        token_ids: generated ids.
        logprob: of all of them together (nats); None where it is not known.

    Raises:
        ValueError: one of them is nothing of the kind, or out of bounds; the text says which.
    """
    if not isinstance(text, str):
        raise ValueError(f"completion is {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"completion holds half a character (a lone surrogate) at {error.start}") from None
    if not isinstance(token_ids, list) or not all(type(i) is int and 0 <= i <= MOST_TOKEN_ID for i in token_ids):
        raise ValueError(f"token_ids is not a list of whole numbers from 0 to {MOST_TOKEN_ID}")
    known = isinstance(logprob, int | float) and not isinstance(logprob, bool)
    if logprob is not None and not (known and abs(logprob) <= _MOST_LOGPROB):
        raise ValueError(f"logprob is not a number from {-_MOST_LOGPROB:g} to {_MOST_LOGPROB:g}")


def parse_record(record: Any, folder: Path) -> tuple[list[Rollout], list[str]]:
    """Rollouts of one line.

    Args:
        record: the decoded JSON of the line.
        folder: where relative image paths start, the folder of the file.

    Returns:
        The rollouts, and notes about things that were passed over (keys nobody knows).

    Raises:
        ValueError: the record is unusable; the text says why.
    """
    if isinstance(record, list):
        if not record:
            raise ValueError("the list is empty")
        parsed = [parse_record(item, folder) for item in record]
        return [r for rollouts, _ in parsed for r in rollouts], [n for _, notes in parsed for n in notes]
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    notes: list[str] = []
    if "conversations" in record:
        known = _PUBLISHED
        rollouts, notes = _parse_published(record, folder)
    elif "messages" in record:
        known = _OURS
        rollouts = _parse_ours(record, folder)
    else:
        hint = _hint(record, ["conversations", "messages"])
        raise ValueError(f"neither 'messages' nor 'conversations' among its keys ({', '.join(record)}){hint}")
    items = record["completions"] if known is _OURS and record.get("completions") else []
    unknown = dict.fromkeys(key for part in [record, *items] for key in part if key not in known)
    return rollouts, notes + [f"unknown key {key!r}{nearest(key, known)}" for key in unknown]


def _hint(keys: Iterable[str], wanted: list[str]) -> str:
    """Which of the ``wanted`` keys one of those found was meant to be."""
    return next((hint for key in keys if (hint := nearest(key, wanted))), "")


def _typed(record: dict[str, Any], key: str, kind: type | tuple[type, ...], called: str) -> Any:
    """An optional entry; None where it is absent or null."""
    value = record.get(key)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{key} is {type(value).__name__}, expected {called}")
    return value


def _images(record: dict[str, Any], messages: list[dict[str, str]], folder: Path) -> list[str]:
    paths = record.get("images") or []
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError("images is not a list of paths")
    marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if marks != len(paths):
        raise ValueError(f"{marks} {IMAGE_MARK} marks in the prompt but {len(paths)} images")
    return [str(folder / path) for path in paths]


def _prompt_id(given: Any, messages: list[dict[str, str]], images: list[str]) -> str:
    if given is not None:
        return str(given)
    return hashlib.blake2b(json.dumps([messages, images]).encode(), digest_size=8).hexdigest()


def _messages(turns: Any, role_key: str, text_key: str) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise ValueError("the conversation is empty or not a list")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn of the conversation is {type(turn).__name__}, expected an object")
        role, text = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"unknown role {role!r}{nearest(str(role), _ROLES)} (known: {', '.join(_ROLES)})")
        if not isinstance(text, str):
            raise ValueError(f"the text of a {role} turn is {type(text).__name__}, expected a string")
        messages.append({"role": _ROLES[role], "content": text})
    return messages


def _parse_published(record: dict[str, Any], folder: Path) -> tuple[list[Rollout], list[str]]:
    messages = _messages(record["conversations"], "from", "value")
    completions: list[str] = []
    while messages and messages[-1]["role"] == "assistant":
        completions.insert(0, messages.pop()["content"])
    if not completions:
        raise ValueError("the conversation does not end with a gpt turn")
    if not messages:
        raise ValueError("there is no prompt before the gpt turn")
    meta = _typed(record, "meta_info", dict, "an object") or {}
    images = _images(record, messages, folder)
    index = meta.get("lenvm_idx")
    if index is not None and meta.get("dataset_name"):
        index = f"{meta['dataset_name']}/{index}"  # data sets that are trained on together each count from 0
    truncated, notes = _truncated_of_published(meta, len(completions))
    common: dict[str, Any] = {
        "prompt_id": _prompt_id(index, messages, images),
        "messages": messages,
        "images": images,
        "split": _typed(meta, "split", str, "a string"),
        "sampling": {
            k: meta[k] for k in ("temperature", "top_p", "top_k", "min_p", "max_tokens") if meta.get(k) is not None
        },
        "generator": _typed(meta, "model_name", str, "a string"),
    }
    return [Rollout(completion=t, censored=c, **common) for t, c in zip(completions, truncated, strict=True)], notes


def _truncated_of_published(meta: dict[str, Any], count: int) -> tuple[list[bool], list[str]]:
    """Which of ``count`` completions were truncated, and notes.

    The published layout has no finish reason (ours adds one): a completion as long as its limit was truncated by it.
    """
    limit = _typed(meta, "max_tokens", (int, float), "a number")
    lengths, one_length = _each(meta, "answer_token_length", (int, float), "a number", count)
    reasons, one_reason = _each(meta, "finish_reason", str, "a string", count)
    truncated = [
        reason == "length" or (reason is None and length is not None and limit is not None and length >= limit)
        for length, reason in zip(lengths, reasons, strict=True)
    ]
    names = [
        name
        for name, decides in (
            ("answer_token_length", one_length and limit is not None and not any(reasons)),
            ("finish_reason", one_reason and meta["finish_reason"] != "stop"),
        )
        if decides
    ]
    return truncated, [
        f"{name} is one value for {count} completions, so it says of none whether it was truncated" for name in names
    ]


def _each(meta: dict[str, Any], key: str, kind: Any, called: str, count: int) -> tuple[list[Any], bool]:
    """An entry of each of ``count`` completions, None where unknown; and whether one value was given for several."""
    value = meta.get(key)
    if not isinstance(value, list):
        value = _typed(meta, key, kind, called)
        return [value if count == 1 else None] * count, value is not None and count > 1
    if len(value) != count:
        raise ValueError(f"{key} has {len(value)} entries for {count} completions")
    for entry in value:
        if entry is not None and not isinstance(entry, kind):
            raise ValueError(f"an entry of {key} is {type(entry).__name__}, expected {called}")
    return value, False


def _parse_ours(record: dict[str, Any], folder: Path) -> list[Rollout]:
    messages = _messages(record["messages"], "role", "content")
    images = _images(record, messages, folder)
    common: dict[str, Any] = {
        "prompt_id": _prompt_id(record.get("prompt_id"), messages, images),
        "messages": messages,
        "images": images,
        "split": _typed(record, "split", str, "a string"),
        "sampling": {k: v for k, v in (_typed(record, "sampling", dict, "an object") or {}).items() if k != "seed"},
        "generator": _typed(record, "generator", str, "a string"),
    }
    items = _typed(record, "completions", list, "a list")
    if items == []:
        raise ValueError("completions is empty")
    rollouts = []
    for item in [record] if items is None else items:
        if not isinstance(item, dict):
            raise ValueError(f"a completion in completions is {type(item).__name__}, expected an object")
        reason = item.get("finish_reason") or "stop"
        if reason not in FINISH:
            raise ValueError(f"unknown finish_reason {reason!r}{nearest(str(reason), FINISH)} (known: stop, length)")
        ids = item.get("token_ids")
        if "completion" not in item and ids is None:
            raise ValueError("neither 'completion' nor 'token_ids'" + _hint(item, ["completion", "token_ids"]))
        text = _typed(item, "completion", str, "a string") or ""
        require_sound(text, [] if ids is None else ids)
        rollouts.append(Rollout(completion=text, token_ids=ids, censored=reason == "length", **common))
    return rollouts
