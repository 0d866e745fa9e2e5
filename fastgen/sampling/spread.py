"""Next part of pass 4: a channel that is read for many channels becomes many equal ones.

The mean over channels is one channel, and what is multiplied by it has hundreds, each of which would be a program of
its own. As many copies of it, computed side by side, are one program: products with equal columns cost one of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fastgen.sampling.graph import Attention, Constant, Graph, Linear, Pointwise, Ref, taps_of

LARGEST = 1 << 20  # elements of a constant with its copies


def spread(graph: Graph) -> None:
    """Give planes whose channels are read several times in a row as many copies of each, next to each other."""
    copies = _copies(graph)
    if all(n == 1 for n in copies):
        return
    for node in graph.nodes:
        n = copies[node.id]
        if isinstance(node, Linear):
            pairs = list(zip(node.taps, node.sources(), strict=True))
            node.taps = [
                t
                for tap, ref in pairs
                for t in taps_of(_each_its_own(ref, copies), tap.weight.repeat_interleave(n, 1), tap.phase)
            ]
            node.bias = None if node.bias is None else node.bias.repeat_interleave(n)
        elif isinstance(node, Pointwise):
            node.operands = [_each_its_own(_repeated(o, n), copies) if isinstance(o, Ref) else o for o in node.operands]
        elif isinstance(node, Constant):
            node.data = node.data.repeat_interleave(n, 0)
        node.channels *= n
    assert graph.output is not None
    graph.output = _each_its_own(graph.output, copies)


def _copies(graph: Graph) -> list[int]:
    """How many copies each plane gets of each of its channels: as many as the longest run of it that is read."""
    least, most = _bounds(graph)
    copies = [1] * len(graph.nodes)
    for node in reversed(graph.nodes):
        for ref in node.sources() if isinstance(node, Pointwise) else ():
            for plane, run in _longest_runs(_repeated(ref, copies[node.id])):
                if least[plane] <= run <= most[plane]:
                    copies[plane] = max(copies[plane], run)
    return copies


def _bounds(graph: Graph) -> tuple[list[int], list[int]]:
    """For each plane how many copies it should have at least, and may have at most."""
    least, most = [1] * len(graph.nodes), [LARGEST] * len(graph.nodes)
    for node in graph.nodes:
        for ref in node.sources():
            planes = np.unique(ref.plane[ref.plane >= 0])
            if node.sequential or (planes >= node.id).any():  # recurrent
                most[node.id] = 1
            if most[node.id] == 1 or isinstance(node, Attention) or (isinstance(node, Linear) and len(ref.plane) > 1):
                for plane in planes:  # in the order that they have
                    most[plane] = 1
    for node in graph.nodes:
        if isinstance(node, Linear):  # all that is not a layer of that many channels
            least[node.id] = -(-sum(len(tap.weight) for tap in node.taps) // node.channels)
        elif isinstance(node, Constant):
            most[node.id] = LARGEST // max(1, node.data.numel())
        elif isinstance(node, Pointwise):
            for ref in node.sources():
                for plane, run in _longest_runs(ref):
                    least[node.id] = max(least[node.id], least[plane])
                    most[node.id] = min(most[node.id], most[plane] // run)
        else:
            most[node.id] = 1
    return least, most


def _longest_runs(ref: Ref) -> list[tuple[int, int]]:
    """Planes, with how many equal channels come in a row at most."""
    length = _place_in_run(ref) + 1
    return [(int(p), int(length[ref.plane == p].max())) for p in np.unique(ref.plane[ref.plane >= 0])]


def _repeated(ref: Ref, copies: int) -> Ref:
    return ref if copies == 1 else ref.take(np.arange(len(ref.plane)).repeat(copies))


def _place_in_run(ref: Ref) -> np.ndarray:
    """[C]: how many equal channels come directly before each."""
    same = np.stack([ref.plane, ref.channel, ref.dy, ref.dx])
    begins = np.concatenate([[True], (same[:, 1:] != same[:, :-1]).any(0)])
    index = np.arange(len(ref.plane))
    return index - np.maximum.accumulate(np.where(begins, index, 0))


def _each_its_own(ref: Ref, copies: list[int]) -> Ref:
    """The frame with the copies of channels in place of the same ones."""
    n = np.where(ref.plane >= 0, np.array(copies)[ref.plane], 1)
    return replace(ref, channel=ref.channel * n + _place_in_run(ref) % n)
