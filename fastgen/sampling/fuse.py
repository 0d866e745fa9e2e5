"""First half of pass 4: which planes are stored, and what is computed together.

`crop` lets a plane that is read in one window be computed in that window alone.  `merge_sums` turns convolution +
convolution (+ constant) into one product with more taps.  `roots` decides which planes are stored: all others are
evaluated inside the one step that needs them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fastgen.sampling.graph import Condition, Constant, Graph, Image, Linear, Node, Pointwise, Ref

STORED = -1


def live(graph: Graph) -> list[bool]:
    """Which nodes the output needs."""
    assert graph.output is not None
    alive = [False] * len(graph.nodes)
    for plane in graph.output.plane:
        alive[plane] = True
    for node in reversed(graph.nodes):
        if alive[node.id]:
            for ref in node.sources():
                for plane in np.unique(ref.plane[ref.plane >= 0]):
                    alive[plane] = True
    return alive


def crop(graph: Graph) -> None:
    """Let planes that are read in one window only be computed there, in the frame of the reader.

    Padding and slicing leave many such planes; without the offset they can be merged and evaluated inside their
    readers.
    """
    alive = live(graph)
    for node in reversed(graph.nodes):
        if not alive[node.id] or not isinstance(node, Linear | Pointwise):
            continue
        windows = _windows(graph, alive, node.id)
        if windows is None or len(windows) != 1:
            continue
        dy, dx, height, width = windows.pop()
        if dy < 0 or dx < 0 or dy + height > node.height or dx + width > node.width:
            continue
        if (dy, dx) != (0, 0):
            _move(graph, node, dy, dx)
        node.height, node.width = height, width


def _windows(graph: Graph, alive: list[bool], plane: int) -> set[tuple[int, int, int, int]] | None:
    """The windows (dy, dx, height, width) in which a plane is read element by element; None if a product reads it."""
    image = next(n for n in graph.nodes if isinstance(n, Image))
    assert graph.output is not None
    readers: list[tuple[Ref, Node]] = [(graph.output, image)]
    for node in graph.nodes[plane + 1 :]:
        if not alive[node.id]:
            continue
        if isinstance(node, Linear) and any(t.plane == plane for t in node.taps):
            return None
        if isinstance(node, Pointwise):
            readers += [(ref, node) for ref in node.sources()]
    found = set()
    for ref, reader in readers:
        here = ref.plane == plane
        found |= {
            (int(dy), int(dx), reader.height, reader.width) for dy, dx in zip(ref.dy[here], ref.dx[here], strict=True)
        }
    return found


def _move(graph: Graph, node: Linear | Pointwise, dy: int, dx: int) -> None:
    """Put the origin of a node's frame to its position (dy, dx)."""
    if isinstance(node, Linear):
        node.taps = [replace(t, dy=t.dy + dy, dx=t.dx + dx) for t in node.taps]
    else:
        node.operands = [
            Ref(o.plane, o.channel, o.dy + dy, o.dx + dx) if isinstance(o, Ref) else o for o in node.operands
        ]
    assert graph.output is not None
    for reader in graph.nodes[node.id + 1 :]:
        if isinstance(reader, Pointwise):
            reader.operands = [_follow(o, node.id, dy, dx) if isinstance(o, Ref) else o for o in reader.operands]
    graph.output = _follow(graph.output, node.id, dy, dx)


def _follow(ref: Ref, plane: int, dy: int, dx: int) -> Ref:
    here = ref.plane == plane
    return Ref(ref.plane, ref.channel, np.where(here, ref.dy - dy, ref.dy), np.where(here, ref.dx - dx, ref.dx))


def settle_output(graph: Graph) -> None:
    """Make the output one whole plane, channel by channel in place."""
    out = graph.output
    assert out is not None
    node = graph.nodes[max(int(out.plane[0]), 0)]
    count = len(out.plane)
    image = next(n for n in graph.nodes if isinstance(n, Image))
    whole = isinstance(node, Linear | Pointwise) and count == node.channels and not out.breaks().any()
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


def _readers(graph: Graph) -> list[list[int]]:
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
    readers = _readers(graph)

    def only_reader(node: Node, of: Node) -> bool:
        return readers[of.id] == [node.id] and (of.channels, of.height, of.width) == (
            node.channels,
            node.height,
            node.width,
        )

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
        if isinstance(b, Linear) and only_reader(node, b):
            merged = Linear(a.name, node.channels, node.height, node.width, taps=[*a.taps, *b.taps])
            merged.bias = bias + (zero if b.bias is None else b.bias)
        elif isinstance(b, Constant) and b.broadcast and b.channels == node.channels:
            merged = Linear(a.name, node.channels, node.height, node.width, taps=a.taps, bias=bias + b.data.flatten())
        else:
            continue
        merged.id, merged.start, merged.samples = node.id, node.start, node.samples
        graph.nodes[node.id] = merged


def roots(graph: Graph) -> list[int | None]:
    """For each plane the stored plane whose step evaluates it (itself if it is stored); None where nobody needs it.

    A plane is evaluated inside its reader when all its readers are evaluated in one step, element by element and in
    place.  A step
    holds one product: of several, the last computed stays inside.
    """
    readers = _readers(graph)
    root: list[int | None] = [None] * len(graph.nodes)
    product: dict[int, int] = {}
    for node in reversed(graph.nodes):
        i = node.id
        if not readers[i]:
            continue
        root[i] = i
        if isinstance(node, Image | Constant | Condition):
            continue
        home = _home(graph, node, readers[i], root)
        if home is not None and not (isinstance(node, Linear) and home in product):
            root[i] = home
        if isinstance(node, Linear):
            product[i if home is None else home] = i
    return root


def _home(graph: Graph, node: Node, readers: list[int], root: list[int | None]) -> int | None:
    """The one step in which all readers of a plane are evaluated, in place; None if there is no such step."""
    homes = {None if r == STORED else root[r] for r in readers}
    if len(homes) > 1 or None in homes or not all(_in_place(graph.nodes[r], node) for r in readers):
        return None
    return homes.pop()


def _in_place(reader: Node, node: Node) -> bool:
    if not isinstance(reader, Pointwise) or (reader.height, reader.width) != (node.height, node.width):
        return False
    for ref in reader.sources():
        here = ref.plane == node.id
        if ref.dy[here].any() or ref.dx[here].any():
            return False
    return True
