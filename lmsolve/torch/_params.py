"""A module's trainable parameters as one flat vector, and back.

The solver only ever sees the vector `x` (n,). Parameters that do not require grad stay outside of
it, tied parameters stand in it once.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

_REAL = (torch.float32, torch.float64)
# torch's stream of random numbers on the CPU is one for all threads.
_RANDOM = threading.RLock()
# So is its choice of kernels.
_KERNELS = threading.RLock()


@dataclass(frozen=True)
class Parameters:
    """Layout of the trainable parameters in the flat vector."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    offsets: tuple[int, ...]  # one more than there are tensors; the last is n
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, module: nn.Module) -> Parameters:
        """Layout of a module's trainable parameters, checked."""
        named = [(k, p) for k, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("`model` must have a trainable parameter, got none.")
        for name, p in named:
            if is_lazy(p):
                raise ValueError(
                    f"`model` must be initialised: run it once, parameter {name} is lazy."
                )
            if p.dtype not in _REAL:
                raise TypeError(
                    f"`model` must have parameters of float32 or float64, got {name} of {p.dtype}."
                )
        first = named[0][1]
        for name, p in named:
            if p.dtype != first.dtype:
                raise TypeError(
                    f"`model` must have parameters of one dtype, got {named[0][0]} of "
                    f"{first.dtype} and {name} of {p.dtype}; convert with `model.to(dtype)`."
                )
            if p.device != first.device:
                raise ValueError(
                    f"`model` must have its parameters on one device, got {named[0][0]} on "
                    f"{first.device} and {name} on {p.device}."
                )
        sizes = (p.numel() for _, p in named)
        return cls(
            names=tuple(name for name, _ in named),
            shapes=tuple(p.shape for _, p in named),
            offsets=tuple(itertools.accumulate(sizes, initial=0)),
            dtype=first.dtype,
            device=first.device,
        )

    @property
    def n(self) -> int:
        """Number of trainable scalars."""
        return self.offsets[-1]

    @property
    def sizes(self) -> list[int]:
        """Number of scalars in each tensor."""
        return [b - a for a, b in itertools.pairwise(self.offsets)]

    def span(self, index: int) -> slice:
        """Place of one tensor in the flat vector."""
        return slice(self.offsets[index], self.offsets[index + 1])

    def pack(self, module: nn.Module) -> Tensor:
        """Flat copy (n,) of the module's current values."""
        values = dict(module.named_parameters())
        return torch.cat([values[name].detach().reshape(-1) for name in self.names])

    def unpack(self, x: Tensor) -> dict[str, Tensor]:
        """Views into `x` (n,) under the parameters' names, in the module's dtype."""
        x = x.to(self.dtype)
        parts = torch.split(x, self.sizes)
        return {k: v.view(s) for k, v, s in zip(self.names, parts, self.shapes, strict=True)}

    def load(self, module: nn.Module, x: Tensor) -> None:
        """Copy `x` (n,) into the module's parameters."""
        values = dict(module.named_parameters())
        with torch.no_grad():
            for name, value in self.unpack(x).items():
                values[name].copy_(value)


def flat(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Gradients side by side (n,), zeros where autograd has none."""
    return torch.cat(
        [
            (torch.zeros_like(t) if g is None else g).reshape(-1)
            for g, t in zip(parts, like, strict=True)
        ]
    )


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise by the batch as in training, but leave the running statistics alone.

    A trial point that may be rejected must not leave a trace in the model.
    """
    key = "track_running_stats"
    touched = [
        m
        for m in module.modules()
        if m.training and getattr(m, key, False) and hasattr(m, "running_mean")
    ]
    for m in touched:
        setattr(m, key, False)
    try:
        yield
    finally:
        for m in touched:
            setattr(m, key, True)


@contextlib.contextmanager
def fixed_random(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers (dropout masks) from `seed`, with torch's own stream restored after."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with _RANDOM, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Dropout layers in evaluation mode, everything else as it is."""
    touched = [
        m for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training
    ]
    for m in touched:
        m.train(False)
    try:
        yield
    finally:
        for m in touched:
            m.train(True)


@contextlib.contextmanager
def unfused_attention() -> Iterator[None]:
    """Attention by products and a softmax: its fused kernels can be differentiated only once."""
    with _KERNELS, sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def quiet_transforms() -> Iterator[None]:
    """Without torch's own warnings on the inside of its transforms, which no user can act on."""
    if threading.current_thread() is not threading.main_thread():
        yield  # filters are the whole process's: whoever starts threads sets them
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not")
        yield
