"""Rollouts in a folder: completions of prompts, resumable, and in the end one file in the order of the prompts.

A `CompletionStore` with `journal.jsonl` for the records as they come, `failures.jsonl`, `images`, and at the end
`summary.json` and `rollouts.jsonl`: all records in the order of the prompts, whole wherever it is there.
"""

import contextlib
import json
import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..decoding.sampling_params import SamplingParams
from ..errors import StoreError
from ..utils.foreign_text import as_shown
from ..utils.images import opened
from ..utils.json_input import parse_object
from ..utils.locked_folder import sync_folder, write_whole
from .completion_store import CompletionStore
from .generators.interface import Answer, Failure, GeneratedText, Prompt, PromptRequest, Prompts
from .images import save_image
from .quantile_limit import QuantileLimit
from .record import FINISH, require_sound
from .summary import LengthCounts

FORMAT = 1
_PROMPTS_AT_HAND = 4096  # prompts whose part of the record is kept: a generator works on fewer at a time
RolloutKey = tuple[str, int]
"""(prompt_id, number of the completion)"""


def rollout_settings(
    fingerprint: dict[str, Any],
    prompts: Prompts,
    n: int,
    sampling: SamplingParams,
    abort_at_quantile: float | None = None,
) -> dict[str, Any]:
    """What decides the content of a store, as JSON values.

    Args:
        fingerprint: of the generator.
        prompts: which ones are asked for.
        n: completions of each prompt.
        sampling: how tokens are sampled.
        abort_at_quantile: share of the completions after whose ends the others are truncated; None: none are.
    """
    aborts = {} if abort_at_quantile is None else {"abort_at_quantile": abort_at_quantile}
    settings = {
        "format": FORMAT,
        "sampling": {**sampling.as_dict(), **aborts},
        "n": n,
        "generator": fingerprint,
        "prompts": prompts.description,
    }
    return json.loads(json.dumps(settings))


@dataclass(frozen=True)
class RolloutRecord:
    """A line of ``journal.jsonl`` and ``rollouts.jsonl``.

    Attributes:
        line: the record, JSON values; see `record`.
        length: of the completion, in tokens.
        truncated: True = it hit its token limit.
        logprob: of all of its tokens (nats); None where it is not known.
        reencoded: True = its ids come from its text.
    """

    line: dict[str, Any]
    length: int
    truncated: bool
    logprob: float | None
    reencoded: bool

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> Self:
        """Read it back.

        Raises:
            ValueError: (or KeyError, TypeError) it is not a whole record.
        """
        if not isinstance(line["prompt_id"], str) or type(line["number"]) is not int:
            raise ValueError("prompt_id is a text and number a whole number")
        require_sound(line["completion"], line["token_ids"], line["logprob"])
        if line["finish_reason"] not in FINISH:
            raise ValueError(f"finish_reason is {line['finish_reason']!r}, expected one of {', '.join(FINISH)}")
        return cls(
            line,
            len(line["token_ids"]),
            line["finish_reason"] == "length",
            None if line["logprob"] is None else float(line["logprob"]),
            bool(line.get("reencoded")),
        )

    def as_line(self) -> dict[str, Any]:
        """JSON values."""
        return self.line

    @property
    def key(self) -> RolloutKey:
        """(prompt_id, number)."""
        return self.line["prompt_id"], self.line["number"]

    @property
    def called(self) -> str:
        """For messages."""
        return _called(*self.key)


def _called(prompt_id: str, number: int) -> str:
    return f"completion {number!r} of prompt {prompt_id!r}"


class PlacesInOrder:
    """Where the lines of ``n`` completions of each prompt begin, eight bytes each: there may be millions.

    Args:
        prompt_ids: in their order.
        n: completions of each.
    """

    def __init__(self, prompt_ids: list[str], n: int) -> None:
        self.numbers = {prompt_id: number for number, prompt_id in enumerate(prompt_ids)}
        self._n = n
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self._places = array("q", [-1]) * (len(self.numbers) * self._n)
        self._count = 0

    def wanted(self, key: RolloutKey) -> bool:
        """Whether it is one of them."""
        prompt_id, number = key
        return prompt_id in self.numbers and type(number) is int and 0 <= number < self._n

    def _index(self, key: RolloutKey) -> int:
        prompt_id, number = key
        return self.numbers[prompt_id] * self._n + number

    def __contains__(self, key: RolloutKey, /) -> bool:
        return self._places[self._index(key)] >= 0

    def __setitem__(self, key: RolloutKey, place: int, /) -> None:
        self._count += key not in self
        self._places[self._index(key)] = place

    def __len__(self) -> int:
        return self._count

    def in_order(self) -> Iterator[int]:
        """Those that are known, in the order of prompts and numbers."""
        return (place for place in self._places if place >= 0)


class RolloutStore(CompletionStore[RolloutKey, RolloutRecord]):
    """Completions of prompts in a folder: what is there, what is missing, adding, finishing. A context manager.

    Args:
        folder: where they are or will be.
        prompts: all prompts; their order is that of the final file.
        settings: from `rollout_settings`.
        generator: its name, for the records.
        wait: wait where another process has the folder, instead of refusing.

    Attributes:
        complete: ``rollouts.jsonl`` is there; nothing can be added.
        total: number of completions wanted.
        failures: why there is no completion, by (prompt_id, number); those of earlier runs only where they are final.
        counts: lengths and the like of the completions that are there (empty where it was complete when opened).
        limit: what is known of the limit that `abort_at_quantile` sets; None where the settings have none.
        notes: what was put right on opening, for people.
    """

    total: int

    def __init__(
        self, folder: Path, prompts: Prompts, settings: dict[str, Any], generator: str, wait: bool = False
    ) -> None:
        self.n: int = settings["n"]
        self._in_order = PlacesInOrder(prompts.ids, self.n)
        super().__init__(
            folder,
            settings,
            RolloutRecord,
            file="journal.jsonl",
            total=len(prompts) * self.n,
            places=self._in_order,
            wait=wait,
        )
        self.prompts, self.generator = prompts, generator
        self.rollouts, self.summary = folder / "rollouts.jsonl", folder / "summary.json"
        self.failed = folder / "failures.jsonl"
        self.complete = False
        self.counts = LengthCounts()
        sampling = settings["sampling"]
        quantile = sampling.get("abort_at_quantile")
        self.limit = None if quantile is None else QuantileLimit(quantile, self.total, sampling["max_tokens"])
        self._prompt_parts: dict[str, dict[str, Any]] = {}

    # -- opening ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Lock the folder, compare settings, repair and read what is there; a complete one is neither locked nor read.

        Raises:
            StoreError: in use, sampled with other settings, or not to be written.
        """
        same = len(self.prompts) - len(self._in_order.numbers)
        if same:
            raise StoreError(f"{same} prompts share their prompt_id with another one")
        return self if self._is_complete() else super().__enter__()

    def open(self) -> None:
        """Compare settings, repair and read what is there; the folder is locked."""
        if not self._is_complete():  # by the process that we waited for
            super().open()
            with self.writing():
                self._read_failures()

    def _is_complete(self) -> bool:
        if self.rollouts.exists():
            self.check_settings()
            self._read_failures()
            self.complete = True
            if self.journal.path.exists():  # of a run that was killed before its very last step
                self.journal.path.unlink(missing_ok=True)
        return self.complete

    def holds_completions(self) -> bool:
        """Whether there is anything in the folder that other settings would make wrong."""
        return self.rollouts.exists() or super().holds_completions()

    def before_new_settings(self) -> None:
        """What failed with other settings may work with these."""
        self.failed.unlink(missing_ok=True)

    def forget(self) -> None:
        """Count anew."""
        self.counts = LengthCounts()
        if self.limit is not None:
            self.limit.forget()

    def remember(self, record: RolloutRecord) -> None:
        """Count a completion that is there."""
        self.counts.add(record.length, record.truncated, record.logprob, record.reencoded)
        if self.limit is not None and not record.truncated:
            self.limit.ended(record.length)

    def _read_failures(self) -> None:
        """Take over the final ones of earlier runs; the others are tried again."""
        if not self.failed.exists():
            return
        self.failures.clear()
        kept = []
        for line in self.failed.read_bytes().splitlines():
            try:
                entry = parse_object(line)
                key = entry["prompt_id"], entry["number"]
                if entry["final"] and self.wanted(key) and not self.has(key):
                    self.failures[key] = Failure(as_shown(entry["reason"], 2000), final=True)
                    kept.append(line.decode())
            except (ValueError, KeyError, TypeError):  # torn: that completion is tried again
                continue
        if not self.rollouts.exists():
            write_whole(self.failed, "".join(f"{line}\n" for line in kept))

    # -- what is there, and what is missing ---------------------------------------------------------------------------

    @property
    def done(self) -> int:
        """Number of completions that are there."""
        return self.total - len(self.failures) if self.complete else super().done

    def wanted(self, key: RolloutKey) -> bool:
        """Whether a completion is one of those asked for."""
        return self._in_order.wanted(key)

    def missing(self, order: Iterable[str] | None = None) -> Iterator[PromptRequest]:
        """What is to be asked of a generator; made as it is read.

        Args:
            order: ids of prompts, those that come first being asked for first; where None, all in their own order.
        """
        for prompt_id in self._in_order.numbers if order is None else order:
            if numbers := self._missing_of(prompt_id):
                yield PromptRequest(self.prompts[self._in_order.numbers[prompt_id]], numbers, limit=self.limit)

    def unfinished(self) -> Iterator[Prompt]:
        """Prompts that miss a completion, in their order; each is made as it is read."""
        numbers = self._in_order.numbers
        return (self.prompts[index] for prompt_id, index in numbers.items() if self._missing_of(prompt_id))

    def _missing_of(self, prompt_id: str) -> tuple[int, ...]:
        keys = ((prompt_id, number) for number in range(self.n))
        return tuple(key[1] for key in keys if not self.has(key) and key not in self.failures)

    # -- adding -------------------------------------------------------------------------------------------------------

    def add_answer(self, answer: Answer) -> None:
        """Write an answer down.

        Raises:
            StoreError: the disk is full, or gone. What was there before is still there, whole.
            GeneratorError: an answer that nobody asked for, or the second one to the same question.
        """
        key, result = (answer.prompt_id, answer.number), answer.result
        self.require_missing(key, _called(*key))
        if isinstance(result, GeneratedText):
            self.add(self._record_of(key, result))
            return
        entry = {"prompt_id": answer.prompt_id, "number": answer.number, **vars(result)}
        with self.writing(), self.failed.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.add_failure(key, _called(*key), result)

    def _record_of(self, key: RolloutKey, result: GeneratedText) -> RolloutRecord:
        prompt_id, number = key
        prompt = self._prompt_part(prompt_id)
        known = result.logprob is not None and math.isfinite(result.logprob)
        line = {
            "prompt_id": prompt_id,
            "number": number,
            "messages": prompt["messages"],
            "images": prompt["images"],
            "completion": result.text,
            "token_ids": result.token_ids,
            "finish_reason": result.finish_reason,
            "logprob": result.logprob if known else None,
            "sampling": {**self.settings["sampling"], "seed": result.seed},
            "generator": self.generator,
            "reencoded": result.reencoded,
            "split": prompt["split"],
            "meta": prompt["meta"],
        }
        for name in ("images", "reencoded", "split", "meta"):
            if not line[name]:
                del line[name]
        return RolloutRecord.from_line(line)

    def _prompt_part(self, prompt_id: str) -> dict[str, Any]:
        """The part of a record that all completions of a prompt share; its images are written."""
        if prompt_id not in self._prompt_parts:
            if len(self._prompt_parts) >= _PROMPTS_AT_HAND:
                self._prompt_parts.clear()
            prompt = self.prompts[self._in_order.numbers[prompt_id]]
            with self.writing():
                images = [save_image(opened(image), self.folder) for image in prompt.images]
            self._prompt_parts[prompt_id] = {**vars(prompt), "images": images}
        return self._prompt_parts[prompt_id]

    # -- finishing ----------------------------------------------------------------------------------------------------

    def final_lines(self, change: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Iterator[bytes]:
        """Lines of the final file, in the order of the prompts.

        Args:
            change: what becomes of each record; None: it stays as it was written.
        """
        for line in self.journal.lines(self._in_order.in_order()):
            yield line if change is None else json.dumps(change(parse_object(line))).encode() + b"\n"

    def finish(self, summary: dict[str, Any], lines: Iterable[bytes]) -> None:
        """Write ``summary.json`` and ``rollouts.jsonl``; the journal goes.

        Args:
            summary: JSON values.
            lines: see `final_lines`.

        Raises:
            StoreError: the disk is full; the journal stays.
        """
        part = self.rollouts.with_name(f".{self.rollouts.name}")
        with self.writing():
            self.journal.sync()
            if not self.failures:
                self.failed.unlink(missing_ok=True)
            write_whole(self.summary, json.dumps(summary, indent=2) + "\n")
            try:
                with part.open("wb") as target:
                    target.writelines(lines)
                    target.flush()
                    os.fsync(target.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
                raise
            part.replace(self.rollouts)
            sync_folder(self.folder)
            self.journal.close()
            # Another process that finds `rollouts.jsonl` takes the journal for a leftover, and may be the first.
            self.journal.path.unlink(missing_ok=True)
        self.complete = True
