"""What accelerated forward functions call: fused blocks, folded weights and small helpers of the rewritten code.

The blocks take tensors, never modules, so that weights keep their place in the module: state dicts, optimisers and
``.to()`` see what they always saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.weak import WeakTensorKeyDictionary

from fastgen import ops
from fastgen.ops.packed_weights import tensor_state

_MAX_FOLDS = 4  # kept of one weight, which may be followed by different norms


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


def conv2d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: str | Sequence[int],
    groups: int,
    dilation: Sequence[int],
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    alpha: float = 1.0,
) -> Tensor:
    """``activation(batch_norm(conv2d(input, weight, bias, ...), ...))``, the norm in eval.

    Without gradients the norm is folded into the weights, once, and the activation is applied in place.
    """
    tensors = (weight, bias, running_mean, running_var, bn_weight, bn_bias)
    if not _may_keep(input, *tensors):
        output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        if running_mean is not None:
            output = F.batch_norm(output, running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps)
        return _activate(output, activation, negative_slope, alpha)
    if running_mean is not None:
        weight, bias = _kept(tensors, eps, lambda: _fold(*tensors, eps))
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _activate_in_place(output, activation, negative_slope, alpha)


def _fold(
    weight: Tensor,
    bias: Tensor | None,
    mean: Any,
    var: Any,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that includes the norm; in double, so that they are rounded once."""
    scale = (var.double() + eps).rsqrt()
    scale = scale if bn_weight is None else scale * bn_weight.double()
    shift = -mean.double() * scale if bias is None else (bias.double() - mean.double()) * scale
    shift = shift if bn_bias is None else shift + bn_bias.double()
    return (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)


def _activate(x: Tensor, activation: str, negative_slope: float, alpha: float) -> Tensor:
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    if activation == "elu":
        return F.elu(x, alpha)
    return x if activation == "none" else getattr(torch, activation)(x)


def _activate_in_place(x: Tensor, activation: str, negative_slope: float, alpha: float) -> Tensor:
    if activation == "leaky_relu":
        return F.leaky_relu_(x, negative_slope)
    if activation == "elu":
        return F.elu_(x, alpha)
    return x if activation == "none" else getattr(torch, activation + "_")(x)


# Weights that are computed from others, constant in eval


def normed_weight(conv: torch.nn.Module) -> Tensor:
    """The weight of a convolution under weight or spectral norm in eval, computed again once it may have changed."""
    sources = norm_sources(conv)
    if not _may_keep(*sources):
        return _compute_weight(conv)
    return _kept(sources, None, lambda: _compute_weight(conv))


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


# What is kept from call to call

_keeps = WeakTensorKeyDictionary()


def _may_keep(*tensors: Tensor | None) -> bool:
    """Whether something computed from these may be kept: not where it has a gradient, is traced, or lacks a version."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    return not any(tensor.is_inference() for tensor in given[1:]) and all(type(t) in _PLAIN for t in given)


_PLAIN = (Tensor, torch.nn.Parameter)


def _kept(tensors: Iterable[Tensor | None], option: Any, compute: Callable[[], Any]) -> Any:
    """The result of `compute`, or what it was before if none of the tensors has changed since."""
    given = [tensor for tensor in tensors if tensor is not None]
    state = [tensor_state(tensor) for tensor in given]
    entries = _keeps.setdefault(given[0], {})
    key = (option, *map(id, given[1:]))
    entry = entries.get(key)
    if entry is None or entry[0] != state:
        if len(entries) >= _MAX_FOLDS:
            entries.clear()
        with torch.no_grad():
            entry = entries[key] = (state, compute())
    return entry[1]


# Helpers of the rewritten code


def tensor(value: Any) -> Tensor:
    """What the rest of the traced code took for granted."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected a tensor of a module that was not traced, got {type(value).__name__}")
    return value


def expect(value: Any, truth: bool) -> None:
    """Where the original raises an error otherwise."""
    if bool(value) is not truth:
        raise ValueError("a check in forward failed")


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
