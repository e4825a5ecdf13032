"""Rows of the table to a padded batch."""

import itertools
from collections import OrderedDict
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from lenvm_lightning.batch import Layout, LayoutKind, LengthBatch, label_states

from .tokenise import Limits, load_image


class RolloutRows(torch.utils.data.Dataset):
    """Rows of one split, with their images opened.

    Args:
        table: tokenised rollouts.
        rows: row numbers of the split in the table.
        prompt_index: number of each row's prompt within the split.
        limits: for scaling images as when the rows were tokenised.
        image_cache: how many opened images to keep in memory.
    """

    def __init__(
        self, table: Dataset, rows: list[int], prompt_index: list[int], limits: Limits, image_cache: int = 4096
    ) -> None:
        self._table = table.with_format("numpy", columns=["input_ids"], output_all_columns=True)
        self._rows, self._prompt_index, self._limits = rows, prompt_index, limits
        self._images: OrderedDict[str, Image.Image] = OrderedDict()
        self._image_cache = image_cache

    def __len__(self) -> int:
        return len(self._rows)

    def without_images(self, index: int) -> dict[str, Any]:
        """A row as the table has it: images are paths."""
        return self._table[self._rows[index]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.without_images(index)
        images, paths = [self._image(path) for path in row["images"]], tuple(row["images"])
        return {**row, "images": images, "paths": paths, "prompt_index": self._prompt_index[index], "row": index}

    def _image(self, path: str) -> Image.Image:
        image = self._images.get(path)
        if image is None:
            image = load_image(path, self._limits)
            self._images[path] = image
            if len(self._images) > self._image_cache:
                self._images.popitem(last=False)
        return image


class Collator:
    """Pads rows on the right and labels their states.

    Args:
        pad_token_id: filler, masked everywhere.
        image_processor: of the backbone; None for text.
        layout: how the batches are meant to be computed.
    """

    def __init__(self, pad_token_id: int, image_processor: Any = None, layout: LayoutKind = "rows") -> None:
        self._pad = pad_token_id
        self._image_processor = image_processor
        self._layout = layout

    def __call__(self, rows: list[dict[str, Any]]) -> LengthBatch:
        """Pad and label rows of `RolloutRows`."""
        width = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), width), self._pad, dtype=torch.int64)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
        remaining = torch.zeros((len(rows), width), dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for i, row in enumerate(rows):
            size, prompt = len(row["input_ids"]), int(row["prompt_length"])
            kept = size - prompt
            # Of a truncated completion that our limit shortens once more, only the part kept here is known.
            length = kept if row["censored"] else int(row["length"])
            input_ids[i, :size] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            attention_mask[i, :size] = 1
            remaining[i], mask[i] = label_states(prompt, kept, length, width)
        images = [row["images"] for row in rows]
        layout = self._layout_of(rows) if self._layout != "rows" else None
        if layout is not None and layout.kind == "shared":  # those of each prompt once, from the first of its rows
            first_rows = [layout.prompts.index(prompt) for prompt in range(max(layout.prompts) + 1)]
            images = [images[row] for row in first_rows]
        batch = LengthBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            remaining=remaining,
            mask=mask,
            censored=torch.tensor([bool(row["censored"]) for row in rows]),
            prompt_index=torch.tensor([row["prompt_index"] for row in rows]),
            row=torch.tensor([row["row"] for row in rows]),
            vision=self._vision(images),
        )
        if layout is not None:
            batch["layout"] = layout
        return batch

    def _layout_of(self, rows: list[dict[str, Any]]) -> Layout:
        """Rows of one prompt are those with equal tokens and images: limits may have truncated a long one."""
        seen: dict[tuple[Any, ...], int] = {}
        prompts = []
        for row in rows:
            tokens = torch.as_tensor(row["input_ids"][: int(row["prompt_length"])], dtype=torch.int64)
            key = (row["prompt_index"], row["paths"], tokens.numpy().tobytes())
            prompts.append(seen.setdefault(key, len(seen)))
        lengths = [len(row["input_ids"]) for row in rows]
        prompt_lengths = [int(row["prompt_length"]) for row in rows]
        return Layout(self._layout, lengths, prompt_lengths, prompts)

    def _vision(self, images: list[list[Image.Image]]) -> dict[str, Tensor]:
        if not any(images):
            return {}
        # A list a row where rows matter, one flat list for processors that see a batch as a stream of images.
        given: list[Any] = images
        if not all(images):
            given = list(itertools.chain.from_iterable(images))
        return dict(self._image_processor(images=given, return_tensors="pt"))
