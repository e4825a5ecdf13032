"""The compiled step: one forward of new tokens as a function of tensors alone, of few shapes.

A step of a small model, or of a large one on a GPU, is mostly the time to launch its operations. Compiled, they are
fused; on a GPU they are recorded as CUDA graphs, too, which read and write at fixed addresses. Keys and values lie in a
`KVCache` with ``static`` shapes, whose rows and columns are powers of two, so that few
graphs serve a long run. Its book-keeping, different in every step, stays outside.
"""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ..errors import GenerationError
from ..tree import step_mask
from .kv_cache import Placement

BACKEND: dict[str, Any] = {"mode": "reduce-overhead"}  # CUDA graphs on a GPU; the same without them on a CPU
MOST_GRAPHS = 256  # of all models of a process; after so many it is an error, and never silently slow


def missing_for_compile(device: torch.device) -> str | None:
    """What a machine lacks for a compiled step on ``device``, and what to do; None where nothing is known to lack."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "compile needs triton on a GPU: pip install triton, or leave compile out"
        compilers = [os.environ.get("CC"), "clang", "gcc", "cc"]
    else:
        compilers = [os.environ.get("CXX", "g++")]  # as torch looks for it
    if any(name and shutil.which(name) for name in compilers):
        return None
    looked = ", ".join(name for name in compilers if name)
    return (
        f"compile needs a compiler, and there is none here (looked for {looked}): install one, such as by "
        "'apt install g++', or leave compile out"
    )


class _Lines(Cache):
    """Preallocated lines, as the model sees them in one compiled step.

    Args:
        keys: of each layer. Shape (lines, head size).
        values: likewise.
        columns: place of each new token in its row. Shape (B, T).
        width: columns of every row.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], columns: Tensor, width: int) -> None:
        super().__init__(layers=[])
        self._kept = list(zip(keys, values, strict=True))
        self._columns = columns
        self._width = width

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens, shape (B, heads, T, head size) each; everything, shape (B, heads, width, head size)."""
        rows, heads = key_states.shape[:2]
        first = torch.arange(rows * heads, device=self._columns.device).view(rows, heads, 1) * self._width
        index = (first + self._columns[:, None]).flatten()
        result = []
        for kept, states in zip(self._kept[layer_idx], (key_states, value_states), strict=True):
            kept.index_copy_(0, index, states.reshape(-1, states.shape[-1]))
            result.append(kept.view(rows, heads, self._width, -1))
        return result[0], result[1]


class CompiledForward:
    """The forward of new tokens of a model, compiled once for each shape.

    Args:
        model: with or without vocabulary head.
        kinds: of attention among its layers.
        cache_name: what its forward calls the cache.
        axes: makes the positions that it takes of positions (B, T).
    """

    def __init__(
        self, model: PreTrainedModel, kinds: list[str], cache_name: str, axes: Callable[[Tensor], Tensor]
    ) -> None:
        self._model: Any = model
        self._config: PreTrainedConfig = model.config.get_text_config()
        self._kinds = kinds
        self._cache_name = cache_name
        self._axes = axes
        self._whole = torch.compile(self._forward, fullgraph=True, dynamic=False, **BACKEND)
        self._known: set[tuple[int, ...]] = set()

    def __call__(
        self,
        input_ids: Tensor,
        placement: Placement,
        within: Tensor,
        depth: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> SimpleNamespace:
        """Run new tokens of all rows.

        Args:
            input_ids: shape (B, T).
            placement: where they go; all rows are of its width.
            within: True = the new token t (row) sees the new token s (column). Shape (T, T).
            depth: tokens between the end of the row and each new token. Shape (T,).
            keys: of each layer, written to. Shape (lines, head size) each.
            values: likewise.

        Returns:
            ``logits`` or ``last_hidden_state``, shape (B, T, …).

        Raises:
            GenerationError: the model cannot be compiled, or was in too many shapes.
        """
        arguments = (input_ids, placement.columns, placement.positions, within, depth, keys, values, placement.width)
        shape = (*input_ids.shape, placement.width)
        torch.compiler.cudagraph_mark_step_begin()
        output = self._whole(*arguments) if shape in self._known else self._first(arguments)
        self._known.add(shape)
        return SimpleNamespace(**{name: value.clone() for name, value in output.items()})  # a graph writes there again

    def _first(self, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
        """A call that may compile."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # seconds, for those who compile

        name = type(self._model).__name__
        limits: dict[str, Any] = {"recompile_limit": MOST_GRAPHS, "accumulated_recompile_limit": 2 * MOST_GRAPHS}
        try:
            with torch._dynamo.config.patch(limits):
                return self._whole(*arguments)
        except FailOnRecompileLimitHit as error:
            raise GenerationError(
                f"compile: this process has compiled {MOST_GRAPHS} shapes of steps already: leave compile out, or go "
                "on in a new process"
            ) from error
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise GenerationError(f"compile: {name} cannot be compiled: {reason}. Leave compile out") from error

    def _forward(
        self,
        input_ids: Tensor,
        columns: Tensor,
        positions: Tensor,
        within: Tensor,
        depth: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        width: int,
    ) -> dict[str, Tensor]:
        masks = {}
        for kind in self._kinds:
            seen = step_mask(columns, width, within, depth, kind, self._config)
            masks[kind] = torch.where(seen, 0.0, -torch.inf).to(keys[0].dtype).unsqueeze(1)
        output = self._model(
            input_ids=input_ids,
            position_ids=self._axes(positions[:, None] + depth),
            attention_mask=masks if len(masks) > 1 else masks[self._kinds[0]],
            use_cache=True,
            packed_queries=True,
            **{self._cache_name: _Lines(keys, values, columns, width)},
        )
        return {name: output[name] for name in ("logits", "last_hidden_state") if name in output}
