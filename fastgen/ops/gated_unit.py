"""The gated activation unit: half of the channels times sigmoid of the others, plus a residual.

A. van den Oord, N. Kalchbrenner, O. Vinyals, L. Espeholt, A. Graves, K. Kavukcuoglu, "Conditional Image Generation with
PixelCNN Decoders", NIPS 2016, equation 2; without tanh, the gate of T. Salimans, A. Karpathy, X. Chen, D. P. Kingma,
"PixelCNN++", ICLR 2017.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen import backends
from fastgen._layouts import arranged, empty, planar
from fastgen.ops.conv_block import check_same, is_jit_traced, is_transformed, is_unobserved, wants_grad
from fastgen.ops.feature_maps import address, native
from fastgen.ops.registration import define

ACTIVATIONS = ("tanh", "none")
_THREAD_ELEMENTS = 1 << 13  # outputs: below, waking a thread costs more than it saves


def gated_unit(input: Tensor, residual: Tensor | None = None, *, activation: str = "tanh") -> Tensor:
    """``act(a) * sigmoid(b)`` of the halves ``a, b = input.chunk(2, dim=1)``, plus the residual, in one pass, and one
    back.

    Args:
        input: [N, 2C, H, W], any strides.
        residual: [N, C, H, W] of the same dtype, any strides, or None.
        activation: "tanh", or "none" for the first half as it is.

    Returns:
        [N, C, H, W]; where a kernel computed it contiguous in memory as the input, or else channels-last.

    float32 and float64 run natively on the CPU, float32, bfloat16 and float16 in Triton on a GPU, and keep nothing but
    the input for the backward pass; other dtypes and devices, autocast, torch.compile and all within `torch.func` or
    forward-mode differentiation run in plain PyTorch; so does a backward pass that is itself to be differentiated.

    Raises:
        TypeError: an argument is not a tensor or the dtypes differ.
        ValueError: a shape or the activation is not as above.
    """
    _check(input, residual, activation)
    args = (input, residual, activation)
    if is_transformed() or torch.compiler.is_compiling() or is_jit_traced():
        return gated_unit_reference(*args)
    function = backends.select("gated_unit", *args)
    if function is _reference:
        return gated_unit_reference(*args)
    tensors = (input, residual)
    if is_unobserved(tensors) and not wants_grad(tensors):
        return function(*args)
    return _GatedUnit.apply(*args)


def gated_unit_reference(input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """The definition, in plain PyTorch."""
    a, b = input.chunk(2, dim=1)
    y = (torch.tanh(a) if activation == "tanh" else a) * torch.sigmoid(b)
    return y if residual is None else residual + y


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(input)
        ctx.activation = activation
        return torch.ops.fastgen.gated_unit(input, residual, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        for_input, for_residual, _ = ctx.needs_input_grad
        grad_input = None
        if for_input and torch.is_grad_enabled():  # create_graph=True
            y = gated_unit_reference(input, None, ctx.activation)
            (grad_input,) = torch.autograd.grad(y, input, grad, create_graph=True)
        elif for_input:
            grad_input = torch.ops.fastgen.gated_unit_grad(grad, input, ctx.activation)
        return grad_input, grad if for_residual else None, None


# Checks, shared by the real and the fake implementations


def _check(input: Tensor, residual: Tensor | None, activation: str) -> None:
    for name, value in (("input", input), ("residual", residual)):
        if not isinstance(value, Tensor) and not (name == "residual" and value is None):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise ValueError(f"input must be [N, 2C, H, W] without empty dimensions but N, got {list(input.shape)}")
    if input.shape[1] % 2:
        raise ValueError(f"input must have an even number of channels, got {input.shape[1]}")
    if residual is not None:
        _check_half("residual", residual, input)
    check_same(input, {"residual": residual})


def _check_grad(grad: Tensor, input: Tensor, activation: str) -> None:
    _check(input, None, activation)
    _check_half("grad", grad, input)
    check_same(input, {"grad": grad})


def _check_half(name: str, tensor: Tensor, input: Tensor) -> None:
    shape = _output_shape(input)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")


def _output_shape(input: Tensor) -> tuple[int, ...]:
    return (input.shape[0], input.shape[1] // 2, *input.shape[2:])


# Implementations


def _job(input: Tensor, activation: str) -> tuple[Any, ...]:
    """The native arguments up to the input. All planes of a sample together are as the channels of a pixel."""
    n, channels, height, width = _output_shape(input)
    area = height * width
    pixels, channels = (n, channels * area) if planar(input) else (n * area, channels)
    threads = max(1, min(torch.get_num_threads(), pixels * channels // _THREAD_ELEMENTS))
    return pixels, channels, activation == "tanh", threads, input.data_ptr()


def _forward(input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    planes = planar(input)
    input = arranged(input, planes)
    residual = None if residual is None else arranged(residual, planes)
    output = empty(input, _output_shape(input), planes)
    pointers = (address(residual), output.data_ptr())
    native("gated_unit", input.dtype)(*_job(input, activation), *pointers)
    return output


def _backward(grad: Tensor, input: Tensor, activation: str) -> Tensor:
    planes = planar(input)
    grad, input = arranged(grad, planes), arranged(input, planes)
    grad_input = empty(input, input.shape, planes)
    native("gated_unit_gradient", input.dtype)(*_job(input, activation), grad.data_ptr(), grad_input.data_ptr())
    return grad_input


def _reference(input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return arranged(gated_unit_reference(input, residual, activation), planar(input))


def _backward_reference(grad: Tensor, input: Tensor, activation: str) -> Tensor:
    a, b = input.chunk(2, dim=1)
    gate = torch.sigmoid(b)
    act, slope = (torch.tanh(a), 1 - torch.tanh(a).square()) if activation == "tanh" else (a, 1)
    return arranged(torch.cat((grad * gate * slope, grad * act * gate * (1 - gate)), dim=1), planar(input))


_triton, _triton_grad = (backends.triton_kernel("gated_unit", name) for name in ("forward", "backward"))


def _why_not(first: Tensor, second: Tensor | None, activation: str) -> str | None:
    """Of the arguments of either operator."""
    if first.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, got {first.dtype}"
    return _why_plain(first, second)


def _why_not_triton(first: Tensor, second: Tensor | None, activation: str) -> str | None:
    """Of the arguments of either operator."""
    return backends.why_not_triton(first) or _why_plain(first, second)


def _why_plain(first: Tensor, second: Tensor | None) -> str | None:
    """What no kernel takes."""
    if backends.is_autocast(first):
        return "autocast is on"
    if any(x is not None and x.layout is not torch.strided for x in (first, second)):
        return "it takes strided tensors"
    return None


# Registration


def _forward_empty(input: Tensor, *_: Any) -> Tensor:
    return empty(input, _output_shape(input), planar(input))


def _grad_empty(grad: Tensor, input: Tensor, *_: Any) -> Tensor:
    return empty(input, input.shape, planar(input))


define(
    "gated_unit", "(Tensor input, Tensor? residual, str activation) -> Tensor", _check, _forward_empty,
    {"reference": (_reference, None), "cpu": (_forward, _why_not), "triton": (_triton, _why_not_triton)},
)  # fmt: skip
define(
    "gated_unit_grad", "(Tensor grad, Tensor input, str activation) -> Tensor", _check_grad, _grad_empty,
    {"reference": (_backward_reference, None), "cpu": (_backward, _why_not), "triton": (_triton_grad, _why_not_triton)},
)  # fmt: skip
