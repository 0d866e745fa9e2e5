"""Up- and downsampling with a small filter for all channels: the blurs and resamplings of StyleGAN.

R. Zhang, "Making Convolutional Networks Shift-Invariant Again", ICML 2019.  T. Karras et al., "Analyzing and Improving
the Image Quality of StyleGAN", CVPR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen._memory import empty
from fastgen.ops.conv_block import check_same, goes_straight, is_transformed, is_unobserved, pair, wants_grad
from fastgen.ops.feature_maps import native, to_channels_last

_MAX_TAPS = 1024  # of the native filter
_THREAD_PRODUCTS = 65536  # below, waking a thread costs more than it saves


class Options(NamedTuple):
    """The arguments of the operator after the tensors, (height, width) each; padding in the order of `F.pad`."""

    up: tuple[int, int]
    down: tuple[int, int]
    padding: tuple[int, int, int, int]
    flip_filter: bool


def upfirdn2d(
    input: Tensor,
    filter: Tensor,
    *,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
) -> Tensor:
    """Zeros between the pixels, zeros around them, a filter for every channel, and every so many of the results.

    The operation of that name of StyleGAN: of each channel by itself, ``up - 1`` zeros are put after every pixel (along
    either axis), then the image is padded, convolved with the filter, and of the results every `down`-th is kept.

    Args:
        input: [N, C, H, W], any strides.
        filter: [kh, kw], of the dtype of the input.
        up, down: integers, or two (height, width).
        padding: an integer, or (left, right, top, bottom) as for `torch.nn.functional.pad`, in pixels of the upsampled
            image; negative values cut off.
        flip_filter: correlate with the filter as it stands, as `torch.nn.functional.conv2d` does, instead of
            convolving.

    Returns:
        [N, C, (H * up + top + bottom - kh) // down + 1, and the same of W], channels-last in memory where the
            input is not contiguous.

    float32 and float64 run natively on the CPU where no gradient is wanted: nothing but the result is stored, zeros are
    not multiplied, and channels-last images are read as they are, as are contiguous ones unless an axis is both up- and
    downsampled.  Elsewhere it is plain PyTorch, and derivatives are of any order.

    Raises:
        TypeError: an argument is not a tensor or the dtypes differ.
        ValueError: a shape or an option is not as above, or the filter is larger than the padded image.
    """
    sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    options = Options(pair("up", up), pair("down", down), sides, flip_filter)  # type: ignore[arg-type]
    tensors = (input, filter)
    args: tuple[Any, ...] = (*tensors, *options)
    _check(*args)
    if wants_grad(tensors) or backends.is_autocast(input) or is_transformed():
        return upfirdn2d_reference(*args)
    if torch.compiler.is_compiling() or not is_unobserved(tensors):
        return torch.ops.fastgen.upfirdn2d(*args)
    if goes_straight(tensors) and _why_not(*tensors) is None:
        return _forward(*args)
    return backends.select("upfirdn2d", *args)(*args)


def upfirdn2d_reference(
    input: Tensor,
    filter: Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
) -> Tensor:
    """The definition, in plain PyTorch."""
    n, c, h, w = input.shape
    x = F.pad(input.reshape(n, c, h, 1, w, 1), (0, up[1] - 1, 0, 0, 0, up[0] - 1))
    x = F.pad(x.reshape(n, c, h * up[0], w * up[1]), tuple(padding))
    kernel = filter if flip_filter else filter.flip(0, 1)
    x = F.conv2d(x, kernel.expand(c, 1, *filter.shape), groups=c)
    return x[:, :, :: down[0], :: down[1]]


# Checks, shared by the real and the fake implementations


def _check(input: Tensor, filter: Tensor, *rest: Any) -> None:
    options = Options(*rest)
    for name, value in {"input": input, "filter": filter}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise ValueError(f"input must be [N, C, H, W] without empty dimensions but N, got {list(input.shape)}")
    if filter.dim() != 2 or 0 in filter.shape:
        raise ValueError(f"filter must be [kh, kw], got {list(filter.shape)}")
    check_same(input, {"filter": filter})
    for name in ("up", "down"):
        value = getattr(options, name)
        if not all(isinstance(factor, int | torch.SymInt) and factor >= 1 for factor in value):
            raise ValueError(f"{name} must be positive integers, got {value}")
    if len(options.padding) != 4 or not all(isinstance(side, int | torch.SymInt) for side in options.padding):
        raise ValueError(f"padding must be an integer or (left, right, top, bottom), got {options.padding}")
    left, right, top, bottom = options.padding
    sizes = input.shape[2] * options.up[0] + top + bottom, input.shape[3] * options.up[1] + left + right
    cut = input.shape[2] * options.up[0] + min(top, 0) + min(bottom, 0) < 1
    if cut or input.shape[3] * options.up[1] + min(left, 0) + min(right, 0) < 1:
        raise ValueError(f"padding {options.padding} leaves nothing of an image of {list(input.shape[2:])}")
    if sizes[0] < filter.shape[0] or sizes[1] < filter.shape[1]:
        raise ValueError(f"filter of {list(filter.shape)} is larger than the padded image of {list(sizes)}")


def _output_shape(input: Tensor, filter: Tensor, options: Options) -> tuple[int, int, int, int]:
    left, right, top, bottom = options.padding
    n, c, h, w = input.shape
    height = (h * options.up[0] + top + bottom - filter.shape[0]) // options.down[0] + 1
    width = (w * options.up[1] + left + right - filter.shape[1]) // options.down[1] + 1
    return n, c, height, width


# Implementations


def _forward(input: Tensor, filter: Tensor, *rest: Any) -> Tensor:
    options = Options(*rest)
    contiguous = input.is_contiguous()
    # Planes are images of one channel. Of both up- and downsampling, only many channels side by side are fast.
    planes = contiguous and all(up == 1 or down == 1 for up, down in zip(options.up, options.down, strict=True))
    input = input if planes else to_channels_last(input)
    kernel = (filter if options.flip_filter else filter.flip(0, 1)).contiguous()
    shape = n, c, height, width = _output_shape(input, filter, options)
    output = empty(shape, input.dtype, torch.contiguous_format if planes else torch.channels_last)
    axes = (
        (input.shape[2], height, filter.shape[0], options.padding[2], options.up[0], options.down[0]),
        (input.shape[3], width, filter.shape[1], options.padding[0], options.up[1], options.down[1]),
    )
    threads = max(1, min(torch.get_num_threads(), output.numel() * filter.numel() // _THREAD_PRODUCTS))
    images = (n * c, 1) if planes else (n, c)
    memory = input.data_ptr(), kernel.data_ptr(), output.data_ptr()
    native("upfirdn2d", input.dtype)(*images, *axes, threads, *memory)
    return output.contiguous() if contiguous else output


def _why_not(input: Tensor, filter: Tensor, *_: Any) -> str | None:
    if input.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, got {input.dtype}"
    if backends.is_autocast(input):
        return "autocast is on"
    if filter.numel() > _MAX_TAPS:
        return f"it takes filters of up to {_MAX_TAPS} elements, got {filter.numel()}"
    return None if input.layout is torch.strided else f"it takes strided tensors, got {input.layout}"


# Registration


def _real(*args: Any) -> Tensor:
    _check(*args)
    output = backends.select("upfirdn2d", *args)(*args)
    return output.contiguous(memory_format=_memory_format(args[0]))


def _fake(input: Tensor, filter: Tensor, *rest: Any) -> Tensor:
    _check(input, filter, *rest)
    shape = _output_shape(input, filter, Options(*rest))
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input))


def _memory_format(input: Tensor) -> torch.memory_format:
    return torch.contiguous_format if input.is_contiguous() else torch.channels_last


backends.register("upfirdn2d", "reference", upfirdn2d_reference)
backends.register("upfirdn2d", "cpu", _forward, why_not=_why_not)
_library = torch.library.Library("fastgen", "FRAGMENT")
_library.define(
    "upfirdn2d(Tensor input, Tensor filter, SymInt[] up, SymInt[] down, SymInt[] padding, bool flip_filter) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.impl("upfirdn2d", _real, "CompositeExplicitAutograd")
torch.library.register_fake("fastgen::upfirdn2d", _fake, lib=_library)
