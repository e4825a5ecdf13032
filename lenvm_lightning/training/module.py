"""LenVMModule: a length value model, its loss and its optimizer as a LightningModule. Glue; the maths is elsewhere.

Logits come from `models/value_model.py`, targets from `objectives.py` and `returns.py`, what truncated completions
teach from `censoring.py`, and the mean over tokens from `token_mean.py`.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..batch import LengthBatch
from ..censoring import Supervision, anchor, treat_censored
from ..distributions.conformal import calibration_to_plain
from ..distributions.heads import HeadConfig
from ..errors import LenVMError, RecipeError
from ..models.adapters import LoRA, digest_of_frozen
from ..models.backbone_config import BackboneConfig
from ..models.value_model import LengthValueModel
from ..objectives import LossConfig, state_weights, token_losses
from ..returns import lambda_returns
from . import fsdp
from .batch_layouts import row_logits, row_outputs
from .build import build_model, prepare_for_training, set_train_mode, value_model_config
from .checkpoint_contents import check_contents, keep_what_is_trained, kept_names
from .layout_check import check_layout
from .metrics import HeldOutScores, LengthErrors, PromptBoundaryMRE, TokenMean, calibration_of
from .optimizers import OptimizerConfig, optimizer_and_schedule, precision_warning
from .settings import LenVMSettings
from .strategies import name_of, unsupported_settings
from .token_mean import SUM_SCALE, divide_by_tokens, or_one


class LenVMModule(L.LightningModule):
    """Trains a length value model; use `TextLenVM` or `VisionLenVM`.

    Args:
        backbone: what the model is built on; a plain string is its source.
        gamma: discount, or `auto`: 99% of the value range at the 99th-percentile training length.
        loss: what the head learns: targets, and how errors count.
        optimizer: how it learns.
        lora: train adapters on the language model, with the backbone frozen; None trains the backbone itself.
        head_dropout: dropout in the value head.
        head: what it predicts of the lengths that may follow: the value alone, or their distribution, too.

    Raises:
        RecipeError: settings that cannot be, or that contradict each other; all of them.
    """

    reads_images: ClassVar[bool] = False

    def __init__(
        self,
        backbone: BackboneConfig | str,
        gamma: float | Literal["auto"] = "auto",
        loss: LossConfig = LossConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        lora: LoRA | None = None,
        head_dropout: float = 0.0,
        head: HeadConfig = HeadConfig(),
    ) -> None:
        super().__init__()
        backbone = backbone if isinstance(backbone, BackboneConfig) else BackboneConfig(str(backbone))
        self.settings = LenVMSettings(backbone, gamma, loss, optimizer, lora, head_dropout, head)
        if problems := self.settings.problems():
            raise RecipeError("the model settings contradict each other:\n  " + "\n  ".join(problems))
        self.save_hyperparameters(self.settings.as_plain())
        self.strict_loading = False  # on_load_checkpoint is stricter
        self.model: LengthValueModel | None = None
        self.tail_after_cut: float | None = None  # tokens, for censored: anchored; the data know
        self.train_loss = TokenMean()
        self.val_loss = TokenMean()
        self._frozen_digest: str | None = None  # None where this process has none of the weights
        self._rows_per_batch: float | None = None  # for weight: completion; the data know
        self._step_tokens: Tensor | float = 0.0  # of this rank since the last optimizer step

    @property
    def lenvm(self) -> LengthValueModel:
        """The value model.

        Raises:
            LenVMError: it is not built yet.
        """
        if self.model is None:
            raise LenVMError("the model is built by configure_model(), which the Trainer calls; call it first")
        return self.model

    @property
    def backbone_source(self) -> str:
        """Where the backbone, and hence tokenizer and processor, come from."""
        return self.settings.backbone.source

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that comes with the backbone may run, its tokenizer's, too."""
        return self.settings.backbone.trust_remote_code

    # -- forward, target, loss ----------------------------------------------------------------------------------

    def forward(self, batch: LengthBatch) -> Tensor:
        """Logits of a batch. Shape (B, T), float32 or better."""
        return row_logits(self.lenvm, batch)

    def supervision(self, predicted: Tensor, batch: LengthBatch) -> Supervision:
        """Which states of a batch teach what, with those of truncated completions treated as the settings say.

        Args:
            predicted: remaining tokens that the model predicts now. Shape (B, T). Treated as constants.
            batch: the batch.
        """
        kind = self.settings.loss.censored
        beyond = predicted
        if kind == "anchored":
            beyond = anchor(predicted, self.tail_after_cut, self.lenvm.config.gamma)
        return treat_censored(batch["remaining"], batch["mask"], batch["censored"], beyond, kind)

    def target(self, logits: Tensor, remaining: Tensor, mask: Tensor) -> Tensor:
        """What the head regresses on: the closed form, or lambda-returns of its own predictions.

        Args:
            logits: head output, for lambda-returns. Shape (B, T). Treated as constants.
            remaining: tokens to come. Shape (B, T).
            mask: True = supervised state. Shape (B, T).

        Returns:
            Shape (B, T), in the type of `logits`.
        """
        rule, lam = self.lenvm.config.rule, self.settings.loss.lam
        if lam == 1.0:
            return rule.of(remaining).to(logits.dtype)
        values = rule.predict(logits.detach())
        return lambda_returns(values, remaining, mask, rule.gamma, lam).to(logits.dtype)

    def loss_sum(self, outputs: Tensor, batch: LengthBatch) -> tuple[Tensor, Tensor]:
        """Weighted loss of the supervised states of a batch, and the sum of their weights (float64).

        Where every token counts alike, these are the sum of losses and the number of states.

        Args:
            outputs: of all heads, the logit first. Shape (B, T, 1 + K); or logits alone, shape (B, T).
            batch: the batch.
        """
        rule, loss = self.lenvm.config.rule, self.settings.loss
        logits = outputs if outputs.ndim == 2 else outputs[..., 0]
        predicted = rule.remaining(logits.detach())  # (B, T)
        remaining, mask, lower_bound = self.supervision(predicted, batch)
        target = self.target(logits, remaining, mask)
        losses = token_losses(logits, target, remaining, loss.kind, rule)  # (B, T)
        counts = mask & ~(lower_bound & (predicted >= remaining))
        weights = state_weights(batch["remaining"], mask, loss.weight)  # (B, T)
        total = (weights.to(losses.dtype) * torch.where(counts, losses, 0.0)).sum()
        if self.lenvm.length_rule is not None and outputs.ndim == 3:
            total = total + self._length_loss_sum(outputs[..., 1:], batch, remaining)
        return total, weights.sum()

    def _length_loss_sum(self, outputs: Tensor, batch: LengthBatch, supervised: Tensor) -> Tensor:
        """Loss of the distributional head, weighted as the value's; its likelihood knows of truncated completions."""
        assert self.lenvm.length_rule is not None
        truncated = batch["censored"][:, None]
        losses = self.lenvm.length_rule.losses(outputs, batch["remaining"], truncated, supervised)  # (B, T)
        weights = state_weights(batch["remaining"], batch["mask"], self.settings.loss.weight).to(losses.dtype)
        return self.settings.head.weight * (weights * losses.masked_fill(~batch["mask"], 0.0)).sum()

    # -- train and validate -------------------------------------------------------------------------------------

    def training_step(self, batch: LengthBatch, batch_idx: int) -> Tensor:
        """The *sum* over supervised states; `on_before_optimizer_step` makes it the mean over the whole step.

        Where completions count alike, that mean is over as many as a batch has on average. Divided by its own number,
        a batch of a few long ones would count as much as one of many short ones.
        """
        total, tokens = self.loss_sum(row_outputs(self.lenvm, batch), batch)
        if self._rows_per_batch is not None:
            tokens = torch.full_like(tokens, self._rows_per_batch)
        self._step_tokens = self._step_tokens + tokens
        self.train_loss.update(total.detach() / or_one(tokens), tokens)
        if self.trainer.world_size > 1 and not batch["vision"]:
            # Ranks wait for each other's gradients of every part: a tower that is trained takes part without images.
            tower = (p for part in self.lenvm.vision_modules() for p in part.parameters() if p.requires_grad)
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
        """Add a held-out batch to the metrics; returns the outputs of all heads, (B, T, 1 + K), for callbacks."""
        outputs = row_outputs(self.lenvm, batch)
        logits = outputs[..., 0]
        total, tokens = self.loss_sum(outputs, batch)
        self.val_loss.update(total / or_one(tokens), tokens)
        predicted = self.lenvm.remaining(logits)
        states = (predicted, batch["remaining"], batch["mask"], batch["censored"])
        self.val_errors.update(*states)
        self.val_boundary.update(*states, batch["prompt_index"])
        distribution = self.lenvm.distribution(outputs) if self.lenvm.length_rule is not None else None
        self.val_scores.update(predicted, distribution, batch)
        return outputs

    def on_validation_epoch_end(self) -> None:
        """Log everything measured on the held-out rows, from sums over all batches and ranks, and calibrate on them."""
        scores = self.val_scores.compute()
        if not self.trainer.sanity_checking:
            self.lenvm.config.calibration = calibration_to_plain(calibration_of(scores))
        scores.pop("states", None)
        results = {
            "loss": self.val_loss.compute(),
            **self.val_errors.compute(),
            **self.val_boundary.compute(),
            **scores,
        }
        self.log_dict({f"val/{name}": value.float() for name, value in results.items()}, rank_zero_only=True)
        for metric in (self.val_loss, self.val_errors, self.val_boundary, self.val_scores):
            metric.reset()

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, see `optimizer_and_schedule`.

        Raises:
            RecipeError: the run has no last step.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise RecipeError("an endless run has no learning-rate schedule: set trainer.max_steps or max_epochs")
        optimizer, schedule = optimizer_and_schedule(
            self.settings.optimizer, self.parameters(), self.trainer.precision, int(steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- set-up -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the model, once the data has said how long completions are; no weight is loaded before.

        Raises:
            RecipeError: the Trainer's strategy would compute something else, or nothing.
        """
        if self.model is not None:
            return
        if self._trainer is not None:
            name, precision = name_of(self.trainer.strategy), str(self.trainer.precision)
            if problems := unsupported_settings(self.settings, name, precision, self.reads_images):
                raise RecipeError("the strategy and the settings contradict each other:\n  " + "\n  ".join(problems))
        data = getattr(self._trainer, "datamodule", None)
        facts = data.facts if data is not None else None
        until = getattr(getattr(data, "settings", None), "until", None)  # other DataModules know no segments
        config = value_model_config(self.settings, facts, until)
        # A fresh head predicts what is left at the middle of the median completion: a typical state.
        expected = facts.p50 / 2 if facts else None
        with fsdp.rank0_init(self.device_mesh):
            self.model = build_model(self.settings, config, expected)
        self.tail_after_cut = facts.tail_after_cut if facts else None
        if data is not None and self.settings.loss.weight == "completion":
            self._rows_per_batch = data.rows_per_batch
        prepare_for_training(self.model, self.settings.backbone)
        self._frozen_digest = digest_of_frozen(self.model)
        if self.device_mesh is not None:
            fsdp.shard(self.model, self.device_mesh, self.trainer.precision)
        self.val_errors = LengthErrors()
        self.val_scores = HeldOutScores()
        self.val_boundary = PromptBoundaryMRE(data.val_prompts if data is not None else 1, config.gamma)

    def on_fit_start(self) -> None:
        """Warn of a precision that learns little, and refuse a layout that the model gets wrong.

        Raises:
            RecipeError: a layout of the data in which the model gives other values.
        """
        if (warning := precision_warning(self.settings.optimizer, str(self.trainer.precision))) is not None:
            rank_zero_warn(warning)
        batches_of = getattr(getattr(self.trainer, "datamodule", None), "layout_check_batches", None)
        batches = batches_of() if batches_of is not None else None
        if batches is not None:
            plain, laid_out = map(self.trainer.strategy.batch_to_device, batches)
            with self.trainer.precision_plugin.forward_context():
                check_layout(self.lenvm, plain, laid_out)

    def on_train_start(self) -> None:
        """Set train mode, see `set_train_mode`."""
        set_train_mode(self.lenvm, self.settings.backbone)

    # -- checkpoints and model directories ----------------------------------------------------------------------

    def _kept(self) -> set[str]:
        return kept_names(self.named_parameters(), self.settings.backbone.pretrained)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained and nothing else, see `keep_what_is_trained`."""
        keep_what_is_trained(checkpoint, self._kept(), self._frozen_digest, self.lenvm.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with weights missing, or beside others, see `check_contents`."""
        check_contents(checkpoint, self._kept(), self._frozen_digest, self.backbone_source)

    def save_pretrained(self, folder: Path, processor: Any) -> None:
        """Write a model directory; see `LengthValueModel.save_pretrained`."""
        self.lenvm.save_pretrained(folder, processor)


class TextLenVM(LenVMModule):
    """A length value model on a text backbone; see `LenVMModule` for the settings."""


class VisionLenVM(LenVMModule):
    """A length value model on a vision-language backbone; see `LenVMModule` for the settings."""

    reads_images = True

    def configure_model(self) -> None:
        """Build the model.

        Raises:
            RecipeError: the backbone has no vision tower.
        """
        super().configure_model()
        if next(self.lenvm.vision_modules(), None) is None:
            raise RecipeError(f"backbone {self.backbone_source!r} reads text only: use TextLenVM and TextRollouts")
