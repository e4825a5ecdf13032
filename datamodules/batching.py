"""Loaders of batches that `batch_planning` has planned: each rank its part of every epoch, resumable to the batch."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from .batch_planning import plan_batches, split_to_count


class TokenBudgetBatches(Sampler[list[int]]):
    """Batch sampler over `plan_batches`, the same number of batches in every epoch and on every rank.

    Epochs are grouped differently and would differ by a batch or two, but the Trainer counts only once. So the
    planned epochs are brought to the largest count among them, a multiple of the ranks, by halving large batches.
    Halving may part a group of `completions_per_batch` in these few.

    Args:
        lengths: tokens of each row.
        max_tokens: padded tokens of a batch.
        seed: of all shuffles.
        epochs: how many epochs to plan; later ones repeat their order.
        rank: which part of each epoch this process takes.
        world_size: number of parts.
        bucket: see `plan_batches`.
        prompts: number of each row's prompt, see `plan_batches`.
        completions_per_batch: see `plan_batches`.
        packed: see `plan_batches`.

    Raises:
        ValueError: there are too few rows for every rank to get as many batches.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        seed: int = 0,
        epochs: int = 1,
        rank: int = 0,
        world_size: int = 1,
        bucket: bool = True,
        prompts: Sequence[int] | None = None,
        completions_per_batch: int = 1,
        packed: bool = False,
    ) -> None:
        self._plan_batches = partial(
            plan_batches,
            np.asarray(lengths, dtype=np.int64),  # type: ignore[arg-type]
            max_tokens,
            bucket=bucket,
            prompts=prompts,
            completions_per_batch=completions_per_batch,
            packed=packed,
        )
        self._seed = seed
        self._epochs = max(1, epochs)
        self._rank = rank
        self._world_size = world_size
        self.epoch = 0
        self._resume: tuple[int, int] | None = None
        count = max(len(self.plan(epoch)) for epoch in range(self._epochs))
        self._count = -(-count // world_size) * world_size
        if len(lengths) < self._count:
            raise ValueError(f"{len(lengths)} rows cannot fill {self._count} batches")

    def plan(self, epoch: int) -> list[list[int]]:
        """Batches of all ranks in an epoch, before they are brought to one count."""
        seed = np.random.SeedSequence([self._seed, epoch % self._epochs]).generate_state(1)[0]
        return self._plan_batches(seed=int(seed))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the Trainer calls it."""
        self.epoch = epoch

    def resume_at(self, epoch: int, batches: int) -> None:
        """Let the next iteration leave out the first `batches`, provided that it is one of `epoch`."""
        self._resume = (epoch, batches)

    @property
    def pending(self) -> tuple[int, int] | None:
        """Epoch and batches of a `resume_at` that no iteration has used yet."""
        return self._resume

    @property
    def start(self) -> int:
        """Batches that the next iteration leaves out."""
        return self._resume[1] if self._resume is not None and self._resume[0] == self.epoch else 0

    def __len__(self) -> int:
        return self._count // self._world_size

    def __iter__(self) -> Iterator[list[int]]:
        start = self.start
        self._resume = None
        batches = split_to_count(self.plan(self.epoch), self._count)
        of_this_rank = batches[self._rank :: self._world_size]
        yield from of_this_rank[start:]


class ResumableLoader(DataLoader):
    """A DataLoader that knows how many batches it has handed out, and can go on from there.

    Workers read ahead, so the sampler's own position says nothing; what counts is what the consumer got.
    """

    batch_sampler: TokenBudgetBatches

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._handed_out = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator starts at its first batch. That is what makes resuming exact: the Trainer asks for the iterator
        # before it sets the epoch, and a plain DataLoader's workers would already be reading the wrong one.
        self._handed_out = self.batch_sampler.start
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Position: the epoch, and how many of its batches were handed out."""
        epoch, batches = self.batch_sampler.pending or (self.batch_sampler.epoch, self._handed_out)
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that were handed out; if the Trainer is past that epoch, the next begins whole."""
        self.batch_sampler.resume_at(state["epoch"], state["batches"])
