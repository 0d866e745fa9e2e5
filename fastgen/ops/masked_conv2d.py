"""Masked convolution: the causal convolution of autoregressive pixel models.

A. van den Oord, N. Kalchbrenner, K. Kavukcuoglu, "Pixel Recurrent Neural Networks", ICML 2016, section 3.4, figure 4.

A pixel sees the pixels above it and to its left.  Within the pixel the colours are in sequence: mask type A, for the
first layer, lets a colour see the earlier colours alone; type B lets it see itself as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastgen import backends
from fastgen.ops.conv_block import is_transformed, is_unobserved, wants_grad

_MIN_THREAD_WORK = 1_000_000  # multiply-adds: below, waking a thread costs more than it saves
_MAX_TAPS = 128  # of csrc/cpu/masked_conv2d.h


def masked_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, mask_type: str, colors: int = 1, splits: int = 1
) -> Tensor:
    """``conv2d(input, weight * conv_mask(...), bias)``, stride 1, zero-padded to the size of the input.

    Args:
        input: [N, Cin, H, W], any strides.
        weight: [Cout, Cin, kh, kw] with odd kh, kw, of the dtype of the input.
        bias: [Cout] or None.
        mask_type: "A" or "B", see `conv_mask`; so are colors and splits.

    Returns:
        [N, Cout, H, W], channels-last in memory where a native kernel computed it.

    Only open taps are computed, in both directions; the gradient of a closed weight is zero.  float32 and float64 run
    natively on the CPU, float32, float16 and bfloat16 on the GPU (Triton; TF32 only where
    ``torch.set_float32_matmul_precision`` asks for it), other dtypes, autocast and all within `torch.func` or
    forward-mode differentiation through plain PyTorch; so does a backward pass that is itself to be differentiated
    (``create_graph=True``).

    Raises:
        TypeError: an argument is not a tensor or the dtypes differ.
        ValueError: a shape, the mask type, colors or splits is not as above.
    """
    _check(input, weight, bias, mask_type, colors, splits)
    args = (input, weight, bias, mask_type, colors, splits)
    if is_transformed():
        return masked_conv2d_reference(*args)
    autocast = torch.is_autocast_enabled(input.device.type)
    if torch.compiler.is_compiling():
        return masked_conv2d_reference(*args) if autocast else _MaskedConv2d.apply(*args)
    function = backends.select("masked_conv2d", *args)
    if function is _forward_reference:
        return masked_conv2d_reference(*args)
    tensors = (input, weight, bias)
    if not wants_grad(tensors) and is_unobserved(tensors):
        return function(*args)
    return _MaskedConv2d.apply(*args)


def masked_conv2d_reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, mask_type: str, colors: int, splits: int
) -> Tensor:
    """The definition, in plain PyTorch."""
    mask = conv_mask(weight.shape, mask_type, colors, splits, device=weight.device)
    return F.conv2d(input, weight * mask, bias, padding=_padding(weight.shape[2:]))


def conv_mask(
    weight_shape: Sequence[int],
    mask_type: str,
    colors: int = 1,
    splits: int = 1,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which weights of a masked convolution are open: bool [Cout, Cin, kh, kw].

    Open are the taps above the centre row, those left of the centre, and of the centre tap the connections from input
    colour a to output colour b with a < b (type A) or a <= b (type B).  Channels are cut into `colors` groups: input
    channel i has colour ``i * colors // Cin``.  Output channels are `splits` equal parts that hold all the colours each
    (two for gated units, whose halves are then aligned): with ``part = Cout // splits``, output channel o has colour
    ``o % part * colors // part``.

    Raises:
        ValueError: the shape is not that of a kernel of odd size, or an option is unknown or does not fit.
    """
    _check_mask(weight_shape, mask_type, colors, splits)
    out_channels, in_channels, height, width = weight_shape
    part = out_channels // splits
    reader = torch.arange(out_channels, device=device)[:, None] % part * colors // part
    source = torch.arange(in_channels, device=device)[None, :] * colors // in_channels
    within = source < reader if mask_type == "A" else source <= reader
    tap = torch.arange(height * width, device=device).view(height, width)
    centre = height * width // 2
    return (tap < centre) | (tap == centre) & within[:, :, None, None]


class _MaskedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, mask_type: str, colors: int, splits: int
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.mask = (mask_type, colors, splits)
        return torch.ops.fastgen.masked_conv2d(input, weight, bias, mask_type, colors, splits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        for_input, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        input_grad: Any = torch.ops.fastgen.masked_conv2d_input_grad
        weight_grad: Any = torch.ops.fastgen.masked_conv2d_weight_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            input_grad, weight_grad = _input_grad_reference, _weight_grad_reference
        if for_input:
            grad_input = input_grad(grad, weight, *ctx.mask)
        if for_weight:
            grad_weight, grad_bias = weight_grad(grad, input, weight.shape[2:], *ctx.mask)
        elif for_bias:
            grad_bias = grad.sum((0, 2, 3))
        return grad_input, grad_weight, grad_bias if for_bias else None, None, None, None


# Checks, shared by the real and the fake implementations


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, mask_type: str, colors: int, splits: int) -> None:
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    _check_mask(weight.shape, mask_type, colors, splits)
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise ValueError(f"input must be [N, Cin, H, W] without empty dimensions but N, got {list(input.shape)}")
    if input.shape[1] != weight.shape[1]:
        raise ValueError(f"input must have {weight.shape[1]} channels as the weight has, got {input.shape[1]}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    _check_same(input, weight, bias)


def _check_input_grad(grad: Tensor, weight: Tensor, mask_type: str, colors: int, splits: int) -> None:
    _check_mask(weight.shape, mask_type, colors, splits)
    if grad.dim() != 4 or grad.shape[1] != weight.shape[0] or 0 in grad.shape[1:]:
        raise ValueError(f"grad must be [N, {weight.shape[0]}, H, W], got {list(grad.shape)}")
    _check_same(grad, weight, None)


def _check_weight_grad(
    grad: Tensor, input: Tensor, kernel: Sequence[int], mask_type: str, colors: int, splits: int
) -> None:
    if grad.dim() != 4 or input.dim() != 4 or input.shape[0] != grad.shape[0] or input.shape[2:] != grad.shape[2:]:
        raise ValueError(f"grad and input must be [N, C, H, W], got {list(grad.shape)} and {list(input.shape)}")
    _check_mask((grad.shape[1], input.shape[1], *kernel), mask_type, colors, splits)
    _check_same(grad, input, None)


def _check_same(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """One floating dtype (autocast may still bring different ones together) and one device."""
    autocast = torch.is_autocast_enabled(input.device.type)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.device != input.device:
            raise ValueError(f"{name} must be on the device of the input, {input.device}, got {value.device}")
        if value.dtype != input.dtype and not autocast:
            raise TypeError(f"{name} must have the dtype of the input, {input.dtype}, got {value.dtype}")
    if not input.dtype.is_floating_point:
        raise TypeError(f"input must be of a floating dtype, got {input.dtype}")


def _check_mask(weight_shape: Sequence[int], mask_type: str, colors: int, splits: int) -> None:
    if len(weight_shape) != 4 or 0 in weight_shape:
        raise ValueError(f"weight must be [Cout, Cin, kh, kw] without empty dimensions, got {list(weight_shape)}")
    if weight_shape[2] % 2 == 0 or weight_shape[3] % 2 == 0:
        raise ValueError(f"weight must have odd kernel sizes, got {weight_shape[2]} x {weight_shape[3]}")
    if mask_type not in ("A", "B"):
        raise ValueError(f"mask_type must be 'A' or 'B', got {mask_type!r}")
    if colors < 1:
        raise ValueError(f"colors must be at least 1, got {colors}")
    if splits < 1 or weight_shape[0] % splits:
        raise ValueError(f"splits must divide the {weight_shape[0]} output channels, got {splits}")


# Implementations


def _forward_reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, mask_type: str, colors: int, splits: int
) -> Tensor:
    output = masked_conv2d_reference(input, weight, bias, mask_type, colors, splits)
    return output.contiguous(memory_format=torch.channels_last)


def _input_grad_reference(grad: Tensor, weight: Tensor, mask_type: str, colors: int, splits: int) -> Tensor:
    mask = conv_mask(weight.shape, mask_type, colors, splits, device=weight.device)
    shape = (grad.shape[0], weight.shape[1], *grad.shape[2:])
    result = conv2d_input(shape, weight * mask, grad, padding=_padding(weight.shape[2:]))
    return result.contiguous(memory_format=torch.channels_last)


def _weight_grad_reference(
    grad: Tensor, input: Tensor, kernel: Sequence[int], mask_type: str, colors: int, splits: int
) -> tuple[Tensor, Tensor]:
    shape = (grad.shape[1], input.shape[1], *kernel)
    mask = conv_mask(shape, mask_type, colors, splits, device=grad.device)
    result = conv2d_weight(input, shape, grad, padding=_padding(kernel))
    return (result * mask).contiguous(), grad.sum((0, 2, 3))


_FUNCTIONS = ("forward", "input_gradient", "weight_gradient")  # in the order of their scratch sizes


def _run(
    function: str, image: Tensor, weight_shape: Sequence[int], mask_type: str, colors: int, splits: int, *args: Any
) -> None:
    """Calls a function of csrc/cpu/masked_conv2d.h; `image` is a tensor of the batch's size and dtype."""
    native = backends.native_cpu()
    out_channels, in_channels, *kernel = weight_shape
    batch, _, height, width = image.shape
    work = batch * height * width * out_channels * in_channels * kernel[0] * kernel[1] // 2
    threads = max(1, min(torch.get_num_threads(), work // _MIN_THREAD_WORK))
    shape = (batch, in_channels, height, width)
    conv = native.MaskedConv2d(shape, out_channels, kernel, mask_type == "B", colors, splits, threads)
    dtype = str(image.dtype).removeprefix("torch.")
    sizes = getattr(native, f"masked_conv2d_scratch_{dtype}")(conv)
    scratch = image.new_empty(sizes[_FUNCTIONS.index(function)])
    getattr(native, f"masked_conv2d_{function}_{dtype}")(conv, *args, scratch.data_ptr())


def _forward_cpu(
    input: Tensor, weight: Tensor, bias: Tensor | None, mask_type: str, colors: int, splits: int
) -> Tensor:
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    output = _channels_last(input, weight.shape[0])
    pointers = (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), output.data_ptr())
    mask = (mask_type, colors, splits)
    _run("forward", input, weight.shape, *mask, input.data_ptr(), input.stride(), *pointers)
    return output


def _input_grad_cpu(grad: Tensor, weight: Tensor, mask_type: str, colors: int, splits: int) -> Tensor:
    weight = weight.contiguous()
    result = _channels_last(grad, weight.shape[1])
    pointers = (weight.data_ptr(), result.data_ptr())
    mask = (mask_type, colors, splits)
    _run("input_gradient", grad, weight.shape, *mask, grad.data_ptr(), grad.stride(), *pointers)
    return result


def _weight_grad_cpu(
    grad: Tensor, input: Tensor, kernel: Sequence[int], mask_type: str, colors: int, splits: int
) -> tuple[Tensor, Tensor]:
    shape = (grad.shape[1], input.shape[1], *kernel)
    if grad.numel() == 0:
        return grad.new_zeros(shape), grad.new_zeros(shape[0])
    weight, bias = grad.new_empty(shape), grad.new_empty(shape[0])
    images = (input.data_ptr(), input.stride(), grad.data_ptr(), grad.stride())
    mask = (mask_type, colors, splits)
    _run("weight_gradient", grad, shape, *mask, *images, weight.data_ptr(), bias.data_ptr())
    return weight, bias


def _channels_last(like: Tensor, channels: int) -> Tensor:
    shape = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _padding(kernel: Any) -> tuple[int, int]:
    return kernel[0] // 2, kernel[1] // 2


def _why_not_cpu(*args: Any) -> str | None:
    first, splits = args[0], args[-1]
    height = args[2][0] if isinstance(args[2], (list, tuple)) else args[1].shape[2]  # weight_grad has no weight
    if first.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, got {first.dtype}"
    if torch.is_autocast_enabled(first.device.type):
        return "autocast is on"
    if first.layout is not torch.strided:
        return f"it takes strided tensors, got {first.layout}"
    if height // 2 + splits > _MAX_TAPS:
        return f"kernel height / 2 + splits is above {_MAX_TAPS}"
    return None


# Registration

_MASK = "str mask_type, int colors, int splits"
_SCHEMAS = {
    "masked_conv2d": f"(Tensor input, Tensor weight, Tensor? bias, {_MASK}) -> Tensor",
    "masked_conv2d_input_grad": f"(Tensor grad, Tensor weight, {_MASK}) -> Tensor",
    "masked_conv2d_weight_grad": f"(Tensor grad, Tensor input, SymInt[2] kernel, {_MASK}) -> (Tensor, Tensor)",
}
_library = torch.library.Library("fastgen", "FRAGMENT")


def _why_not_triton(*args: Any) -> str | None:
    autocast = torch.is_autocast_enabled(args[0].device.type)
    return "autocast is on" if autocast else backends.why_not_triton(args[0])


def _register(name: str, check: Any, reference: Any, cpu: Any, triton: str, empty: Any) -> None:
    """One check for the real and the fake implementation; `empty` allocates what the fake one returns."""

    def real(*args: Any) -> Any:
        check(*args)
        return backends.select(name, *args)(*args)

    def fake(*args: Any) -> Any:
        check(*args)
        return empty(*args)

    backends.register(name, "reference", reference)
    backends.register(name, "cpu", cpu, why_not=_why_not_cpu)
    backends.register(name, "triton", backends.triton_kernel("masked_conv2d", triton), why_not=_why_not_triton)
    _library.define(name + _SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgen::{name}", fake, lib=_library)


def _forward_empty(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return _channels_last(input, weight.shape[0])


def _input_grad_empty(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return _channels_last(grad, weight.shape[1])


def _weight_grad_empty(grad: Tensor, input: Tensor, kernel: Sequence[int], *_: Any) -> tuple[Tensor, Tensor]:
    return grad.new_empty((grad.shape[1], input.shape[1], *kernel)), grad.new_empty(grad.shape[1])


_register("masked_conv2d", _check, _forward_reference, _forward_cpu, "forward", _forward_empty)
_register(
    "masked_conv2d_input_grad",
    _check_input_grad, _input_grad_reference, _input_grad_cpu, "input_gradient", _input_grad_empty,
)  # fmt: skip
_register(
    "masked_conv2d_weight_grad",
    _check_weight_grad, _weight_grad_reference, _weight_grad_cpu, "weight_gradients", _weight_grad_empty,
)  # fmt: skip
