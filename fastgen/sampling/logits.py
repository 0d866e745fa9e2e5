"""Heads take logits. A log-softmax of the levels is dropped, for the head does the same; probabilities are refused: as
logits they would be another distribution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fastgen.sampling.graph import TOP_LEVEL, Node, Pointwise, UnsupportedModel
from fastgen.sampling.heads import Bernoulli, Categorical, Head
from fastgen.sampling.planes import pointwise
from fastgen.sampling.rules import rule

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


@rule("_log_softmax")
def _log_softmax(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """The logits themselves, for `check_logits` to find out whether they may stand for it."""
    codes = pointwise(tracer, "copy", [tracer.codes(args[0])], args[0].shape)
    tracer.log_softmaxes[len(tracer.graph.nodes) - 1] = _rows(codes, args[1])
    tracer.set_codes(outputs[0], codes)


def check_logits(tracer: Tracer, codes: Tensor, head: Head) -> None:
    """
    Args:
        codes: of the network's output [N, C*K, H, W].

    Raises:
        UnsupportedModel: the output is known to be no logits.
    """
    nodes = tracer.graph.nodes
    for plane, rows in tracer.log_softmaxes.items():
        if any((ref.plane == plane).any() for node in nodes for ref in node.sources()):
            raise _unsupported(nodes[plane], "a log-softmax that is not the last layer cannot be sampled incrementally")
        if not isinstance(head, Categorical) or not _among(_rows(codes.unflatten(1, (-1, head.levels)), 2), rows):
            raise _unsupported(nodes[plane], f"a log-softmax over anything but the levels is no output for {head}")
    assert tracer.graph.output is not None
    for last in (nodes[p] for p in np.unique(tracer.graph.output.plane) if p >= 0):
        if isinstance(head, Bernoulli) and isinstance(last, Pointwise) and last.op == "sigmoid":
            raise _unsupported(last, f"a sigmoid as the last layer is no output for {head}, which takes logits")


def _unsupported(node: Node, what: str) -> UnsupportedModel:
    return UnsupportedModel(f"module {node.name or TOP_LEVEL!r}: {what}")


def _rows(codes: Tensor, dim: int) -> np.ndarray:
    """[rows, levels], the codes along a dimension, in ascending order."""
    rows = codes.movedim(dim, -1).flatten(0, -2).numpy()
    return np.sort(rows, axis=1)


def _among(found: np.ndarray, rows: np.ndarray) -> bool:
    """Whether those of the rows `found` that share an element with `rows` are among them."""
    shared = found[np.isin(found, rows).any(1)]
    rows = rows[np.argsort(rows[:, 0])]
    at = np.searchsorted(rows[:, 0], shared[:, 0]).clip(max=len(rows) - 1)
    return shared.shape[1] == rows.shape[1] and bool((rows[at] == shared).all())
