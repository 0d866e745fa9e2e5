"""Images that are joined, or parted, to be convolved by other than their channels: each sample as a group with weights
of its own, or each channel of each sample as an image, with one small filter for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import ops
from fastgen._memory import empty
from fastgen.acceleration.deferred import Axes, Deferred, Dims, Sizes, of_shapes, or_of_tensor, plain
from fastgen.acceleration.scaled_weights import DTYPES, ScaledWeight
from fastgen.ops.conv_block import is_transformed, is_unobserved, pair, wants_grad
from fastgen.ops.conv_cpu import Options
from fastgen.ops.conv_sequence import conv_bn_act_sequence
from fastgen.ops.known_convs import BLOCK_TENSORS

# Samples, channels, rows, a pixel and the zeros that follow it in a column, columns, and the same in a row.
_N, _C, _H, _U, _W, _V = range(6)
_ZERO, _ONE = [(n, (n,), (n, n), [n], [n, n]) for n in (0, 1)]  # as options of a convolution
_NO_NORM = (None,) * (BLOCK_TENSORS - 1)


def _times(images: Tensor, scales: Tensor) -> Tensor:
    """Images times scales [N, C, 1, 1], in the images' order."""
    if wants_grad((images, scales)):
        return images * scales
    for order in (torch.contiguous_format, torch.channels_last):
        if images.is_contiguous(memory_format=order):
            return torch.mul(images, scales, out=empty(images.shape, images.dtype, order))
    return images * scales


def images(value: Any) -> Any:
    """Images [N, C, H, W] to be deferred; or themselves, as code takes for granted that they lie."""
    if not isinstance(value, Tensor):
        return value
    observed = torch.compiler.is_compiling() or is_transformed() or not is_unobserved((value,))
    if observed or wants_grad((value,)) or torch.is_autocast_enabled("cpu"):
        return value.contiguous()
    if value.dim() != 4 or value.device.type != "cpu" or value.dtype not in DTYPES or 0 in value.shape:
        return value.contiguous()
    return Images(value)


class Images(Deferred):
    """`source`, with zeros between its pixels and `padding` (left, right, top, bottom) around it, all of which is put
    into the memory of a tensor only where it is asked for.
    """

    def __init__(self, source: Tensor) -> None:
        n, c, h, w = source.shape
        super().__init__((n, c, h, 1, w, 1), ((_N,), (_C,), (_H,), (_W,)), source)
        self.source, self.padding = source, (0, 0, 0, 0)
        self.up = (1, 1)
        self.pending: list[Tensor] = []  # what the source is yet to be multiplied with, shared by all views of it

    def scaled(self) -> Tensor:
        """The source, multiplied in place."""
        while self.pending:
            self.source.mul_(self.pending.pop())
        return self.source

    def unscaled(self) -> tuple[Tensor | None, Tensor | None]:
        """The source and what it is yet to be multiplied with, if that is what the images are."""
        same = self.shape == self.source.shape and self.up == (1, 1) and not any(self.padding)
        if not same or not _is_in_order(self.sizes, self.dims) or len(self.pending) > 1:
            return None, None
        return self.source, self.pending[0] if self.pending else None

    def tensor(self) -> Tensor:
        value = self.scaled()
        n, c, h, w = value.shape
        if self.up != (1, 1):
            value = F.pad(value.reshape(n, c, h, 1, w, 1), (0, self.up[1] - 1, 0, 0, 0, self.up[0] - 1))
            value = value.reshape(n, c, h * self.up[0], w * self.up[1])
        value = F.pad(value, self.padding) if any(self.padding) else value
        if self.shape == value.shape and _is_in_order(self.sizes, self.dims):
            return value
        return self.arranged(value.reshape(self.sizes))

    def pad(self, sides: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
        """Of zeros: between pixels where a dimension of one follows these, around the images elsewhere."""
        found: Images | None = None
        if mode == "constant" and not value and all(isinstance(side, int) for side in sides):
            found = self
        for i in range(0, len(sides), 2):
            if found is not None and (sides[i] or sides[i + 1]):
                found = found._padded(len(self.dims) - 1 - i // 2, sides[i], sides[i + 1])
        return F.pad(self.lying(), sides, mode, value) if found is None else found

    def _padded(self, at: int, before: int, after: int) -> Images | None:
        along = self._along(self.dims[at])
        if along is not None:
            return self._with_zeros_around(at, along, before, after)
        follows = self._along(self.dims[at - 1]) if at and not self.dims[at] else None
        return (
            self._with_zeros_between(at, follows, after) if follows is not None and not before and after > 0 else None
        )

    def _with_zeros_around(self, at: int, along: int, before: int, after: int) -> Images | None:
        """Or, negative, without what is cut off."""
        padding, size = list(self.padding), self.shape[at] + before + after
        for side, more in ((2 - 2 * along, before), (3 - 2 * along, after)):
            if padding[side] < 0 < more:
                return None  # zeros in the place of what was cut off
            padding[side] += more
        if size < 1:
            return None
        pixel, zeros = ((_H, _U), (_W, _V))[along]
        sizes, dims = list(self.sizes), list(self.dims)
        sizes[pixel], sizes[zeros] = size, 1
        dims[at] = (pixel,) if size > 1 else ()
        return self._with(padding=tuple(padding), sizes=tuple(sizes), dims=tuple(dims))

    def _with_zeros_between(self, at: int, along: int, count: int) -> Images | None:
        if self.up[along] > 1 or any(self.padding[2 - 2 * along : 4 - 2 * along]):
            return None
        zeros, up, sizes, dims = (_U, _V)[along], list(self.up), list(self.sizes), list(self.dims)
        up[along] = sizes[zeros] = count + 1
        dims[at] = (zeros,)
        return self._with(up=tuple(up), sizes=tuple(sizes), dims=tuple(dims))

    def _along(self, axes: Axes) -> int | None:
        """0 of a dimension that is the rows of the images, 1 of their columns."""
        for along, (pixel, zeros) in enumerate(((_H, _U), (_W, _V))):
            if axes == tuple(axis for axis in (pixel, zeros) if self.sizes[axis] > 1) and axes:
                return along
        return None

    @or_of_tensor
    def __getitem__(self, index: Any) -> Any:
        """Also of parts of the rows and columns, which are cut off."""
        index = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(i, slice) for i in index) or len(index) > len(self.dims):
            return super().__getitem__(index)
        found: Images | None = self
        for at, (i, size) in enumerate(zip(index, self.shape, strict=False)):
            begin, end, step = i.indices(size)
            if found is None or (begin, end, step) == (0, size, 1):
                continue
            is_cut = step == 1 and self._along(self.dims[at]) is not None
            found = found._padded(at, -begin, end - size) if is_cut else None
        if found is None:
            raise ValueError
        return found

    def conv2d(
        self,
        weight: Any,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        found = None
        plainly = bias is None and stride in _ONE and padding in _ZERO
        if plainly and (by_matrices := self._by_matrices(weight, groups)) is not None:
            return by_matrices
        if bias is None and isinstance(weight, ScaledWeight):
            found = self._by_sample(weight, groups, False, stride, padding, 0, dilation)
        elif bias is None and stride in _ONE and dilation in _ONE and padding in _ZERO:
            found = self._filtered(weight, groups)
        if found is not None:
            return found
        return F.conv2d(self.lying(), plain(weight), bias, stride, padding, dilation, groups)

    def conv_transpose2d(
        self,
        weight: Any,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        found = None
        if bias is None and isinstance(weight, ScaledWeight):
            found = self._by_sample(weight, groups, True, stride, padding, output_padding, dilation)
        if found is not None:
            return found
        tensors = self.lying(), plain(weight), bias
        return F.conv_transpose2d(*tensors, stride, padding, output_padding, groups, dilation)

    def _by_sample(
        self, weight: ScaledWeight, groups: int, transposed: bool, stride: Any, padding: Any, more: Any, dilation: Any
    ) -> Images | None:
        """Of [1, N * C, H, W]."""
        n, c, h, w = self.source.shape
        joined = self.shape == (1, n * c, h, w) and _is_in_order(self.sizes, self.dims)
        if (
            not joined
            or any(self.padding)
            or self.up != (1, 1)
            or weight.dtype != self.dtype
            or isinstance(padding, str)
        ):
            return None
        inner, outer = weight.scales()
        if not weight.of_groups(n, c, groups, transposed) or wants_grad((inner, outer)):
            return None
        source = self.scaled()
        scaled, kernel = source if inner is None else _times(source, inner), weight.kernel(transposed)
        steps, sides, rest, spread = (_pair(value) for value in (stride, padding, more, dilation))
        options = Options(steps, sides, rest, 1, spread, False, 0.0, "none", 0.0)
        blocks = ((transposed, tuple(options)),)
        contiguous = source.is_contiguous() and not transposed  # which a filter follows, fast on channels-last
        output = conv_bn_act_sequence(scaled, (kernel, *_NO_NORM), blocks, contiguous)
        if not output.numel():
            return None  # axes without elements are no part of what a stand-in knows of itself
        result = Images(output)
        result.pending += [] if outer is None else [outer]
        return result.view(1, -1, *result.source.shape[2:])

    def _by_matrices(self, weight: Any, groups: int) -> Images | None:
        """Of [1, N * C, H, W] and kernels of one element, which read the images as they lie: no scales, no copy."""
        n, c, h, w = self.source.shape
        joined = self.shape == (1, n * c, h, w) and _is_in_order(self.sizes, self.dims)
        if not joined or any(self.padding) or self.up != (1, 1) or weight.dtype != self.dtype:
            return None
        if isinstance(weight, ScaledWeight):
            matrices = weight.matrices() if weight.of_groups(n, c, groups, False) else None
        else:
            fits = groups == n and weight.shape[1:] == (c, 1, 1) and weight.shape[0] % n == 0
            matrices = weight.reshape(n, -1, c) if fits else None
        if matrices is None or wants_grad((matrices,)):
            return None
        source = self.scaled()
        positions = source.flatten(2) if source.is_contiguous() else source.permute(0, 2, 3, 1).flatten(1, 2).mT
        result = Images(torch.bmm(matrices, positions).view(n, -1, h, w))
        return result.view(1, -1, h, w)

    def _filtered(self, weight: Any, groups: int) -> Images | None:
        """Of [N * C, 1, H, W], or [N, C, H, W] with the same filter for each channel."""
        if not isinstance(weight, Tensor) or weight.dim() != 4 or wants_grad((weight,)) or weight.dtype != self.dtype:
            return None
        n, c, h, between_rows, w, between_columns = self.sizes
        if between_rows > 1 or between_columns > 1 or not _is_in_order(self.sizes, self.dims):
            return None
        apart = self.shape == (n * c, 1, h, w) and groups == 1
        joined = self.shape == (1, n * c, h, w) and groups == n * c
        if not apart and not joined and not (self.shape == (n, c, h, w) and groups == c):
            return None
        if weight.shape[:2] != (groups, 1) or (groups > 1 and not torch.equal(weight, weight[:1].expand_as(weight))):
            return None
        if weight.shape[2] > h or weight.shape[3] > w:
            return None
        output = ops.upfirdn2d(self.source, weight[0, 0], up=self.up, padding=self.padding, flip_filter=True)
        result = Images(output)
        result.pending += self.pending  # which filters leave as it is
        if apart:
            return result.view(n * c, 1, *output.shape[2:])
        return result.view(1, n * c, *output.shape[2:]) if joined else result


def _pair(value: Any) -> tuple[int, int]:
    """An option of a convolution."""
    return pair("options", value * 2 if isinstance(value, list | tuple) and len(value) == 1 else value)


@of_shapes
def _is_in_order(sizes: Sizes, dims: Dims) -> bool:
    return [axis for axes in dims for axis in axes] == [axis for axis, size in enumerate(sizes) if size > 1]


Images.functions = {
    **{F.pad: "pad", F.conv2d: "conv2d", F.conv_transpose2d: "conv_transpose2d"},
}
