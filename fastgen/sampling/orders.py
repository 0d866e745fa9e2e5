"""Ways of seeing tensors of any shape as feature maps: tokens, heads, rows of matrices.

Where codes name their places, these tell the layout.  Where zeros leave a choice, layouts are tried, the likeliest
first; one in which all is a view of planes is the right one, another may be none.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.sampling.graph import LayoutError, Ref

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


_MOST_SHIFTS = 2  # of tokens some of whose channels are those of others
PIECES = (0, 1, 2)  # of which planes tensors may be made: see `Tracer.recognise`


class Order:
    """An order of the elements, or rows, of tensors: indices, -1 in places whose elements nobody asks for.

    Most are strided views, which are much faster to read and write than single elements.
    """

    def __init__(self, index: Tensor):
        self.index = index
        self._asked = index >= 0
        self._complete = bool(self._asked.all())
        self._strides = self._find_strides() if self._complete and index.numel() else None

    def _find_strides(self) -> list[int] | None:
        index, first = self.index, int(self.index.flatten()[0])
        sizes = index.shape
        strides = [int(index.select(d, 1).flatten()[0]) - first if n > 1 else 0 for d, n in enumerate(sizes)]
        last = sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
        if first or min(strides) < 0 or last != index.numel() - 1:
            return None
        return strides if torch.equal(index, torch.arange(index.numel()).as_strided(sizes, strides)) else None

    def of(self, codes: Tensor) -> Tensor:
        """Elements or rows of codes [count, ...] in this order."""
        if self._strides is not None:
            return self._view(codes.contiguous())
        if self._complete:
            return codes[self.index]
        asked = self._asked.view(*self.index.shape, *[1] * (codes.dim() - 1))
        return torch.where(asked, codes[self.index], -1)

    def restored(self, codes: Tensor, count: int) -> Tensor:
        """The `count` elements or rows of which `codes` are those in this order."""
        result = torch.empty(count, *codes.shape[self.index.dim() :], dtype=torch.int64)
        self.restore(codes, result)
        return result

    def restore(self, codes: Tensor, result: Tensor) -> None:
        """Put codes that are in this order into a contiguous tensor where they come from."""
        if self._strides is not None:
            self._view(result).copy_(codes)
        elif self._complete:
            result[self.index] = codes
        else:
            result[self.index[self._asked]] = codes[self._asked]

    def among(self, rows: Tensor) -> Order:
        """The order in a tensor of which rows, by their indices, are in this one."""
        return Order(torch.where(self._asked, rows[self.index], -1))

    def _view(self, codes: Tensor) -> Tensor:
        row = codes[0].numel()
        assert self._strides is not None
        strides = [*(row * s for s in self._strides), *codes.stride()[1:]]
        return codes.as_strided((*self.index.shape, *codes.shape[1:]), strides)


def orders(tracer: Tracer, tensors: Sequence[Tensor], shape: Sequence[int], pieces: int) -> Iterator[Order]:
    """Ways of seeing tensors of a shape as feature maps: indices [N, C, h, w] of their elements."""
    if tuple(shape) in tracer.orders:  # most layers have that of the layer before
        yield tracer.orders[tuple(shape)]
    for tensor in tensors:  # in the order of one operand's planes
        with contextlib.suppress(LayoutError):
            yield Order(_plane_order(tracer, tensor.reshape(-1)))
    yield from map(Order, _arrangements(tracer, tensors, shape, pieces))


def _arrangements(tracer: Tracer, tensors: Sequence[Tensor], shape: Sequence[int], pieces: int) -> Iterator[Tensor]:
    """Indices [N, C, h, w] of the elements of tensors of a shape in the layouts that feature maps are kept in: channels
    last, positions in one dimension, or together with the samples in one. The likeliest come first.
    """
    index, batch = torch.arange(math.prod(shape)), tracer.graph.batch
    layouts: list[Tensor] = []
    if len(shape) == 4 and shape[0] == batch:
        whole = index.view(*shape)
        yield whole.permute(0, 3, 1, 2)
        if pieces:  # tokens behind heads, before heads, or last
            layouts += [whole.transpose(2, 3).flatten(1, 2), whole.flatten(2).transpose(1, 2), whole.flatten(1, 2)]
    elif len(shape) in (2, 3) and index.numel() % (batch * shape[-1]) == 0:
        layouts.append(index.view(batch, -1, shape[-1]).transpose(1, 2))  # channels last
        if len(shape) == 3 and shape[0] == batch and shape[2] > 1:
            layouts.append(index.view(*shape))
        if len(shape) == 3 and pieces and shape[0] > batch and shape[0] % batch == 0:  # windows of F.unfold
            layouts.append(index.view(batch, -1, shape[2]))
        if len(shape) == 3 and shape[1] == batch:
            layouts.append(index.view(*shape).permute(1, 2, 0))
    for tokens in layouts:
        codes = [t.reshape(-1)[tokens] for t in tensors]
        if len(shape) == 4:  # keys, as likely as not
            last = appended(tracer, codes)
            tokens, codes = tokens.roll(last, 2), [c.roll(last, 2) for c in codes]
        for width, before in rasters(tracer, codes, pieces):
            yield _in_rows(tokens, width, before)


def depends(tracer: Tracer, codes: Tensor) -> bool:
    """Whether elements depend on the image."""
    return not tracer.graph.given(tracer.graph.planes(codes.numpy())).all()


def appended(tracer: Tracer, tensors: Sequence[Tensor]) -> int:
    """How many of the last tokens [N, C, tokens] depend on the image in no channel, where others do."""
    graph = tracer.graph
    later = np.any([~graph.given(graph.planes(t.numpy())).all((0, 1)) for t in tensors], axis=0)
    return int(np.argmax(later[::-1]))


def _in_rows(tokens: Tensor, width: int, before: int) -> Tensor:
    """[..., tokens] -> [..., h, width], -1 in `before` places in front of the first, and behind the last."""
    after = -(before + tokens.shape[-1]) % width
    return F.pad(tokens, (before, after), value=-1).unflatten(-1, (-1, width))


def rasters(tracer: Tracer, tensors: Sequence[Tensor], pieces: int) -> Iterator[tuple[int, int]]:
    """Ways of seeing tokens [N, C, count] as rows of pixels: the width, and how many pixels go before the first token.

    Planes among them tell the width and, where tokens lie in front of the image's, the place in the row: that of the
    token, or the next one, where tokens are shifted. Then come squares: where zeros leave a choice, they are the
    likelier, if they are not larger than the image.
    """
    count = tensors[0].shape[2]
    found = []
    for tokens in tensors:
        plane, _, _, _, x = tracer.graph.decode(tokens[0].numpy())
        for p in np.unique(plane[plane >= 0]):
            node = tracer.graph.nodes[p]
            if node.given:
                continue
            if node.height == 1:  # which more tokens may continue; but zeros around it are rows, too
                found += [(count, 0)] * (pieces > 0)
                continue
            first = np.unique((x - np.arange(count))[plane == p] % node.width).tolist()
            if len(first) > 1:
                found += [(node.width, 0)] * (count % node.width == 0)
            if len(first) <= _MOST_SHIFTS:
                before = dict.fromkeys(b % node.width for f in first for b in (f, f + 1))
                found += [(node.width, b) for b in sorted(before, key=lambda b: (b + count) % node.width != 0)]
    image = tracer.graph.image
    squares = sorted(
        (w for w in range(1, count + 1) if count % w == 0),
        key=lambda w: (w > image.width or count // w > image.height, abs(w - count // w)),
    )
    yield from dict.fromkeys([*found, *((w, 0) for w in squares)])


def _plane_order(tracer: Tracer, flat: Tensor) -> Tensor:
    """The indices [N, C, h, w] that put flat codes into the order (sample, channel, y, x) of their planes."""
    whole = _order_of_a_plane(tracer, flat)
    if whole is not None:
        return whole
    plane, sample, channel, y, x = tracer.graph.decode(flat.numpy())
    if (plane < 0).any() or tracer.graph.given(plane).all():
        raise LayoutError
    order = np.lexsort((x, y, channel, plane, sample))
    codes = flat.numpy()[order]
    if (codes[1:] == codes[:-1]).any():  # repeated channels: a key for several heads
        order = np.lexsort((x, y, channel, plane, _occurrence(flat.numpy()), sample))
    rows, columns = _at_places(y[order], x[order], tracer.graph.batch)
    each = torch.from_numpy(order).view(tracer.graph.batch, -1, len(rows))
    result = torch.full((*each.shape[:2], int(rows.max()) + 1, int(columns.max()) + 1), -1)
    result[:, :, rows, columns] = each
    return result


def _order_of_a_plane(tracer: Tracer, flat: Tensor) -> Tensor | None:
    """The same where codes are those of one whole plane, in any order: without sorting them."""
    start = int(flat.min())
    node = tracer.graph.spanned(start, int(flat.max()))
    if node is None or node.samples * node.channels * node.height * node.width != len(flat):
        return None
    order = torch.full((len(flat),), -1)
    order[flat - start] = torch.arange(len(flat))
    return None if (order < 0).any() else order.view(node.samples, node.channels, node.height, node.width)


def _at_places(y: np.ndarray, x: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a grid for elements whose places repeat themselves, at least once for each sample."""
    width = int(x.max()) + 1
    places = y * width + x
    again = np.flatnonzero(places == places[0])
    count = int(again[1]) if len(again) > 1 else len(places)
    if len(places) % (batch * count) or (places.reshape(-1, count) != places[:count]).any():
        raise LayoutError
    rows, columns = (np.unique(v[:count], return_inverse=True)[1] for v in (y, x))
    if (rows.max() + 1) * (columns.max() + 1) > 2 * count + width:  # no rows of pixels
        raise LayoutError
    return rows, columns


def _occurrence(values: np.ndarray) -> np.ndarray:
    """How many equal values come before each."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    index = np.arange(len(values))
    result = np.empty_like(index)
    result[order] = index - np.maximum.accumulate(np.where(first, index, 0))
    return result


def are_positions(tracer: Tracer, columns: Tensor) -> bool:
    """Whether the columns of codes [..., rows, columns] are positions of planes, the same ones in all rows."""
    first = columns.reshape(-1, columns.shape[-1])[:1].numpy()
    for codes in (first, columns.numpy()):  # most have one position in a row
        plane, _, _, y, x = tracer.graph.decode(codes)
        place = np.ma.masked_where(tracer.graph.given(plane), y * (1 + x.max()) + x).reshape(-1, columns.shape[-1])
        if place.count() == 0 or (np.ma.ptp(place, axis=0) > 0).any():
            return False
        places = place.max(0).compressed()
        if len(places) < 2 or len(np.unique(places)) < len(places):
            return False
    return True


def feature_map(tracer: Tracer, rows: Tensor) -> tuple[Order, Tensor, Ref]:
    """Codes [N*h*w, K], positions in any order, as a feature map: the order [N, h, w] of rows, the codes [N, K, h, w]
    in this order, and where they are found.
    """
    (found,) = feature_maps(tracer, rows, several=False)
    return found


def feature_maps(tracer: Tracer, rows: Tensor, several: bool = True) -> list[tuple[Order, Tensor, Ref]]:
    """`feature_map`; where positions have several rows, as those of heads have, several."""
    for pieces in PIECES:
        for order in _raster_orders(tracer, rows, pieces):
            with contextlib.suppress(LayoutError):
                grid = order.of(rows).permute(0, 3, 1, 2).contiguous()
                ref = tracer.recognise(grid, pieces)
                tracer.orders[(len(rows),)] = order
                return [(order, grid, ref)]
        parts = _places_apart(tracer, rows) if several else []
        if len(parts) > 1:
            found = [(part, feature_map(tracer, rows[part])) for part in parts]
            return [(order.among(part), grid, ref) for part, (order, grid, ref) in found]
    raise LayoutError


def _places_apart(tracer: Tracer, rows: Tensor) -> list[Tensor]:
    """Indices of rows that are at different positions: of the first row at each, of the second, and so on."""
    plane, sample, _, y, x = tracer.graph.decode(rows[:, 0].numpy())
    if tracer.graph.given(plane).any():
        return []
    place = (sample * (1 + y.max()) + y) * (1 + x.max()) + x
    turn = _occurrence(place)
    return [torch.from_numpy(np.flatnonzero(turn == i)) for i in range(1 + turn.max())]


def _raster_orders(tracer: Tracer, rows: Tensor, pieces: int) -> Iterator[Order]:
    """Ways of seeing codes [N*h*w, K] as a feature map: indices [N, h, w] of rows. By a channel whose elements tell
    their places; where there is none, because zeros were shifted in, by trial.
    """
    batch = tracer.graph.batch
    if (len(rows),) in tracer.orders:  # as likely as not
        yield tracer.orders[(len(rows),)]
    for c in (rows > 0).all(0).nonzero().flatten().tolist():
        plane, sample, _, y, x = tracer.graph.decode(rows[:, c].numpy())
        order = np.lexsort((x, y, sample))
        if len(np.unique(plane)) == 1 and np.array_equal(
            sample[order], np.repeat(np.arange(batch), len(rows) // batch)
        ):
            with contextlib.suppress(LayoutError):
                at = _at_places(y[order], x[order], batch)
                if len(at[0]) * batch == len(rows):
                    result = torch.full((batch, int(at[0].max()) + 1, int(at[1].max()) + 1), -1)
                    result[:, at[0], at[1]] = torch.from_numpy(order).view(batch, -1)
                    yield Order(result)
                    break
    if len(rows) % batch == 0:
        index = torch.arange(len(rows))
        for tokens in (index.view(batch, -1), index.view(-1, batch).T):  # sample first, token first
            codes = rows[tokens].transpose(1, 2)
            yield from (Order(_in_rows(tokens, *raster)) for raster in rasters(tracer, [codes], pieces))
