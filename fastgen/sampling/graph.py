"""The traced network as planes.

A *plane* is a feature map [channels, height, width] that some node computes; every tensor that the network handles is a
re-arrangement of elements of planes (and zeros).  Instead of one lowering rule for each of slice, pad, cat, chunk,
view, permute, roll, ..., every element of every tensor carries an integer *code* that names the plane element it is a
copy of; 0 is a zero. Layout operators then run on the codes as they run on the values, and `recognise` reads the codes
back into per-channel (plane, channel, dy, dx).
"""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass(eq=False)
class Ref:
    """Where each channel of a [C, h, w] tensor comes from: element (c, y, x) is plane[c][channel[c], y + dy[c], x +
    dx[c]].

    Plane -1 is all zeros.  Outside the plane there are zeros, too.
    """

    plane: np.ndarray
    channel: np.ndarray
    dy: np.ndarray
    dx: np.ndarray

    def take(self, channels: np.ndarray) -> Ref:
        return Ref(self.plane[channels], self.channel[channels], self.dy[channels], self.dx[channels])

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

    @property
    def broadcast(self) -> bool:
        """Read at every position alike."""
        return False

    def sources(self) -> list[Ref]:
        return []


@dataclass(eq=False)
class Image(Node):
    """The encoded image: the network's input."""


@dataclass(eq=False)
class Constant(Node):
    """Depends on parameters alone. data: float [channels, height, width]."""

    data: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def broadcast(self) -> bool:
        return self.height == self.width == 1


@dataclass(eq=False)
class Condition(Node):
    """Depends on parameters and labels; evaluated once per sample. tensor: its value in the traced call."""

    tensor: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def broadcast(self) -> bool:
        return self.height == self.width == 1


@dataclass(eq=False)
class Tap:
    """Channels [channel, channel + weight.shape[0]) of a plane at offset (dy, dx), times weight [k, channels of the
    node].
    """

    plane: int
    dy: int
    dx: int
    channel: int
    weight: Tensor


@dataclass(eq=False)
class Linear(Node):
    """bias[m] + sum over taps and k of source[k, y + dy, x + dx] * weight[k, m]."""

    taps: list[Tap] = field(default_factory=list)
    bias: Tensor | None = None

    def sources(self) -> list[Ref]:
        refs = []
        for tap in self.taps:
            k = tap.weight.shape[0]
            full = np.full(k, 1)
            refs.append(Ref(full * tap.plane, np.arange(tap.channel, tap.channel + k), full * tap.dy, full * tap.dx))
        return refs


@dataclass(eq=False)
class Pointwise(Node):
    """op applied to operands, channel by channel; an operand is a Ref or a number."""

    op: str = ""
    operands: list[Ref | float] = field(default_factory=list)

    def sources(self) -> list[Ref]:
        return [o for o in self.operands if isinstance(o, Ref)]


class Graph:
    """Nodes in the order in which they were computed; node i computes plane i."""

    def __init__(self, batch: int):
        self.batch = batch
        self.nodes: list[Node] = []
        self._starts: list[int] = []
        self._next = 1
        self.output: Ref | None = None

    def add(self, node: Node) -> Node:
        node.id = len(self.nodes)
        node.start = self._next
        node.samples = 1 if isinstance(node, Constant) else self.batch
        self._next += node.samples * node.channels * node.height * node.width
        self._starts.append(node.start)
        self.nodes.append(node)
        return node

    def codes(self, node: Node) -> Tensor:
        """int64 [samples, C, h, w]: the codes of a node's own elements."""
        size = (node.samples, node.channels, node.height, node.width)
        return torch.arange(node.start, node.start + int(np.prod(size))).view(size)

    def decode(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """codes -> (plane, sample, channel, y, x); plane -1 where the code is 0."""
        plane = np.searchsorted(np.asarray(self._starts), codes, side="right") - 1
        shapes = np.array([(n.start, n.channels, n.height, n.width) for n in self.nodes], dtype=np.int64)
        start, channels, height, width = shapes[np.maximum(plane, 0)].transpose(-1, *range(codes.ndim))
        rest = codes - start
        rest, x = np.divmod(rest, width)
        rest, y = np.divmod(rest, height)
        sample, channel = np.divmod(rest, channels)
        return plane, sample, channel, y, x

    def recognise(self, codes: Tensor) -> Ref:
        """Read int64 codes [N, C, h, w] back into one (plane, channel, dy, dx) per channel, or raise LayoutError.

        Guess from the first non-zero element of each channel, rebuild the codes that the guess implies, compare all.
        """
        array = codes.numpy()
        samples, channels, height, width = array.shape
        if array.size == 0:
            zero = np.zeros(channels, dtype=np.int64)
            return Ref(zero - 1, zero, zero, zero)
        flat = array[0].reshape(channels, -1)
        first = np.argmax(flat > 0, axis=1)
        plane, _, channel, y, x = self.decode(flat[np.arange(channels), first])
        info = np.array([(n.channels, n.height, n.width, n.start, n.samples > 1, n.broadcast) for n in self.nodes])
        plane_c, plane_h, plane_w, start, per_sample, broadcast = info[np.maximum(plane, 0)].T
        dy = np.where((plane < 0) | (broadcast > 0), 0, y - first // width)
        dx = np.where((plane < 0) | (broadcast > 0), 0, x - first % width)

        rows = np.arange(height) * (broadcast[:, None] == 0) + dy[:, None]  # [C, h]
        cols = np.arange(width) * (broadcast[:, None] == 0) + dx[:, None]  # [C, w]
        in_rows = (rows >= 0) & (rows < plane_h[:, None]) & (plane[:, None] >= 0)
        in_cols = (cols >= 0) & (cols < plane_w[:, None])
        inside = in_rows[:, :, None] & in_cols[:, None, :]
        origin = start + channel * plane_h * plane_w
        implied = origin[:, None, None] + rows[:, :, None] * plane_w[:, None, None] + cols[:, None, :]
        stride = plane_c * plane_h * plane_w * per_sample
        for n in range(samples):
            if not np.array_equal(array[n], np.where(inside, implied + n * stride[:, None, None], 0)):
                raise LayoutError
        return Ref(plane, np.where(plane < 0, 0, channel), dy, dx)
