"""Pass 3, schedule: for every plane and channel, the latest image element that it depends on, and so the moment to
compute it.

Pixels are drawn in raster order, the colours of a pixel in groups one after the other (`Head.groups`).  The *reach* of
a plane's channel is the latest draw, relative to the plane's position, that the channel depends on: (dy, dx, group),
compared lexicographically, dy and dx in pixels of the image whatever the plane's stride.  It is held as one integer, so
that a shift is an addition and "later" is ">".  Where the reach differs from position to position, because planes of
different strides come together, it is the latest of them.  From the reach follow

* the causality proof: the parameters of group g at (y, x) must have a reach before (0, 0, g);
* the stage: what depends on finished rows alone is computed for a whole row (`Stage.ROW`), the rest pixel by pixel
  (`Stage.PIXEL`), between two draws, and so is what reads itself in its own row (`Node.sequential`);
* the lags: at time (y, x) a step computes the position of its plane that lies at pixel (y - lag_y, x - lag_x).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

from fastgen.sampling.graph import (
    TOP_LEVEL,
    Attention,
    Embedding,
    Graph,
    Image,
    Linear,
    Node,
    NotCausal,
    Pointwise,
    Ref,
)
from fastgen.sampling.heads import Group

Keys = NDArray[np.int64]

_DX, _DY = 1 << 8, 1 << 40  # key = dy * _DY + dx * _DX + group
_NEVER = -(1 << 62)


class Stage(IntEnum):
    ROW = 0
    PIXEL = 1


def key(dy: int, dx: int, group: int) -> int:
    return dy * _DY + dx * _DX + group


def unkey(keys: Keys) -> tuple[Keys, Keys, Keys]:
    """keys -> (dy, dx, group)."""
    dy = (keys + _DY // 2) // _DY
    rest = keys - dy * _DY
    return dy, rest // _DX, rest % _DX


@dataclass(eq=False)
class Part:
    """Positions of a plane that are computed alike: all, or those of one phase of a transposed convolution.

    Per channel: reach [C], and whether it is computed pixel by pixel [C].
    """

    phase: tuple[int, int] | None
    reach: Keys
    pixel: NDArray[np.bool_]


@dataclass(eq=False)
class Schedule:
    """For each node the parts of its plane, and the reach of each channel: the latest of all parts."""

    graph: Graph
    groups: int
    parts: list[list[Part]]
    reach: list[Keys]

    def source_rows(self, ref: Ref) -> Keys:
        """dy of the reach of each channel of a frame."""
        return unkey(_source_keys(self.graph, ref, self.reach))[0]

    def slots(self, part: Part) -> Keys:
        """[C, 4]: (stage, lag_y, lag_x, rank) per channel; rank: the number of groups of the pixel that are drawn
        before.
        """
        dy, dx, group = unkey(part.reach)
        last = group == self.groups - 1
        zero = np.zeros_like(dy)
        row_slot = np.stack([zero + Stage.ROW, dy + 1, zero, zero], axis=1)
        pixel_slot = np.stack([zero + Stage.PIXEL, dy, dx + last, np.where(last, 0, group + 1)], axis=1)
        return np.where(part.pixel[:, None], pixel_slot, row_slot)


def schedule(graph: Graph, groups: list[Group]) -> Schedule:
    """Reach and stage of every plane; `groups`: those of the head.

    Raises:
        NotCausal: a parameter depends on the element it predicts, or on a later one.
    """
    parts = _parts(graph, groups)
    reach = [np.max([part.reach for part in each], axis=0) for each in parts]
    _prove_causal(graph, reach, groups)
    _mark_pixel_stage(graph, parts)
    return Schedule(graph, len(groups), parts, reach)


def _shifts(graph: Graph, ref: Ref) -> Keys:
    """The shift of each channel of a frame, as a key."""
    finer = np.zeros((len(ref.plane), 2), dtype=np.int64)
    for plane in np.unique(ref.plane[ref.plane >= 0]):
        if not graph.nodes[plane].given:
            finer[ref.plane == plane] = np.minimum(graph.nodes[plane].stride, ref.stride)
    return finer[:, 0] * ref.dy * _DY + finer[:, 1] * ref.dx * _DX


def _source_keys(graph: Graph, ref: Ref, reach: list[Keys]) -> Keys:
    """Reach of each channel of a frame."""
    keys = np.full(len(ref.plane), _NEVER, dtype=np.int64)
    for plane in np.unique(ref.plane[ref.plane >= 0]):
        here = ref.plane == plane
        keys[here] = reach[plane][ref.channel[here]]
    return np.where(keys > _NEVER, keys + _shifts(graph, ref), _NEVER)


def _linear_keys(graph: Graph, node: Linear, phase: tuple[int, int], reach: list[Keys]) -> Keys:
    keys = np.full(node.channels, _NEVER, dtype=np.int64)
    for tap, ref in node.taps_at(phase):
        source = _source_keys(graph, ref, reach)
        for latest in np.unique(source):  # few
            used = (tap.weight[torch.from_numpy(source == latest)] != 0).any(0).numpy()
            keys[used] = np.maximum(keys[used], latest)
    return keys


def _latest(graph: Graph, node: Attention) -> int:
    """The latest key that a position sees, as a shift."""
    positions = np.flatnonzero((node.spans[:, 0] < node.spans[:, 1]).numpy())
    if not len(positions):
        return _NEVER
    source = graph.nodes[node.values.plane[0]]
    last = node.spans[:, 1].numpy()[positions].astype(np.int64) - 1
    rows = last // source.width * source.stride[0] - positions // node.width * node.stride[0]
    columns = last % source.width * source.stride[1] - positions % node.width * node.stride[1]
    return int((rows * _DY + columns * _DX).max())


def _attention_keys(graph: Graph, node: Attention, reach: list[Keys]) -> list[Keys]:
    """Of each channel of query, keys, values and what is added for each key."""
    query, *seen = (_source_keys(graph, ref, reach) for ref in node.sources())
    latest = _latest(graph, node)
    return [query, *(np.where(np.minimum(k, latest) > _NEVER, k + latest, _NEVER) for k in seen)]


def _parts(graph: Graph, groups: list[Group]) -> list[list[Part]]:
    # A computed plane that depends on no image element counts as depending on a row so far up that every reader finds
    # it ready.
    assert graph.output is not None
    downward = sum(_rows_down_of(graph, n) for n in graph.nodes)
    always = key(-1 - downward - _rows_down(graph, graph.output), 0, 0)
    group_of = np.concatenate([np.full(len(g.colours), i, dtype=np.int64) for i, g in enumerate(groups)])
    reach = [np.full(n.channels, _NEVER, dtype=np.int64) for n in graph.nodes]
    while True:  # until what recurrent layers read of planes that follow is settled
        before = [*reach]
        parts = _parts_by(graph, group_of, always, reach)
        if not any(map(_recurrent, graph.nodes)) or all(map(np.array_equal, before, reach)):
            return parts


def _parts_by(graph: Graph, group_of: Keys, always: int, reach: list[Keys]) -> list[list[Part]]:
    """reach: becomes that of all nodes; so far known of those that follow their readers."""
    parts: list[list[Part]] = []
    for node in graph.nodes:
        phases: list[tuple[int, int] | None] = [None]
        if isinstance(node, Image):
            keys = [group_of]
        elif isinstance(node, Embedding):
            keys = [np.full(node.channels, group_of[node.colour], dtype=np.int64)]
        elif node.given:
            keys = [np.full(node.channels, _NEVER, dtype=np.int64)]
        elif isinstance(node, Linear):
            keys = [_linear_keys(graph, node, phase, reach) for phase in node.phases()]
            phases = phases if len(keys) == 1 else [*node.phases()]
        elif isinstance(node, Attention):  # one step for all channels
            latest = max(int(k.max(initial=_NEVER)) for k in _attention_keys(graph, node, reach))
            keys = [np.full(node.channels, latest, dtype=np.int64)]
        else:
            keys = [np.max([_source_keys(graph, r, reach) for r in node.sources()], axis=0)]
        if not node.given:
            keys = [np.where(k == _NEVER, always, k) for k in keys]
        if _recurrent(node):
            keys = [np.maximum(k, max(always, _not_before(node, reach, int(group_of[-1])))) for k in keys]
        parts.append([Part(p, k, np.zeros(node.channels, dtype=bool)) for p, k in zip(phases, keys, strict=True)])
        reach[node.id] = np.max(keys, axis=0)
    return parts


def _recurrent(node: Node) -> bool:
    """Whether it reads planes that follow, at positions that come before."""
    return any((ref.plane >= node.id).any() for ref in node.sources())


def _not_before(node: Node, reach: list[Keys], last: int) -> int:
    """The first key that is computed at the same pixel as planes that follow. What is computed ahead of them does not
    find the position before.
    """
    read = [(ref, p) for ref in node.sources() for p in np.unique(ref.plane) if p >= node.id]
    latest = max(reach[p][ref.channel[ref.plane == p]].max() for ref, p in read)
    dy, dx, group = (int(v) for v in unkey(np.array(latest)))
    return key(dy, dx - (group != last), last)


def _rows_down(graph: Graph, ref: Ref) -> int:
    return max(0, int(unkey(_shifts(graph, ref))[0].max(initial=0)))


def _rows_down_of(graph: Graph, node: Node) -> int:
    rows = max((_rows_down(graph, ref) for ref in node.sources()), default=0)
    return max(rows, int(unkey(np.array(_latest(graph, node)))[0])) if isinstance(node, Attention) else rows


def _prove_causal(graph: Graph, reach: list[Keys], groups: list[Group]) -> None:
    assert graph.output is not None
    keys = _source_keys(graph, graph.output, reach)
    limit = np.concatenate([np.full(len(g.params), i, dtype=np.int64) for i, g in enumerate(groups)])
    late = np.flatnonzero(keys >= limit)
    if not len(late):
        return
    channel = int(late[np.argmax(keys[late] - limit[late])])
    dy, dx, group = (int(v) for v in unkey(keys[channel]))
    path = _path(graph, reach, graph.output, channel)
    layers = dict.fromkeys(n.name or TOP_LEVEL for n, _, _ in path if isinstance(n, Linear | Attention))
    predicted, seen = groups[int(limit[channel])].colours[0], groups[group].colours[0]
    raise NotCausal(
        f"module {_culprit(path)!r} makes the model see what it predicts: the parameters of colour {predicted} at "
        f"pixel (y, x) depend on colour {seen} at (y{dy:+d}, x{dx:+d}); "
        f"the layers between: {' -> '.join(layers) or 'none'}"
    )


def _path(graph: Graph, reach: list[Keys], ref: Ref, channel: int) -> list[tuple[Node, int, int]]:
    """Computed nodes with the shift at which each is critical, from the image to the output, along the latest
    dependence.
    """
    path: list[tuple[Node, int, int]] = []
    plane, channel = int(ref.plane[channel]), int(ref.channel[channel])
    while not isinstance(graph.nodes[plane], Image | Embedding):
        node = graph.nodes[plane]
        _, plane, channel, dy, dx = max(_critical(graph, node, channel, reach))
        path.append((node, dy, dx))
    return path[::-1]


def _critical(graph: Graph, node: Node, channel: int, reach: list[Keys]) -> list[tuple[int, int, int, int, int]]:
    """(key, plane, channel, dy, dx) of every source element of one channel of a node, dy and dx in pixels."""
    found = []
    if isinstance(node, Attention):
        down, right, _ = (int(v) for v in unkey(np.array(_latest(graph, node))))
        shifts = [(0, 0), *[(down, right)] * 3]
        for ref, keys, shift in zip(node.sources(), _attention_keys(graph, node, reach), shifts, strict=True):
            if len(keys):
                k = int(np.argmax(keys))
                found.append((int(keys[k]), int(ref.plane[k]), int(ref.channel[k]), *shift))
        return found
    refs = [(ref, np.array([channel])) for ref in node.sources()]
    if isinstance(node, Linear):
        weights = [np.flatnonzero(tap.weight[:, channel].numpy()) for tap in node.taps]
        refs = list(zip(node.sources(), weights, strict=True))
    for ref, channels in refs:
        if len(channels):
            part = ref.take(channels)
            keys = _source_keys(graph, part, reach)
            k = int(np.argmax(keys))
            dy, dx, _ = unkey(_shifts(graph, part)[k : k + 1])
            found.append((int(keys[k]), int(part.plane[k]), int(part.channel[k]), int(dy[0]), int(dx[0])))
    return found


def _culprit(path: list[tuple[Node, int, int]]) -> str:
    """The node that looks furthest ahead; if none does, the first layer, which connects the pixel to itself."""
    ahead = max(path, key=lambda step: (step[1], step[2]), default=None)
    if ahead is not None and (ahead[1], ahead[2]) > (0, 0):
        return ahead[0].name or TOP_LEVEL
    first = next((node for node, _, _ in path if isinstance(node, Linear)), path[0][0] if path else None)
    return (first.name if first is not None else "") or TOP_LEVEL


def _mark_pixel_stage(graph: Graph, parts: list[list[Part]]) -> None:
    """A channel must be computed pixel by pixel when a reader at the pixel stage needs it before its last row is
    finished.
    """
    assert graph.output is not None

    def mark(ref: Ref, needed: NDArray[np.bool_], reader_dy: Keys, shift: int = 0) -> None:
        """needed, reader_dy: [readers, channels of ref] or [channels]. shift: a key."""
        shifts = _shifts(graph, ref) + shift
        for plane in np.unique(ref.plane[ref.plane >= 0]):
            here = ref.plane == plane
            channels = ref.channel[here]
            for part in parts[plane]:
                dy = unkey(part.reach[channels] + shifts[here])[0]
                now = np.atleast_2d(needed[..., here] & (reader_dy[..., here] == dy)).any(0)
                part.pixel[channels[now]] = True

    for node in graph.nodes:
        if node.sequential:
            for part in parts[node.id]:
                part.pixel[:] = True
    everywhere = np.ones(len(graph.output.plane), dtype=bool)
    mark(graph.output, everywhere, np.zeros(len(everywhere), dtype=np.int64))
    for node in reversed(graph.nodes):
        for part in parts[node.id]:
            needed, dy = part.pixel, unkey(part.reach)[0]
            if not needed.any():
                continue
            if isinstance(node, Linear):
                for tap, ref in zip(node.taps, node.sources(), strict=True):
                    if tap.phase in (None, part.phase) or part.phase is None:
                        used = tap.weight.numpy().T != 0  # [M, K]
                        mark(ref, used & needed[:, None], np.broadcast_to(dy[:, None], used.shape))
            elif isinstance(node, Attention):
                part.pixel[:] = True
                latest = _latest(graph, node)
                for ref, shift in zip(node.sources(), (0, latest, latest, latest), strict=True):
                    if shift > _NEVER:
                        mark(ref, np.ones(len(ref.plane), dtype=bool), np.broadcast_to(dy[0], len(ref.plane)), shift)
            elif isinstance(node, Pointwise):
                for ref in node.sources():
                    mark(ref, needed, dy)
    for node in graph.nodes:
        if not isinstance(node, Linear | Pointwise | Attention):
            for part in parts[node.id]:
                part.pixel[:] = False
