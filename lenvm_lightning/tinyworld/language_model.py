"""Trains the tiny models themselves: next-token prediction on the generated corpus, as an ordinary LightningModule."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, get_cosine_schedule_with_warmup

from . import path


class TinyLanguageModel(L.LightningModule):
    """A tiny generator, trained from random weights.

    Args:
        name: ``tiny-text`` or ``tiny-vl``; its folder gives shape and tokenizer.
        lr: peak learning rate; linear warm-up, then a cosine to a hundredth.
        warmup_steps: optimizer steps of warm-up.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        prompt_weight: weight of the loss on prompt tokens, beside 1 on completion tokens.
        initializer_range: standard deviation of the initial weights.
    """

    def __init__(
        self,
        name: str,
        lr: float = 3e-3,
        warmup_steps: int = 200,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.98),
        prompt_weight: float = 0.3,
        initializer_range: float = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        config = AutoConfig.from_pretrained(path(name))
        config.get_text_config().initializer_range = initializer_range
        auto: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        self.model = auto.from_config(config, dtype=torch.float32)

    @property
    def backbone_source(self) -> str:
        """Where the tokenizer or processor comes from."""
        return self.hparams["name"]

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Cross-entropy (nats) of every next token, and its weight. Shapes (B, T - 1)."""
        vision = dict(batch["vision"])
        if vision:
            ids = batch["input_ids"]
            vision["mm_token_type_ids"] = (ids == self.model.config.image_token_id).to(torch.int32)
        # Rows are padded on the right, so that no real token sees padding: causal attention alone is right, and faster.
        logits = self.model(input_ids=batch["input_ids"], use_cache=False, **vision).logits[:, :-1]
        labels = batch["input_ids"][:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
        weight = torch.where(batch["completion"][:, 1:], 1.0, self.hparams["prompt_weight"])
        return losses, weight * batch["attention_mask"][:, 1:]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Weighted token mean of a batch."""
        losses, weight = self.losses(batch)
        loss = (losses * weight).sum() / weight.sum()
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Mean over the completion tokens of held-out documents."""
        losses, _ = self.losses(batch)
        there = batch["completion"][:, 1:]
        self.log("val/loss", losses[there].mean(), batch_size=int(there.sum()))

    def configure_optimizers(self) -> Any:
        """AdamW without decay on biases and norms."""
        h = self.hparams
        groups = [
            {"params": [p for p in self.parameters() if p.ndim >= 2], "weight_decay": h["weight_decay"]},
            {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=h["lr"], betas=tuple(h["betas"]))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, min(h["warmup_steps"], steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
