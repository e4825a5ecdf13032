"""Strategies by name: what each shards over ranks, and what it cannot train."""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy

from .deepspeed import ZeRO
from .settings import LenVMSettings

_MEANT = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def name_of(strategy: Strategy | str) -> str:
    """Name of a strategy, as a recipe gives it, or of its class; in lower case."""
    if isinstance(strategy, ZeRO):
        return f"deepspeed_stage_{strategy.stage}{strategy.offloaded}"
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy)):  # or what is made from these
        return "deepspeedstrategy" if isinstance(strategy, DeepSpeedStrategy) else "fsdpstrategy"
    return strategy.lower() if isinstance(strategy, str) else type(strategy).__name__.lower()


def stage_of(name: str) -> int:
    """What is sharded: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too."""
    if name.startswith("deepspeed"):
        return next((int(letter) for letter in name if letter.isdigit()), 2)
    return 3 if name.startswith(("fsdp", "fullyshard", "modelparallel")) else 0


def unsupported_settings(settings: LenVMSettings, name: str, precision: str, reads_images: bool) -> list[str]:
    """What a strategy would compute otherwise, or not at all.

    Args:
        settings: of the module.
        name: of the strategy, from `name_of`.
        precision: of the Trainer.
        reads_images: True = the module reads images.

    Returns:
        A sentence for every setting; none where all can be trained.
    """
    stage, backbone, found = stage_of(name), settings.backbone, []
    if name.startswith("fsdp") and name != "fsdp":
        found.append(
            "Lightning's FSDPStrategy is torch's first FSDP, which cannot clip gradients by their norm: use "
            "strategy: fsdp in a recipe, or lenvm_lightning.training.fsdp.FullySharded()"
        )
    if name == "deepspeedstrategy":
        found.append(
            "Lightning's DeepSpeedStrategy cannot divide gradients by the tokens of a whole optimizer step: use "
            "strategy: deepspeed_stage_2 in a recipe, or lenvm_lightning.training.deepspeed.ZeRO(stage=2)"
        )
    if backbone.quantise is not None and stage == 3:
        found.append("quantised weights cannot be sharded over ranks: train them with strategy: ddp")
    if not name.startswith("deepspeed"):
        return found
    precision = _MEANT.get(precision, precision)
    if precision not in ("32-true", "bf16-mixed"):
        found.append(
            f"precision: {precision}: DeepSpeed would cast or scale everything by means of its own, the value head "
            "included: use bf16-mixed or 32-true"
        )
    if "nvme" in name:
        found.append(f"strategy: {name}: nobody has tried it on disks: use deepspeed_stage_3_offload")
    if backbone.dtype != "float32" and not (settings.lora and backbone.dtype == "bfloat16"):
        found.append(f"dtype: {backbone.dtype}: DeepSpeed trains weights in float32: set dtype: float32")
    if reads_images and not backbone.freeze_vision:
        found.append(
            "freeze_vision: false: DeepSpeed adds up gradients in the order they come, which is another one in ranks "
            "whose batch has no images: use strategy: fsdp or ddp"
        )
    if reads_images and stage == 3:
        found.append(
            "images: in stage 3 ranks wait for each other in every layer, and those without images never call the "
            "vision tower: use strategy: deepspeed_stage_2 or fsdp"
        )
    return found
