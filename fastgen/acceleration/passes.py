"""Finds sums, activations and products in a row behind a convolution, which become one pass over its result."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from fastgen.acceleration import blocks
from fastgen.acceleration.deferred import plain
from fastgen.acceleration.deferring import is_alone
from fastgen.acceleration.finishing import finish
from fastgen.acceleration.links import takers
from fastgen.acceleration.tracing import Trace
from fastgen.acceleration.writes import written


def finish_in_one_pass(trace: Trace) -> None:
    """Rewrites sums, activations and products in a row that are left in the memory of what a deferred convolution
    becomes.
    """
    done: set[fx.Node] = set()
    for node in list(trace.graph.nodes):
        if node in done or _step(node) != "add":
            continue
        run = _run_from(node)
        done |= set(run)
        start = run[0].args[0]
        deferred = isinstance(start, fx.Node) and start.target is plain and is_alone(start) and takers(start) == run[:1]
        if deferred and len(run) > 1 and not _writes_between(run, trace):
            _replace(run, start.args[0], trace.graph)  # type: ignore[union-attr]


_ORDER = {"add": ("add", "activate", "gain", "clamp"), "activate": ("gain", "clamp"), "gain": ("clamp",), "clamp": ()}


def _step(node: fx.Node) -> str | None:
    args, numbers = node.args, all(isinstance(value, int | float) for value in node.args[1:])
    if node.target is blocks.add_into or (node.op == "call_method" and node.target == "add_"):
        return "add" if len(args) == 2 and isinstance(args[1], fx.Node) and not node.kwargs else None
    if node.target is blocks.activate_into:
        return "activate"
    if node.target is blocks.mul_into:
        return "gain" if numbers else None
    if node.op == "call_method" and node.target == "clamp" and len(args) == 3 and not node.kwargs:
        return "clamp" if numbers and args[1] == -args[2] <= 0 else None  # type: ignore[operator]
    return None


def _run_from(node: fx.Node) -> list[fx.Node]:
    """Steps that may follow each other, each all that takes the one before; of what is not larger than the first, as of
    ``x.add_(y)``, the size or dtype may be asked for.
    """
    run, step = [node], "add"
    while len(users := takers(run[-1])) == 1:
        (user,) = users
        if len(run[-1].users) > 1 and not all(previous.target == "add_" for previous in run):
            break
        next = _step(user)
        if next not in _ORDER[step] or user.args[0] is not run[-1]:
            break
        run.append(user)
        step = next
    return run


def _writes_between(run: list[fx.Node], trace: Trace) -> bool:
    node = run[0]
    while node is not run[-1]:
        if node not in run and any(True for _ in written(node, trace)):
            return True
        node = node.next
    return False


def _replace(run: list[fx.Node], start: Any, graph: fx.Graph) -> None:
    by_step = {_step(node): node.args for node in run}
    terms = tuple(node.args[1] for node in run if _step(node) == "add")
    methods = tuple(node.target == "add_" for node in run if _step(node) == "add")
    activation, parameter = by_step.get("activate", (None, "none", 0.0))[1:]
    gain, limit = by_step.get("gain", (None, 1.0))[1], by_step.get("clamp", (None, None, math.inf))[2]
    with graph.inserting_before(run[-1]):
        arguments = (start, terms, methods, activation, parameter, float(gain), float(limit))  # type: ignore[arg-type]
        finished = graph.call_function(finish, arguments)
    finished.meta["tensor"] = True
    run[-1].replace_all_uses_with(finished)
    gone: list[Any] = [run[0].args[0], *run]
    for node in gone:
        node.replace_all_uses_with(start, lambda user: user not in gone)
    for node in reversed(gone):
        graph.erase_node(node)
