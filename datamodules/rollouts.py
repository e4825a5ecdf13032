"""DataModules: rollout files in, batches with remaining tokens out."""

import hashlib
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lenvm_lightning.batch import LayoutKind, LengthBatch
from lenvm_lightning.errors import DataError
from lenvm_lightning.models import embedded
from lenvm_lightning.models.processors import load_processor, tokenizer_of
from lenvm_lightning.rollouts.embedded import is_rollouts, write_rollouts

from .batch_planning import plan_batches, rows_for_layout_check, split_to_count
from .batching import ResumableLoader, TokenBudgetBatches
from .collate import Collator, RolloutRows
from .report import (
    BatchFacts,
    RolloutFacts,
    RowProblem,
    check_problems,
    collect_batch_facts,
    collect_facts,
    describe_facts,
    describe_problems,
)
from .settings import DataKind, DataSettings
from .split import number_prompts, split_rows, usable_rows
from .table import build_table, find_files

_EPOCHS_OF_AN_ENDLESS_RUN = 16  # planned apart; then their batches come again
_MOST_TRUNCATED = 0.25  # share of the training completions up to which truncated ones may meet in batches of their own


class RolloutsDataModule(L.LightningDataModule):
    """Rollouts as length-bucketed batches; use `TextRollouts` or `VisionRollouts`.

    After `setup` there are `train_rows` and `val_rows` (what batches are made of), `train_sizes` and `val_sizes`
    (tokens of each), `facts` of the completions trained on, `val_prompts` held out, and `rows_per_batch`.

    Args:
        files: see `DataSettings`.
        settings: the others of `DataSettings`, by name.

    Raises:
        DataError: settings that cannot be, or that contradict each other; all of them.
    """

    kind: ClassVar[DataKind] = "text"
    settings_class: ClassVar[type] = DataSettings  # its fields are the arguments

    def __init__(self, files: str | list[str] = "tinyworld", **settings: Any) -> None:
        super().__init__()
        self.settings = DataSettings(files, **settings)
        if problems := self.settings.problems(self.kind):
            raise DataError("the data settings cannot be:\n  " + "\n  ".join(problems))
        self.processor_source = self.settings.processor  # the recipe's model names one where this is None
        self.trust_remote_code = False  # of the processor; only a recipe that trusts its model's code says otherwise
        self._processor: Any = None
        self._table: Dataset | None = None
        self._train_loader: ResumableLoader | None = None
        self._resume_at: dict[str, int] | None = None

    # -- building -----------------------------------------------------------------------------------------------

    @property
    def processor(self) -> Any:
        """Tokenizer, or processor of a vision-language model, that the rows are made with."""
        if self._processor is None:
            source = self.processor_source
            if source is None:
                if self.trainer is None or self.trainer.lightning_module is None:
                    raise DataError("without a Trainer the DataModule needs to be told its processor: processor=...")
                source = str(self.trainer.lightning_module.backbone_source)
                self.trust_remote_code = bool(getattr(self.trainer.lightning_module, "trust_remote_code", False))
            self._processor = load_processor(source, trust_remote_code=self.trust_remote_code)
        return self._processor

    def _build(self) -> tuple[Dataset, str]:
        """The table of tokenised rollouts, and its key."""
        settings = self.settings
        files: list[str] = []
        for name in settings.file_names:
            if is_rollouts(name):
                name = str(write_rollouts(name, self.kind, settings.cache_folder / f"{name}-{self.kind}"))
            files.append(name)
        return build_table(
            self.processor,
            settings.limits,
            files=find_files(files),
            dataset=settings.dataset,
            cache_dir=settings.cache_folder,
            num_proc=settings.num_proc,
            allow_images_from=settings.allow_images_from,
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
        self._check_packed_rows_are_text(self._table)
        self._split(self._table)
        batches = collect_batch_facts(
            plan_batches(self.train_sizes, self.settings.batch_tokens, **self._plan_options),
            lengths=self.train_sizes,
            prompt_lengths=self._prompt_lengths,
            prompts=self.train_numbers,
            layout=self.settings.layout,
            groups_completions=self.settings.completions_per_batch > 1,
        )
        self.rows_per_batch = len(self.train_rows) / batches.count
        self._report(batches)

    def _check_rows(self, table: Dataset) -> None:
        """Tell of problems and notes; too many problems end it."""
        columns = table.select_columns(["place", "problem", "notes"]).with_format("arrow")[:]
        has_notes = pc.greater(pc.list_value_length(columns["notes"]), 0)
        of_interest = columns.filter(pc.or_(has_notes, pc.not_equal(columns["problem"], ""))).to_pylist()
        problems = [RowProblem(row["place"], row["problem"]) for row in of_interest if row["problem"]]
        notes = [RowProblem(row["place"], note) for row in of_interest for note in row["notes"]]
        log = self.settings.cache_folder / f"problems-{self.table_key}.txt"
        if problems or notes:
            log.write_text("\n".join(map(str, [*problems, *notes])) + "\n", encoding="utf-8")
        check_problems(problems, len(table), self.settings.max_bad_share, str(log))
        if problems:
            rank_zero_info(describe_problems(problems, len(table), f"are left out (all in {log})"))
        if notes:
            rank_zero_info(describe_problems(notes, len(table), f"have a note (all in {log})"))

    def _check_packed_rows_are_text(self, table: Dataset) -> None:
        if self.settings.layout != "packed":
            return
        counts = pc.list_value_length(table.with_format("arrow")[:]["images"]).to_numpy()
        if counts.any():
            place = table[int(counts.argmax())]["place"]
            raise DataError(f"layout: packed is for text, but {place} has images: set layout: shared, or rows")

    def _split(self, table: Dataset) -> None:
        split = split_rows(usable_rows(table), self.settings)
        self.train_sizes = [row.tokens for row in split.train]
        self.val_sizes = [row.tokens for row in split.held_out]
        self.train_numbers = number_prompts(split.train)
        self._val_numbers = number_prompts(split.held_out)
        self._prompt_lengths = [row.prompt_length for row in split.train]
        limits = self.settings.limits
        self.train_rows = RolloutRows(table, [row.row for row in split.train], self.train_numbers, limits)
        self.val_rows = RolloutRows(table, [row.row for row in split.held_out], self._val_numbers, limits)
        self.val_prompts = len(set(self._val_numbers))
        self.facts: RolloutFacts = collect_facts(split.train)

    def _report(self, batches: BatchFacts) -> None:
        described = describe_facts(self.facts, batches, held_out=len(self.val_rows), held_out_prompts=self.val_prompts)
        if not self.buckets and self.settings.bucket is None:
            described += "\n  batches are random: with so many truncated, those of similar lengths would be all or none"
            if self.kind == "text" and self.settings.layout == "rows":
                described += "; layout: packed saves their padding"
        notices = {embedded.notice(name) or "" for name in self.facts.generators if embedded.wrote(name)}
        rank_zero_info("\n  ".join([described, *sorted(notices)]))

    def held_out_digest(self) -> str:
        """What was validated on: the same for the same completions, truncated to the same length, in whatever order.

        Images count by the tokens they take, not by what is on them.
        """
        digests = []
        for number in range(len(self.val_rows)):
            row = self.val_rows.without_images(number)
            numbers = [int(row["prompt_length"]), int(row["length"]), int(row["censored"]), *row["input_ids"]]
            digests.append(hashlib.blake2b(np.asarray(numbers, dtype=np.int64).tobytes()).digest())
        return hashlib.blake2b(b"".join(sorted(digests)), digest_size=12).hexdigest()

    # -- loaders ------------------------------------------------------------------------------------------------

    @property
    def buckets(self) -> bool:
        """Whether batches are of similar lengths.

        Truncated completions are all about as long. Together in a batch they pull at every prediction, those without
        them pull back, and a model learns little of which prompts are which (docs/experiments.md).
        """
        if self.settings.bucket is not None:
            return self.settings.bucket
        return self.facts.truncated_share <= _MOST_TRUNCATED

    @property
    def _plan_options(self) -> dict[str, Any]:
        """How the training rows are put into batches."""
        settings = self.settings
        return {
            "seed": settings.seed,
            "bucket": self.buckets,
            "packed": settings.layout == "packed",
            "prompts": self.train_numbers,
            "completions_per_batch": settings.completions_per_batch,
        }

    def collator(self, layout: LayoutKind | None = None) -> Collator:
        """What makes batches of rows, in a layout; the one of the settings where None."""
        tokenizer = tokenizer_of(self.processor)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return Collator(pad, getattr(self.processor, "image_processor", None), layout or self.settings.layout)

    def layout_check_batches(self) -> tuple[LengthBatch, LengthBatch] | None:
        """A few short training rows, padded and in the layout, to check it with; None where it is `rows`."""
        layout = self.settings.layout
        if layout == "rows":
            return None
        rows = [self.train_rows[row] for row in rows_for_layout_check(self.train_sizes, self.train_numbers)]
        return self.collator("rows")(rows), self.collator()(rows)

    def _epochs(self, batches: int) -> int:
        """How many epochs the Trainer will ask for; those of an endless run repeat."""
        trainer = self.trainer
        if trainer is None:
            return 1
        if trainer.max_steps > 0:
            return 1 + trainer.max_steps * trainer.accumulate_grad_batches // max(1, batches // trainer.world_size)
        return trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else _EPOCHS_OF_AN_ENDLESS_RUN

    def train_dataloader(self) -> ResumableLoader:
        """Batches of this rank, shuffled anew every epoch.

        Raises:
            DataError: fewer training rows than ranks.
        """
        rank, world_size = _rank(self.trainer)
        budget, options = self.settings.batch_tokens, self._plan_options
        epochs = self._epochs(len(plan_batches(self.train_sizes, budget, **options)))
        try:
            sampler = TokenBudgetBatches(
                self.train_sizes, budget, epochs=epochs, rank=rank, world_size=world_size, **options
            )
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
        options = {**self._plan_options, "prompts": self._val_numbers, "seed": None, "bucket": True}
        batches = plan_batches(self.val_sizes, self.settings.batch_tokens, **options)
        try:
            batches = split_to_count(batches, -(-len(batches) // world_size) * world_size)
        except ValueError as error:
            raise DataError(f"held out: {error}; use fewer devices or hold out more prompts") from error
        return DataLoader(self.val_rows, batch_sampler=batches[rank::world_size], **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        workers = self.settings.num_workers
        return {
            "collate_fn": self.collator(),
            "num_workers": workers,
            "persistent_workers": workers > 0,
            # Loaders draw a seed when they start; from the global generator, that would shift the dropout of a run
            # that was resumed against one that was not.
            "generator": torch.Generator().manual_seed(self.settings.seed),
        }

    # -- resuming -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Which data the run is on, and how far it is.

        The Trainer keeps the position of a loader too, but loses it where the schedule needs the number of batches
        (`max_epochs`): then it asks for the loader before it restores its own state.
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
    """Text rollouts; see `DataSettings` for the settings."""

    kind = "text"


class VisionRollouts(RolloutsDataModule):
    """Image and text rollouts, for vision-language backbones; see `DataSettings` for the settings."""

    kind = "vision"


def _rank(trainer: Any) -> tuple[int, int]:
    """Number of this process, and of all; without a Trainer there is one."""
    return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
