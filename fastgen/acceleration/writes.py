"""Which nodes of a graph write to memory that they are given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
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


def asks_late(trace: Trace) -> bool:
    """Whether a question, whose answer may send a call to the module's own forward, comes after something that this
    would do once more: a write to memory of inputs, or a random number of a generator that is given.
    """
    from fastgen.acceleration.layout import memory  # which is built on this

    shared = memory(trace)
    given = {
        first for node, first in shared.items() if node.op in ("placeholder", "get_attr") or _is_opaque(node, trace)
    }
    done = False
    for node in trace.graph.nodes:
        if node.target in (blocks.assume, blocks.expect_rank, blocks.expect_plain):
            if done:
                return True
            continue
        drawn = draws(node, trace) and (node.kwargs.get("generator") is not None or _is_opaque(node, trace))
        done |= drawn or any(shared[target] in given for target in written(node, trace))
    return False


def _is_opaque(node: fx.Node, trace: Trace) -> bool:
    """A module that may do anything."""
    return node.op == "call_module" and not type(trace.modules[str(node.target)]).__module__.startswith("torch.nn.")


def draws(node: fx.Node, trace: Trace) -> bool:
    if node.op == "call_module":
        module = trace.modules[str(node.target)]
        return module.training and isinstance(module, torch.nn.modules.dropout._DropoutNd)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return any(part in name for part in ("rand", "normal", "dropout", "bernoulli", "multinomial", "exponential"))


def changed(trace: Trace) -> set[fx.Node]:
    """All nodes whose memory one may write to."""
    from fastgen.acceleration.layout import memory  # which is built on this

    if trace.changed is None:
        shared = memory(trace)
        targets = {shared[target] for node in trace.graph.nodes for target in written(node, trace)}
        trace.changed = {node for node, first in shared.items() if first in targets}
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
