"""DataModules: rollout files in, batches with remaining tokens out."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lenvm_lightning.batch import LayoutKind, LengthBatch
from lenvm_lightning.errors import DataError
from lenvm_lightning.models import embedded
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.rollouts.embedded import is_rollouts, write_rollouts
from lenvm_lightning.rollouts.held_out import is_held_out, role_of

from .batching import ResumableLoader, TokenBudgetBatches, plan_batches, split_to_count, trial_rows
from .collate import Collator, RolloutRows
from .report import (
    Problem,
    RolloutFacts,
    check_problems,
    collect_facts,
    completions_meeting,
    describe_facts,
    describe_problems,
    packed_padding_share,
    padding_share,
    shared_share,
)
from .table import build_table, default_cache_dir, find_files
from .tokenise import Limits, tokenizer_of


class RolloutsDataModule(L.LightningDataModule):
    """Rollouts as length-bucketed batches; use `TextRollouts` or `VisionRollouts`.

    Args:
        files: JSONL files or globs, in the published layout or in our own record; ``tinyworld`` stands for a small
            set that the package writes itself.
        dataset: arguments of ``datasets.load_dataset`` instead of files, for rollouts kept as a dataset.
        processor: where tokenizer or processor come from; the model's backbone where None.
        max_length: tokens of a row, prompt and completion; what is longer loses the end of its completion,
            and its labels keep the whole length.
        max_prompt_length: tokens of a prompt; half of max_length where None. Longer text prompts lose their beginning.
        max_pixels: pixels of an image; larger ones are scaled down. None leaves it to the processor.
        max_image_pixels: pixels of an image file above which the row counts as bad.
        batch_tokens: padded tokens of a batch. Under ``layout: shared`` they are counted as those of rows, so that the
            same rows meet as without it: raise it for what sharing saves.
        bucket: batches of similar lengths; False gives random ones.
        together: completions of a prompt that meet in a batch, as far as batch_tokens allows; 1 shuffles them freely.
        layout: how a batch is computed; values and gradients are the same. ``rows``: padded to the longest.
            ``packed``, for text: rows one after the other, with next to no padding. ``shared``: a prompt and its
            pictures once for those of its completions that meet, so set ``together`` too.
        train_prompts: train on so many prompts only, the first ones; None takes all. Runs that are to be compared
            should share one gamma: ``auto`` goes by the completions trained on.
        train_completions: of each training prompt take so many completions only, the first ones; None takes all.
        val_share: share of prompts held out where no row says ``split: test`` (or val, dev, eval).
        val_completions: at most so many held-out completions are used, the first ones; None uses all.
        max_bad_share: share of unusable rows above which nothing starts.
        seed: of the order of batches.
        num_workers: processes that open and scale images.
        num_proc: processes that tokenise; one a core where None.
        cache_dir: where tokenised tables are kept; ``$LENVM_CACHE`` or the user's cache where None.
    """

    kind: Literal["text", "vision"] = "text"

    def __init__(
        self,
        files: str | list[str] = "tinyworld",
        dataset: dict[str, Any] | None = None,
        processor: str | None = None,
        max_length: int = 4096,
        max_prompt_length: int | None = None,
        max_pixels: int | None = None,
        max_image_pixels: int = 50_000_000,
        batch_tokens: int = 8192,
        bucket: bool = True,
        together: int = 1,
        layout: LayoutKind = "rows",
        train_prompts: int | None = None,
        train_completions: int | None = None,
        val_share: float = 0.05,
        val_completions: int | None = None,
        max_bad_share: float = 0.01,
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.files = [files] if isinstance(files, str) else files
        self.dataset, self.processor_source = dataset, processor
        self.limits = Limits(max_length, max_prompt_length, max_pixels, max_image_pixels)
        self.batch_tokens, self.bucket, self.together, self.seed = batch_tokens, bucket, together, seed
        self.layout = layout
        self.train_prompts, self.train_completions = train_prompts, train_completions
        self.val_share, self.val_completions, self.max_bad_share = val_share, val_completions, max_bad_share
        self.num_workers, self.num_proc = num_workers, num_proc
        self.cache_dir = Path(cache_dir) if cache_dir else default_cache_dir()
        if problems := self._problems():
            raise DataError("the data settings cannot be:\n  " + "\n  ".join(problems))
        self._table: Dataset | None = None
        self._train_loader: ResumableLoader | None = None
        self._resume_at: dict[str, int] | None = None

    def _problems(self) -> list[str]:
        limits = self.limits
        least: list[tuple[str, int | None, int]] = [
            ("max_length", limits.max_length, 2),
            ("batch_tokens", self.batch_tokens, 2),
            ("max_pixels", limits.max_pixels, 1),
            ("max_image_pixels", limits.max_image_pixels, 1),
            ("together", self.together, 1),
            ("train_prompts", self.train_prompts, 1),
            ("train_completions", self.train_completions, 1),
            ("val_completions", self.val_completions, 1),
            ("num_workers", self.num_workers, 0),
            ("num_proc", self.num_proc, 1),
        ]
        found = [f"{name} must be at least {low}, got {n}" for name, n, low in least if n is not None and n < low]
        if limits.max_length >= 2 and not 0 < limits.prompt < limits.max_length:
            found.append(
                f"max_prompt_length ({limits.max_prompt_length}) must be at least 1 and below max_length "
                f"({limits.max_length})"
            )
        if self.layout not in get_args(LayoutKind):
            found.append(f"layout must be one of {', '.join(get_args(LayoutKind))}; got {self.layout}")
        if self.layout == "packed" and self.kind == "vision":
            found.append("layout: packed is for text; with pictures set layout: shared, or rows")
        if self.layout == "packed" and self.together > 1:
            found.append(
                f"layout: packed fills gaps with whatever fits and keeps no completions together, got together: "
                f"{self.together}; set layout: shared, or together: 1"
            )
        for name, share in (("val_share", self.val_share), ("max_bad_share", self.max_bad_share)):
            if not 0.0 <= share <= 1.0:
                found.append(f"{name} must lie between 0 and 1, got {share}")
        return found

    # -- building -----------------------------------------------------------------------------------------------

    @property
    def processor(self) -> Any:
        """Tokenizer, or processor of a vision-language model, that the rows are made with."""
        if not hasattr(self, "_processor"):
            source = self.processor_source
            if source is None:
                if self.trainer is None or self.trainer.lightning_module is None:
                    raise DataError("without a Trainer the DataModule needs to be told its processor: processor=...")
                source = str(self.trainer.lightning_module.backbone_source)
            self._processor = load_processor(source)
        return self._processor

    def _build(self) -> tuple[Dataset, str]:
        files: list[str] = []
        for name in self.files if self.dataset is None else ():
            if is_rollouts(name):
                name = str(write_rollouts(name, self.kind, self.cache_dir / f"{name}-{self.kind}"))
            files.append(name)
        return build_table(
            self.processor,
            self.limits,
            files=find_files(files),
            dataset=self.dataset,
            cache_dir=self.cache_dir,
            num_proc=self.num_proc,
        )

    def prepare_data(self) -> None:
        """Write what is not on disk yet; runs on one rank of a machine."""
        self._build()

    def setup(self, stage: str | None = None) -> None:
        """Load the table, report on it, split it into training and held-out rows.

        Raises:
            DataError: too many bad rows, or nothing to train or to validate on.
        """
        if self._table is not None:
            return
        self._table, self.table_key = self._build()
        self._check_rows(self._table)
        seen = [i for i, paths in enumerate(self._table["images"]) if paths] if self.layout == "packed" else []
        if seen:
            place = self._table[seen[0]]["place"]
            raise DataError(f"layout: packed is for text, but {place} has pictures: set layout: shared, or rows")
        self._split(self._table)
        plan = plan_batches(self.train_sizes, self.batch_tokens, **self._plan_options)
        padding = (packed_padding_share if self.layout == "packed" else padding_share)(self.train_sizes, plan)
        self.rows_per_batch = len(self.train_rows) / len(plan)
        meeting = completions_meeting(self.train_numbers, plan) if self.together > 1 else None
        shared = None
        if self.layout == "shared":
            shared = shared_share(self.train_sizes, self._prompt_lengths, self.train_numbers, plan)
        described = describe_facts(
            self.facts, len(self.val_rows), self.val_prompts, padding, len(plan), meeting, self.layout, shared
        )
        notices = {embedded.notice(name) or "" for name in self.facts.generators if embedded.wrote(name)}
        rank_zero_info("\n  ".join([described, *sorted(notices)]))

    def _check_rows(self, table: Dataset) -> None:
        places, texts = list(table["place"]), list(table["problem"])
        problems = [Problem(p, t) for p, t in zip(places, texts, strict=True) if t]
        notes = [Problem(p, n) for p, many in zip(places, table["notes"], strict=True) for n in many]
        log = self.cache_dir / f"problems-{self.table_key}.txt"
        if problems or notes:
            log.write_text("\n".join(map(str, [*problems, *notes])) + "\n", encoding="utf-8")
        check_problems(problems, len(texts), self.max_bad_share, str(log))
        if problems:
            rank_zero_info(describe_problems(problems, len(texts), f"are left out (all in {log})"))
        if notes:
            rank_zero_info(describe_problems(notes, len(texts), f"have a note (all in {log})"))

    def _split(self, table: Dataset) -> None:
        splits, ids = list(table["split"]), list(table["prompt_id"])
        good = [i for i, problem in enumerate(table["problem"]) if not problem]
        held = [i for i in good if role_of(splits[i]) == "test"]
        if not held:
            held = [i for i in good if is_held_out(ids[i], self.val_share)]
        train = self._take(ids, sorted(set(good) - set(held)))
        shared = {ids[i] for i in held} & {ids[i] for i in train}
        if shared:
            rank_zero_info(
                f"{len(shared):,} of the held-out prompts are trained on too, going by prompt_id, such as "
                f"{min(shared)!r}: errors on them say little"
            )
        if self.val_completions is not None:
            held = held[: self.val_completions]
        if not train or not held:
            empty = "train on" if not train else "validate on"
            raise DataError(
                f"no rows are left to {empty}: {len(train)} training and {len(held)} held-out completions. Give more "
                "prompts, mark some with split: test, or change data.val_share."
            )
        sizes = np.asarray([len(x) for x in table.with_format("numpy")["input_ids"]])
        self.train_sizes, self.val_sizes = sizes[train].tolist(), sizes[held].tolist()
        self.train_numbers, self._val_numbers = _number(ids, train), _number(ids, held)
        prompt_lengths = list(table["prompt_length"])
        self._prompt_lengths = [prompt_lengths[i] for i in train]
        self.train_rows = RolloutRows(table, train, self.train_numbers, self.limits)
        self.val_rows = RolloutRows(table, held, self._val_numbers, self.limits)
        self.val_prompts = len({ids[i] for i in held})
        columns = {name: list(table[name]) for name in ("length", "censored", "sampling", "generator")}
        self.facts: RolloutFacts = collect_facts(
            [columns["length"][i] for i in train],
            [columns["censored"][i] for i in train],
            [ids[i] for i in train],
            [columns["sampling"][i] for i in train],
            [columns["generator"][i] for i in train],
        )

    def held_out_digest(self) -> str:
        """What was validated on: the same for the same completions, cut to the same length, in whatever order.

        Pictures count by the tokens they take, not by what is on them.
        """
        rows = [self.val_rows.without_images(i) for i in range(len(self.val_rows))]
        facts = ((row["prompt_length"], row["length"], row["censored"]) for row in rows)
        parts = [
            hashlib.blake2b(np.asarray([*map(int, fact), *row["input_ids"]], dtype=np.int64).tobytes()).digest()
            for fact, row in zip(facts, rows, strict=True)
        ]
        return hashlib.blake2b(b"".join(sorted(parts)), digest_size=12).hexdigest()

    def _take(self, ids: Sequence[str], rows: Sequence[int]) -> list[int]:
        """The training rows that train_prompts and train_completions ask for, and a note where there are too few."""
        prompts, completions = self.train_prompts, self.train_completions
        there: Counter[int] = Counter()  # completions of each prompt
        taken = []
        for row, number in zip(rows, _number(ids, rows), strict=True):
            there[number] += 1
            if (prompts is None or number < prompts) and (completions is None or there[number] <= completions):
                taken.append(row)
        if prompts is not None and prompts > len(there):
            rank_zero_info(f"train_prompts asks for {prompts:,} prompts to train on, there are {len(there):,}")
        if completions is not None:
            chosen = [count for number, count in there.items() if prompts is None or number < prompts]
            if few := sum(count < completions for count in chosen):
                rank_zero_info(
                    f"train_completions asks for {completions:,} completions of each prompt, {few:,} of the "
                    f"{len(chosen):,} training prompts have fewer"
                )
        return taken

    # -- loaders ------------------------------------------------------------------------------------------------

    @property
    def _plan_options(self) -> dict[str, Any]:
        """How the training rows are put into batches."""
        groups: dict[str, Any] = {"prompts": self.train_numbers, "together": self.together}
        return {"seed": self.seed, "bucket": self.bucket, "packed": self.layout == "packed", **groups}

    def _collator(self, layout: LayoutKind | None = None) -> Collator:
        tokenizer = tokenizer_of(self.processor)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return Collator(pad, getattr(self.processor, "image_processor", None), layout or self.layout)

    def trial(self) -> tuple[LengthBatch, LengthBatch] | None:
        """A few short training rows, padded and in the layout, to try it out on a model; None where it is ``rows``."""
        if self.layout == "rows":
            return None
        rows = [self.train_rows[row] for row in trial_rows(self.train_sizes, self.train_numbers)]
        return self._collator("rows")(rows), self._collator()(rows)

    def _epochs(self, batches: int) -> int:
        """How many epochs the Trainer will ask for; endless ones are planned as 16 and then repeat."""
        trainer = self.trainer
        if trainer is None:
            return 1
        if trainer.max_steps > 0:
            return 1 + trainer.max_steps * trainer.accumulate_grad_batches // max(1, batches // trainer.world_size)
        return trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 16

    def train_dataloader(self) -> ResumableLoader:
        """Batches of this rank, shuffled anew every epoch."""
        rank, world_size = _rank(self.trainer)
        options: dict[str, Any] = {**self._plan_options, "rank": rank, "world_size": world_size}
        batches = len(plan_batches(self.train_sizes, self.batch_tokens, **self._plan_options))
        try:
            sampler = TokenBudgetBatches(self.train_sizes, self.batch_tokens, epochs=self._epochs(batches), **options)
        except ValueError as error:
            raise DataError(f"{error}; use fewer devices or more rollouts") from error
        self._train_loader = ResumableLoader(self.train_rows, batch_sampler=sampler, **self._loader_options())
        if self._resume_at is not None:
            self._train_loader.load_state_dict(self._resume_at)
            self._resume_at = None
        return self._train_loader

    def val_dataloader(self) -> DataLoader:
        """Held-out batches of this rank, longest first; as many as each other rank has, for they wait for each other.

        Raises:
            DataError: fewer held-out rows than ranks.
        """
        rank, world_size = _rank(self.trainer)
        options = {**self._plan_options, "prompts": self._val_numbers, "seed": None}
        batches = plan_batches(self.val_sizes, self.batch_tokens, **options)
        try:
            batches = split_to_count(batches, -(-len(batches) // world_size) * world_size)
        except ValueError as error:
            raise DataError(f"held out: {error}; use fewer devices or hold out more prompts") from error
        return DataLoader(self.val_rows, batch_sampler=batches[rank::world_size], **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": self._collator(),
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            # Loaders draw a seed when they start; from the global generator, that would shift the dropout of a run
            # that was resumed against one that was not.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    # -- resuming -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Which data the run is on, and how far it is.

        The Trainer keeps the position of a loader too, but loses it where the schedule needs the number of batches
        (``max_epochs``): then it asks for the loader before it restores its own state.
        """
        position = self._train_loader.state_dict() if self._train_loader is not None else None
        return {"table_key": self.table_key, "position": position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with other data.

        Raises:
            DataError: the rollouts or the settings that tokenise them changed since the checkpoint.
        """
        if state_dict["table_key"] != self.table_key:
            raise DataError(
                "the rollouts changed since this run began, so it cannot be continued as it was: put the old files "
                "back, or start another run with --name"
            )
        self._resume_at = state_dict["position"]


class TextRollouts(RolloutsDataModule):
    """Text rollouts; see `RolloutsDataModule` for the settings."""

    kind = "text"


class VisionRollouts(RolloutsDataModule):
    """Image and text rollouts, for vision-language backbones; see `RolloutsDataModule` for the settings."""

    kind = "vision"


def _number(ids: Sequence[str], rows: Sequence[int]) -> list[int]:
    """Number of each row's prompt, in order of first appearance."""
    seen: dict[str, int] = {}
    return [seen.setdefault(ids[i], len(seen)) for i in rows]


def _rank(trainer: Any) -> tuple[int, int]:
    return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
