"""First half of pass 4: which planes are stored, and what is computed together.

`share` lets channels that are computed alike be computed once.  `crop` lets a plane that is read in one window be
computed in that window alone.  `merge_sums` turns convolution + convolution (+ constant) into one product with more
taps.  `roots` decides which planes are stored: all others are evaluated inside the one step that needs them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fastgen.sampling.graph import Attention, Constant, Graph, Linear, Node, Pointwise, Ref, Tap, taps_of

STORED = -1


def trim(graph: Graph) -> None:
    """Drop the sources of planes that nobody needs, and the channels of others that nobody needs.

    One product gives queries, keys and values, and those that are rotated are made by others
    (`fastgen.sampling.rotations`).
    """
    readers = readers_of(graph)
    assert graph.output is not None
    for node in reversed(graph.nodes):
        if not readers[node.id] and node.sources():
            frame = node.channels, node.height, node.width, node.id, node.samples, node.start, node.stride
            graph.nodes[node.id] = Linear(node.name, *frame)
        if node.sequential or not readers[node.id] or not isinstance(node, Linear | Pointwise):
            continue
        refs = [ref for r in readers[node.id] for ref in ([graph.output] if r == STORED else graph.nodes[r].sources())]
        used = np.zeros(node.channels, dtype=bool)
        for ref in refs:
            used[ref.channel[ref.plane == node.id]] = True
        if used.all():
            continue
        kept = np.flatnonzero(used)
        if isinstance(node, Linear):
            node.taps = [replace(tap, weight=tap.weight[:, kept].contiguous()) for tap in node.taps]
            node.bias = None if node.bias is None else node.bias[kept]
        else:
            node.operands = [o.take(kept) if isinstance(o, Ref) else o for o in node.operands]
        node.channels = len(kept)
        renumber(graph, readers[node.id], node.id, np.cumsum(used) - 1)


def renumber(graph: Graph, readers: list[int], plane: int, channel: np.ndarray) -> None:
    """Let readers of a plane find each of its channels where it is now."""

    def moved(ref: Ref) -> Ref:
        here = ref.plane == plane
        return replace(ref, channel=np.where(here, channel[np.where(here, ref.channel, 0)], ref.channel))

    for reader in readers:
        if reader == STORED:
            assert graph.output is not None
            graph.output = moved(graph.output)
            continue
        node = graph.nodes[reader]
        if isinstance(node, Linear):
            node.taps = [replace(t, channel=int(channel[t.channel])) if t.plane == plane else t for t in node.taps]
        elif isinstance(node, Pointwise):
            node.operands = [moved(o) if isinstance(o, Ref) else o for o in node.operands]
        elif isinstance(node, Attention):
            node.query, node.keys, node.values, node.of_keys = map(moved, node.sources())


def live(graph: Graph) -> list[bool]:
    """Which nodes the output needs."""
    assert graph.output is not None
    alive = [False] * len(graph.nodes)
    for plane in graph.output.plane:
        alive[plane] = True
    before = 0
    while before < sum(alive):  # what recurrent layers read may follow them
        before = sum(alive)
        for node in reversed(graph.nodes):
            if alive[node.id]:
                for ref in node.sources():
                    for plane in np.unique(ref.plane[ref.plane >= 0]):
                        alive[plane] = True
    return alive


def share(graph: Graph) -> None:
    """Let readers of a channel that is computed like an earlier one read that one.

    Skip connections apply the same activation to the same feature map in several places.
    """
    plane = [np.full(n.channels, n.id) for n in graph.nodes]  # where to find each channel
    channel = [np.arange(n.channels) for n in graph.nodes]
    seen: dict[object, tuple[int, int]] = {}

    def redirect(ref: Ref) -> Ref:
        ref = replace(ref, plane=ref.plane.copy(), channel=ref.channel.copy())
        for p in np.unique(ref.plane[ref.plane >= 0]):
            here = ref.plane == p
            ref.plane[here], ref.channel[here] = plane[p][ref.channel[here]], channel[p][ref.channel[here]]
        return ref

    for node in graph.nodes:
        if isinstance(node, Linear):
            pairs = zip(node.taps, node.sources(), strict=True)
            node.taps = [t for tap, ref in pairs for t in taps_of(redirect(ref), tap.weight, tap.phase)]
        elif isinstance(node, Pointwise):
            node.operands = [redirect(o) if isinstance(o, Ref) else o for o in node.operands]
            kind = (node.op, node.height, node.width, node.stride)
            count: dict[object, int] = {}  # equal channels of one node stay apart, and in order: they are one program
            for c, key in enumerate(_operands_of_channels(node)):
                turn = count[key] = count.get(key, -1) + 1
                plane[node.id][c], channel[node.id][c] = seen.setdefault((kind, key, turn), (node.id, c))
    assert graph.output is not None
    graph.output = redirect(graph.output)


def _operands_of_channels(node: Pointwise) -> list[object]:
    """For each channel of a node, its operands."""
    columns = [
        [o] * node.channels
        if not isinstance(o, Ref)
        else zip(o.plane.tolist(), o.channel.tolist(), o.dy.tolist(), o.dx.tolist(), strict=True)
        for o in node.operands
    ]
    return list(zip(*columns, strict=True))


def crop(graph: Graph) -> None:
    """Let planes that are read in one window only be computed there, in the frame of the reader.

    Padding and slicing leave many such planes; without the offset they can be merged and evaluated inside their
    readers.
    """
    readers = readers_of(graph)
    for node in reversed(graph.nodes):
        if not readers[node.id] or not isinstance(node, Linear | Pointwise):
            continue
        windows = _windows(graph, readers[node.id], node.id)
        if windows is None or len(windows) != 1:
            continue
        dy, dx, height, width = windows.pop()
        if dy < 0 or dx < 0 or dy + height > node.height or dx + width > node.width:
            continue
        if (dy, dx) != (0, 0):
            _move(graph, readers[node.id], node, dy, dx)
        node.height, node.width = height, width


def _windows(graph: Graph, readers: list[int], plane: int) -> set[tuple[int, int, int, int]] | None:
    """The windows (dy, dx, height, width) in which a plane is read element by element; None if a product, attention or
    a frame of another stride reads it.
    """
    image = graph.image
    assert graph.output is not None
    views: list[tuple[Ref, Node]] = [(graph.output, image)]
    for reader in (graph.nodes[r] for r in readers if r != STORED):
        if isinstance(reader, Linear | Attention):
            return None
        views += [(ref, reader) for ref in reader.sources()]
    found = set()
    for ref, reader in views:
        here = ref.plane == plane
        if here.any() and ref.stride != graph.nodes[plane].stride:
            return None
        found |= {
            (int(dy), int(dx), reader.height, reader.width) for dy, dx in zip(ref.dy[here], ref.dx[here], strict=True)
        }
    return found


def _move(graph: Graph, readers: list[int], node: Linear | Pointwise, dy: int, dx: int) -> None:
    """Put the origin of a node's frame to its position (dy, dx)."""
    if isinstance(node, Linear):
        node.taps = [_moved_tap(graph, node, t, dy, dx) for t in node.taps]
    else:
        node.operands = [graph.moved(o, dy, dx) if isinstance(o, Ref) else o for o in node.operands]
    assert graph.output is not None
    for reader in (graph.nodes[r] for r in readers if r != STORED):
        if isinstance(reader, Pointwise):
            reader.operands = [_follow(o, node.id, dy, dx) if isinstance(o, Ref) else o for o in reader.operands]
    graph.output = _follow(graph.output, node.id, dy, dx)


def _moved_tap(graph: Graph, node: Linear, tap: Tap, dy: int, dx: int) -> Tap:
    one = np.ones(1, dtype=np.int64)
    ref = graph.moved(Ref(one * tap.plane, one * tap.channel, one * tap.dy, one * tap.dx, node.stride), dy, dx)
    phase = tap.phase and ((tap.phase[0] - dy) % node.period[0], (tap.phase[1] - dx) % node.period[1])
    return replace(tap, dy=int(ref.dy[0]), dx=int(ref.dx[0]), phase=phase)


def _follow(ref: Ref, plane: int, dy: int, dx: int) -> Ref:
    here = ref.plane == plane
    return replace(ref, dy=np.where(here, ref.dy - dy, ref.dy), dx=np.where(here, ref.dx - dx, ref.dx))


def settle_output(graph: Graph) -> None:
    """Make the output one whole plane, channel by channel in place."""
    assert graph.output is not None
    image = graph.image
    out = graph.output
    node = graph.nodes[max(int(out.plane[0]), 0)]
    count = len(out.plane)
    whole = isinstance(node, Linear | Pointwise) and count == node.channels and not out.breaks().any()
    whole = whole and node.stride == image.stride
    if whole and not out.channel[0] and not out.dy.any() and not out.dx.any() and out.plane[0] >= 0:
        return
    copy = graph.add(Pointwise("output", count, image.height, image.width, op="copy", operands=[out]))
    zero = np.zeros(count, dtype=np.int64)
    graph.output = Ref(zero + copy.id, np.arange(count), zero, zero)


def _whole(operand: Ref | float, node: Node) -> int | None:
    """The plane of an operand that is all of one plane of the same size in place, else None."""
    if not isinstance(operand, Ref) or operand.plane[0] < 0 or operand.breaks().any():
        return None
    if operand.channel[0] or operand.dy.any() or operand.dx.any():
        return None
    return int(operand.plane[0])


def readers_of(graph: Graph) -> list[list[int]]:
    """For each plane the nodes that read it; the output counts as reader STORED."""
    alive = live(graph)
    readers: list[list[int]] = [[] for _ in graph.nodes]
    for node in graph.nodes:
        if alive[node.id]:
            for plane in {int(p) for ref in node.sources() for p in np.unique(ref.plane) if p >= 0}:
                readers[plane].append(node.id)
    assert graph.output is not None
    for plane in np.unique(graph.output.plane):
        readers[plane].append(STORED)
    return readers


def merge_sums(graph: Graph) -> None:
    """Replace add(product, product) and add(product, per-channel constant), in place, where nobody else reads the
    products.
    """
    readers = readers_of(graph)

    def geometry(node: Node) -> tuple[object, ...]:
        return node.channels, node.height, node.width, node.stride

    def only_reader(node: Node, of: Node) -> bool:
        return readers[of.id] == [node.id] and geometry(of) == geometry(node)

    for node in list(graph.nodes):
        if not isinstance(node, Pointwise) or node.op != "add" or not all(isinstance(o, Ref) for o in node.operands):
            continue
        planes = [_whole(o, node) for o in node.operands]
        if None in planes:
            continue
        a, b = (graph.nodes[p] for p in planes if p is not None)
        if isinstance(b, Linear):
            a, b = b, a
        if not isinstance(a, Linear) or not only_reader(node, a):
            continue
        zero = torch.zeros(node.channels)
        bias = zero if a.bias is None else a.bias
        if isinstance(b, Linear) and only_reader(node, b) and a.period == b.period:
            merged = replace(a, taps=[*a.taps, *b.taps], bias=bias + (zero if b.bias is None else b.bias))
        elif isinstance(b, Constant) and b.broadcast and b.channels == node.channels:
            merged = replace(a, bias=bias + b.data.flatten())
        else:
            continue
        merged.id, merged.start, merged.samples = node.id, node.start, node.samples
        graph.nodes[node.id] = merged


def roots(graph: Graph) -> list[int | None]:
    """For each plane the stored plane whose step evaluates it (itself if it is stored); None where nobody needs it.

    A plane is evaluated inside its reader when all its readers are evaluated in one step, element by element and in
    place, each channel once.  A step holds one product: of several, the last computed stays inside.  A transposed
    convolution, which has a step for each phase, is stored.
    """
    readers = readers_of(graph)
    root: list[int | None] = [None] * len(graph.nodes)
    product: dict[int, int] = {}
    places: dict[int, np.ndarray] = {}
    for node in reversed(graph.nodes):
        i = node.id
        if not readers[i]:
            continue
        root[i] = i
        places[i] = np.arange(node.channels)
        if not isinstance(node, Linear | Pointwise) or (isinstance(node, Linear) and node.period != (1, 1)):
            continue
        home = _home(graph, node, readers[i], root)
        inside = None if home is None else _places(graph, node, readers[i], places)
        if home is not None and inside is not None and not (isinstance(node, Linear) and home in product):
            root[i], places[i] = home, inside
        if isinstance(node, Linear):
            product[i if home is None or root[i] == i else home] = i
    return root


def _places(graph: Graph, node: Node, readers: list[int], places: dict[int, np.ndarray]) -> np.ndarray | None:
    """The channel of the step in which each channel of a plane is evaluated (-1: nobody needs it); None if one would be
    evaluated twice.
    """
    place = np.full(node.channels, -1)
    for reader in readers:
        for ref in graph.nodes[reader].sources():
            here = (ref.plane == node.id) & (places[reader] >= 0)
            wanted = np.full(node.channels, -1)
            if len(np.unique(ref.channel[here])) < here.sum():
                return None
            wanted[ref.channel[here]] = places[reader][here]
            if ((place >= 0) & (wanted >= 0) & (place != wanted)).any():
                return None
            place = np.maximum(place, wanted)
    return place


def _home(graph: Graph, node: Node, readers: list[int], root: list[int | None]) -> int | None:
    """The one step in which all readers of a plane are evaluated, in place; None if there is no such step."""
    homes = {None if r == STORED else root[r] for r in readers}
    if len(homes) > 1 or None in homes or not all(_in_place(graph.nodes[r], node) for r in readers):
        return None
    return homes.pop()


def _in_place(reader: Node, node: Node) -> bool:
    if not isinstance(reader, Pointwise) or reader.stride != node.stride:
        return False
    if (reader.height, reader.width) != (node.height, node.width):
        return False
    for ref in reader.sources():
        here = ref.plane == node.id
        if ref.dy[here].any() or ref.dx[here].any():
            return False
    return True
