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
from fastgen.acceleration.deferred import Axes, Deferred, plain
from fastgen.acceleration.scaled_weights import DTYPES, ScaledWeight
from fastgen.ops.conv_block import is_transformed, is_unobserved, pair, wants_grad

# Samples, channels, rows, a pixel and the zeros that follow it in a column, columns, and the same in a row.
_N, _C, _H, _U, _W, _V = _AXES = "NCHUWV"


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
        sizes = dict(zip((_N, _C, _H, _W), source.shape, strict=True)) | {_U: 1, _V: 1}
        super().__init__(sizes, [(_N,), (_C,), (_H,), (_W,)], source)
        self.source, self.padding = source, (0, 0, 0, 0)
        self.up = (1, 1)

    def tensor(self) -> Tensor:
        value = self.source
        n, c, h, w = value.shape
        if self.up != (1, 1):
            value = F.pad(value.reshape(n, c, h, 1, w, 1), (0, self.up[1] - 1, 0, 0, 0, self.up[0] - 1))
            value = value.reshape(n, c, h * self.up[0], w * self.up[1])
        value = F.pad(value, self.padding) if any(self.padding) else value
        if self.shape == value.shape and [axis for axes in self.dims for axis in axes] == self._order():
            return value
        sizes = [self.sizes[axis] for axis in _AXES]
        return self.arranged(value.reshape(sizes), _AXES)

    def _order(self) -> list[str]:
        return [axis for axis in _AXES if self.sizes[axis] > 1]

    def pad(self, sides: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
        """Of zeros: between pixels where a dimension of one follows these, around the images elsewhere."""
        if mode != "constant" or value or not all(isinstance(side, int) for side in sides):
            return F.pad(self.tensor(), sides, mode, value)
        found = self
        for i in range(0, len(sides), 2):
            at = len(self.dims) - 1 - i // 2
            wider = found._padded(at, sides[i], sides[i + 1]) if sides[i] or sides[i + 1] else found
            if wider is None:
                return F.pad(self.tensor(), sides, mode, value)
            found = wider
        return found

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
        dims = list(self.dims)
        dims[at] = (pixel,) if size > 1 else ()
        return self._with(padding=tuple(padding), sizes=self.sizes | {pixel: size, zeros: 1}, dims=tuple(dims))

    def _with_zeros_between(self, at: int, along: int, count: int) -> Images | None:
        if self.up[along] > 1 or any(self.padding[2 - 2 * along : 4 - 2 * along]):
            return None
        zeros, up, dims = (_U, _V)[along], list(self.up), list(self.dims)
        up[along] = count + 1
        dims[at] = (zeros,)
        return self._with(up=tuple(up), sizes=self.sizes | {zeros: count + 1}, dims=tuple(dims))

    def _along(self, axes: Axes) -> int | None:
        """0 of a dimension that is the rows of the images, 1 of their columns."""
        for along, (pixel, zeros) in enumerate(((_H, _U), (_W, _V))):
            if axes == tuple(axis for axis in (pixel, zeros) if self.sizes[axis] > 1) and axes:
                return along
        return None

    def __getitem__(self, index: Any) -> Any:
        """Also of parts of the rows and columns, which are cut off."""
        index = index if isinstance(index, tuple) else (index,)
        whole = all(isinstance(i, slice) for i in index) and len(index) <= len(self.dims)
        if not whole:
            return super().__getitem__(index)
        found = self
        for at, (i, size) in enumerate(zip(index, self.shape, strict=False)):
            begin, end, step = i.indices(size)
            if (begin, end, step) == (0, size, 1):
                continue
            cut = (
                found._padded(at, -begin, end - size) if step == 1 and self._along(self.dims[at]) is not None else None
            )
            if cut is None:
                return self.tensor()[index]
            found = cut
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
        plainly = ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)
        if bias is None and isinstance(weight, ScaledWeight):
            options = {"stride": stride, "padding": padding, "dilation": dilation}
            found = self._by_sample(weight, groups, False, ops.conv2d_bn_act, options)
        elif bias is None and all(pair(name, value) == (least, least) for name, value, least in plainly):
            found = self._filtered(weight, groups)
        if found is not None:
            return found
        return F.conv2d(self.tensor(), plain(weight), bias, stride, padding, dilation, groups)

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
        options = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
        if bias is None and isinstance(weight, ScaledWeight):
            found = self._by_sample(weight, groups, True, ops.conv_transpose2d_bn_act, options)
            if found is not None:
                return found
        return F.conv_transpose2d(self.tensor(), plain(weight), bias, groups=groups, **options)

    def _by_sample(
        self, weight: ScaledWeight, groups: int, transposed: bool, operation: Any, options: dict[str, Any]
    ) -> Images | None:
        """Of [1, N * C, H, W]."""
        (n, c, h, w), source = self.source.shape, self.source
        joined = self.shape == (1, n * c, h, w) and [axis for axes in self.dims for axis in axes] == self._order()
        if not joined or any(self.padding) or self.up != (1, 1) or weight.dtype != self.dtype:
            return None
        inner, outer = weight.scales()
        if not weight.of_groups(n, c, groups, transposed) or wants_grad((inner, outer)):
            return None
        scaled = source if inner is None else source * inner
        output = operation(scaled, weight.kernel(transposed), **options)
        result = Images(output if outer is None else output.mul_(outer))
        return result.view(1, -1, *result.source.shape[2:])

    def _filtered(self, weight: Any, groups: int) -> Images | None:
        """Of [N * C, 1, H, W], or [N, C, H, W] with the same filter for each channel."""
        if not isinstance(weight, Tensor) or weight.dim() != 4 or wants_grad((weight,)) or weight.dtype != self.dtype:
            return None
        n, c, h, w = (self.sizes[axis] for axis in (_N, _C, _H, _W))
        if self.sizes[_U] > 1 or self.sizes[_V] > 1 or [a for axes in self.dims for a in axes] != self._order():
            return None
        apart = self.shape == (n * c, 1, h, w) and groups == 1
        if not apart and not (self.shape == (n, c, h, w) and groups == c):
            return None
        if weight.shape[:2] != (groups, 1) or (groups > 1 and not torch.equal(weight, weight[:1].expand_as(weight))):
            return None
        if weight.shape[2] > h or weight.shape[3] > w:
            return None
        output = ops.upfirdn2d(self.source, weight[0, 0], up=self.up, padding=self.padding, flip_filter=True)
        result = Images(output)
        return result.view(n * c, 1, *output.shape[2:]) if apart else result


Images.functions = {
    **{F.pad: "pad", F.conv2d: "conv2d", F.conv_transpose2d: "conv_transpose2d"},
}
