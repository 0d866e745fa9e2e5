"""Which nodes of a graph write to memory that they are given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from fastgen.acceleration import blocks
from fastgen.acceleration.tracing import Trace

IN_PLACE = {blocks.iadd, blocks.isub, blocks.imul, blocks.itruediv}


def written(node: fx.Node, trace: Trace) -> Iterator[fx.Node]:
    """The inputs that a node may change; of a module that is not one of PyTorch's, all."""
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        yield out
    inputs = node.all_input_nodes
    if node.op == "call_module":
        module = trace.modules[str(node.target)]
        known = type(module).__module__.startswith("torch.nn.")
        yield from inputs if not known or getattr(module, "inplace", False) else ()
    elif node.op in ("call_method", "call_function"):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.target in IN_PLACE or (name.endswith("_") and not name.endswith("__")) or _is_in_place(node):
            yield from inputs[:1]


def changed(trace: Trace) -> set[fx.Node]:
    """All nodes that one may write to."""
    if trace.changed is None:
        trace.changed = {target for node in trace.graph.nodes for target in written(node, trace)}
    return trace.changed


def _is_in_place(node: fx.Node) -> bool:
    """Of functions with an argument ``inplace``."""
    if node.op != "call_function" or not callable(node.target):
        return False
    signature = _signature(node.target)
    if signature is None or "inplace" not in signature.parameters:
        return False
    try:
        return bool(signature.bind(*node.args, **node.kwargs).arguments.get("inplace"))
    except TypeError:
        return False


@functools.lru_cache(maxsize=1024)
def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # built in
        return None
