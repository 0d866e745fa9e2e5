"""Convolution, BatchNorm and activation in one: what encoders and discriminators are made of, and what lies between the
blocks of generators.

S. Ioffe, C. Szegedy, "Batch Normalization", ICML 2015, algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops import conv_cpu as cpu
from fastgen.ops.conv_block import (
    ACTIVATIONS,
    check_norm,
    check_same,
    check_tensors,
    goes_straight,
    is_jit_traced,
    is_transformed,
    is_unobserved,
    pair,
    wants_grad,
)
from fastgen.ops.conv_cpu import Options, is_native_better, output_shape
from fastgen.ops.conv_training import define_training, reference, train
from fastgen.ops.feature_maps import channels_last
from fastgen.ops.known_convs import call_known, serve
from fastgen.ops.packed_weights import kept

_LEAST_FILTERED = 32  # channels, as in csrc/cpu/conv_weight_gradient.h
_LEAST_WORK = 1 << 25  # multiply-adds of a forward pass in training: below, the calls around the kernels cost more


def conv2d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    alpha: float = 1.0,
) -> Tensor:
    """``activation(batch_norm(conv2d(input, weight, bias, ...), ...))``.

    Args:
        input: [N, Cin, H, W], any strides.
        weight: [Cout, Cin / groups, kh, kw], of the dtype of the input; so are the others.
        bias: [Cout] or None, of the convolution.
        running_mean, running_var: [Cout], statistics of the BatchNorm; both or none.
        bn_weight, bn_bias: [Cout] or None, scale and shift of the BatchNorm.  Without statistics, bn_weight and bn_bias
            there is no BatchNorm.
        stride, padding, groups, dilation: as in `torch.nn.functional.conv2d`, with "same" and "valid".
        training, momentum, eps: as in `torch.nn.functional.batch_norm`: `training` normalises by the batch and
            updates the running statistics.  It has no effect without a BatchNorm.
        activation: "none", "relu", "leaky_relu" (with negative_slope), "elu" (with alpha), "tanh", "sigmoid", "silu" or
            "gelu" (with the error function).

    Returns:
        [N, Cout, H', W'], channels-last in memory where no gradient is wanted or a native kernel computed it;
        contiguous if the input is, the kernel has one element and PyTorch computes it.

    Where no gradient is wanted, float32, float64 and bfloat16 run natively on the CPU, but for groups of a few channels
    (one input and one output channel, depthwise, are native in float32 and float64) and for layers of more than a few
    million multiply-adds whose kernels have one element (but in float32 with one thread) or whose input channels are
    fewer than eight: there, and in other dtypes, PyTorch's convolution is used, with the BatchNorm folded into weights
    that are kept from call to call, and the activation in place. So it is in bfloat16 of an odd number of input
    channels; but where oneDNN has no bfloat16 for the processor, all but groups of such run natively, and depthwise
    ones in float32, rounded once.

    Where a gradient is wanted, or with `training`, float32 and float64 run natively on the CPU, forward and backward,
    where that is faster: kernels of two or three times the stride without groups and dilation, of 32 channels or more
    on either side, or of at most eight output channels, and not the smallest. All else is plain PyTorch, and so is a
    backward pass that is itself to be differentiated (``create_graph=True``).

    Minimal filtering on the CPU (of kernels like 4x4 in steps of 2) mixes neighbouring pixels of a tile: an infinite
    input, or one 1e4 times as large as the others, disturbs outputs that do not read it.

    Raises:
        TypeError: an argument is not a tensor or the dtypes differ.
        ValueError: a shape or an option is not as above.
    """
    strides, dilations = pair("stride", stride), pair("dilation", dilation)
    parameter = alpha if activation == "elu" else negative_slope
    training = training and (running_mean is not None or bn_weight is not None or bn_bias is not None)
    compiling = torch.compiler.is_compiling()
    if not compiling and is_jit_traced():  # which warns of checks
        tensors = (input, weight, bias, running_mean, running_var, bn_weight, bn_bias)
        rest = (strides, padding, (0, 0), groups, dilations, training, eps, activation, parameter)
        return reference(False, *tensors, *rest, momentum=momentum)
    if isinstance(padding, str):
        input, padding = _pad(input, weight, padding, strides, dilations)
    tensors = (input, weight, bias, running_mean, running_var, bn_weight, bn_bias)
    given = (strides, pair("padding", padding), groups, dilations, eps, activation, parameter)
    options, args = _options(*given, training=training), (*tensors, *given)
    if not compiling and not training and isinstance(input, Tensor):
        block = (False, options)
        known = call_known(input, tensors[1:], (block,))
        if known is not None:
            return known
        if goes_straight(tensors):
            call = cpu.served(False, tensors, options)
            if call is not None:
                return serve(call, tensors, block)
    _check(tensors, options)
    if training or wants_grad(tensors):
        return _train(tensors, options, momentum)
    if backends.is_autocast(input) or is_transformed():
        return conv2d_bn_act_reference(*args)
    if compiling or not is_unobserved(tensors):
        return torch.ops.fastgen.conv2d_bn_act(*args)
    return backends.select("conv2d_bn_act", *args)(*args)


def conv2d_bn_act_reference(*args: Any) -> Tensor:
    """The definition, in plain PyTorch; of the arguments of the operator."""
    return reference(False, *args[:7], *_options(*args[7:]))


def _train(tensors: Sequence[Any], options: Options, momentum: float) -> Tensor:
    args = (*tensors, *options)
    is_free = torch.compiler.is_compiling() or backends.asked() == "auto"
    if is_free and not _is_native_training_better(tensors[0], tensors[1], options):
        return reference(False, *args, momentum=momentum)
    return train(False, args, momentum)


def _options(
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    *act: Any,  # eps, activation, parameter
    training: bool = False,
) -> Options:
    """Of the arguments of the operator after the tensors."""
    return Options(stride, padding, (0, 0), groups, dilation, training, *act)


# Checks, shared by the real and the fake implementations


def _pad(
    input: Tensor, weight: Tensor, padding: str, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, int]]:
    """The input and the padding of either side that come to the same."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise ValueError(f"padding must be 'same', 'valid', an integer or two, got {padding!r}")
    if tuple(stride) != (1, 1):
        raise ValueError(f"padding 'same' needs stride 1, got {tuple(stride)}")
    total = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(size % 2 for size in total):  # one more behind than in front
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, (total[0] // 2, total[1] // 2)


def _check(tensors: Sequence[Any], options: Options) -> None:
    channel_names = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias")
    (input, weight), channels = tensors[:2], dict(zip(channel_names, tensors[2:], strict=True))
    check_tensors(input, weight, channels)
    for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        if min(getattr(options, name)) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(options, name)}")
    if options.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {options.activation!r}")
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            f"weight must be [Cout, Cin / groups, kh, kw] without empty dimensions, got {list(weight.shape)}"
        )
    if options.groups < 1 or weight.shape[0] % options.groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} output channels, got {options.groups}")
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise ValueError(f"input must be [N, Cin, H, W] without empty dimensions but N, got {list(input.shape)}")
    if input.shape[1] != weight.shape[1] * options.groups:
        wanted = weight.shape[1] * options.groups
        raise ValueError(f"input must have {wanted} channels as weight and groups have, got {input.shape[1]}")
    shape = output_shape(False, input.shape, weight.shape, options)
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"the output would be {shape[2]} x {shape[3]}: the kernel is larger than the padded input")
    check_norm(channels, shape[1], options.training)
    if options.training and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(f"training needs more than one value per channel, got an output of {list(shape)}")
    check_same(input, {"weight": weight, **channels})


def _check_training(*args: Any) -> None:
    """Of the arguments of the operators of a training step."""
    options = Options(*args[7:])
    if max(options.output_padding):
        raise ValueError(f"output_padding must be 0, got {options.output_padding}")
    _check(args[:7], options)


# Implementations


def _forward(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    tensors, options = (input, weight, *rest[:5]), _options(*map(_hashable, rest[5:]))
    if is_native_better(input.dtype, input.shape, weight.shape, options):
        call: Callable[..., Tensor] = _native(input, weight, tensors[3] is not None, options)
    elif cpu.is_depthwise(weight.shape, options.groups) and cpu.is_slow_bfloat16(input.dtype):
        call = _in_float32(input, weight, tensors[3] is not None, options)
    else:
        call = _folded(input, weight, options)
    cpu.serve_later(False, tensors, options, call)
    return call(*tensors)


def _is_native_training_better(input: Tensor, weight: Tensor, options: Options) -> bool:
    """Of enough work, where minimal filtering may compute all three products, or the output channels are few."""
    if input.device.type != "cpu" or input.dtype not in (torch.float32, torch.float64):
        return False
    out_channels, in_channels, *kernel = weight.shape
    if math.prod(output_shape(False, input.shape, weight.shape, options)) * math.prod(weight.shape[1:]) < _LEAST_WORK:
        return False
    if out_channels <= cpu.FEW_OUTPUTS:
        return in_channels >= cpu.FEW_INPUTS and math.prod(kernel) > 1
    taps = [size / step for size, step in zip(kernel, options.stride, strict=True)]
    if taps not in ([2, 2], [3, 3]) or tuple(options.dilation) != (1, 1) or options.groups != 1:
        return False
    return min(out_channels, in_channels) >= _LEAST_FILTERED


def _why_not(*args: Any) -> str | None:
    layout = args[0].layout
    return None if layout is torch.strided else f"it takes strided tensors, got {layout}"


def _native(input: Tensor, weight: Tensor, batch_norm: bool, options: Options) -> Callable[..., Tensor]:
    if input.dtype is torch.bfloat16 and weight.shape[1] % 2:
        return _with_even_channels(input, weight, batch_norm, options)
    sizes = input.shape, input.stride(), input.dtype
    return cpu.Inference(False, *sizes, weight, batch_norm, options)


def _with_even_channels(input: Tensor, weight: Tensor, batch_norm: bool, options: Options) -> Callable[..., Tensor]:
    """The kernels for bfloat16 multiply pairs of input channels; here the last one of zeros completes a pair."""
    padded = _one_channel_more(input)
    sizes = padded.shape, padded.stride(), padded.dtype
    native = cpu.Inference(False, *sizes, _one_channel_more(weight), batch_norm, options)

    def call(input: Tensor, weight: Tensor, *tensors: Tensor | None) -> Tensor:
        even = kept((weight,), "even", lambda: _one_channel_more(weight))
        return native(_one_channel_more(input), even, *tensors)

    return call


def _in_float32(input: Tensor, weight: Tensor, batch_norm: bool, options: Options) -> Callable[..., Tensor]:
    """Of bfloat16, rounded once, at the end."""
    wide = input.float()
    native = cpu.Inference(False, wide.shape, wide.stride(), wide.dtype, weight, batch_norm, options)

    def call(input: Tensor, *tensors: Tensor | None) -> Tensor:
        floats = [None if tensor is None else kept((tensor,), "float32", tensor.float) for tensor in tensors]
        return native(input.float(), *floats).bfloat16()  # type: ignore[arg-type]

    return call


def _one_channel_more(tensor: Tensor) -> Tensor:
    return F.pad(tensor, (0, 0, 0, 0, 0, 1))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _folded(input: Tensor, weight: Tensor, options: Options) -> Callable[..., Tensor]:
    """PyTorch's convolution of folded weights. By channels-last ones, so that the result is, too; but kernels of one
    element read contiguous images as they are.
    """
    one, dense = weight.shape[2:] == (1, 1), input.is_contiguous()
    layout = torch.contiguous_format if one and dense else torch.channels_last
    eps, activation, parameter = options.eps, options.activation, options.parameter

    def call(input: Tensor, *tensors: Tensor | None) -> Tensor:
        weight, bias = kept(tensors, (eps, layout), lambda: _fold(eps, layout, *tensors))  # type: ignore[arg-type]
        output = F.conv2d(input, weight, bias, options.stride, options.padding, options.dilation, options.groups)
        return _activate_in_place(output.contiguous(memory_format=layout), activation, parameter)

    return call


def _fold(
    eps: float,
    layout: torch.memory_format,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution that includes the norm; in double, so that they are rounded once."""
    if mean is None or var is None:
        return _laid_out(weight, layout), bias
    scale = (var.double() + eps).rsqrt()
    scale = scale if bn_weight is None else scale * bn_weight.double()
    shift = -mean.double() * scale if bias is None else (bias.double() - mean.double()) * scale
    shift = shift if bn_bias is None else shift + bn_bias.double()
    folded = (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype)
    return _laid_out(folded, layout), shift.to(weight.dtype)


def _laid_out(weight: Tensor, layout: torch.memory_format) -> Tensor:
    """Strides of dimensions of one element say to PyTorch which layout is meant, and are kept where both are right."""
    return torch.empty_like(weight, memory_format=layout).copy_(weight)


def _activate_in_place(x: Tensor, activation: str, parameter: float) -> Tensor:
    if activation == "leaky_relu":
        return F.leaky_relu_(x, parameter)
    if activation == "elu":
        return F.elu_(x, parameter)
    if activation == "silu":
        return F.silu(x, inplace=True)
    if activation == "gelu":
        return torch.ops.aten.gelu_(x)
    return x if activation == "none" else getattr(torch, activation + "_")(x)


# Registration


def _real(*args: Any) -> Tensor:
    _check(args[:7], _options(*args[7:]))
    output = backends.select("conv2d_bn_act", *args)(*args)
    return output.contiguous(memory_format=torch.channels_last)


def _fake(*args: Any) -> Tensor:
    options = _options(*args[7:])
    _check(args[:7], options)
    return channels_last(args[0], output_shape(False, args[0].shape, args[1].shape, options))


define_training(False, _check_training)
backends.register("conv2d_bn_act", "reference", conv2d_bn_act_reference)
backends.register("conv2d_bn_act", "cpu", _forward, why_not=_why_not)
_library = torch.library.Library("fastgen", "FRAGMENT")
_library.define(
    "conv2d_bn_act(Tensor input, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor? bn_weight, Tensor? bn_bias, SymInt[2] stride, SymInt[2] padding, SymInt groups, SymInt[2] dilation, "
    "float eps, str activation, float parameter) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.impl("conv2d_bn_act", _real, "CompositeExplicitAutograd")
torch.library.register_fake("fastgen::conv2d_bn_act", _fake, lib=_library)
