"""The traced network as planes.

A *plane* is a feature map [channels, height, width] that some node computes; every tensor that the network handles is a
re-arrangement of elements of planes (and zeros).  Instead of one lowering rule for each of slice, pad, cat, chunk,
view, permute, roll, ..., every element of every tensor carries an integer *code* that names the plane element it is a
copy of; 0 is a zero, -1 an element that nobody asks for. Layout operators then run on the codes as they run on the
values, and `recognise` reads the codes back into per-channel (plane, channel, dy, dx).

Networks with strided and transposed convolutions have planes of several *strides*: position y of a plane of stride s
lies at row s*y of the image.  A tensor with a view of planes is a *frame*, with a stride of its own; its position y
reads position ``(y * num + dy) // den`` of a plane, num / den being the ratio of the strides in lowest terms (one of
them is 1).  So dy counts rows of the finer of the two.  Constants and conditions have no stride: y reads y + dy.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

TOP_LEVEL = "(top level)"  # what the model itself is called in errors; its submodules have paths


class UnsupportedModel(RuntimeError):
    """The model uses something that the sampling compiler has no rule for; the text names the node and its module."""


class NotCausal(ValueError):
    """The model sees the element it predicts, or a later one; the text names the module."""


class LayoutError(Exception):
    """A tensor whose elements are not a shifted window of planes; or, in the text, what else has no rule."""


Stride = tuple[int, int]


def ratio(frame: int, source: int) -> tuple[int, int]:
    """(num, den) of a frame and a plane by their strides along one axis."""
    if frame % source and source % frame:
        raise LayoutError(f"that mixes feature maps of strides {frame} and {source}")
    return max(1, frame // source), max(1, source // frame)


@dataclass(eq=False)
class Ref:
    """Where each channel of a [C, h, w] frame comes from: element (c, y, x) is plane[c][channel[c], row, column], row
    and column being y and x shifted by dy[c] and dx[c], for planes of other strides as in the module's docstring.

    Plane -1 is all zeros.  Outside the plane there are zeros, too.
    """

    plane: np.ndarray
    channel: np.ndarray
    dy: np.ndarray
    dx: np.ndarray
    stride: Stride = (1, 1)

    def take(self, channels: np.ndarray) -> Ref:
        return replace(
            self,
            plane=self.plane[channels],
            channel=self.channel[channels],
            dy=self.dy[channels],
            dx=self.dx[channels],
        )

    def breaks(self) -> np.ndarray:
        """bool [C-1]: True where channel c+1 does not continue channel c in the same plane at the same offset."""
        step = np.where(self.plane[1:] >= 0, 1, 0)
        return (
            (np.diff(self.plane) != 0)
            | (np.diff(self.channel) != step)
            | (np.diff(self.dy) != 0)
            | (np.diff(self.dx) != 0)
        )

    def segments(self) -> list[tuple[int, int]]:
        """Maximal [start, stop) ranges of channels without a break."""
        cuts = np.flatnonzero(self.breaks()) + 1
        edges = [0, *cuts.tolist(), len(self.plane)]
        return list(zip(edges[:-1], edges[1:], strict=True))


@dataclass(eq=False)
class Node:
    """One plane and how it comes about. `name` is the path of the module that computed it."""

    name: str
    channels: int
    height: int
    width: int
    id: int = -1
    samples: int = 1  # 1: the same for all samples of a batch
    start: int = 0  # code of its first element
    stride: Stride = (1, 1)
    sequential: bool = False  # part of a layer that reads itself in its own row

    @property
    def given(self) -> bool:
        """A constant or a condition."""
        return isinstance(self, Constant | Condition)

    @property
    def broadcast(self) -> bool:
        """Read at every position alike."""
        return self.given and self.height == self.width == 1

    def sources(self) -> list[Ref]:
        return []


@dataclass(eq=False)
class Image(Node):
    """The encoded image: the network's input."""


@dataclass(eq=False)
class Embedding(Node):
    """A colour of the image looked up in a table: channel c of a pixel with level l is table[l, c]."""

    colour: int = 0
    table: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(eq=False)
class Constant(Node):
    """Depends on parameters alone. data: float [channels, height, width]."""

    data: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(eq=False)
class Condition(Node):
    """Depends on parameters, labels and condition; evaluated once per sample. tensor: its value in the traced call."""

    tensor: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(eq=False)
class Tap:
    """Channels [channel, channel + weight.shape[0]) of a plane at offset (dy, dx), times weight [k, channels of the
    node]. phase: the positions modulo the node's `period` that have the tap; None: all.
    """

    plane: int
    dy: int
    dx: int
    channel: int
    weight: Tensor
    phase: tuple[int, int] | None = None


def taps_of(ref: Ref, weight: Tensor, phase: tuple[int, int] | None = None) -> list[Tap]:
    """Taps that multiply the channels of a frame with weight [K, M]; zero rows at its ends go."""
    taps = []
    for start, stop in ref.segments():
        rows = np.flatnonzero(weight[start:stop].any(1).numpy())
        if ref.plane[start] < 0 or not len(rows):
            continue
        a, b = start + int(rows[0]), start + int(rows[-1]) + 1
        plane, dy, dx, channel = (int(v[a]) for v in (ref.plane, ref.dy, ref.dx, ref.channel))
        taps.append(Tap(plane, dy, dx, channel, weight[a:b].contiguous(), phase))
    return taps


@dataclass(eq=False)
class Linear(Node):
    """bias[m] + sum over taps and k of source[k, y + dy, x + dx] * weight[k, m].

    A transposed convolution has a `period`, its stride: which taps a position has depends on its row and column modulo
    the period.
    """

    taps: list[Tap] = field(default_factory=list)
    bias: Tensor | None = None
    period: tuple[int, int] = (1, 1)

    def sources(self) -> list[Ref]:
        refs = []
        for tap in self.taps:
            k = tap.weight.shape[0]
            full = np.full(k, 1)
            channels = np.arange(tap.channel, tap.channel + k)
            refs.append(Ref(full * tap.plane, channels, full * tap.dy, full * tap.dx, self.stride))
        return refs

    def phases(self) -> list[tuple[int, int]]:
        return [(y, x) for y in range(self.period[0]) for x in range(self.period[1])]

    def taps_at(self, phase: tuple[int, int]) -> list[tuple[Tap, Ref]]:
        """The taps of positions of one phase, with their sources."""
        found = zip(self.taps, self.sources(), strict=True)
        return [(tap, ref) for tap, ref in found if tap.phase in (None, phase)]


@dataclass(eq=False)
class Pointwise(Node):
    """op applied to operands, channel by channel; an operand is a Ref or a number."""

    op: str = ""
    operands: list[Ref | float] = field(default_factory=list)

    def sources(self) -> list[Ref]:
        return [o for o in self.operands if isinstance(o, Ref)]


def nothing() -> Ref:
    """The view of no channels."""
    none = np.zeros(0, dtype=np.int64)
    return Ref(none, none, none, none)


@dataclass(eq=False)
class Attention(Node):
    """For each head h and position p, sum over keys s of softmax_s(scale * query[p, h] . keys[s, h] + bias[h, p, s]) *
    values[s, h]; Vaswani et al. 2017, "Attention Is All You Need", equation 1. Zero where p sees no key. With a cap
    that is not 0, the scaled product is cap * tanh(product / cap). Without softmax, all but the bias is 0 and neither
    query nor keys have channels: positions are mixed by a matrix, their bias.

    The channels of query, keys and values are those of the first head, then those of the second, and so on; each is all
    of one plane, or some of its channels, in place. Positions are counted in raster order, p in the node's own plane,
    s in that of the keys.

    spans: int32 [positions, 2], p sees the keys begin <= s < end. bias: float [heads or 1, positions, keys], -inf where
    a key inside the span is not seen, or None. Some head sees the first key of a span, and some the last. of_keys:
    channels of a condition, one or, where queries have their own, one for each position, which are added to the bias of
    each key; or nothing.
    """

    heads: int = 1
    scale: float = 1.0
    cap: float = 0.0
    softmax: bool = True
    query: Ref = field(default_factory=nothing)
    keys: Ref = field(default_factory=nothing)
    values: Ref = field(default_factory=nothing)
    spans: Tensor = field(default_factory=lambda: torch.empty(0, 2))
    bias: Tensor | None = None
    of_keys: Ref = field(default_factory=nothing)

    def sources(self) -> list[Ref]:
        return [self.query, self.keys, self.values, self.of_keys]


class Graph:
    """Nodes in the order in which they were computed; node i computes plane i."""

    def __init__(self, batch: int):
        self.batch = batch
        self.nodes: list[Node] = []
        self._shapes = np.empty((64, 4), dtype=np.int64)  # (start, channels, height, width) of the nodes, and room
        self._given = np.ones(65, dtype=bool)  # from plane -1 on
        self._next = 1
        self.output: Ref | None = None

    @property
    def image(self) -> Image:
        return next(n for n in self.nodes if isinstance(n, Image))

    def add(self, node: Node) -> Node:
        node.id = len(self.nodes)
        node.start = self._next
        node.samples = 1 if isinstance(node, Constant) else self.batch
        self._next += node.samples * node.channels * node.height * node.width
        if node.id == len(self._shapes):
            self._shapes = np.concatenate([self._shapes, np.empty_like(self._shapes)])
            self._given = np.concatenate([self._given, self._given[1:]])
        self._shapes[node.id] = (node.start, node.channels, node.height, node.width)
        self._given[node.id + 1] = node.given
        self.nodes.append(node)
        return node

    def whole(self, node: Node) -> Ref:
        """All channels of a plane in place."""
        channels, zero = np.arange(node.channels), np.zeros(node.channels, dtype=np.int64)
        return Ref(np.full(node.channels, node.id), channels, zero, zero, node.stride)

    def codes(self, node: Node) -> Tensor:
        """int64 [samples, C, h, w]: the codes of a node's own elements."""
        size = (node.samples, node.channels, node.height, node.width)
        return torch.arange(node.start, node.start + int(np.prod(size))).view(size)

    def spanned(self, first: int, last: int) -> Node | None:
        """The node whose first and last code these are; none for those that do not depend on the image."""
        node = self.nodes[int(self.planes(np.array(first)))] if first > 0 else None
        if node is None or node.given or node.start != first:
            return None
        return node if last - first + 1 == node.samples * node.channels * node.height * node.width else None

    def planes(self, codes: np.ndarray) -> np.ndarray:
        """The plane of each code; -1 where it names none."""
        return np.searchsorted(self._shapes[: len(self.nodes), 0], codes, side="right") - 1

    def given(self, planes: np.ndarray) -> np.ndarray:
        """Which planes do not depend on the image: constants, conditions, and -1, which is none."""
        return self._given[planes + 1]

    def decode(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """codes -> (plane, sample, channel, y, x); plane -1 where the code names none."""
        shapes = self._shapes[: len(self.nodes)]
        plane = self.planes(codes)
        start, channels, height, width = shapes[np.maximum(plane, 0)].transpose(-1, *range(codes.ndim))
        rest = codes - start
        rest, x = np.divmod(rest, width)
        rest, y = np.divmod(rest, height)
        sample, channel = np.divmod(rest, channels)
        return plane, sample, channel, y, x

    def elements(self, ref: Ref, sample: np.ndarray, channel: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Codes of elements (channel, y, x) of a frame, 0 outside of planes."""
        (num_y, den_y), (num_x, den_x) = self._ratios(ref, 0), self._ratios(ref, 1)
        plane = ref.plane[channel]
        start, channels, height, width = self._shapes[np.maximum(plane, 0)].T
        nodes = [self.nodes[p] for p in plane]
        broadcast, samples = np.array([n.broadcast for n in nodes]), np.array([n.samples for n in nodes])
        row = np.where(broadcast, 0, (y * num_y[channel] + ref.dy[channel]) // den_y[channel])
        column = np.where(broadcast, 0, (x * num_x[channel] + ref.dx[channel]) // den_x[channel])
        inside = (plane >= 0) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        index = np.where(samples > 1, sample, 0) * channels + ref.channel[channel]
        return np.where(inside, start + (index * height + row) * width + column, 0)

    # Frames.

    def _ratios(self, ref: Ref, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """(num, den) of each channel of a frame along an axis."""
        num, den = np.ones(len(ref.plane), dtype=np.int64), np.ones(len(ref.plane), dtype=np.int64)
        for plane in np.unique(ref.plane[ref.plane >= 0]):
            if not self.nodes[plane].given:
                here = ref.plane == plane
                num[here], den[here] = ratio(ref.stride[axis], self.nodes[plane].stride[axis])
        return num, den

    def moved(self, ref: Ref, dy: int, dx: int) -> Ref:
        """The same view in a frame whose origin is position (dy, dx) of the old one."""
        (num_y, _), (num_x, _) = self._ratios(ref, 0), self._ratios(ref, 1)
        return replace(ref, dy=ref.dy + num_y * dy, dx=ref.dx + num_x * dx)

    def every(self, ref: Ref, step: Stride) -> Ref:
        """The view in a frame of every `step`-th position of the old one."""
        if step == (1, 1):
            return ref
        if any(self.nodes[p].given for p in np.unique(ref.plane[ref.plane >= 0])):
            raise LayoutError("on every n-th position of a constant or a condition")
        result = replace(ref, stride=(ref.stride[0] * step[0], ref.stride[1] * step[1]))
        for axis, name in enumerate(("dy", "dx")):
            # (step p + d) // den = (p + d // k) // (den / k) with k the common factor of step and den
            factor = np.gcd(step[axis], self._ratios(ref, axis)[1])
            setattr(result, name, getattr(ref, name) // factor)
            self._ratios(result, axis)  # complains where neither stride divides the other
        return result

    def finer(self, ref: Ref, factor: Stride) -> Ref:
        """The view in a frame with `factor` positions for each of the old one; only of planes of the frame's stride."""
        if any(s % f for s, f in zip(ref.stride, factor, strict=True)):
            raise LayoutError("upsamples beyond the resolution of the image")
        for axis in (0, 1):
            if any((v != 1).any() for v in self._ratios(ref, axis)):
                raise LayoutError
        if any(self.nodes[p].given for p in np.unique(ref.plane[ref.plane >= 0])):
            raise LayoutError
        stride = (ref.stride[0] // factor[0], ref.stride[1] // factor[1])
        return replace(ref, dy=ref.dy * factor[0], dx=ref.dx * factor[1], stride=stride)

    def at_stride(self, ref: Ref, stride: Stride, size: tuple[int, int]) -> Ref:
        """The view as a frame of another stride, for frames of one position along the axis in which they differ."""
        for axis, name in enumerate(("dy", "dx")):
            if ref.stride[axis] == stride[axis]:
                continue
            if all(self.nodes[p].given for p in np.unique(ref.plane[ref.plane >= 0])):
                return replace(ref, stride=stride)
            if size[axis] != 1:
                raise LayoutError(f"mixes feature maps of strides {ref.stride[axis]} and {stride[axis]}")
            source = getattr(ref, name) // self._ratios(ref, axis)[1]
            ref = replace(ref, stride=(stride[0], ref.stride[1]) if axis == 0 else (ref.stride[0], stride[1]))
            ref = replace(ref, **{name: source * self._ratios(ref, axis)[1]})
        return ref

    def recognise(self, codes: Tensor, holes: bool = False) -> Ref:
        """Read int64 codes [N, C, h, w] back into one (plane, channel, dy, dx) per channel, or raise LayoutError.

        With `holes`, elements inside a plane may have been replaced by zeros.
        Guess from the first non-zero element of each channel, rebuild the codes that the guess implies, compare all.
        """
        array = codes.numpy()
        channels, width = array.shape[1], array.shape[3]
        if array.size == 0:
            zero = np.zeros(channels, dtype=np.int64)
            return Ref(zero - 1, zero, zero, zero)
        node = self.spanned(int(codes[0, 0, 0, 0]), int(codes[-1, -1, -1, -1]))
        if node is not None and not node.broadcast and torch.equal(codes, self.codes(node)):
            return self.whole(node)
        flat = array[0].reshape(channels, -1)
        first = np.argmax(flat > 0, axis=1)
        plane, _, channel, y, x = self.decode(flat[np.arange(channels), first])
        rows = self._axis(0, array[0], plane, y, first // width, first % width)
        columns = self._axis(1, array[0].transpose(0, 2, 1), plane, x, first % width, first // width)

        ref = Ref(plane, np.where(plane < 0, 0, channel), rows.offset, columns.offset, (rows.stride, columns.stride))
        for here in _views(ref):
            self._verify(array[:, here], ref.take(here), rows, columns, int(here[0]), holes)
        return ref

    def _verify(self, part: np.ndarray, ref: Ref, rows: _Axis, columns: _Axis, first: int, holes: bool) -> None:
        """Compare the codes of channels that see one plane in one window, the first of which is `first`, with what the
        frame implies.
        """
        if ref.plane[0] < 0:
            if (part > 0).any():
                raise LayoutError
            return
        node = self.nodes[ref.plane[0]]
        y, first_y = rows.inside(first, part.shape[2], node.height)
        x, first_x = columns.inside(first, part.shape[3], node.width)
        window = part[:, :, first_y : first_y + len(y), first_x : first_x + len(x)]
        area = node.height * node.width
        origin = node.start + ref.channel * area
        implied = origin[:, None, None] + (y[:, None] * node.width + x)
        for codes in window:
            if not np.array_equal(codes, implied) and not np.array_equal(codes, _asked(codes, implied, holes)):
                raise LayoutError
            if node.samples > 1:
                implied += node.channels * area
        if np.count_nonzero(part > 0) != np.count_nonzero(window > 0):
            raise LayoutError

    def _axis(
        self, axis: int, codes: np.ndarray, plane: np.ndarray, source: np.ndarray, along: np.ndarray, across: np.ndarray
    ) -> _Axis:
        """How frames read planes along one axis: codes [C, along, across]; plane, source position and frame position of
        the first element of each channel.
        """
        planes = np.unique(plane[plane >= 0])
        strides = {p: 0 if self.nodes[p].given else self.nodes[p].stride[axis] for p in planes.tolist()}
        runs: dict[int, int] = {}  # of a coarser plane: the frame position behind the run of its first element
        seen = np.count_nonzero(codes[np.arange(len(codes)), :, across] > 0, axis=1)
        frame = None
        for p, stride in strides.items():
            if not stride:
                continue
            c = int(np.argmax(np.where(plane == p, seen, -1)))  # the channel that tells most
            where = np.flatnonzero(codes[c, :, across[c]] > 0)
            positions = self.decode(codes[c, where, across[c]])[3 + axis]
            num, den = _steps(where, positions)
            if num and stride * num % den == 0:
                frame = frame or stride * num // den
            changes = where[positions != positions[0]]
            runs[p] = int(changes[0]) if len(changes) else int(where[-1]) + 1
        frame = frame or max(strides.values(), default=0) or 1
        nums, dens = np.ones(len(plane), dtype=np.int64), np.ones(len(plane), dtype=np.int64)
        offset = source - along
        for p, stride in strides.items():
            here = plane == p
            if self.nodes[p].broadcast:
                nums[here], offset[here] = 0, 0
            elif stride:
                num, den = ratio(frame, stride)
                nums[here], dens[here] = num, den
                offset[here] = den * (source[here] + 1) - runs[p] if den > 1 else source[here] - num * along[here]
        offset[plane < 0] = 0
        return _Axis(frame, nums, dens, offset)


def _views(ref: Ref) -> list[np.ndarray]:
    """The channels of a frame that see one plane in one window, for each."""
    where = np.stack([ref.plane, ref.dy, ref.dx])
    if (where == where[:, :1]).all():
        return [np.arange(len(ref.plane))]
    _, which = np.unique(where, axis=1, return_inverse=True)
    return [np.flatnonzero(which.ravel() == i) for i in range(which.max() + 1)]


def _asked(codes: np.ndarray, implied: np.ndarray, holes: bool) -> np.ndarray:
    """The implied codes where codes ask for one."""
    return np.where(codes > 0 if holes else codes >= 0, implied, codes)


@dataclass(frozen=True, eq=False)
class _Axis:
    """Position p of a frame of this stride reads position (p * num + offset) // den of the plane, per channel."""

    stride: int
    num: np.ndarray
    den: np.ndarray
    offset: np.ndarray

    def inside(self, channel: int, size: int, source_size: int) -> tuple[np.ndarray, int]:
        """The positions of a plane that a channel reads, and the frame position of the first of them."""
        positions = (np.arange(size) * self.num[channel] + self.offset[channel]) // self.den[channel]
        within = np.flatnonzero((positions >= 0) & (positions < source_size))
        return positions[within], int(within[0]) if len(within) else 0


def _steps(where: np.ndarray, positions: np.ndarray) -> tuple[int, int]:
    """(num, den) of an ascending sequence of positions of a plane at positions `where` of a frame; (0, 1) if it is too
    short to tell.
    """
    adjacent = np.diff(where) == 1
    steps = np.diff(positions)[adjacent]
    if not len(steps):
        return 0, 1
    if steps.min() > 0:
        return int(steps[0]), 1
    changes = np.flatnonzero(steps) + 1
    edges = [0, *changes.tolist(), len(steps) + 1]
    return 1, int(np.diff(edges).max())
