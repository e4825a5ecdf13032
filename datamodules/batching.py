"""Batches under a token budget: similar lengths together, shuffled, reproducible, resumable to the batch."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from lenvm_lightning.training.packing import take_batch

_RANDOM_WINDOW = 8  # batches whose rows packed ones are filled from, where lengths are not to meet
_JITTER = 0.04  # costs one or two per cent of padding


def plan_batches(
    lengths: Sequence[int],
    max_tokens: int,
    *,
    seed: int | None,
    window: int = 50,
    bucket: bool = True,
    prompts: Sequence[int] | None = None,
    together: int = 1,
    packed: bool = False,
) -> list[list[int]]:
    """Group rows so that ``rows x longest row <= max_tokens``, or, packed, ``bins x fullest bin <= max_tokens``.

    Rows are shuffled, sorted by length within windows of about ``window`` batches, cut into batches, and the batches
    shuffled: rows of similar length meet, and no part of an epoch is all short or all long. Where one or two windows
    hold all rows, lengths are first multiplied by a random factor close to 1: else the same rows would meet in every
    epoch.

    With ``together`` above 1 all this happens to groups of completions of one prompt, drawn anew for every seed, and
    the length of a group is that of its longest row. The paper found that shuffled batches, the default, beat batches
    that keep a prompt's completions together; groups also cost padding, since their rows differ in length.

    Packed batches are filled within the same windows: with the longest rows that are left, as many bins as the budget
    holds, and gaps with shorter ones. Without ``bucket`` a window is only a few batches.

    Args:
        lengths: tokens of each row.
        max_tokens: padded tokens a batch may hold; a single longer row gets a batch of its own.
        seed: of the shuffles; None keeps the rows in order of length, longest first, for evaluation.
        window: batches in a sorting window.
        bucket: False leaves the sorting out: random batches, for comparison.
        prompts: number of each row's prompt; needed for ``together`` above 1.
        together: completions of a prompt that stay in one batch. A group of them that is above ``max_tokens`` is
            split, into rows of similar length.
        packed: for `pack`; only without ``together``.

    Returns:
        Row numbers of each batch; every row exactly once.

    Raises:
        ValueError: ``together`` above 1 without a prompt for every row, or packed.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) == 0:
        return []
    if packed:
        if together > 1:
            raise ValueError(f"packed batches keep no completions of a prompt together, got together: {together}")
        return _pack(sizes, max_tokens, seed, window if bucket else _RANDOM_WINDOW)
    random = np.random.default_rng(seed) if seed is not None else None
    groups, longest, padded = None, sizes, sizes  # each row by itself
    if together > 1:
        if prompts is None or len(prompts) != len(sizes):
            raise ValueError(f"together: {together} needs the prompt of each of the {len(sizes)} rows")
        groups = _group(np.asarray(prompts), together, sizes, max_tokens, random)
        longest = np.asarray([sizes[group].max() for group in groups])
        padded = longest * np.asarray([len(group) for group in groups])
    if random is None:
        order = np.argsort(-longest, kind="stable")
        chosen = (groups[i] if groups else [i] for i in order.tolist())
        return _cut(chosen, longest[order].tolist(), max_tokens)
    order = random.permutation(len(longest))
    if bucket:
        count = max(1, int(window * max_tokens / max(1.0, float(padded.mean()))))
        windows = [order[start : start + count] for start in range(0, len(order), count)]
        few = len(windows) <= 2
        keys = longest * random.uniform(1 - _JITTER, 1 + _JITTER, len(longest)) if few else longest
        order = np.concatenate([part[np.argsort(keys[part], kind="stable")] for part in windows])
    chosen = (groups[i] if groups else [i] for i in order.tolist())
    batches = _cut(chosen, longest[order].tolist(), max_tokens)
    random.shuffle(batches)
    return batches


def _pack(sizes: np.ndarray, max_tokens: int, seed: int | None, window: int) -> list[list[int]]:
    """Batches of rows that fit into bins of one width, from windows of about ``window`` batches."""
    random = np.random.default_rng(seed) if seed is not None else None
    order = np.arange(len(sizes)) if random is None else random.permutation(len(sizes))
    count = max(1, int(window * max_tokens / max(1.0, float(sizes.mean()))))
    if random is not None:
        count = min(count, -(-len(sizes) // 4))  # else the same rows would meet in every epoch
    lengths, batches = sizes.tolist(), []
    for start in range(0, len(order), count):
        part = order[start : start + count]
        left = part[np.argsort(sizes[part], kind="stable")].tolist()
        while left:
            batch, left = take_batch(lengths, left, max_tokens)
            batches.append(batch)
    if random is not None:
        random.shuffle(batches)
    return batches


def _group(
    prompts: np.ndarray, together: int, sizes: np.ndarray, max_tokens: int, random: np.random.Generator | None
) -> list[list[int]]:
    """Rows of one prompt in random groups of up to ``together``, fewer where the budget does not hold so many."""
    rows = np.arange(len(prompts)) if random is None else random.permutation(len(prompts))
    rows = rows[np.argsort(prompts[rows], kind="stable")]
    first = np.searchsorted(prompts[rows], prompts[rows])  # where the rows of each row's prompt begin
    starts = np.flatnonzero((np.arange(len(rows)) - first) % together == 0)
    groups = []
    for group in np.split(rows, starts[1:]):
        group = group[np.argsort(-sizes[group], kind="stable")]
        groups += _cut(([row] for row in group.tolist()), sizes[group].tolist(), max_tokens)
    return groups


def _cut(groups: Iterable[list[int]], sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Batches of whole groups, one after the other; ``sizes`` has the longest row of each group."""
    batches: list[list[int]] = []
    current: list[int] = []
    longest = 0
    for group, size in zip(groups, sizes, strict=True):
        if current and (len(current) + len(group)) * max(longest, size) > max_tokens:
            batches.append(current)
            current, longest = [], 0
        current += group
        longest = max(longest, size)
    batches.append(current)
    return batches


def split_to_count(batches: list[list[int]], count: int) -> list[list[int]]:
    """Halve the largest batches until there are ``count``: no row is lost or doubled.

    Raises:
        ValueError: there are fewer rows than ``count``.
    """
    batches = [list(batch) for batch in batches]
    while len(batches) < count:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        rows = batches[largest]
        if len(rows) < 2:
            raise ValueError(f"{sum(map(len, batches))} rows cannot fill {count} batches")
        batches[largest] = rows[: len(rows) // 2]
        batches.insert(largest + 1, rows[len(rows) // 2 :])
    return batches


def trial_rows(lengths: Sequence[int], prompts: Sequence[int]) -> list[int]:
    """Short rows that share prompts: two of each of two prompts, or one of them twice where there is only one."""
    of_prompt: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        of_prompt.setdefault(prompts[row], []).append(row)
    pairs = [(rows * 2)[:2] if len(rows) < 2 else rows[:2] for rows in of_prompt.values()]
    pairs.sort(key=lambda pair: (pair[0] == pair[1], lengths[pair[1]]))
    return [row for pair in pairs[:2] for row in pair]


class TokenBudgetBatches(Sampler[list[int]]):
    """Batch sampler over `plan_batches`, the same number of batches in every epoch and on every rank.

    Epochs are grouped differently and would differ by a batch or two, but the Trainer counts only once. So the
    planned epochs are brought to the largest count among them, a multiple of the ranks, by halving large batches.
    Halving may part a group of ``together`` in these few.

    Args:
        lengths: tokens of each row.
        max_tokens: padded tokens of a batch.
        seed: of all shuffles.
        epochs: how many epochs to plan; later ones repeat their order.
        rank: which share of each epoch this process takes.
        world_size: number of shares.
        bucket: see `plan_batches`.
        prompts: number of each row's prompt, see `plan_batches`.
        together: see `plan_batches`.
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
        together: int = 1,
        packed: bool = False,
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._options: dict[str, Any] = {
            "max_tokens": max_tokens, "bucket": bucket, "prompts": prompts, "together": together, "packed": packed
        }  # fmt: skip
        self._seed, self._epochs, self._rank, self._world_size = seed, max(1, epochs), rank, world_size
        self.epoch = 0
        self._resume: tuple[int, int] | None = None
        count = max(len(self._plan(epoch)) for epoch in range(self._epochs))
        self._count = -(-count // world_size) * world_size
        if len(self._lengths) < self._count:
            raise ValueError(f"{len(self._lengths)} rows cannot fill {self._count} batches")

    def _plan(self, epoch: int) -> list[list[int]]:
        seed = np.random.SeedSequence([self._seed, epoch % self._epochs]).generate_state(1)[0]
        return plan_batches(self._lengths, seed=int(seed), **self._options)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the Trainer calls it."""
        self.epoch = epoch

    def resume_at(self, epoch: int, batches: int) -> None:
        """Let the next iteration leave out the first ``batches``, provided that it is one of ``epoch``."""
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
        batches = split_to_count(self._plan(self.epoch), self._count)[self._rank :: self._world_size]
        start, self._resume = self.start, None
        yield from batches[start:]


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
