"""LenVMModule: a length value model, its loss and its optimizer as a LightningModule. Glue; the maths is elsewhere."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..batch import LengthBatch
from ..censoring import CensoredKind, anchor, treat_censored
from ..errors import CheckpointError, LenVMError, RecipeError
from ..metrics import LengthErrors, PromptBoundaryMRE, TokenMean
from ..models.adapters import LoRA, digest_of_frozen
from ..models.backbone import QuantiseKind
from ..models.hub_files import some
from ..models.value_model import LengthValueModel, LenVMConfig
from ..objectives import LossKind, TargetKind, WeightKind, state_weights, token_losses
from ..returns import lambda_returns
from . import fsdp
from .batch_layouts import row_logits, try_out
from .optimizers import OptimizerKind, build_optimizer, warmup_and_cosine, what_is_lost
from .strategies import name_of, refused
from .token_mean import SUM_SCALE, divide_by_tokens, or_one


class LenVMModule(L.LightningModule):
    """Trains a length value model; use `TextLenVM` or `VisionLenVM`.

    Args:
        backbone: hub id, directory, or embedded name (``tiny-text``, ``tiny-vl``).
        pretrained: start from the backbone's weights; False from random ones of its shape.
        overrides: entries of the backbone's config to change; only with ``pretrained: false``.
        keep_layers: start from only so many layers of the pretrained language model, the first ones, for a value
            model that is shallower than its generator; None keeps all.
        dtype: type of the weights; the Trainer's ``precision`` decides what is computed in.
        attn_implementation: attention kernels of transformers; its own choice where None.
        trust_remote_code: run modelling code that comes with the backbone.
        lora: train adapters on the language model, with the backbone frozen; None trains the backbone itself.
        quantise: ``nf4`` keeps the frozen language model in four bits (QLoRA) and computes in ``dtype``; needs lora.
        gamma: discount, or ``auto``: 99% of the value range at the 99th-percentile training length.
        target: what the head regresses on, see `LengthTarget`.
        loss: how errors count, see `token_losses`.
        weight: what counts alike in the loss, every ``token`` or every ``completion``, see
            `state_weights`.
        lam: lambda of the lambda-returns; 1 is the closed form. Below 1 only with the discounted target.
        censored: what completions that hit their token limit teach, see `censoring`.
        head_dropout: dropout in the value head.
        lr: peak learning rate.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        optimizer: ``adamw``, fused where that can be, and compensated for weights in bfloat16; ``adamw_8bit``
            keeps moments in eight bits, a quarter of the memory; ``paged_adamw_8bit`` moves them to the host where a
            GPU is full.
        warmup_steps: optimizer steps of linear warm-up; a number below 1 is a share of all steps.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        freeze_vision: leave vision tower and projector as they are.
    """

    def __init__(
        self,
        backbone: str,
        pretrained: bool = True,
        overrides: dict[str, Any] | None = None,
        keep_layers: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        lora: LoRA | None = None,
        quantise: QuantiseKind | None = None,
        gamma: float | Literal["auto"] = "auto",
        target: TargetKind = "discounted",
        loss: LossKind = "mse",
        weight: WeightKind = "token",
        lam: float = 1.0,
        censored: CensoredKind = "anchored",
        head_dropout: float = 0.0,
        lr: float = 2e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        optimizer: OptimizerKind = "adamw",
        warmup_steps: float = 50,
        gradient_checkpointing: bool = False,
        freeze_vision: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["lora"])
        self.hparams["lora"] = asdict(lora) if lora is not None else None  # checkpoints hold plain values only
        self.strict_loading = False  # on_load_checkpoint is stricter
        self.model: LengthValueModel | None = None
        self._frozen: str | None = None  # None where this process has none of the weights
        self.tail_after_cut: float | None = None  # tokens, for censored: anchored; the data know
        self._rows_per_batch: float | None = None  # for weight: completion; the data know
        self._step_tokens: Tensor | float = 0.0
        self.train_loss = TokenMean()
        self.val_loss = TokenMean()
        problems = self._problems()
        if problems:
            raise RecipeError("the model settings contradict each other:\n  " + "\n  ".join(problems))

    def _problems(self) -> list[str]:
        h, found = self.hparams, []
        if h["gamma"] != "auto" and not 0.0 < h["gamma"] < 1.0:
            found.append(f"gamma must lie strictly between 0 and 1 or be 'auto', got {h['gamma']}")
        if not 0.0 <= h["lam"] <= 1.0:
            found.append(f"lam must lie between 0 and 1, got {h['lam']}")
        if not h["lr"] > 0:
            found.append(f"lr must be positive, got {h['lr']}")
        found += [
            f"{name} must be at least 0, got {h[name]}" for name in ("weight_decay", "warmup_steps") if h[name] < 0
        ]
        if not all(0.0 <= beta < 1.0 for beta in h["betas"]):
            found.append(f"betas must lie between 0 and 1, got {tuple(h['betas'])}")
        if not 0.0 <= h["head_dropout"] < 1.0:
            found.append(f"head_dropout must be at least 0 and below 1, got {h['head_dropout']}")
        if h["lam"] != 1.0 and h["target"] != "discounted":
            found.append(f"lam {h['lam']} needs target: discounted, whose rewards add up; got {h['target']}")
        if h["loss"] == "bce" and h["target"] not in ("discounted", "normalised"):
            found.append(f"loss: bce needs a target between 0 and 1, which {h['target']} is not")
        if h["pretrained"] and h["overrides"]:
            found.append("overrides change the shape of the backbone, so they need pretrained: false")
        if h["keep_layers"] is not None and h["keep_layers"] < 1:
            found.append(f"keep_layers must be at least 1, got {h['keep_layers']}")
        if h["keep_layers"] is not None and not h["pretrained"]:
            found.append("keep_layers cuts pretrained weights; with pretrained: false set the layers in overrides")
        found += self._adapter_problems()
        for name, kinds in (
            ("target", TargetKind),
            ("loss", LossKind),
            ("weight", WeightKind),
            ("censored", CensoredKind),
            ("optimizer", OptimizerKind),
        ):
            if h[name] not in get_args(kinds):
                found.append(f"{name} must be one of {', '.join(get_args(kinds))}; got {h[name]}")
        return found

    def _adapter_problems(self) -> list[str]:
        h, found = self.hparams, []
        if h["lora"] is None:
            if h["quantise"] is not None:
                found.append("quantise: weights in four bits cannot be trained, so it needs adapters: set lora.rank")
            return found
        found += LoRA(**h["lora"]).problems()
        if not h["pretrained"]:
            found.append("lora trains adapters on weights that are kept elsewhere, so it needs pretrained: true")
        if not h["freeze_vision"]:
            found.append("lora trains the language model alone, so it needs freeze_vision: true")
        if h["quantise"] is not None and h["dtype"] == "float64":
            found.append(f"quantise: {h['quantise']} computes in float32, bfloat16 or float16; dtype is float64")
        return found

    # -- set-up -------------------------------------------------------------------------------------------------

    @property
    def backbone_source(self) -> str:
        """Where the backbone, and hence tokenizer and processor, come from."""
        return self.hparams["backbone"]

    def configure_model(self) -> None:
        """Build the model, once the data has said how long completions are; no weight is loaded before.

        Raises:
            RecipeError: the Trainer's strategy would compute something else, or nothing.
        """
        if self.model is not None:
            return
        h = self.hparams
        if self._trainer is not None:
            name, precision = name_of(self.trainer.strategy), str(self.trainer.precision)
            if problems := refused(h, name, precision, isinstance(self, VisionLenVM)):
                raise RecipeError("the strategy and the settings contradict each other:\n  " + "\n  ".join(problems))
        data = getattr(self._trainer, "datamodule", None)
        facts = data.facts if data is not None else None
        if facts is None and (h["gamma"] == "auto" or h["target"] == "normalised"):
            raise LenVMError("gamma: auto and target: normalised need a DataModule that knows the lengths; set gamma")
        config = LenVMConfig(
            gamma=facts.gamma if facts and h["gamma"] == "auto" else h["gamma"],
            target=h["target"],
            length_scale=float(facts.longest) if facts else 1.0,
            backbone=str(h["backbone"]),
            rollouts=vars(facts).copy() if facts else {},
            dropout=h["head_dropout"],
        )
        with fsdp.one_copy(self.device_mesh):
            self.model = build_model(h, config, facts.p50 / 2 if facts else None)
        self.tail_after_cut = facts.tail_after_cut if facts else None
        if data is not None and h["weight"] == "completion":
            self._rows_per_batch = data.rows_per_batch
        self._prepare_backbone(self.model)
        self._frozen = digest_of_frozen(self.model)
        if self.device_mesh is not None:
            fsdp.shard(self.model, self.device_mesh, self.trainer.precision)
        self.val_errors = LengthErrors()
        self.val_boundary = PromptBoundaryMRE(data.val_prompts if data is not None else 1, config.gamma)

    def _prepare_backbone(self, model: LengthValueModel) -> None:
        if self.hparams["gradient_checkpointing"]:
            model.recompute_activations()
        if self.hparams["freeze_vision"]:
            for part in model.vision_modules():
                part.requires_grad_(False)

    def on_fit_start(self) -> None:
        """Warn of a precision that learns little, and refuse a layout that the model gets wrong.

        Raises:
            RecipeError: a layout of the data in which the model gives other values.
        """
        h = self.hparams
        if (warning := what_is_lost(h["optimizer"], str(self.trainer.precision), h["lr"])) is not None:
            rank_zero_warn(warning)
        trial = getattr(getattr(self.trainer, "datamodule", None), "trial", None)
        if trial is not None and (batches := trial()) is not None:
            with self.trainer.precision_plugin.forward_context():
                try_out(self._lenvm, *map(self.trainer.strategy.batch_to_device, batches))

    def on_train_start(self) -> None:
        """Set train mode: fit does not, and transformers then drops gradient checkpointing and dropout silently."""
        model = self._lenvm
        model.train()
        if self.hparams["freeze_vision"]:
            for part in model.vision_modules():
                part.eval()

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _kept(self) -> set[str]:
        """Names of what a checkpoint holds: what is trained, and what else could not be loaded again."""
        named = self.named_parameters()
        return {name for name, parameter in named if parameter.requires_grad or not self.hparams["pretrained"]}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained and nothing else, and a mark of the weights that it was trained beside."""
        kept = self._kept()
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}
        checkpoint["trained"] = sorted(checkpoint["state_dict"])  # where ranks write their shares, this alone is read
        checkpoint["frozen"] = self._frozen
        checkpoint["lenvm_config"] = asdict(self._lenvm.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with weights missing, or beside others.

        Raises:
            CheckpointError: keys are missing or unknown, or the weights that are not trained have changed.
        """
        there, kept = set(checkpoint.get("state_dict") or checkpoint["trained"]), self._kept()
        wrong = [f"{key} is missing" for key in sorted(kept - there)]
        wrong += [f"{key} has no place" for key in sorted(there - kept)]
        if wrong:
            raise CheckpointError(f"the checkpoint is of another model: {some(wrong)}. Start another run with --name.")
        if self._frozen is not None and checkpoint.get("frozen", self._frozen) != self._frozen:
            raise CheckpointError(
                f"the weights of {self.backbone_source} that are not trained have changed since this run began, so it "
                "cannot go on as it was: put the old ones back, or start another run with --name"
            )

    @property
    def _lenvm(self) -> LengthValueModel:
        if self.model is None:
            raise LenVMError("the model is built by configure_model(), which the Trainer calls; call it first")
        return self.model

    def save_pretrained(self, folder: Path, processor: Any) -> None:
        """Write a model directory; see `LengthValueModel.save_pretrained`."""
        self._lenvm.save_pretrained(folder, processor)

    # -- forward and loss ---------------------------------------------------------------------------------------

    def forward(self, batch: LengthBatch) -> Tensor:
        """Logits of a batch. Shape (B, T), float32 or better."""
        return row_logits(self._lenvm, batch)

    def loss_sum(self, logits: Tensor, batch: LengthBatch) -> tuple[Tensor, Tensor]:
        """Weighted loss of the supervised states of a batch, and the sum of their weights (float64).

        Where every token counts alike, these are the sum of losses and the number of states.
        """
        rule, h = self._lenvm.config.rule, self.hparams
        predicted = rule.remaining(logits.detach())
        beyond = anchor(predicted, self.tail_after_cut, rule.gamma) if h["censored"] == "anchored" else predicted
        remaining, mask, lower_bound = treat_censored(
            batch["remaining"], batch["mask"], batch["censored"], beyond, h["censored"]
        )
        if h["lam"] == 1.0:
            target = rule.of(remaining)
        else:
            target = lambda_returns(rule.predict(logits.detach()), remaining, mask, rule.gamma, h["lam"])
        target = target.to(logits.dtype)
        losses = token_losses(logits, target, remaining, h["loss"], rule)
        counts = mask & ~(lower_bound & (predicted >= remaining))
        weights = state_weights(batch["remaining"], mask, h["weight"])
        return (weights.to(losses.dtype) * torch.where(counts, losses, 0.0)).sum(), weights.sum()

    def training_step(self, batch: LengthBatch, batch_idx: int) -> Tensor:
        """The *sum* over supervised states; ``on_before_optimizer_step`` makes it the mean over the whole step.

        Where completions count alike, that mean is over as many as a batch has on average. Divided by its own number,
        a batch of a few long ones would count as much as one of many short ones.
        """
        total, tokens = self.loss_sum(self(batch), batch)
        if self._rows_per_batch is not None:
            tokens = torch.full_like(tokens, self._rows_per_batch)
        self._step_tokens = self._step_tokens + tokens
        self.train_loss.update(total.detach() / or_one(tokens), tokens)
        if self.trainer.world_size > 1 and not batch["vision"]:
            # Ranks wait for each other's gradients of every part: a tower that is trained takes part without pictures.
            tower = (p for part in self._lenvm.vision_modules() for p in part.parameters() if p.requires_grad)
            total = total + sum(0.0 * p.sum() for p in tower)
        return total * SUM_SCALE

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the number (or weight) of supervised states, see `divide_by_tokens`."""
        divide_by_tokens(self, self._step_tokens)
        self._step_tokens = 0.0

    def on_train_batch_end(self, outputs: Any, batch: LengthBatch, batch_idx: int) -> None:
        """Log the token-mean loss of the optimizer step that has just ended."""
        trainer: Any = self.trainer
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self.log("train/loss", self.train_loss.compute(), rank_zero_only=True)
        self.train_loss.reset()

    def validation_step(self, batch: LengthBatch, batch_idx: int) -> Tensor:
        """Add a held-out batch to the metrics; returns its logits for callbacks."""
        logits = self(batch)
        total, tokens = self.loss_sum(logits, batch)
        self.val_loss.update(total / or_one(tokens), tokens)
        predicted = self._lenvm.remaining(logits)
        states = (predicted, batch["remaining"], batch["mask"], batch["censored"])
        self.val_errors.update(*states)
        self.val_boundary.update(*states, batch["prompt_index"])
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log everything measured on the held-out rows, from sums over all batches and ranks."""
        results = {"loss": self.val_loss.compute(), **self.val_errors.compute(), **self.val_boundary.compute()}
        self.log_dict({f"val/{name}": value.float() for name, value in results.items()}, rank_zero_only=True)
        for metric in (self.val_loss, self.val_errors, self.val_boundary):
            metric.reset()

    # -- optimizer ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW without decay on biases and norms; linear warm-up, then a cosine to 0 at the last step."""
        h = self.hparams
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": h["weight_decay"]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = build_optimizer(h["optimizer"], groups, self.trainer.precision, lr=h["lr"], betas=tuple(h["betas"]))
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise RecipeError("an endless run has no learning-rate schedule: set trainer.max_steps or max_epochs")
        warmup = int(h["warmup_steps"] if h["warmup_steps"] >= 1 else h["warmup_steps"] * steps)
        schedule = warmup_and_cosine(optimizer, min(warmup, int(steps)), int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def build_model(h: Mapping[str, Any], config: LenVMConfig, expected_length: float | None) -> LengthValueModel:
    """The model of these hyperparameters, with a fresh head."""
    return LengthValueModel.from_backbone(
        h["backbone"],
        config,
        pretrained=h["pretrained"],
        overrides=h["overrides"],
        keep_layers=h["keep_layers"],
        expected_length=expected_length,
        dtype=h["dtype"],
        attn_implementation=h["attn_implementation"],
        trust_remote_code=h["trust_remote_code"],
        quantise=h["quantise"],
        lora=LoRA(**h["lora"]) if h["lora"] else None,
    )


class TextLenVM(LenVMModule):
    """A length value model on a text backbone; see `LenVMModule` for the settings."""


class VisionLenVM(LenVMModule):
    """A length value model on a vision-language backbone; see `LenVMModule` for the settings."""

    def configure_model(self) -> None:
        """Build the model.

        Raises:
            RecipeError: the backbone has no vision tower.
        """
        super().configure_model()
        if next(self._lenvm.vision_modules(), None) is None:
            raise RecipeError(f"backbone {self.backbone_source!r} reads text only: use TextLenVM and TextRollouts")
