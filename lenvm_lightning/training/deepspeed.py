"""Training with DeepSpeed's ZeRO: moments (stage 1), gradients too (2), weights too (3) sharded over ranks.

`fit.trainer.strategy: deepspeed_stage_2` trains that way, and so do Lightning's other names for DeepSpeed. What is
computed is what DDP computes, token mean included: DeepSpeed adds up gradients of a sum, and where it divides them by a
loss scale, before it clips, it is told to divide by the number of tokens.

Weights, gradients and moments are float32. With `bf16-mixed` the matrices are multiplied in bfloat16, as under DDP,
and the head is not; DeepSpeed's own bfloat16 would cast all of it.

In stage 3, too, every rank first builds the whole model in the memory of its machine, to be sharded afterwards. For
models of which a machine cannot hold as many copies as it has ranks, `strategy: fsdp` builds only one.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.imports import RequirementCache
from lightning.fabric.utilities.load import _METADATA_FILENAME as METADATA_FILE
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from ..errors import CheckpointError, RecipeError
from ..models.hub_files import some
from ..utils.reading import in_a_sentence
from .checkpoint_file import read_checkpoint_file
from .deepspeed_checkpoint import TAG, read_optimizer_states, read_weights
from .fsdp import keep_in_step


class EnginePrecision(DeepSpeedPrecision):
    """Leaves weights and batches as they are, and computes in bfloat16 where autocast does.

    Args:
        precision: of the Trainer; `unsupported_settings` says which.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast nothing."""
        return module

    def convert_input(self, data: Any) -> Any:
        """Cast nothing: in bfloat16, 1,001 tokens would be 1,000."""
        return data

    def tensor_init_context(self) -> AbstractContextManager:
        """Make tensors as usual."""
        return nullcontext()

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Autocast, for what runs outside the engine; within, `torch_autocast` in its settings says the same."""
        from deepspeed.accelerator import get_accelerator

        half = self.precision == "bf16-mixed"
        with torch.autocast(get_accelerator().device_name(), torch.bfloat16, enabled=half, cache_enabled=False):
            yield


class ZeRO(DeepSpeedStrategy):
    """Lightning's strategy for DeepSpeed, made to train on the exact token mean, and in float32 what has to be.

    Args:
        stage: 1, 2 or 3.
        options: more for DeepSpeedStrategy (offload_optimizer, offload_parameters, config, …).

    Raises:
        RecipeError: DeepSpeed is not installed, or is told to use its own half precision or no ZeRO.
    """

    def __init__(self, stage: int = 2, **options: Any) -> None:
        if not RequirementCache("deepspeed"):
            raise RecipeError('DeepSpeed is not installed: pip install "lenvm-lightning[deepspeed]"')
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no other
        super().__init__(stage=stage, **options)
        self._linear = nn.functional.linear
        self._engine: Any = None
        assert isinstance(self.config, dict)
        if wrong := [key for key in ("fp16", "bf16") if self.config.get(key, {}).get("enabled")]:
            raise RecipeError(
                f"{wrong[0]} in the settings of DeepSpeed casts the value head, too: set trainer.precision"
            )
        if self.stage not in (1, 2, 3):
            raise RecipeError("DeepSpeed without ZeRO shards nothing: use strategy: ddp")
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's AdamW is fused on CPUs, too

    @classmethod
    def named(cls, name: str) -> "ZeRO":
        """The strategy by one of Lightning's names.

        Raises:
            RecipeError: there is no such name.
        """
        known = [key for key in StrategyRegistry if key.startswith("deepspeed")]
        if name not in known:
            raise RecipeError(f"trainer.strategy: {name} is unknown; there are {', '.join(known)}")
        return cls(**StrategyRegistry[name]["init_params"])

    @property
    def stage(self) -> int:
        """What is sharded: 1 moments, 2 gradients too, 3 weights too."""
        assert isinstance(self.config, dict)
        return int(self.config.get("zero_optimization", {}).get("stage", 0))

    @property
    def offloaded(self) -> str:
        """What Lightning's names say of what lies elsewhere than on the device: nothing, _offload, _offload_nvme."""
        assert isinstance(self.config, dict)
        settings = self.config.get("zero_optimization", {})
        where = {(settings.get(f"offload_{what}") or {}).get("device", "none") for what in ("optimizer", "param")}
        return "_offload_nvme" if "nvme" in where else "_offload" if "cpu" in where else ""

    # -- set-up -------------------------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Precision:
        """Ours, whatever the Trainer would take."""
        return self._precision_plugin or Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        self._precision_plugin = None if plugin is None else EnginePrecision(plugin.precision)  # type: ignore[arg-type]

    @property
    def handles_gradient_accumulation(self) -> bool:
        """The Trainer counts: DeepSpeed would go on with a short last window in the next epoch."""
        return False

    def setup_environment(self) -> None:
        """Open the process group, on CPUs as well.

        Raises:
            RecipeError: DeepSpeed takes another kind of device than the Trainer.
        """
        import deepspeed

        device = deepspeed.get_accelerator().device_name()
        if device != self.root_device.type:
            raise RecipeError(
                f"DeepSpeed computes on {device} and the Trainer on {self.root_device.type}: set the environment "
                f"variable DS_ACCELERATOR={self.root_device.type}, or trainer.accelerator"
            )
        if device == "cpu":  # gloo is enough; it would compile a replacement, with a compiler that may not be there
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """As usual, but that CPUs have no numbers to be compared with ranks."""
        if self.root_device.type != "cpu":
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def model_sharded_context(self) -> AbstractContextManager:  # type: ignore[override]
        """Build the model as usual: pretrained weights are sharded when they are there."""
        return nullcontext()

    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        assert self.lightning_module is not None
        self.config.update(
            gradient_accumulation_steps=1,  # the Trainer divides by theirs
            train_micro_batch_size_per_gpu=1,  # for its own log only
            gradient_clipping=self.lightning_module.trainer.gradient_clip_val or 0.0,
        )
        if self.precision_plugin.precision == "bf16-mixed":
            # No module is named whose gradients it would add up in bfloat16.
            self.config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        import deepspeed

        self.release()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._engine, optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=trained, lr_scheduler=lr_scheduler, config=self.config,
            dist_init_required=False,
        )  # fmt: skip
        keep_in_step(model)
        module: Any = self.lightning_module
        self.exclude_frozen_parameters = module.settings.backbone.pretrained
        return self._engine, optimizer

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """An engine only where weights are sharded; elsewhere every rank has them all."""
        import deepspeed

        self.release()
        if self.stage < 3:
            model.to(self.root_device)
            return
        assert isinstance(self.config, dict)
        kept = ("train_micro_batch_size_per_gpu", "zero_optimization", "torch_autocast")
        config = {key: value for key, value in self.config.items() if key in kept}
        self._engine = deepspeed.initialize(model=model, model_parameters=[], config=config, dist_init_required=False)[
            0
        ]
        self.model = self._engine

    def release(self) -> None:
        """Let go of the engine, its hooks and all it holds; weights stay as they are, sharded or not."""
        if self._engine is not None:
            self._engine.module_forward_pre_hook.remove()
            self._engine.module_forward_post_hook.remove()
            self._engine.destroy()
            self._engine, self.optimizers, self.model = None, [], self.lightning_module
        nn.functional.linear = self._linear  # stage 3 puts another in its place, for all of the process

    # -- a step -------------------------------------------------------------------------------------------------

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Add up gradients within a window; the step is due at the first backward pass outside."""
        self._engine.set_gradient_accumulation_boundary(False)
        yield
        self._engine.set_gradient_accumulation_boundary(True)

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients that the next step takes, before it clips them: it divides by a loss scale there."""
        self._engine.optimizer.loss_scale = 1.0 / factor

    def optimizer_step(self, *args: Any, **options: Any) -> Any:
        """Take a step; losses of the next are not scaled."""
        result = super().optimizer_step(*args, **options)
        self._engine.optimizer.loss_scale = 1.0
        return result

    # -- checkpoints --------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: the engine writes it."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder: shards of all ranks by DeepSpeed, and the rest in a file of its own, without objects."""
        path = Path(self.broadcast(filepath))
        super().save_checkpoint({}, path, storage_options)
        if self.is_global_zero:
            rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
            torch.save(rest, path / METADATA_FILE)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore weights and, to train on, moments.

        Raises:
            CheckpointError: not a whole checkpoint of DeepSpeed, not one to be trusted, or of another number of ranks.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not (path / TAG).is_dir():
            raise CheckpointError(
                f"{path} was not written by DeepSpeed (looked for {path / TAG}): use its own strategy"
            )
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            self._put(read_weights(path))
        elif (ranks := len(read_optimizer_states(path))) != self.world_size:
            raise CheckpointError(
                f"{path} was written by {ranks} ranks, and can be resumed by as many; here are {self.world_size}"
            )
        else:  # by its name: else it would take the folder that a file names, which nobody has read safely
            strict = self.lightning_module.strict_loading
            with in_a_sentence(f"{path} cannot be resumed"):
                found, _ = self._engine.load_checkpoint(
                    path, TAG, load_module_strict=strict, load_lr_scheduler_states=False
                )
            if found is None:  # it goes on with the weights it has, and warns
                raise CheckpointError(f"{path} is not whole: DeepSpeed found no weights in it")
        return read_checkpoint_file(path / METADATA_FILE)

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights into the module, of which each rank may hold a shard."""
        assert self.lightning_module is not None
        if self.stage < 3:
            self.lightning_module.load_state_dict(weights, strict=False)
            return
        import deepspeed

        own = dict(self.lightning_module.named_parameters())
        if unknown := sorted(weights.keys() - own.keys()):
            raise CheckpointError(f"the checkpoint is of another model: {some(unknown)} have no place")
        for name, value in weights.items():
            with deepspeed.zero.GatheredParameters([own[name]], modifier_rank=0), torch.no_grad():
                if self.is_global_zero:
                    own[name].copy_(value)
