"""The generated corpus of the tiny models as batches for next-token prediction."""

from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from datamodules.batch_planning import plan_batches
from datamodules.batching import ResumableLoader, TokenBudgetBatches
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.tinyworld import corpus

from ..models.processors import tokenizer_of

_VALIDATION_SEED = 1_000_003  # added to the seed of the corpus


class TinyCorpus(L.LightningDataModule):
    """Documents of the tiny world, drawn and tokenised at the start (about 3,000 a second) and seen once.

    Args:
        kind: `text` or `vision`.
        documents: how many to learn from.
        val_documents: how many to validate on; new ones, of the same kind.
        max_length: tokens of a row; what is longer is cut.
        batch_tokens: padded tokens of a batch.
        seed: of the corpus and of the order of batches.
        num_workers: processes that paint images.
    """

    def __init__(
        self,
        kind: corpus.Kind = "text",
        documents: int = 100_000,
        val_documents: int = 500,
        max_length: int = 768,
        batch_tokens: int = 8192,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.kind, self.documents, self.val_documents = kind, documents, val_documents
        self.max_length, self.batch_tokens, self.seed = max_length, batch_tokens, seed
        self.num_workers = num_workers
        self.processor_source: str | None = "tiny-vl" if kind == "vision" else "tiny-text"
        self.train: TinyDocuments | None = None
        self._loader: ResumableLoader | None = None
        self._resume_at: dict[str, int] | None = None

    @property
    def processor(self) -> Any:
        """Tokenizer, or processor of the vision-language model."""
        if not hasattr(self, "_processor"):
            self._processor = load_processor(str(self.processor_source))
        return self._processor

    def setup(self, stage: str | None = None) -> None:
        """Draw both parts; the seed of the validation part is another one."""
        if self.train is None:
            tokenizer = tokenizer_of(self.processor)
            self.train = TinyDocuments(tokenizer, self.kind, self.seed, self.documents, self.max_length)
            self.val = TinyDocuments(
                tokenizer, self.kind, self.seed + _VALIDATION_SEED, self.val_documents, self.max_length
            )

    def _loader_options(self) -> dict[str, Any]:
        pad = tokenizer_of(self.processor).pad_token_id
        return {
            "collate_fn": _Collator(pad, getattr(self.processor, "image_processor", None)),
            "num_workers": self.num_workers,
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def train_dataloader(self) -> ResumableLoader:
        """Length-bucketed batches in random order."""
        assert self.train is not None
        batches = TokenBudgetBatches(self.train.lengths, self.batch_tokens, seed=self.seed)
        self._loader = ResumableLoader(self.train, batch_sampler=batches, **self._loader_options())
        if self._resume_at is not None:
            self._loader.load_state_dict(self._resume_at)
            self._resume_at = None
        return self._loader

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation documents."""
        batches = plan_batches(self.val.lengths, self.batch_tokens, seed=None)
        return DataLoader(self.val, batch_sampler=batches, **self._loader_options())

    def state_dict(self) -> dict[str, Any]:
        """How far the run is."""
        return {"position": self._loader.state_dict() if self._loader is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._resume_at = state_dict["position"]


class TinyDocuments(torch.utils.data.Dataset):
    """Documents of the corpus as token ids, the same as chat template and processor would make of them.

    Args:
        tokenizer: of the tiny model.
        kind: of the corpus.
        seed: of the corpus.
        count: how many documents.
        max_length: tokens of a row; what is longer is cut.
    """

    def __init__(self, tokenizer: Any, kind: corpus.Kind, seed: int, count: int, max_length: int) -> None:
        self._kind, self._seed = kind, seed
        documents = [corpus.document(kind, seed, index, paint=False) for index in range(count)]
        # Rendering the template for each prompt would take ten times as long as all the rest.
        before, after = tokenizer.apply_chat_template(
            [{"role": "user", "content": "<image>"}], add_generation_prompt=True, tokenize=False
        ).split("<image>")
        texts = [before + d.prompt.replace("<image>", _image_text(d)) + after for d in documents]
        encode = tokenizer.backend_tokenizer.encode_batch_fast
        prompts = [encoding.ids for encoding in encode(texts, add_special_tokens=False)]
        completions = [e.ids for e in encode([d.completion for d in documents], add_special_tokens=False)]
        self._rows = [
            np.asarray([*prompt, *completion, tokenizer.eos_token_id][:max_length], dtype=np.int32)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        self.lengths = [len(row) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {"input_ids": self._rows[index], "prompt_length": self._prompt_lengths[index]}
        if self._kind == "vision":
            row["image"] = corpus.document(self._kind, self._seed, index).image
        return row


def _image_text(document: corpus.Document) -> str:
    """Return the image tokens of a document's image, one a cell of its grid."""
    return f"<|vision_start|>{'<|image_pad|>' * document.image_tokens}<|vision_end|>"


class _Collator:
    """Pads rows on the right; `completion` is True on the tokens of the completion."""

    def __init__(self, pad_token_id: int, image_processor: Any) -> None:
        self._pad, self._image_processor = pad_token_id, image_processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        width = int(lengths.max())
        ids = torch.full((len(rows), width), self._pad, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        prompts = torch.tensor([row["prompt_length"] for row in rows])
        place = torch.arange(width)
        there = place < lengths[:, None]
        vision = {}
        if self._image_processor is not None:
            vision = dict(self._image_processor(images=[[row["image"]] for row in rows], return_tensors="pt"))
        return {
            "input_ids": ids,
            "attention_mask": there.to(torch.int64),
            "completion": there & (place >= prompts[:, None]),
            "vision": vision,
        }
