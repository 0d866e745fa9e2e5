"""Transposed convolution, BatchNorm and activation in one: the block that generators and decoders are made of.

A. Radford, L. Metz, S. Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks", ICLR 2016, section 3.  S. Ioffe, C. Szegedy, "Batch Normalization", ICML 2015, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
from fastgen.ops.conv_cpu import Options, output_shape
from fastgen.ops.conv_training import OPTIONS, TENSORS, define_training, reference, saving_reference, train
from fastgen.ops.feature_maps import channels_last
from fastgen.ops.known_convs import call_known, serve
from fastgen.ops.registration import Implementation, define


def conv_transpose2d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    alpha: float = 1.0,
) -> Tensor:
    """``activation(batch_norm(conv_transpose2d(input, weight, bias, ...), ...))``.

    Args:
        input: [N, Cin, H, W], any strides.
        weight: [Cin, Cout / groups, kh, kw], of the dtype of the input; so are the others.
        bias: [Cout] or None, of the convolution.
        running_mean, running_var: [Cout], statistics of the BatchNorm; both or none.
        bn_weight, bn_bias: [Cout] or None, scale and shift of the BatchNorm.  Without statistics, bn_weight and bn_bias
            there is no BatchNorm.
        stride, padding, output_padding, groups, dilation: as in `torch.nn.functional.conv_transpose2d`.
        training, momentum, eps: as in `torch.nn.functional.batch_norm`: `training` normalises by the batch and
            updates the running statistics.  It has no effect without a BatchNorm.
        activation: "none", "relu", "leaky_relu" (with negative_slope), "elu" (with alpha), "tanh", "sigmoid", "silu" or
            "gelu" (with the error function).

    Returns:
        [N, Cout, H', W'] with ``H' = (H - 1) * stride - 2 * padding + dilation * (kh - 1) + output_padding + 1``,
        channels-last in memory where a native kernel computed it.

    float32 and float64 run natively on the CPU; so does bfloat16 for inference with an even number of input channels in
    each group, summed in float32 and rounded after the activation; but groups of one channel are PyTorch's, which is
    faster.  float32, float16 and bfloat16 run natively on the GPU (Triton; one group, no dilation, TF32 only where
    ``torch.set_float32_matmul_precision`` asks for it).  Other dtypes and autocast go through plain PyTorch.  Where no
    gradient is wanted, bias, BatchNorm and activation are applied while the convolution writes its result, and nothing
    else is stored.  On the CPU packed weights are kept from call to call; see `fastgen.ops.packed_weights` for how
    changed weights are noticed.  A backward pass that is itself to be differentiated (``create_graph=True``) runs in
    plain PyTorch.

    Minimal filtering on the CPU (of kernels like 4x4 in steps of 2) mixes neighbouring pixels of a tile: an infinite
    input, or one 1e4 times as large as the others, disturbs outputs that do not read it.

    Raises:
        TypeError: an argument is not a tensor or the dtypes differ.
        ValueError: a shape or an option is not as above; training on a single value per channel.
    """
    tensors = (input, weight, bias, running_mean, running_var, bn_weight, bn_bias)
    geometry = (pair("stride", stride), pair("padding", padding), pair("output_padding", output_padding))
    batch_norm = running_mean is not None or bn_weight is not None or bn_bias is not None
    training = training and batch_norm
    parameter = alpha if activation == "elu" else negative_slope
    args = (*tensors, *geometry, groups, pair("dilation", dilation), training, eps, activation, parameter)
    compiling = torch.compiler.is_compiling()
    if not compiling and is_jit_traced():  # which warns of checks
        return reference(True, *args, momentum=momentum)
    if not compiling and not training and isinstance(input, Tensor):
        block = (True, args[7:])
        known = call_known(input, tensors[1:], (block,))
        if known is not None:
            return known
        if goes_straight(tensors):
            call = cpu.served(True, tensors, args[7:])
            if call is not None:
                return serve(call, tensors, block)
    _check(*args)
    if not compiling and 0 in output_shape(True, input.shape, weight.shape, Options(*args[7:]))[2:]:
        return reference(True, *args, momentum=momentum)  # an error, too, where PyTorch has one
    if _is_depthwise(input, weight, groups) and (compiling or backends.asked() == "auto"):
        return reference(True, *args, momentum=momentum)
    saving = training or wants_grad(tensors)
    if saving:
        return train(True, args, momentum)
    if is_transformed() or (compiling and backends.is_autocast(input)):
        return reference(True, *args)
    if not compiling:
        function = backends.select("conv_transpose2d_bn_act", *args)
        if function is _forward_reference:
            return reference(True, *args)
        if is_unobserved(tensors):
            return function(*args)
    return torch.ops.fastgen.conv_transpose2d_bn_act(*args)


def _is_depthwise(input: Tensor, weight: Tensor, groups: int) -> bool:
    """Each channel by itself, for which PyTorch mostly takes a quarter to two thirds of the time on the CPU."""
    return input.device.type == "cpu" and groups > 1 and (groups, 1) == tuple(weight.shape[:2])


# Checks, shared by the real and the fake implementations


def _check(input: Tensor, weight: Tensor, *rest: Any) -> None:
    channel_names = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias")
    channels = dict(zip(channel_names, rest[:5], strict=True))
    options = Options(*rest[5:])
    check_tensors(input, weight, channels)
    _check_options(options)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            f"weight must be [Cin, Cout / groups, kh, kw] without empty dimensions, got {list(weight.shape)}"
        )
    if weight.shape[0] % options.groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} input channels, got {options.groups}")
    if input.dim() != 4 or (input.shape[0] and 0 in input.shape[1:]):
        raise ValueError(
            f"input must be [N, Cin, H, W], without empty dimensions unless N is 0, got {list(input.shape)}"
        )
    if input.shape[1] != weight.shape[0]:
        raise ValueError(f"input must have {weight.shape[0]} channels as the weight has, got {input.shape[1]}")
    shape = output_shape(True, input.shape, weight.shape, options)
    if shape[2] < 0 or shape[3] < 0:
        raise ValueError(f"the output would be {shape[2]} x {shape[3]}: padding {options.padding} is too large for it")
    check_norm(channels, shape[1], options.training)
    if options.training and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(f"training needs more than one value per channel, got an output of {list(shape)}")
    check_same(input, {"weight": weight, **channels})


def _check_options(options: Options) -> None:
    for name, least in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1)):
        if min(getattr(options, name)) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(options, name)}")
    if options.groups < 1:
        raise ValueError(f"groups must be at least 1, got {options.groups}")
    for extra, stride, dilation in zip(options.output_padding, options.stride, options.dilation, strict=True):
        if extra >= max(stride, dilation):
            raise ValueError(f"output_padding must be less than stride or dilation, got {options.output_padding}")
    if options.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {options.activation!r}")


# Registration


def _why_not_triton(*args: Any) -> str | None:
    backward = isinstance(args[-1], (list, tuple))  # which gradients are needed comes last there
    options = Options(*(args[-10:-1] if backward else args[-9:]))
    if backends.is_autocast(args[0]):
        return "autocast is on"
    if options.groups != 1 or max(options.dilation) != 1:
        return "it takes one group and no dilation"
    return backends.why_not_triton(args[0])


def _triton(function: str) -> Implementation:
    return backends.triton_kernel("conv_transpose2d_bn_act", function), _why_not_triton


def _forward_reference(*args: Any) -> Tensor:
    return saving_reference(True, *args)[0]


def _forward_empty(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return channels_last(input, output_shape(True, input.shape, weight.shape, Options(*rest[5:])))


define(
    "conv_transpose2d_bn_act", f"({TENSORS}, {OPTIONS}) -> Tensor", _check, _forward_empty,
    {"reference": (_forward_reference, None), "cpu": (cpu.forward, cpu.why_not), "triton": _triton("forward")},
)  # fmt: skip
define_training(True, _check, {"triton": _triton("saving")}, {"triton": _triton("backward")})
