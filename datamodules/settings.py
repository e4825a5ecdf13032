"""What a DataModule of rollouts is told: every setting, its default, what it means and may be."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lenvm_lightning.batch import LayoutKind
from lenvm_lightning.utils.images import MAX_IMAGE_PIXELS

from .table_cache import default_cache_dir
from .tokenise import Limits

DataKind = Literal["text", "vision"]


@dataclass(frozen=True)
class DataSettings:
    """Settings of `TextRollouts` and `VisionRollouts`, which take them as they are named here.

    Attributes:
        files: JSONL files or globs, in the published layout or in our own record; `tinyworld` stands for a small set
            that the package writes itself.
        dataset: arguments of `datasets.load_dataset` instead of files, for rollouts kept as a dataset.
        processor: where tokenizer or processor come from; the model's backbone where None.
        until: a text, such as `</think>`: what is learned is how many tokens are left to the one that completes its
            first occurrence, and what follows is left out. A completion that ends without it counts to its end.
        max_length: tokens of a row, prompt and completion; what is longer loses the end of its completion, and its
            labels keep the whole length.
        max_prompt_length: tokens of a prompt; half of max_length where None. Longer text prompts lose their beginning.
        max_pixels: pixels of an image; larger ones are scaled down. None leaves it to the processor.
        max_image_pixels: pixels of an image file above which the row counts as bad.
        batch_tokens: padded tokens of a batch. Under `layout: shared` they are counted as those of rows, so that the
            same rows meet as without it: raise it for what sharing saves.
        bucket: batches of similar lengths; False gives random ones. Where None they are of similar lengths unless more
            than 25% of the training completions are truncated: all of a batch would be, or none.
        completions_per_batch: completions of a prompt that meet in a batch, as far as batch_tokens allows; 1 shuffles
            them freely.
        layout: how a batch is computed; values and gradients are the same. `rows`: padded to the longest. `packed`, for
            text: rows one after the other, with next to no padding. `shared`: a prompt and its images once for those of
            its completions that meet, so set `completions_per_batch` too.
        train_prompts: train on so many prompts only, the first ones; None takes all. Runs that are to be compared
            should use one gamma: `auto` goes by the completions trained on.
        train_completions: of each training prompt take so many completions only, the first ones; None takes all.
        val_share: share of prompts held out where no row says `split: test` (or val, dev, eval), in [0, 1].
        val_completions: at most so many held-out completions are used, the first ones; None uses all.
        max_bad_share: share of unusable rows above which nothing starts, in [0, 1].
        seed: of the order of batches.
        num_workers: processes that open and scale images.
        num_proc: processes that tokenise; one a core where None.
        allow_images_from: folders from which images that rows name may be opened, beside that of their file.
        cache_dir: where tokenised tables are kept; `$LENVM_CACHE` or the user's cache where None.
    """

    files: str | list[str] = "tinyworld"
    dataset: dict[str, Any] | None = None
    processor: str | None = None
    until: str | None = None
    max_length: int = 4096
    max_prompt_length: int | None = None
    max_pixels: int | None = None
    max_image_pixels: int = MAX_IMAGE_PIXELS
    batch_tokens: int = 8192
    bucket: bool | None = None
    completions_per_batch: int = 1
    layout: LayoutKind = "rows"
    train_prompts: int | None = None
    train_completions: int | None = None
    val_share: float = 0.05
    val_completions: int | None = None
    max_bad_share: float = 0.01
    seed: int = 0
    num_workers: int = 0
    num_proc: int | None = None
    allow_images_from: str | list[str] | None = None
    cache_dir: str | None = None

    @property
    def limits(self) -> Limits:
        """What of a rollout becomes a row."""
        return Limits(
            until=self.until,
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            max_pixels=self.max_pixels,
            max_image_pixels=self.max_image_pixels,
        )

    @property
    def file_names(self) -> Sequence[str]:
        """Files and globs, as a list; none where rollouts are kept as a dataset."""
        if self.dataset is not None:
            return []
        return [self.files] if isinstance(self.files, str) else self.files

    @property
    def cache_folder(self) -> Path:
        """Where tokenised tables are kept."""
        return Path(self.cache_dir) if self.cache_dir else default_cache_dir()

    def problems(self, kind: DataKind) -> list[str]:
        """What is wrong with the settings, in words, all at once.

        Args:
            kind: of the DataModule.
        """
        nothing = ["until is an empty text, which is everywhere: leave it out"] if self.until == "" else []
        return (
            nothing
            + self._sizes_too_small()
            + self._sizes_that_clash()
            + self._layout_problems(kind)
            + self._share_problems()
        )

    def _sizes_too_small(self) -> list[str]:
        least = {
            "max_length": 2,  # a token of the prompt, one of the completion
            "batch_tokens": 2,
            "max_pixels": 1,
            "max_image_pixels": 1,
            "completions_per_batch": 1,
            "train_prompts": 1,
            "train_completions": 1,
            "val_completions": 1,
            "num_workers": 0,
            "num_proc": 1,
        }
        found = []
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                found.append(f"{name} must be at least {low}, got {value}")
        return found

    def _sizes_that_clash(self) -> list[str]:
        if self.max_length < 2 or 0 < self.limits.prompt < self.max_length:
            return []
        return [
            f"max_prompt_length ({self.max_prompt_length}) must be at least 1 and below max_length ({self.max_length})"
        ]

    def _layout_problems(self, kind: DataKind) -> list[str]:
        found = []
        if self.layout not in get_args(LayoutKind):
            found.append(f"layout must be one of {', '.join(get_args(LayoutKind))}; got {self.layout}")
        if self.layout == "packed" and kind == "vision":
            found.append("layout: packed is for text; with images set layout: shared, or rows")
        if self.layout == "packed" and self.completions_per_batch > 1:
            found.append(
                "layout: packed fills gaps with whatever fits and keeps no completions of a prompt together, got "
                f"completions_per_batch: {self.completions_per_batch}; set layout: shared, or completions_per_batch: 1"
            )
        return found

    def _share_problems(self) -> list[str]:
        shares = {"val_share": self.val_share, "max_bad_share": self.max_bad_share}
        return [
            f"{name} must lie between 0 and 1, got {share}" for name, share in shares.items() if not 0.0 <= share <= 1.0
        ]
