"""The resumable store of sampled completions, which survives being killed at any moment.

A folder holds ``settings.json`` (what it was sampled with, written first), ``journal.jsonl`` (one record a line, as
finished), ``failures.jsonl``, ``images``, and at the end ``summary.json`` and ``rollouts.jsonl``: all records in the
order of the prompts, whole wherever it is there.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from PIL import Image

from ..decoding.sampling_params import SamplingParams
from ..errors import GeneratorError, StoreError
from ..utils.locked_folder import FolderLock, differences, write_whole
from .generators.interface import Answer, Failure, GeneratedText, Prompt, PromptRequest
from .journal import Journal
from .summary import Tally

FORMAT = 1
_HEADS = 4096  # prompts whose part of the record is kept at hand


class Prompts(Protocol):
    """Prompts of a run, as `load_prompts` returns them."""

    ids: list[str]
    """Of each, in order; all different."""
    description: dict[str, Any]
    """Where they come from, with a digest of their content, as JSON values."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int, /) -> Prompt:
        """Take one; its pictures are opened or drawn now."""


def describe(fingerprint: dict[str, Any], prompts: Prompts, n: int, sampling: SamplingParams) -> dict[str, Any]:
    """What decides the content of a store, as JSON values.

    Args:
        fingerprint: of the generator.
        prompts: which ones are asked for.
        n: completions of each prompt.
        sampling: how tokens are drawn.
    """
    settings = {
        "format": FORMAT,
        "sampling": sampling.as_dict(),
        "n": n,
        "generator": fingerprint,
        "prompts": prompts.description,
    }
    return json.loads(json.dumps(settings))


class RolloutStore:
    """Completions of prompts in a folder: what is there, what is missing, adding, finishing. A context manager.

    Args:
        folder: where they are or will be.
        prompts: all prompts; their order is that of the final file.
        settings: from `describe`.
        generator: its name, for the records.
        wait: wait where another process has the folder, instead of refusing.

    Attributes:
        complete: ``rollouts.jsonl`` is there; nothing can be added.
        done: number of completions that are there.
        total: number of completions wanted.
        failures: why there is no completion, by (prompt_id, number); those of earlier runs only where they are final.
        tally: lengths and the like of the completions that are there (empty where it was complete when opened).
        notes: what was put right on opening, for people.
    """

    def __init__(
        self, folder: Path, prompts: Prompts, settings: dict[str, Any], generator: str, wait: bool = False
    ) -> None:
        self.folder, self.prompts, self.settings, self.generator = folder, prompts, settings, generator
        self.rollouts, self.summary = folder / "rollouts.jsonl", folder / "summary.json"
        self.failed = folder / "failures.jsonl"
        self.journal = Journal(folder / "journal.jsonl", folder / "broken.jsonl")
        self.n: int = settings["n"]
        self.total = len(prompts) * self.n
        self.done = 0
        self.complete = False
        self.failures: dict[tuple[str, int], Failure] = {}
        self.notes: list[str] = []
        self._lock = FolderLock(folder, wait)
        self._heads: dict[int, dict[str, Any]] = {}

    # -- opening and closing --------------------------------------------------------------------------------------

    def __enter__(self) -> "RolloutStore":
        """Lock the folder, compare settings, repair and read what is there.

        Raises:
            StoreError: in use, sampled with other settings, or not to be written.
        """
        self._index = {prompt_id: number for number, prompt_id in enumerate(self.prompts.ids)}
        if len(self._index) < len(self.prompts):
            raise StoreError(f"{len(self.prompts) - len(self._index)} prompts share their prompt_id with another one")
        self._forget()
        if self._is_complete():
            return self
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lock)
            if not self._is_complete():  # by the process that we waited for
                with self._writing():
                    self._check_settings()
                    self.notes += self.journal.read(self._take)
                    self._read_failures()
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Force everything to the disk and let others in."""
        try:
            with self._writing():
                self.journal.sync()
        except StoreError:
            if error is None:  # else the disk was full already, and that is being said
                raise
        finally:
            self.journal.close()
            self._lock.__exit__(None, None, None)

    def _is_complete(self) -> bool:
        if self.rollouts.exists():
            self._check_settings()
            self._read_failures()
            self.complete, self.done = True, self.total - len(self.failures)
            if self.journal.path.exists():  # killed between the two
                self.journal.path.unlink(missing_ok=True)
        return self.complete

    def _check_settings(self) -> None:
        file, journal = self.folder / "settings.json", self.journal.path
        holds = self.rollouts.exists() or (journal.exists() and journal.stat().st_size > 0)
        changed = [] if file.exists() else ["settings.json is missing"]
        if file.exists():
            try:
                changed = differences(json.loads(file.read_text(encoding="utf-8")), self.settings)
            except (ValueError, AttributeError) as error:
                changed = [f"settings.json cannot be read: {error}"]
        if changed and holds:
            raise StoreError(
                f"{self.folder} holds completions sampled with other settings:\n  " + "\n  ".join(changed) + "\n"
                "Sample into another folder, or delete this one."
            )
        if changed:
            self.failed.unlink(missing_ok=True)
            write_whole(file, json.dumps(self.settings, indent=2) + "\n")

    # -- reading --------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._places, self.done, self.tally = [-1] * self.total, 0, Tally()

    def _take(self, line: bytes, place: int) -> str:
        """Count a line of the journal in; what is wrong with it otherwise, or an empty string."""
        if place == 0:
            self._forget()
        try:
            record = json.loads(line)
            key = self._key(record["prompt_id"], record["number"])
            length, cut = len(record["token_ids"]), record["finish_reason"] == "length"
            logprob = None if record["logprob"] is None else float(record["logprob"])
            reencoded = bool(record.get("reencoded"))
        except (ValueError, KeyError, TypeError, GeneratorError) as error:
            return f"not a whole record ({type(error).__name__}: {error})"
        if self._places[key] >= 0:
            return f"completion {record['number']} of prompt {record['prompt_id']!r} for the second time"
        self._count(key, place, length, cut, logprob, reencoded)
        return ""

    def _count(self, key: int, place: int, length: int, cut: bool, logprob: float | None, reencoded: bool) -> None:
        self._places[key] = place
        self.tally.add(length, cut, logprob, reencoded)
        self.done += 1

    def _read_failures(self) -> None:
        """Take over the final ones of earlier runs; the others are tried again."""
        if not self.failed.exists():
            return
        self.failures.clear()
        kept = []
        for line in self.failed.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                entry = json.loads(line)
                key = entry["prompt_id"], entry["number"]
                if entry["final"] and self._places[self._key(*key)] < 0:
                    self.failures[key] = Failure(entry["reason"], final=True)
                    kept.append(line)
            except (ValueError, KeyError, TypeError, GeneratorError):  # torn: that completion is tried again
                continue
        if not self.rollouts.exists():
            write_whole(self.failed, "".join(kept))

    def _key(self, prompt_id: str, number: int) -> int:
        """Place of a completion in the canonical order."""
        if type(number) is not int or not 0 <= number < self.n or prompt_id not in self._index:
            raise GeneratorError(f"completion {number!r} of prompt {prompt_id!r} was not asked for")
        return self._index[prompt_id] * self.n + number

    # -- sampling -------------------------------------------------------------------------------------------------

    def missing(self) -> Iterator[PromptRequest]:
        """What is to be asked of a generator, in order; made as it is read."""
        for prompt_id, index in self._index.items():
            first = index * self.n
            numbers = tuple(
                number
                for number in range(self.n)
                if self._places[first + number] < 0 and (prompt_id, number) not in self.failures
            )
            if numbers:
                yield PromptRequest(self.prompts[index], numbers)

    def add(self, answer: Answer) -> None:
        """Write an answer down.

        Raises:
            StoreError: the disk is full, or gone. What was there before is still there, whole.
            GeneratorError: an answer that nobody asked for, or the second one to the same question.
        """
        key, result = self._key(answer.prompt_id, answer.number), answer.result
        if self._places[key] >= 0 or (answer.prompt_id, answer.number) in self.failures:
            raise GeneratorError(f"completion {answer.number} of prompt {answer.prompt_id!r} came a second time")
        with self._writing():
            if isinstance(result, Failure):
                entry = {"prompt_id": answer.prompt_id, "number": answer.number, **vars(result)}
                with self.failed.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
                self.failures[answer.prompt_id, answer.number] = result
            else:
                record = self._record(key, result)
                place = self.journal.append(json.dumps(record).encode())
                cut = result.finish_reason == "length"
                self._count(key, place, len(result.token_ids), cut, record["logprob"], result.reencoded)

    def _record(self, key: int, result: GeneratedText) -> dict[str, Any]:
        index, number = divmod(key, self.n)
        prompt = self._head(index)
        known = result.logprob is not None and math.isfinite(result.logprob)
        record = {
            "prompt_id": prompt["prompt_id"],
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
            if not record[name]:
                del record[name]
        return record

    def _head(self, index: int) -> dict[str, Any]:
        """The part of a record that all completions of a prompt share; its pictures are written."""
        if index not in self._heads:
            if len(self._heads) >= _HEADS:
                self._heads.clear()
            prompt = self.prompts[index]
            self._heads[index] = {**vars(prompt), "images": [self._image(image) for image in prompt.images]}
        return self._heads[index]

    def _image(self, image: Image.Image | str) -> str:
        """Path of a picture from the folder; one that was no file becomes one, named by its content."""
        if isinstance(image, str):
            return os.path.relpath(os.path.realpath(image), os.path.realpath(self.folder))
        if image.mode not in ("L", "RGB", "RGBA"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        content = f"{image.mode} {image.size}".encode() + image.tobytes()
        file = self.folder / "images" / f"{hashlib.sha256(content).hexdigest()[:24]}.png"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            part = file.with_name(f".{file.name}")
            with part.open("wb") as target:
                image.save(target, format="PNG")
                target.flush()
                os.fsync(target.fileno())  # before any record names it
            part.replace(file)
        return f"images/{file.name}"

    # -- finishing ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say what to do where the disk does not take any more."""
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{self.folder} cannot be written: {error.strerror or error}. {self.done:,} of {self.total:,} "
                "completions are there and stay. Make room, then type the same command again: it goes on from there."
            ) from error

    def finish(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json`` and, in canonical order, ``rollouts.jsonl``; the journal goes.

        Raises:
            StoreError: the disk is full; the journal stays.
        """
        part = self.rollouts.with_name(f".{self.rollouts.name}")
        with self._writing():
            self.journal.sync()
            if not self.failures:
                self.failed.unlink(missing_ok=True)
            write_whole(self.summary, json.dumps(summary, indent=2) + "\n")
            try:
                with part.open("wb") as target:
                    self.journal.copy((place for place in self._places if place >= 0), target)
                    target.flush()
                    os.fsync(target.fileno())
            except OSError:
                part.unlink(missing_ok=True)
                raise
            part.replace(self.rollouts)
            _sync_names(self.folder)
            self.journal.close()
            self.journal.path.unlink()
        self.complete = True


def _sync_names(folder: Path) -> None:
    """Force the names of a folder's files to the disk."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
