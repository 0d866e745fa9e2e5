"""Training of a convolution of either kind with BatchNorm and activation: what autograd sees of `conv2d_bn_act` and
`conv_transpose2d_bn_act`, by the operators NAME_saving and NAME_backward.

S. Ioffe, C. Szegedy, "Batch Normalization", ICML 2015, algorithm 1 and section 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops import conv_cpu as cpu
from fastgen.ops.conv_block import activate, is_transformed
from fastgen.ops.conv_cpu import Options, output_shape
from fastgen.ops.feature_maps import channels_last
from fastgen.ops.registration import Implementation, define

TENSORS = "Tensor input, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? bn_weight, Tensor? bn_bias"  # noqa: E501
OPTIONS = "SymInt[2] stride, SymInt[2] padding, SymInt[2] output_padding, SymInt groups, SymInt[2] dilation, bool training, float eps, str activation, float parameter"  # noqa: E501
_NAMES = {False: "conv2d_bn_act", True: "conv_transpose2d_bn_act"}
_SAVED = (
    "Tensor grad, Tensor input, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor conv, Tensor mean, Tensor var"
)


def reference(
    transposed: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    *rest: Any,
    momentum: float = 0.1,
) -> Tensor:
    """The definition, in plain PyTorch; `rest`: `Options`."""
    options = Options(*rest)
    output = _convolve(transposed, input, weight, bias, options)
    if options.training or running_mean is not None:
        norm = (running_mean, running_var, bn_weight, bn_bias, options.training, momentum, options.eps)
        output = F.batch_norm(output, *norm)
    if options.activation == "relu" and not torch.compiler.is_compiling() and not is_transformed():
        return torch.relu_(output)  # PyTorch keeps the result alone either way
    return activate(output, options.activation, options.parameter)


def _convolve(transposed: bool, input: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    stride, padding, output_padding, groups, dilation = options[:5]
    if transposed:
        return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def train(transposed: bool, args: Sequence[Any], momentum: float) -> Tensor:
    """The result, with a gradient; `args`: those of the operator. Running statistics are updated."""
    if _is_plain(transposed, args):
        return reference(transposed, *args, momentum=momentum)
    output, mean, var = _Block.apply(transposed, *args)
    running_mean, running_var = args[3:5]
    if Options(*args[7:]).training and running_mean is not None and running_var is not None and output.numel():
        count = output.numel() // output.shape[1]
        with torch.no_grad():  # as `torch.nn.functional.batch_norm` does, with the unbiased variance
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * (count / (count - 1)), momentum)
    return output


def _is_plain(transposed: bool, args: Sequence[Any]) -> bool:
    if torch.compiler.is_compiling():
        return is_transformed() or backends.is_autocast(args[0])
    if is_transformed():
        return True
    return backends.select(f"{_NAMES[transposed]}_saving", *args) is _SAVING[transposed]


class _Block(torch.autograd.Function):
    """Keeps the result of the convolution for the backward pass; the activation's input is computed again from it."""

    @staticmethod
    def forward(ctx: Any, transposed: bool, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        input, weight, bias, _, _, bn_weight, bn_bias, *options = args
        output, conv, mean, var = _operator(transposed, "saving")(*args)
        if not conv.numel() and Options(*options).activation != "none":
            # Compiled code does not notice writes to what was saved.
            conv = output.clone() if torch.compiler.is_compiling() else output
        ctx.save_for_backward(bias, input, weight, bn_weight, bn_bias, conv, mean, var)
        ctx.transposed, ctx.options = transposed, options
        ctx.mark_non_differentiable(mean, var)
        return output, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return _differentiable_backward(ctx, grad)
        for_input, for_weight, for_bias, _, _, for_bn_weight, for_bn_bias = ctx.needs_input_grad[1:8]
        grads = _operator(ctx.transposed, "backward")(
            grad, *ctx.saved_tensors[1:], *ctx.options, [for_input, for_weight]
        )
        wanted = (for_input, for_weight, for_bias, for_bn_weight, for_bn_bias)
        first, second, third, fourth, fifth = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return None, first, second, third, None, None, fourth, fifth, *(None,) * 9


def _operator(transposed: bool, what: str) -> Callable[..., Any]:
    return getattr(torch.ops.fastgen, f"{_NAMES[transposed]}_{what}")


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions of `grad` and of the saved tensors: plain PyTorch's, from a second forward pass."""
    bias, input, weight, bn_weight, bn_bias, conv, mean, var = ctx.saved_tensors
    if not mean.numel() and Options(*ctx.options).activation in ("none", "relu", "leaky_relu"):
        return _linear_backward(ctx, grad, input, weight, conv.detach())
    running = (mean, var) if mean.numel() and not Options(*ctx.options).training else (None, None)
    tensors: tuple[Any, ...] = (input, weight, bias, *running, bn_weight, bn_bias)
    output = reference(ctx.transposed, *tensors, *ctx.options)
    needs = ctx.needs_input_grad[1:]
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=False) if need]
    grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=True, allow_unused=True))
    return None, *(next(grads) if need else None for need in needs)


def _linear_backward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor, conv: Tensor) -> tuple[Tensor | None, ...]:
    """The same of a block that is linear but for where its activation is cut: it needs no second forward pass."""
    options = Options(*ctx.options)
    for_input, for_weight, for_bias = ctx.needs_input_grad[1:4]
    if options.activation != "none":
        grad = grad * _activation_gradient(conv, options.activation, options.parameter)
    grads = _convolution_backward(ctx.transposed, grad, input, weight, options, [for_input, for_weight])
    return None, *grads[:2], grad.sum((0, 2, 3)) if for_bias else None, *(None,) * 13


def _convolution_backward(
    transposed: bool, grad: Tensor, input: Tensor, weight: Tensor, options: Options, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    stride, padding, output_padding, groups, dilation = options[:5]
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    return torch.ops.aten.convolution_backward(grad, input, weight, None, *geometry, [*needs, False])


# Implementations


def saving_reference(
    transposed: bool,
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

    Without a BatchNorm the statistics are empty; so is the second without an activation, too, or where
    `conv_cpu.follows_from_output`.
    """
    options = Options(*rest)
    conv = _convolve(transposed, input, weight, bias, options).contiguous(memory_format=torch.channels_last)
    if options.training:
        var, mean = torch.var_mean(conv, (0, 2, 3), correction=0)
    elif running_mean is not None and running_var is not None:
        mean, var = running_mean.clone(), running_var.clone()
    else:
        empty = input.new_empty(0)
        if options.activation == "none":
            return conv, empty, empty.clone(), empty.clone()
        kept = input.new_empty(0) if cpu.follows_from_output(transposed, options, False) else conv
        return activate(conv, options.activation, options.parameter), kept, empty, empty.clone()
    output = F.batch_norm(conv, mean, var, bn_weight, bn_bias, False, 0.0, options.eps)
    output = output.clone() if output is conv else output
    return activate(output, options.activation, options.parameter), conv, mean, var


def backward_reference(
    transposed: bool,
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
    """Gradients of input, weight, bias, bn_weight and bn_bias; of the first two, empty ones where not needed.

    `conv`: the output where the gradient follows from that.
    """
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
    of_input, of_weight, _ = _convolution_backward(transposed, grad, input, weight, options, needs)
    empty = input.new_empty(0)
    grad_input = empty if of_input is None else of_input.contiguous(memory_format=torch.channels_last)
    grad_weight = empty.clone() if of_weight is None else of_weight.contiguous()
    return grad_input, grad_weight, grad.sum((0, 2, 3)), grad_bn_weight, grad_bn_bias


_SAVING = {transposed: functools.partial(saving_reference, transposed) for transposed in (False, True)}


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


def define_training(
    transposed: bool,
    check: Callable[..., None],
    saving: dict[str, Implementation] | None = None,
    backward: dict[str, Implementation] | None = None,
) -> None:
    """Defines NAME_saving and NAME_backward; `check`: of the arguments of the first; then further implementations."""
    name = _NAMES[transposed]

    def saving_empty(input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        options = Options(*rest[5:])
        statistics = options.training or rest[1] is not None
        output = channels_last(input, output_shape(transposed, input.shape, weight.shape, options))
        kept = statistics or options.activation != "none"
        kept = kept and not cpu.follows_from_output(transposed, options, statistics)
        conv = torch.empty_like(output) if kept else input.new_empty(0)
        channels = output.shape[1] if statistics else 0
        return output, conv, input.new_empty(channels), input.new_empty(channels)

    def check_backward(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> None:
        shape = output_shape(transposed, input.shape, weight.shape, Options(*rest[5:-1]))
        if tuple(grad.shape) != shape:
            raise ValueError(f"grad must be {list(shape)}, got {list(grad.shape)}")

    def natively(function: Callable[..., Any]) -> Implementation:
        return functools.partial(function, transposed), cpu.why_not_training

    plainly = functools.partial(backward_reference, transposed)
    define(
        f"{name}_saving", f"({TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)", check, saving_empty,
        {"reference": (_SAVING[transposed], None), "cpu": natively(cpu.saving), **(saving or {})},
    )  # fmt: skip
    define(
        f"{name}_backward", f"({_SAVED}, {OPTIONS}, bool[2] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        check_backward, _backward_empty,
        {"reference": (plainly, None), "cpu": natively(cpu.backward), **(backward or {})},
    )  # fmt: skip


def _backward_empty(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    grad_input = channels_last(input, input.shape) if needs[0] else input.new_empty(0)
    grad_weight = input.new_empty(weight.shape) if needs[1] else input.new_empty(0)
    return grad_input, grad_weight, *(input.new_empty(grad.shape[1]) for _ in range(3))
