"""A row of somebody's data as a prompt: which columns hold what, and the templates around them."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ...errors import nearest
from ..held_out import role_of
from ..record import IMAGE_MARK

SourceRow = dict[str, Any]
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_PLACE = re.compile(r"\{\{|\}\}|\{(\w+)\}")
PLAIN_KINDS = ("messages", "conversations", "prompt")
_PLAIN_KEYS = (*PLAIN_KINDS, "images", "image", "prompt_id", "id", "split", "meta", "meta_info")
_OF_COMPLETIONS = (  # of rollouts, whose prompts are as good as any
    "number", "completion", "completions", "token_ids", "finish_reason", "logprob", "sampling", "generator",
    "reencoded", "correct", "source_fields",
)  # fmt: skip


@dataclass(frozen=True)
class Draft:
    """A prompt before its id is settled and its images are opened.

    Attributes:
        messages: chat messages, roles system / user / assistant, a mark for each image.
        images: as found in the row: paths, opened images, or True where only their number is known.
        id: as found in the row, or None.
        split: ``train``, ``test`` or None.
        meta: JSON values.
    """

    messages: list[dict[str, str]]
    images: list[Any]
    id: str | None = None
    split: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def content_digest(draft: Draft) -> str:
    """Digest of what a prompt consists of, so that equal prompts get equal ones."""
    return hashlib.blake2b(
        json.dumps([draft.messages, list(map(str, draft.images))]).encode(), digest_size=8
    ).hexdigest()


def read_turns(turns: Any, *, first_turn: bool = False) -> list[dict[str, str]]:
    """Chat messages of a conversation, without what a model said last.

    Args:
        turns: the conversation, in ``role`` and ``content``, or in ``from`` and ``value``.
        first_turn: keep only what stands before the first answer.

    Raises:
        ValueError: it is no conversation, or nobody asks anything in it.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError("the conversation is empty or not a list")
    messages: list[dict[str, str]] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn of the conversation is {type(turn).__name__}, expected an object")
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"unknown role {role!r}{nearest(str(role), _ROLES)} (known: {', '.join(_ROLES)})")
        if first_turn and messages and _ROLES[role] == "assistant":
            break
        if not isinstance(text, str):
            raise ValueError(f"the text of a {role} turn is {type(text).__name__}, expected a string")
        messages.append({"role": _ROLES[role], "content": text})
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise ValueError("nobody asks anything in the conversation")
    return messages


def place_marks(messages: list[dict[str, str]], images: int) -> list[dict[str, str]]:
    """Messages with a mark for each image: where they have none, the images go before the first question.

    A ``<image>`` in a text that has no images is only a word, and would be taken for one: it gets a space.

    Raises:
        ValueError: some images have marks, but not all of them.
    """
    marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if marks == images:
        return messages
    if not images:
        return [{**m, "content": m["content"].replace(IMAGE_MARK, "< image>")} for m in messages]
    if marks:
        raise ValueError(f"{marks} {IMAGE_MARK} marks in the prompt but {images} images")
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    marked = {**messages[first], "content": IMAGE_MARK * images + messages[first]["content"]}
    return [*messages[:first], marked, *messages[first + 1 :]]


def fill(template: str, values: dict[str, str]) -> str:
    r"""Fill ``{name}`` in a template; ``{}`` as in ``\boxed{}`` is left alone, ``{{name}}`` gives ``{name}``.

    Raises:
        ValueError: a name without a value.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        if match[1] not in values:
            raise ValueError(f"template: {match[0]} is neither {{prompt}} nor a column{nearest(match[1], values)}")
        return values[match[1]]

    return _PLACE.sub(value, template)


def places(template: str | None) -> set[str]:
    """Names that a template wants."""
    return {name for name in _PLACE.findall(template or "") if name}


@dataclass(frozen=True)
class ColumnMapping:
    """Which columns of a row hold what.

    Attributes:
        prompt: the column of the question, a text; or None.
        messages: the column of a whole conversation, instead; its last answers are left out.
        images: columns with an image or a list of them, in the order in which they are shown.
        options: the column of choices; they follow the question as (A), (B), …
        id: the column of ids; row numbers where None.
        split: the column that says train or test.
        meta: columns to remember, by the name they get.
        template: text around the question, ``{prompt}``, and other ``{columns}``; None: the question alone.
        first_turn: of a conversation, keep only what stands before the first answer.
        fix: changes a row before anything is read from it; None leaves it out.
    """

    prompt: str | None = None
    messages: str | None = None
    images: tuple[str, ...] = ()
    options: str | None = None
    id: str | None = None
    split: str | None = None
    meta: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    first_turn: bool = False
    fix: Callable[[SourceRow], SourceRow] | None = None

    def columns(self) -> list[str]:
        """All columns that are read."""
        named = [self.prompt, self.messages, self.options, self.id, self.split, *self.images]
        wanted = [*(name for name in named if name), *self.meta.values(), *sorted(places(self.template) - {"prompt"})]
        return list(dict.fromkeys(wanted))

    def draft(self, row: SourceRow) -> Draft:
        """Read one row.

        Raises:
            ValueError: it cannot be used; the text says why.
        """
        if self.fix:
            try:
                row = self.fix(row)
            except KeyError as error:
                raise ValueError(f"{error.args[0]} is missing") from error
        images = [image for name in self.images for image in _as_list(row.get(name)) if image is not None]
        if self.messages:
            messages = read_turns(row.get(self.messages), first_turn=self.first_turn)
        else:
            messages = [{"role": "user", "content": self._question(row, str(self.prompt), images)}]
        found = row.get(self.id) if self.id else None
        if self.id and found is None:
            raise ValueError(f"{self.id} is empty, and is to be the id")
        return Draft(
            messages=place_marks(messages, len(images)),
            images=images,
            id=None if found is None else str(found),
            split=_role(row.get(self.split), self.split) if self.split else None,
            meta={name: value for name, column in self.meta.items() if (value := _json(row.get(column))) is not None},
        )

    def _question(self, row: SourceRow, column: str, images: list[Any]) -> str:
        text = row.get(column)
        if text is None or (isinstance(text, str) and not text.strip() and not images):  # an image can say it all
            raise ValueError(f"{column} is empty")
        if not isinstance(text, str):
            raise ValueError(f"{column} is {type(text).__name__}, expected a string")
        options = _as_list(row.get(self.options)) if self.options else []
        if options:
            text += "\nChoices:\n" + "\n".join(f"({chr(65 + i)}) {option}" for i, option in enumerate(options))
        if self.template is None:
            return text
        return fill(self.template, {**{name: str(value) for name, value in row.items()}, "prompt": text})


class PlainMapping(ColumnMapping):
    """Rows that say themselves what they hold: ``messages``, ``conversations`` or ``prompt``, and what goes with it."""

    def columns(self) -> list[str]:
        """All columns that may be there."""
        return list(_PLAIN_KEYS)

    def draft(self, row: SourceRow) -> Draft:
        """Read one row; see `ColumnMapping.draft`."""
        kinds = [key for key in PLAIN_KINDS if row.get(key) is not None]
        if not kinds:
            hint = next((h for key in row if (h := nearest(key, PLAIN_KINDS))), "")
            raise ValueError(
                f"none of 'messages', 'conversations' and 'prompt' among its keys ({', '.join(row)}){hint}"
            )
        if len(kinds) > 1:
            raise ValueError(f"both {kinds[0]} and {kinds[1]}: which one is the prompt?")
        for key in row:
            hint = nearest(key, [k for k in _PLAIN_KEYS if k not in row])
            if hint and key not in _PLAIN_KEYS + _OF_COMPLETIONS:
                raise ValueError(f"unknown key {key!r}{hint}")
        images = _as_list(row.get("images")) or _as_list(row.get("image"))
        if kinds[0] == "prompt":
            messages = [{"role": "user", "content": self._question(row, "prompt", images)}]
        elif self.template:
            raise ValueError(f"the template is for a prompt that is a text, and this one is {kinds[0]}")
        else:
            messages = read_turns(row[kinds[0]], first_turn=self.first_turn)
        info = row.get("meta_info")
        info = info if isinstance(info, dict) else {}
        found = next((v for v in (row.get("prompt_id"), row.get("id"), info.get("lenvm_idx")) if v is not None), None)
        if found is not None and found == info.get("lenvm_idx") and info.get("dataset_name"):
            found = f"{info['dataset_name']}/{found}"
        meta = row.get("meta")
        if meta is not None and not isinstance(meta, dict):
            raise ValueError(f"meta is {type(meta).__name__}, expected an object")
        return Draft(
            messages=place_marks(messages, len(images)),
            images=images,
            id=None if found is None else str(found),
            split=_role(row.get("split") or info.get("split"), "split"),
            meta=_json(meta or {}),
        )


def _role(split: Any, name: str) -> str | None:
    """Train or test, as a row says."""
    role = None if split is None else role_of(str(split))
    if split is not None and role is None:
        raise ValueError(f"{name} is {split!r}, expected train or test")
    return role


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _json(value: Any) -> Any:
    """A value as JSON has it: times and the like as text."""
    return json.loads(json.dumps(value, default=str))


def missing_columns(wanted: Iterable[str], there: list[str]) -> list[str]:
    """What to say of columns that are not there, one text each."""
    return [f"no column {name!r}{nearest(name, there)}" for name in wanted if name not in there]
