"""Transposed convolution, BatchNorm and activation in one: the block that generators and decoders are made of.

A. Radford, L. Metz, S. Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks", ICLR 2016, section 3.  S. Ioffe, C. Szegedy, "Batch Normalization", ICML 2015, algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops import conv_transpose2d_bn_act_cpu as cpu
from fastgen.ops.conv_block import (
    ACTIVATIONS,
    activate,
    check_norm,
    check_same,
    check_tensors,
    goes_straight,
    is_transformed,
    is_unobserved,
    pair,
    wants_grad,
)
from fastgen.ops.conv_transpose2d_bn_act_cpu import Options, output_shape
from fastgen.ops.feature_maps import channels_last
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
    each group, summed in float32 and rounded after the activation.  float32, float16 and bfloat16 run natively on the
    GPU (Triton; one group, no dilation, TF32 only where ``torch.set_float32_matmul_precision`` asks for it).  Other
    dtypes and autocast go through plain PyTorch.  Where no gradient is wanted, bias, BatchNorm and activation are
    applied while the convolution writes its result, and nothing else is stored.  On the CPU packed weights are kept
    from call to call; see `fastgen.ops.packed_weights` for how changed weights are noticed.  A backward pass that is
    itself to be differentiated (``create_graph=True``) runs in plain PyTorch.

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
    if not compiling and not training and isinstance(input, Tensor) and goes_straight(tensors):
        call = cpu.served(tensors, args[7:])
        if call is not None:
            return call(*tensors)
    _check(*args)
    saving = training or wants_grad(tensors)
    if is_transformed():
        plain = True
    elif compiling:
        plain = torch.is_autocast_enabled(input.device.type)
    else:
        function = backends.select("conv_transpose2d_bn_act_saving" if saving else "conv_transpose2d_bn_act", *args)
        plain = function is _forward_reference or function is _saving_reference
    if plain:
        return conv_transpose2d_bn_act_reference(*args, momentum=momentum)
    if not saving:
        if not compiling and is_unobserved(tensors):
            return function(*args)
        return torch.ops.fastgen.conv_transpose2d_bn_act(*args)
    output, mean, var = _Block.apply(*args)
    if training and running_mean is not None and running_var is not None and output.numel():
        _update(running_mean, running_var, mean, var, output.numel() // output.shape[1], momentum)
    return output


def conv_transpose2d_bn_act_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    training: bool,
    eps: float,
    activation: str,
    parameter: float,
    momentum: float = 0.1,
) -> Tensor:
    """The definition, in plain PyTorch; `parameter` is the slope of leaky_relu or the alpha of elu."""
    output = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if training or running_mean is not None:
        output = F.batch_norm(output, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    return activate(output, activation, parameter)


def _update(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float) -> None:
    """As `torch.nn.functional.batch_norm` does, with the unbiased variance."""
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / (count - 1)), momentum)


class _Block(torch.autograd.Function):
    """Keeps the result of the convolution for the backward pass; the activation's input is computed again from it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        input, weight, bias, _, _, bn_weight, bn_bias, *options = args
        output, conv, mean, var = torch.ops.fastgen.conv_transpose2d_bn_act_saving(*args)
        ctx.save_for_backward(bias, input, weight, bn_weight, bn_bias, conv, mean, var)
        ctx.options = options
        ctx.mark_non_differentiable(mean, var)
        return output, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return _differentiable_backward(ctx, grad)
        for_input, for_weight, for_bias, _, _, for_bn_weight, for_bn_bias = ctx.needs_input_grad[:7]
        grads = torch.ops.fastgen.conv_transpose2d_bn_act_backward(
            grad, *ctx.saved_tensors[1:], *ctx.options, [for_input, for_weight]
        )
        wanted = (for_input, for_weight, for_bias, for_bn_weight, for_bn_bias)
        first, second, third, fourth, fifth = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return first, second, third, None, None, fourth, fifth, *(None,) * 9


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions of `grad` and of the saved tensors: plain PyTorch's, from a second forward pass."""
    bias, input, weight, bn_weight, bn_bias, _, mean, var = ctx.saved_tensors
    running = (mean, var) if mean.numel() and not Options(*ctx.options).training else (None, None)
    tensors: tuple[Any, ...] = (input, weight, bias, *running, bn_weight, bn_bias)
    output = conv_transpose2d_bn_act_reference(*tensors, *ctx.options)
    wanted = [tensor for tensor, need in zip(tensors, ctx.needs_input_grad, strict=False) if need]
    grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(grads) if need else None for need in ctx.needs_input_grad)


# Checks, shared by the real and the fake implementations


def _check(input: Tensor, weight: Tensor, *rest: Any) -> None:
    channel_names = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias")
    channels = dict(zip(channel_names, rest, strict=False))
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
    shape = output_shape(input.shape, weight.shape, options)
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


# Implementations


def _forward_reference(*args: Any) -> Tensor:
    return _saving_reference(*args)[0]


def _saving_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, result of the convolution, and the mean and (biased) variance that it is normalised by.

    Without a BatchNorm the statistics are empty; without an activation, too, so is the second.
    """
    options = Options(*rest)
    conv = F.conv_transpose2d(input, weight, bias, *options[:5])
    conv = conv.contiguous(memory_format=torch.channels_last)
    if options.training:
        var, mean = torch.var_mean(conv, (0, 2, 3), correction=0)
    elif running_mean is not None and running_var is not None:
        mean, var = running_mean.clone(), running_var.clone()
    else:
        empty = input.new_empty(0)
        if options.activation == "none":
            return conv, empty, empty.clone(), empty.clone()
        return activate(conv, options.activation, options.parameter), conv, empty, empty.clone()
    output = F.batch_norm(conv, mean, var, bn_weight, bn_bias, False, 0.0, options.eps)
    output = output.clone() if output is conv else output
    return activate(output, options.activation, options.parameter), conv, mean, var


def _backward_reference(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    conv: Tensor,
    mean: Tensor,
    var: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias, bn_weight and bn_bias; of the first two, empty ones where not needed."""
    options, needs = Options(*rest[:-1]), rest[-1]
    view = (1, -1, 1, 1)
    scale = grad.new_ones(grad.shape[1]) if bn_weight is None else bn_weight
    normalised = conv
    if mean.numel():
        normalised = (conv - mean.view(view)) * (var + options.eps).rsqrt().view(view)
        before = normalised * scale.view(view)
        before = before if bn_bias is None else before + bn_bias.view(view)
        grad = grad * _activation_gradient(before, options.activation, options.parameter)
    elif conv.numel() or options.activation != "none":
        grad = grad * _activation_gradient(conv, options.activation, options.parameter)
    grad_bn_bias = grad.sum((0, 2, 3))
    grad_bn_weight = (grad * normalised).sum((0, 2, 3)) if conv.numel() else torch.zeros_like(grad_bn_bias)
    if options.training and grad.numel():
        count = grad.numel() // grad.shape[1]
        grad = grad - grad_bn_bias.view(view) / count - normalised * grad_bn_weight.view(view) / count
    if mean.numel():
        grad = grad * (scale * (var + options.eps).rsqrt()).view(view)
    grads = torch.ops.aten.convolution_backward(
        grad,
        input,
        weight,
        None,
        options.stride,
        options.padding,
        options.dilation,
        True,
        options.output_padding,
        options.groups,
        [*needs, False],
    )
    grad_input = grads[0].contiguous(memory_format=torch.channels_last) if needs[0] else input.new_empty(0)
    grad_weight = grads[1].contiguous() if needs[1] else input.new_empty(0)
    return grad_input, grad_weight, grad.sum((0, 2, 3)), grad_bn_weight, grad_bn_bias


def _activation_gradient(x: Tensor, activation: str, parameter: float) -> Tensor:
    one = torch.ones_like(x)
    if activation in ("relu", "leaky_relu"):
        return torch.where(x > 0, one, 0.0 if activation == "relu" else parameter)
    if activation == "elu":
        return torch.where(x > 0, one, parameter * x.exp())
    if activation == "none":
        return one
    if activation == "silu":
        y = x.sigmoid()
        return y * (1 + x * (1 - y))
    if activation == "gelu":
        density = (-x * x / 2).exp() / math.sqrt(2 * math.pi)
        return (1 + (x * math.sqrt(0.5)).erf()) / 2 + x * density
    y = activate(x, activation, parameter)
    return 1 - y * y if activation == "tanh" else y * (1 - y)


# Registration

_TENSORS = "Tensor input, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? bn_weight, Tensor? bn_bias"  # noqa: E501
_OPTIONS = "SymInt[2] stride, SymInt[2] padding, SymInt[2] output_padding, SymInt groups, SymInt[2] dilation, bool training, float eps, str activation, float parameter"  # noqa: E501
_SAVED = (
    "Tensor grad, Tensor input, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor conv, Tensor mean, Tensor var"
)


def _why_not_triton(*args: Any) -> str | None:
    backward = isinstance(args[-1], (list, tuple))  # which gradients are needed comes last there
    options = Options(*(args[-10:-1] if backward else args[-9:]))
    if torch.is_autocast_enabled(args[0].device.type):
        return "autocast is on"
    if options.groups != 1 or max(options.dilation) != 1:
        return "it takes one group and no dilation"
    return backends.why_not_triton(args[0])


def _triton(function: str) -> Implementation:
    return backends.triton_kernel("conv_transpose2d_bn_act", function), _why_not_triton


def _forward_empty(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return channels_last(input, output_shape(input.shape, weight.shape, Options(*rest[5:])))


def _saving_empty(input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    output, options = _forward_empty(input, weight, *rest), Options(*rest[5:])
    channels = output.shape[1] if options.training or rest[1] is not None else 0
    conv = torch.empty_like(output) if channels or options.activation != "none" else input.new_empty(0)
    return output, conv, input.new_empty(channels), input.new_empty(channels)


def _backward_empty(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    grad_input = channels_last(input, input.shape) if needs[0] else input.new_empty(0)
    grad_weight = input.new_empty(weight.shape) if needs[1] else input.new_empty(0)
    return grad_input, grad_weight, *(input.new_empty(grad.shape[1]) for _ in range(3))


def _check_backward(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> None:
    options = Options(*rest[5:-1])
    shape = output_shape(input.shape, weight.shape, options)
    if tuple(grad.shape) != shape:
        raise ValueError(f"grad must be {list(shape)}, got {list(grad.shape)}")


define(
    "conv_transpose2d_bn_act", f"({_TENSORS}, {_OPTIONS}) -> Tensor", _check, _forward_empty,
    {"reference": (_forward_reference, None), "cpu": (cpu.forward, cpu.why_not), "triton": _triton("forward")},
)  # fmt: skip
define(
    "conv_transpose2d_bn_act_saving", f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _check, _saving_empty,
    {"reference": (_saving_reference, None), "cpu": (cpu.saving, cpu.why_not_training), "triton": _triton("saving")},
)  # fmt: skip
define(
    "conv_transpose2d_bn_act_backward",
    f"({_SAVED}, {_OPTIONS}, bool[2] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _check_backward, _backward_empty,
    {
        "reference": (_backward_reference, None), "cpu": (cpu.backward, cpu.why_not_training),
        "triton": _triton("backward"),
    },
)  # fmt: skip
