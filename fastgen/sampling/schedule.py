"""Pass 3, schedule: for every plane and channel, the latest image element that it depends on, and so the moment to
compute it.

Pixels are drawn in raster order, the colours of a pixel in groups one after the other.  The *reach* of a plane's
channel is the latest draw, relative to the plane's position, that the channel depends on: (dy, dx, group), compared
lexicographically.  It is held as one integer, so that a shift is an addition and "later" is ">".  From the reach follow

* the causality proof: the parameters of colour c at (y, x) must have a reach before (0, 0, c);
* the stage: what depends on finished rows alone is computed for a whole row (`Stage.ROW`), the rest pixel by pixel
  (`Stage.PIXEL`), between two draws;
* the lags: at time (y, x) a step computes position (y - lag_y, x - lag_x) of its plane.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from fastgen.sampling.graph import TOP_LEVEL, Condition, Constant, Graph, Image, Linear, Node, NotCausal, Pointwise, Ref

Keys = NDArray[np.int64]

_DX, _DY = 1 << 8, 1 << 40  # key = dy * _DY + dx * _DX + colour
_NEVER = -(1 << 62)


class Stage(IntEnum):
    ROW = 0
    PIXEL = 1


def key(dy: int, dx: int, colour: int) -> int:
    return dy * _DY + dx * _DX + colour


def unkey(keys: Keys) -> tuple[Keys, Keys, Keys]:
    """keys -> (dy, dx, colour)."""
    dy = (keys + _DY // 2) // _DY
    rest = keys - dy * _DY
    return dy, rest // _DX, rest % _DX


@dataclass(eq=False)
class Schedule:
    """Per node: reach of each channel [C], and whether the channel is computed pixel by pixel [C]."""

    colours: int
    reach: list[Keys]
    pixel: list[NDArray[np.bool_]]

    def rows(self, node: int) -> Keys:
        """dy of the reach, per channel."""
        return unkey(self.reach[node])[0]

    def slots(self, node: int) -> Keys:
        """[C, 4]: (stage, lag_y, lag_x, rank) per channel; rank: the number of colours of the pixel that are drawn
        before.
        """
        dy, dx, colour = unkey(self.reach[node])
        last = colour == self.colours - 1
        pixel = self.pixel[node]
        zero = np.zeros_like(dy)
        row_slot = np.stack([zero + Stage.ROW, dy + 1, zero, zero], axis=1)
        pixel_slot = np.stack([zero + Stage.PIXEL, dy, dx + last, np.where(last, 0, colour + 1)], axis=1)
        return np.where(pixel[:, None], pixel_slot, row_slot)


def schedule(graph: Graph, params_per_channel: int) -> Schedule:
    """Reach and stage of every plane.

    Raises:
        NotCausal: a parameter depends on the element it predicts, or on a later one.
    """
    image = next(n for n in graph.nodes if isinstance(n, Image))
    reach = _reach(graph)
    _prove_causal(graph, reach, params_per_channel)
    return Schedule(image.channels, reach, _pixel_stage(graph, reach))


def _shift(dy: int, dx: int) -> int:
    return key(dy, dx, 0)


def _source_keys(ref: Ref, reach: list[Keys]) -> Keys:
    """Reach of each channel of a Ref, in the frame of the reader."""
    keys = np.full(len(ref.plane), _NEVER, dtype=np.int64)
    for plane in np.unique(ref.plane[ref.plane >= 0]):
        here = ref.plane == plane
        keys[here] = reach[plane][ref.channel[here]]
    known = keys > _NEVER
    keys[known] += ref.dy[known] * _DY + ref.dx[known] * _DX
    return keys


def _linear_keys(node: Linear, reach: list[Keys]) -> Keys:
    keys = np.full(node.channels, _NEVER, dtype=np.int64)
    for tap, ref in zip(node.taps, node.sources(), strict=True):
        source = _source_keys(ref, reach)
        used = np.where(tap.weight.numpy() != 0, source[:, None], _NEVER)
        keys = np.maximum(keys, used.max(0))
    return keys


def _reach(graph: Graph) -> list[Keys]:
    # A computed plane that depends on no image element counts as depending on a row so far up that every reader finds
    # it ready.
    assert graph.output is not None
    downward = sum(max((int(r.dy.max(initial=0)) for r in n.sources()), default=0) for n in graph.nodes)
    always = key(-1 - downward - int(graph.output.dy.max(initial=0)), 0, 0)
    reach: list[Keys] = []
    for node in graph.nodes:
        if isinstance(node, Image):
            keys = np.arange(node.channels, dtype=np.int64)
        elif isinstance(node, Constant | Condition):
            keys = np.full(node.channels, _NEVER, dtype=np.int64)
        else:
            if isinstance(node, Linear):
                keys = _linear_keys(node, reach)
            else:
                keys = np.max([_source_keys(r, reach) for r in node.sources()], axis=0)
            keys = np.where(keys == _NEVER, always, keys)
        reach.append(keys)
    return reach


def _prove_causal(graph: Graph, reach: list[Keys], params_per_channel: int) -> None:
    assert graph.output is not None
    keys = _source_keys(graph.output, reach)
    limit = np.arange(len(keys)) // params_per_channel
    late = np.flatnonzero(keys >= limit)
    if not len(late):
        return
    channel = int(late[np.argmax(keys[late] - limit[late])])
    dy, dx, colour = (int(v) for v in unkey(keys[channel]))
    path = _path(graph, reach, graph.output, channel)
    layers = dict.fromkeys(n.name or TOP_LEVEL for n, _, _ in path if isinstance(n, Linear))
    raise NotCausal(
        f"module {_culprit(path)!r} makes the model see what it predicts: the parameters of colour "
        f"{int(limit[channel])} at pixel (y, x) depend on colour {colour} at (y{dy:+d}, x{dx:+d}); "
        f"the layers between: {' -> '.join(layers) or 'none'}"
    )


def _path(graph: Graph, reach: list[Keys], ref: Ref, channel: int) -> list[tuple[Node, int, int]]:
    """Computed nodes with the shift at which each is critical, from the image to the output, along the latest
    dependence.
    """
    path: list[tuple[Node, int, int]] = []
    plane, channel = int(ref.plane[channel]), int(ref.channel[channel])
    while not isinstance(graph.nodes[plane], Image):
        node = graph.nodes[plane]
        step = max(_critical(node, channel, reach))
        path.append((node, step[3], step[4]))
        plane, channel = step[1], step[2]
    return path[::-1]


def _critical(node: Node, channel: int, reach: list[Keys]) -> list[tuple[int, int, int, int, int]]:
    """(key, plane, channel, dy, dx) of every source element of one channel of a node."""
    found = []
    if isinstance(node, Linear):
        for tap, ref in zip(node.taps, node.sources(), strict=True):
            rows = np.flatnonzero(tap.weight[:, channel].numpy())
            if len(rows):
                keys = _source_keys(ref, reach)[rows]
                k = int(rows[np.argmax(keys)])
                found.append((int(keys.max()), tap.plane, tap.channel + k, tap.dy, tap.dx))
    elif isinstance(node, Pointwise):
        for ref in node.sources():
            k = int(_source_keys(ref, reach)[channel])
            found.append(
                (k, int(ref.plane[channel]), int(ref.channel[channel]), int(ref.dy[channel]), int(ref.dx[channel]))
            )
    return found


def _culprit(path: list[tuple[Node, int, int]]) -> str:
    """The node that looks furthest ahead; if none does, the first layer, which connects the pixel to itself."""
    ahead = max(path, key=lambda step: (step[1], step[2]), default=None)
    if ahead is not None and (ahead[1], ahead[2]) > (0, 0):
        return ahead[0].name or TOP_LEVEL
    first = next((node for node, _, _ in path if isinstance(node, Linear)), path[0][0] if path else None)
    return (first.name if first is not None else "") or TOP_LEVEL


def _pixel_stage(graph: Graph, reach: list[Keys]) -> list[NDArray[np.bool_]]:
    """A channel must be computed pixel by pixel when a reader at the pixel stage needs it before its last row is
    finished.
    """
    assert graph.output is not None
    pixel = [np.zeros(n.channels, dtype=bool) for n in graph.nodes]

    def mark(ref: Ref, needed: NDArray[np.bool_], reader_dy: Keys) -> None:
        """needed, reader_dy: [readers, channels of ref] or [channels]."""
        dy = unkey(_source_keys(ref, reach))[0]
        now = np.atleast_2d(needed & (reader_dy == dy)).any(0) & (ref.plane >= 0)
        for plane in np.unique(ref.plane[now]):
            here = now & (ref.plane == plane)
            pixel[plane][ref.channel[here]] = True

    out_dy = unkey(_source_keys(graph.output, reach))[0]
    mark(graph.output, np.ones(len(out_dy), dtype=bool), np.zeros_like(out_dy))
    for node in reversed(graph.nodes):
        needed, dy = pixel[node.id], unkey(reach[node.id])[0]
        if not needed.any():
            continue
        if isinstance(node, Linear):
            for tap, ref in zip(node.taps, node.sources(), strict=True):
                used = tap.weight.numpy().T != 0  # [M, K]
                mark(ref, used & needed[:, None], dy[:, None])
        elif isinstance(node, Pointwise):
            for ref in node.sources():
                mark(ref, needed, dy)
    for node in graph.nodes:
        if isinstance(node, Image | Constant | Condition):
            pixel[node.id][:] = False
    return pixel
