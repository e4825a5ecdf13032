"""Trains the tiny models themselves: next-token prediction on the generated corpus, as an ordinary LightningModule."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ..training.optimizers import warmup_and_cosine
from . import path, quality


class TinyLanguageModel(L.LightningModule):
    """A tiny generator, trained from random weights: Muon on the matrices inside, AdamW on embeddings and the rest.

    Args:
        name: `tiny-text` or `tiny-vl`; its folder gives shape and tokenizer.
        lr: peak learning rate; linear warm-up, then a cosine to 0.
        warmup_steps: optimizer steps of warm-up.
        weight_decay: on matrices only.
        betas: AdamW's.
        prompt_weight: weight of the loss on prompt tokens, beside 1 on completion tokens.
        initializer_range: standard deviation of the initial weights.
        judged_prompts: held-out prompts of each set on which `judge` compares it with the shipped one; 0: no judging.
    """

    def __init__(
        self,
        name: str,
        lr: float = 3e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.98),
        prompt_weight: float = 0.3,
        initializer_range: float = 0.05,
        judged_prompts: int = 64,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False  # there are two optimizers
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

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One optimizer step on the weighted token mean of a batch."""
        losses, weight = self.losses(batch)
        loss = (losses * weight).sum() / weight.sum()
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        optimizers: Any = self.optimizers()
        schedules: Any = self.lr_schedulers()
        optimizers[0].step()
        optimizers[1].optimizer.step()  # past Lightning, which would count a second step
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.zero_grad()
            schedule.step()
        self.log("train/loss", loss.detach())

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Mean over the completion tokens of held-out documents."""
        losses, _ = self.losses(batch)
        there = batch["completion"][:, 1:]
        self.log("val/loss", losses[there].mean(), batch_size=int(there.sum()))

    def save_pretrained(self, folder: Path, processor: Any) -> None:
        """Write an ordinary model directory; weights are kept in float16, half the size, and load as float32."""
        weights = self.model.state_dict()
        halves = {tensor.data_ptr(): tensor.half() for tensor in weights.values()}  # tied weights stay one tensor
        self.model.save_pretrained(folder, state_dict={n: halves[tensor.data_ptr()] for n, tensor in weights.items()})
        processor.save_pretrained(folder)

    def judge(self, folder: Path) -> dict[str, Any]:
        """Figures of the model directory `folder` beside those of the shipped model, as plain numbers."""
        if not self.hparams["judged_prompts"]:
            return {}
        found = quality.compare(folder, self.hparams["name"], self.hparams["judged_prompts"])
        return {which: {who: asdict(one) for who, one in both.items()} for which, both in found.items()}

    def configure_optimizers(self) -> Any:
        """Muon and AdamW at the same learning rate, without decay on biases and norms.

        On these models Muon reached AdamW's validation loss in about half of the steps.
        """
        h = self.hparams
        inside: list[Tensor] = []
        tables: list[Tensor] = []
        rest: list[Tensor] = []
        for name, parameter in self.named_parameters():
            kind = rest if parameter.ndim < 2 else inside if parameter.ndim == 2 and "embed" not in name else tables
            kind.append(parameter)
        muon = torch.optim.Muon(inside, lr=h["lr"], weight_decay=h["weight_decay"], adjust_lr_fn="match_rms_adamw")
        groups = [{"params": tables, "weight_decay": h["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(groups, lr=h["lr"], betas=tuple(h["betas"]))
        steps = int(self.trainer.estimated_stepping_batches)
        schedules = [warmup_and_cosine(o, min(h["warmup_steps"], steps), steps) for o in (muon, adamw)]
        return [muon, adamw], schedules
