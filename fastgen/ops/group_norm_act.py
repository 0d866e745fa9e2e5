"""Normalisation by groups of channels and activation in one: what lies before the convolutions of decoders.

Y. Wu, K. He, "Group Normalization", ECCV 2018.  One channel in a group: D. Ulyanov, A. Vedaldi, V. Lempitsky, "Instance
Normalization: The Missing Ingredient for Fast Stylization", 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import backends
from fastgen._memory import LEAST_POOLED, empty
from fastgen.ops.conv_block import (
    ACTIVATIONS,
    activate,
    check_same,
    goes_straight,
    is_jit_traced,
    is_transformed,
    is_unobserved,
    signature,
    wants_grad,
)
from fastgen.ops.feature_maps import address, channels_last, dense, dense_strides

_THREAD_ELEMENTS = 16384  # below, waking a thread costs more than it saves


class Options(NamedTuple):
    """The arguments of the operator after the tensors."""

    num_groups: int
    eps: float
    activation: str
    parameter: float  # the slope of leaky_relu or the alpha of elu


def group_norm_act(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    alpha: float = 1.0,
) -> Tensor:
    """``activation(group_norm(input, num_groups, weight, bias, eps))``.

    Each of `num_groups` groups of neighbouring channels of an image is normalised by its mean and (biased) variance
    over the group and all positions: Wu and He 2018, equations 1 and 2.  With as many groups as channels it is the
    instance norm of Ulyanov et al. 2016, without running statistics.

    Args:
        input: [N, C, H, W], any strides.
        num_groups: of channels, a divisor of C.
        weight, bias: [C] or None, scale and shift of the channels, of the dtype of the input.
        eps: added to the variance.
        activation: "none", "relu", "leaky_relu" (with negative_slope), "elu" (with alpha), "tanh", "sigmoid", "silu" or
            "gelu" (with the error function).

    Returns:
        [N, C, H, W], channels-last in memory where no gradient is wanted.

    Where no gradient is wanted, float32, float64 and bfloat16 run natively on the CPU: the input is read twice, the
    second time with the activation, and nothing else is stored.  Inputs in another layout than channels-last are copied
    to it on the way; PyTorch's instance norm of a small contiguous map is faster, but leaves it contiguous.  Where a
    gradient is wanted it is plain PyTorch, and derivatives are of any order; so it is in other dtypes, under autocast
    and on other devices.

    A group of one element is normalised to 0, where `torch.nn.functional.group_norm` refuses a batch of one such group.

    Raises:
        TypeError: an argument is not a tensor or the dtypes differ.
        ValueError: a shape or an option is not as above.
    """
    options = (num_groups, eps, activation, alpha if activation == "elu" else negative_slope)
    tensors = (input, weight, bias)
    compiling = torch.compiler.is_compiling()
    if not compiling and isinstance(input, Tensor) and goes_straight(tensors):
        call = _served.get(signature(tensors, options))
        if call is not None:
            return call(*tensors)
    args = (*tensors, *options)
    if not compiling and is_jit_traced():  # which warns of checks
        return group_norm_act_reference(*args)
    _check(*args)
    if wants_grad(tensors) or backends.is_autocast(input) or is_transformed():
        return group_norm_act_reference(*args)
    if compiling or not is_unobserved(tensors):
        return torch.ops.fastgen.group_norm_act(*args)
    return backends.select("group_norm_act", *args)(*args)


def group_norm_act_reference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str,
    parameter: float,
) -> Tensor:
    """The definition, in plain PyTorch; `parameter` is the slope of leaky_relu or the alpha of elu."""
    return activate(torch.group_norm(input, num_groups, weight, bias, eps), activation, parameter)


# Checks, shared by the real and the fake implementations


def _check(input: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> None:
    options, channels = Options(*rest), {"weight": weight, "bias": bias}
    for name, value in {"input": input, **channels}.items():
        if not isinstance(value, Tensor) and (name == "input" or value is not None):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if options.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {options.activation!r}")
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise ValueError(f"input must be [N, C, H, W] without empty dimensions but N, got {list(input.shape)}")
    count = input.shape[1]
    if options.num_groups < 1 or count % options.num_groups:
        raise ValueError(f"num_groups must divide the {count} channels, got {options.num_groups}")
    for name, value in channels.items():
        if value is not None and tuple(value.shape) != (count,):
            raise ValueError(f"{name} must be [{count}], got {list(value.shape)}")
    check_same(input, channels)


# Implementations


def _forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> Tensor:
    tensors, options = (input, weight, bias), Options(*rest)
    if len(_served) >= _MAX_SERVED:
        _served.clear()
    call = _served[signature(tensors, options)] = _native(input, options)
    return call(*tensors)


_MAX_SERVED = 4096
_served: dict[tuple[Any, ...], Callable[..., Tensor]] = {}  # what serves calls like one that was checked before


def _why_not(input: Tensor, *_: Any) -> str | None:
    if input.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"it takes float32, float64 and bfloat16, got {input.dtype}"
    if backends.is_autocast(input):
        return "autocast is on"
    return None if input.layout is torch.strided else f"it takes strided tensors, got {input.layout}"


def _native(input: Tensor, options: Options) -> Callable[..., Tensor]:
    """What computes calls like this one; all of it that does not depend on values is done before the first."""
    native, dtype = backends.native_cpu(), str(input.dtype).removeprefix("torch.")
    shape, strides, groups = tuple(input.shape), input.stride(), options.num_groups
    threads = _worthwhile_threads(math.prod(shape), torch.get_num_threads())
    size = getattr(native, f"group_norm_act_scratch_size_{dtype}")(shape, groups, threads) * 8 // input.itemsize
    output_strides, is_pooled = dense_strides(shape), math.prod(shape) * input.itemsize >= LEAST_POOLED
    function = getattr(native, f"group_norm_act_{dtype}")
    act = (options.eps, getattr(native.Activation, options.activation), options.parameter)

    def call(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if is_pooled:
            output = empty(shape, input.dtype, torch.channels_last)
        else:
            output = input.new_empty_strided(shape, output_strides)  # in half the time of torch.empty
        weight, bias = dense(weight), dense(bias)
        scratch = input.new_empty(size)
        function(
            shape, groups, threads, input.data_ptr(), strides, address(weight), address(bias), *act,
            output.data_ptr(), scratch.data_ptr(),
        )  # fmt: skip
        return output

    return call


def _worthwhile_threads(elements: int, threads: int) -> int:
    return max(1, min(threads, elements // _THREAD_ELEMENTS))


# Registration


def _real(*args: Any) -> Tensor:
    _check(*args)
    output = backends.select("group_norm_act", *args)(*args)
    return output.contiguous(memory_format=torch.channels_last)


def _fake(input: Tensor, *rest: Any) -> Tensor:
    _check(input, *rest)
    return channels_last(input, input.shape)


backends.register("group_norm_act", "reference", group_norm_act_reference)
backends.register("group_norm_act", "cpu", _forward, why_not=_why_not)
_library = torch.library.Library("fastgen", "FRAGMENT")
_library.define(
    "group_norm_act(Tensor input, Tensor? weight, Tensor? bias, SymInt num_groups, float eps, str activation, "
    "float parameter) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.impl("group_norm_act", _real, "CompositeExplicitAutograd")
torch.library.register_fake("fastgen::group_norm_act", _fake, lib=_library)
