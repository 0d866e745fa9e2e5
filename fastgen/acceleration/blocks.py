"""What accelerated forward functions call: fused blocks, folded weights and small helpers of the rewritten code.

The blocks take tensors, never modules, so that weights keep their place in the module: state dicts, optimisers and
``.to()`` see what they always saw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastgen import ops
from fastgen.ops.conv_block import activate, is_transformed, is_unobserved, wants_grad
from fastgen.ops.packed_weights import kept


def conv_transpose2d_bn_act(
    input: Tensor, weight: Tensor, *tensors: Tensor | None, output_size: Sequence[int] | None = None, **options: Any
) -> Tensor:
    """`ops.conv_transpose2d_bn_act` with the `output_size` of `torch.nn.ConvTranspose2d`."""
    if output_size is not None:
        options["output_padding"] = _output_padding(input, weight, output_size, options)
    return ops.conv_transpose2d_bn_act(input, weight, *tensors, **options)


def _output_padding(input: Tensor, weight: Tensor, output_size: Sequence[int], options: Any) -> tuple[int, int]:
    stride, padding, dilation = options["stride"], options["padding"], options["dilation"]
    least = [
        (input.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1
        for i in range(2)
    ]
    extra = [size - smallest for size, smallest in zip(output_size[-2:], least, strict=True)]
    if any(more < 0 or more >= step for more, step in zip(extra, stride, strict=True)):
        raise ValueError(f"output_size must be within the stride of {least}, got {list(output_size)}")
    return extra[0], extra[1]


def group_norm_act(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, *, num_groups: int, eps: float, **activation: Any
) -> Tensor:
    """`ops.group_norm_act`; and what that refuses: other than images, scales of another dtype, single numbers."""
    if input.dim() == 4 and _is_one_dtype(input, weight, bias) and math.prod(input.shape[1:]) > num_groups:
        return ops.group_norm_act(input, num_groups, weight, bias, eps=eps, **activation)
    return _activate(F.group_norm(input, num_groups, weight, bias, eps), **activation)


def instance_norm_act(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, **activation: Any
) -> Tensor:
    """The same of a group for each channel; PyTorch has errors of its own for what is no batch of images."""
    if input.dim() == 4 and _is_one_dtype(input, weight, bias) and input.shape[2] * input.shape[3] > 1:
        return ops.group_norm_act(input, input.shape[1], weight, bias, eps=eps, **activation)
    return _activate(F.instance_norm(input, weight=weight, bias=bias, eps=eps), **activation)


def _is_one_dtype(input: Tensor, *others: Tensor | None) -> bool:
    return all(other is None or other.dtype == input.dtype for other in others)


def _activate(x: Tensor, activation: str = "none", negative_slope: float = 0.01, alpha: float = 1.0) -> Tensor:
    return activate(x, activation, alpha if activation == "elu" else negative_slope)


def add_into(fresh: Tensor, other: Any) -> Tensor:
    """``fresh + other``, in the memory of the first, which nobody else has, where that can hold the sum."""
    return fresh.add_(other) if _can_hold(fresh, other) else fresh + other


def mul_into(fresh: Tensor, other: Any) -> Tensor:
    """The same of a product."""
    return fresh.mul_(other) if _can_hold(fresh, other) else fresh * other


def activate_into(fresh: Tensor, activation: str, parameter: float) -> Tensor:
    """The same of an activation of `IN_PLACE`."""
    if _can_hold(fresh, 0):
        return IN_PLACE[activation](fresh, *([parameter] if activation in ("leaky_relu", "elu") else []))
    return activate(fresh, activation, parameter)


IN_PLACE = {
    **{"relu": torch.relu_, "tanh": torch.tanh_, "sigmoid": torch.sigmoid_},
    **{"leaky_relu": F.leaky_relu_, "elu": F.elu_},
}


def _can_hold(fresh: Tensor, other: Any) -> bool:
    """What the original makes of these two, element by element."""
    if torch.compiler.is_compiling() or is_transformed() or wants_grad((fresh,)) or not fresh.is_floating_point():
        return False
    if not isinstance(other, Tensor):
        return isinstance(other, int | float) and is_unobserved((fresh,))
    if other.dtype != fresh.dtype or wants_grad((other,)) or not is_unobserved((fresh, other)):
        return False
    sizes = zip(reversed(other.shape), reversed(fresh.shape), strict=False)
    fits = other.dim() <= fresh.dim() and all(size in (1, whole) for size, whole in sizes)
    return fits and fresh.is_inference() == other.is_inference()


# Weights that are computed from others, constant in eval


def normed_weight(conv: torch.nn.Module) -> Tensor:
    """The weight of a convolution under weight or spectral norm in eval, computed again once it may have changed."""
    sources = norm_sources(conv)
    return kept(sources, None, lambda: _compute_weight(conv)) if may_keep(sources) else _compute_weight(conv)


def norm_sources(conv: torch.nn.Module) -> list[Tensor]:
    """The tensors that the weight is computed from."""
    if parametrize.is_parametrized(conv, "weight"):
        parametrization: Any = conv.parametrizations["weight"]  # type: ignore[index]
        return [*parametrization.parameters(), *parametrization.buffers()]
    suffixes = ("_g", "_v") if isinstance(norm_hook(conv), WeightNorm) else ("_orig", "_u", "_v")
    return [getattr(conv, "weight" + suffix) for suffix in suffixes]


def norm_hook(conv: torch.nn.Module) -> Any:
    """The hook of `torch.nn.utils.weight_norm` or `spectral_norm`, the old functions, if it is the only one."""
    hooks: list[Any] = list(conv._forward_pre_hooks.values())
    if len(hooks) == 1 and type(hooks[0]) in (WeightNorm, SpectralNorm) and hooks[0].name == "weight":
        return hooks[0]
    return None


def _compute_weight(conv: torch.nn.Module) -> Tensor:
    hook = norm_hook(conv)
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(conv, do_power_iteration=False)
    return hook.compute_weight(conv) if hook is not None else conv.weight  # type: ignore[return-value]


def may_keep(tensors: Sequence[Tensor]) -> bool:
    """Whether something computed from these may be kept: not where it has a gradient, is traced or transformed."""
    if torch.compiler.is_compiling() or is_transformed() or not is_unobserved(tensors):
        return False
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def upsampling_weight(weight: Tensor, scale: tuple[int, int]) -> Tensor:
    """Of the transposed convolution, in steps of `scale`, that is equal to a convolution of each pixel repeated so many
    times: an output reads most pixels through several elements, whose sum is its weight.
    """
    return kept([weight], scale, lambda: _spread(weight, scale)) if may_keep([weight]) else _spread(weight, scale)


def _spread(weight: Tensor, scale: tuple[int, int]) -> Tensor:
    flipped = weight.double().flip(2, 3).transpose(0, 1)
    shifts = [(dy, dx) for dy in range(scale[0]) for dx in range(scale[1])]
    parts = [F.pad(flipped, (dx, scale[1] - 1 - dx, dy, scale[0] - 1 - dy)) for dy, dx in shifts]
    return torch.stack(parts).sum(0).to(weight.dtype)


# Helpers of the rewritten code


def tensor(value: Any) -> Tensor:
    """What the rest of the traced code took for granted."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected a tensor of a module that was not traced, got {type(value).__name__}")
    return value


class OtherThanAssumed(Exception):
    """Of an input that the rewritten code is not for."""


def expect_rank(tensor: Tensor, rank: int) -> None:
    """Where the rewritten code was written for so many dimensions."""
    if tensor.dim() != rank:
        raise OtherThanAssumed(f"has inputs of other than {rank} dimensions")


def expect_plain(tensor: Tensor) -> None:
    """Where the rewritten code was written for no subclass, nor a parameter."""
    if type(tensor) is not Tensor:
        raise OtherThanAssumed(f"has an input that is a {type(tensor).__name__}")


def assume(value: Any, truth: bool) -> None:
    """Where the rewritten code was written for this answer to a question of the original."""
    if bool(value) is not truth:
        raise OtherThanAssumed("has inputs of another device, dtype or number than assumed")


def expect(value: Any, truth: bool) -> None:
    """Where the original raises an error otherwise."""
    if bool(value) is not truth:
        raise ValueError("a check in forward failed")


def keep(path: str, name: str, value: Any) -> None:
    """Stands for an attribute that is set; code that runs has the assignment itself."""


def iadd(a: Any, b: Any) -> Any:
    a += b
    return a


def isub(a: Any, b: Any) -> Any:
    a -= b
    return a


def imul(a: Any, b: Any) -> Any:
    a *= b
    return a


def itruediv(a: Any, b: Any) -> Any:
    a /= b
    return a
