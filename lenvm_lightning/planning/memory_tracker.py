"""A tracker of memory: every tensor that a step makes, by kind, without a byte of it being there.

Works on real tensors, where it sees what the kernels return, and on fake ones, which have a shape and no memory: a
training step of a model of any size then takes seconds on a laptop and shows what a real one would hold, and when.
"""

import contextlib
import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .memory_kinds import COPIES, FORWARD, IN_VISION_TOWER, WEIGHTS

_aten = torch.ops.aten
# Real tensors with more elements become fake beside a fake model. Smaller ones stay, since modelling code looks into
# grids of images, positions and masks to decide what it does.
_KEPT_REAL = 2**20
# torch counts the operations of the attention kernels of GPUs only.
_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g.shape, q.shape, k.shape, v.shape
    ),
}


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all live tensors by kind, the most there were, and the floating-point operations.

    A tensor is of the kind that `making` says when it is made, unless `own` says otherwise. Views count
    once, with what they look at.

    Args:
        fake: the mode that the model was made under; None for a model with real tensors.

    Attributes:
        now: bytes of each kind.
        peaks: at the fullest moment of each phase, the bytes of each kind.
        flops: floating-point operations of each phase: of matrix products, convolutions and attention; a multiplication
            with an addition is two, and masked-out attention counts as computed.
    """

    def __init__(self, fake: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.flops: Counter[str] = Counter()
        self.kind = self.phase = "other"
        self._fake = fake
        self._entries: dict[int, tuple[str, float, weakref.ref[Any]]] = {}
        self._weights: set[int] = set()

    def own(self, tensor: Tensor, kind: str, nbytes: float | None = None) -> None:
        """Say of what kind a tensor is, and how much memory it takes where that is not what its dtype says."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            old_kind, old_bytes, _ = self._entries[key]
            self.now[old_kind] -= old_bytes  # type: ignore[assignment]
            nbytes = old_bytes if nbytes is None else nbytes
        nbytes = float(storage.nbytes()) if nbytes is None else nbytes
        self._entries[key] = (kind, nbytes, weakref.ref(storage, lambda _: self._forget(key)))
        self.now[kind] += nbytes  # type: ignore[assignment]

    def own_weights(self, parameter: Tensor, nbytes: float | None = None) -> None:
        """Say that a tensor is a weight; a cast of it in the forward pass is a `weight copy`, not an activation."""
        self.own(parameter, WEIGHTS, nbytes)
        self._weights.add(parameter.untyped_storage()._cdata)

    def _forget(self, key: int) -> None:
        kind, nbytes, _ = self._entries.pop(key)
        self.now[kind] -= nbytes  # type: ignore[assignment]

    @contextlib.contextmanager
    def making(self, kind: str, phase: str | None = None) -> Iterator[None]:
        """What is made inside is of this kind, and happens in this phase."""
        before = self.kind, self.phase
        self.kind, self.phase = kind, phase or self.phase
        try:
            yield
        finally:
            self.kind, self.phase = before

    def watch(self, module: nn.Module, kind: str, phase: str = FORWARD) -> None:
        """What a module makes in the forward pass is of this kind, and happens in this phase."""
        before: list[tuple[str, str]] = []

        def enter(*_: Any) -> None:
            before.append((self.kind, self.phase))
            if self.phase == FORWARD:
                self.kind, self.phase = kind, phase

        def leave(*_: Any) -> None:
            self.kind, self.phase = before.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def watch_recomputing(self, module: nn.Module, kind: str, phase: str) -> None:
        """What layers under activation checkpointing make for the second time is of this kind."""

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), self.making(kind, phase)

        for layer in module.modules():
            checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
            if checkpoint is not None:
                layer._gradient_checkpointing_func = functools.partial(checkpoint, context_fn=contexts)  # type: ignore[assignment]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # questions such as what device a tensor is on, thousands of them
            return func(*args, **kwargs)
        if self._fake is not None:
            args, kwargs = self._without_memory(args, kwargs)
        out = func(*args, **kwargs)
        if self._fake is not None:
            out = tree_map_only(Tensor, self._unless_small, out)
        kind = self.kind
        if func is _aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights:
            kind = COPIES if self.phase in (FORWARD, IN_VISION_TOWER) else kind
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._entries:
                self.own(tensor, kind)
        self._count(func, args, kwargs, out)
        if sum(self.now.values()) > sum(self.peaks.get(self.phase, Counter()).values()):
            self.peaks[self.phase] = self.now.copy()
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = getattr(func, "overloadpacket", None)
        if packet in _CPU_ATTENTION:
            self.flops[self.phase] += _CPU_ATTENTION[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.flops[self.phase] += int(flop_registry[packet](*args, **kwargs, out_val=out))

    def _without_memory(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments for an operation on real tensors whose result would be too big to be real."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not tensors or any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return args, kwargs
        try:
            size = math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
        except RuntimeError:  # not an operation that broadcasts
            return args, kwargs
        return (args, kwargs) if size <= _KEPT_REAL else tree_map_only(Tensor, self._fake_of, (args, kwargs))

    def _unless_small(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) or tensor.untyped_storage().nbytes() <= 8 * _KEPT_REAL:
            return tensor
        return self._fake_of(tensor)

    def _fake_of(self, tensor: Tensor) -> Tensor:
        assert self._fake is not None
        return self._fake.from_tensor(tensor)
