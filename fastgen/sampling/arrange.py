"""First part of pass 4: products whose channels are read in another order give them in that order.

Where queries, keys and values of a head lie next to each other, as in GPT-NeoX, those of all heads would be a program
for each head.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fastgen.sampling.fuse import STORED, readers_of, renumber
from fastgen.sampling.graph import Graph, Linear, Pointwise, Ref


def arrange(graph: Graph) -> None:
    """Put the channels of products into the order in which they are read, if that leaves fewer breaks."""
    readers = readers_of(graph)
    for node in graph.nodes:
        if not isinstance(node, Linear) or node.sequential or STORED in readers[node.id] or not readers[node.id]:
            continue
        by = [graph.nodes[r] for r in readers[node.id]]
        if not all(isinstance(n, Pointwise) and not n.sequential for n in by):
            continue
        read = [ref.take(np.flatnonzero(ref.plane == node.id)) for n in by for ref in n.sources()]
        found = np.concatenate([*(ref.channel for ref in read), np.arange(node.channels)])
        _, first = np.unique(found, return_index=True)
        order = found[np.sort(first)]
        place = np.argsort(order)
        if _breaks(read, place) >= _breaks(read, np.arange(node.channels)):
            continue
        index = torch.from_numpy(order)
        node.taps = [replace(tap, weight=tap.weight[:, index].contiguous()) for tap in node.taps]
        node.bias = None if node.bias is None else node.bias[index]
        renumber(graph, readers[node.id], node.id, place)


def _breaks(read: list[Ref], place: np.ndarray) -> int:
    """How often the channels of a plane that are read do not follow each other, each being at a place."""
    return sum(int(replace(ref, channel=place[ref.channel]).breaks().sum()) for ref in read)
