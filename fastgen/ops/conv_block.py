"""What convolutions and norms with activations share: these, checks, the short way past the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastgen import backends

_dispatch_modes, _is_tracing = torch._C._len_torch_dispatch_stack, torch._C._is_tracing
_transform = torch._C._functorch.peek_interpreter_stack
_PLAIN, _STRIDED = (Tensor, torch.nn.Parameter), torch.strided
ACTIVATIONS = ("none", "relu", "leaky_relu", "elu", "tanh", "sigmoid", "silu", "gelu")


def activate(x: Tensor, activation: str, parameter: float) -> Tensor:
    if activation == "leaky_relu":
        return F.leaky_relu(x, parameter)
    if activation == "elu":
        return F.elu(x, parameter)
    return x if activation == "none" else getattr(F, activation)(x)


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    if type(value) is tuple and len(value) == 2:
        return value
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) == 2:
        return pair
    raise ValueError(f"{name} must be an integer or two (height, width), got {value!r}")


def check_tensors(input: Tensor, weight: Tensor, channels: dict[str, Tensor | None]) -> None:
    """`channels`: the vectors of one value per output channel, which may be missing."""
    for name, value in {"input": input, "weight": weight, **channels}.items():
        if not isinstance(value, Tensor) and not (name in channels and value is None):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_norm(channels: dict[str, Tensor | None], count: int, training: bool) -> None:
    """Of bias and BatchNorm: one value per output channel, and statistics where they are needed."""
    for name, value in channels.items():
        if value is not None and tuple(value.shape) != (count,):
            raise ValueError(f"{name} must be [{count}], got {list(value.shape)}")
    given = [channels[name] is not None for name in ("running_mean", "running_var", "bn_weight", "bn_bias")]
    if given[0] != given[1]:
        raise ValueError("running_mean and running_var must be given together")
    if any(given[2:]) and not given[0] and not training:
        raise ValueError("a BatchNorm without running_mean and running_var must be training")


def check_same(input: Tensor, others: dict[str, Tensor | None]) -> None:
    """One floating dtype (autocast may still bring different ones together) and one device."""
    autocast = backends.is_autocast(input)
    for name, value in others.items():
        if value is None:
            continue
        if value.device != input.device:
            raise ValueError(f"{name} must be on the device of the input, {input.device}, got {value.device}")
        if value.dtype != input.dtype and not autocast:
            raise TypeError(f"{name} must have the dtype of the input, {input.dtype}, got {value.dtype}")
    if not input.dtype.is_floating_point:
        raise TypeError(f"input must be of a floating dtype, got {input.dtype}")


def wants_grad(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_unobserved(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the dispatcher would only pass the call on: no tracing, no mode, no tensor subclass, and no tensor whose
    sign is still to be changed, as that of ``z.conj().imag`` (the memory has the other sign).

    For small layers the way through it costs as much as the arithmetic.
    """
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
            return False
    return _dispatch_modes() == 0 and not _is_tracing()


def goes_straight(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a kernel for the CPU may be called at once, if the arguments are right: all tensors plain ones of one
    dtype, no gradient wanted, nobody watching.
    """
    dtype, with_grad = tensors[0].dtype if tensors[0] is not None else None, torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN
            or tensor.dtype is not dtype
            or not tensor.is_cpu
            or tensor.layout is not _STRIDED
            or tensor.is_neg()
            or (with_grad and tensor.requires_grad)
        ):
            return False
    return (
        backends.is_free("cpu")
        and _dispatch_modes() == 0
        and not _is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
    )


def signature(tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a call that goes straight everything that checks and preparations look at, but type, device and layout."""
    first = tensors[0]
    assert first is not None
    shapes = [None if tensor is None else tensor.shape for tensor in tensors]
    return (first.dtype, first.stride(), *shapes, options, torch.get_num_threads(), backends.native_cpu().isa())


def is_transformed() -> bool:
    """Within `torch.func.vmap`, `grad` and the like, or forward-mode differentiation: only PyTorch's own operators know
    what to do.
    """
    # By the type: torch.compile wraps the value, which then is not None.
    return type(_transform()) is not type(None) or forward_ad._current_level >= 0


def is_jit_traced() -> bool:
    """Within `torch.jit.trace`, which can save no graph with an autograd function in it."""
    return _is_tracing() and _dispatch_modes() == 0


def unwrapped(tensor: Tensor) -> Tensor:
    """The values behind a tensor of `torch.func`, for checks: those of the whole batch."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
