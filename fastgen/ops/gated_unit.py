"""The gated activation unit: half of the channels times sigmoid of the others, plus a residual.

A. van den Oord, N. Kalchbrenner, O. Vinyals, L. Espeholt, A. Graves, K. Kavukcuoglu, "Conditional Image Generation with
PixelCNN Decoders", NIPS 2016, equation 2; without tanh, the gate of T. Salimans, A. Karpathy, X. Chen, D. P. Kingma,
"PixelCNN++", ICLR 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops.conv_block import check_same, is_transformed, is_unobserved, wants_grad

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
        [N, C, H, W], channels-last in memory where the native kernel computed it.

    float32 and float64 run natively on the CPU, and keep nothing but the input for the backward pass; other dtypes and
    devices, autocast, torch.compile and all within `torch.func` or forward-mode differentiation run in plain PyTorch;
    so does a backward pass that is itself to be differentiated.

    Raises:
        TypeError: an argument is not a tensor or the dtypes differ.
        ValueError: a shape or the activation is not as above.
    """
    _check(input, residual, activation)
    args = (input, residual, activation)
    if (
        is_transformed()
        or torch.compiler.is_compiling()
        or backends.select("gated_unit", input, residual, activation) is _reference
    ):
        return gated_unit_reference(*args)
    tensors = (input, residual)
    if is_unobserved(tensors) and not wants_grad(tensors):
        return _forward(*args)
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
    """The native arguments up to the input, which is channels-last."""
    n, channels, height, width = _output_shape(input)
    pixels = n * height * width
    threads = max(1, min(torch.get_num_threads(), pixels * channels // _THREAD_ELEMENTS))
    return pixels, channels, activation == "tanh", threads, input.data_ptr()


def _native(function: str, dtype: torch.dtype) -> Any:
    return getattr(backends.native_cpu(), f"{function}_{str(dtype).removeprefix('torch.')}")


def _forward(input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    input = _channels_last(input)
    residual = None if residual is None else _channels_last(residual)
    output = _empty(input, _output_shape(input))
    pointers = (0 if residual is None else residual.data_ptr(), output.data_ptr())
    _native("gated_unit", input.dtype)(*_job(input, activation), *pointers)
    return output


def _backward(grad: Tensor, input: Tensor, activation: str) -> Tensor:
    grad, input = _channels_last(grad), _channels_last(input)
    grad_input = _empty(input, input.shape)
    _native("gated_unit_gradient", input.dtype)(*_job(input, activation), grad.data_ptr(), grad_input.data_ptr())
    return grad_input


def _reference(input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return _channels_last(gated_unit_reference(input, residual, activation))


def _backward_reference(grad: Tensor, input: Tensor, activation: str) -> Tensor:
    a, b = input.chunk(2, dim=1)
    gate = torch.sigmoid(b)
    act, slope = (torch.tanh(a), 1 - torch.tanh(a).square()) if activation == "tanh" else (a, 1)
    return _channels_last(torch.cat((grad * gate * slope, grad * act * gate * (1 - gate)), dim=1))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _why_not(first: Tensor, second: Tensor | None, activation: str) -> str | None:
    """Of the arguments of either operator."""
    if first.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, got {first.dtype}"
    if torch.is_autocast_enabled(first.device.type):
        return "autocast is on"
    if any(x is not None and x.layout is not torch.strided for x in (first, second)):
        return "it takes strided tensors"
    return None


# Registration

_library = torch.library.Library("fastgen", "FRAGMENT")


def _real(input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    _check(input, residual, activation)
    return backends.select("gated_unit", input, residual, activation)(input, residual, activation)


def _fake(input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    _check(input, residual, activation)
    return _empty(input, _output_shape(input))


def _real_grad(grad: Tensor, input: Tensor, activation: str) -> Tensor:
    _check_grad(grad, input, activation)
    return backends.select("gated_unit_grad", grad, input, activation)(grad, input, activation)


def _fake_grad(grad: Tensor, input: Tensor, activation: str) -> Tensor:
    _check_grad(grad, input, activation)
    return _empty(input, input.shape)


for _name, _schema, _functions, _operator, _shape_only in (
    (
        "gated_unit", "(Tensor input, Tensor? residual, str activation) -> Tensor",
        (_reference, _forward), _real, _fake,
    ),
    (
        "gated_unit_grad", "(Tensor grad, Tensor input, str activation) -> Tensor",
        (_backward_reference, _backward), _real_grad, _fake_grad,
    ),
):  # fmt: skip
    backends.register(_name, "reference", _functions[0])
    backends.register(_name, "cpu", _functions[1], why_not=_why_not)
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, _operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgen::{_name}", _shape_only, lib=_library)
