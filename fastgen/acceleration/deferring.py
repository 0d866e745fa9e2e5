"""Finds convolutions by other than their channels in a traced graph, and has their images, and weights, deferred.

Two kinds: weights of each sample, that are computed from a parameter, with samples as groups; and filters that are
computed from a small buffer, the same for all channels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.parameter import is_lazy

from fastgen.acceleration.deferred import plain
from fastgen.acceleration.deferred_images import images
from fastgen.acceleration.layout import memory
from fastgen.acceleration.links import asks_for_size, name_of, own_tensor
from fastgen.acceleration.report import Entry, Report
from fastgen.acceleration.scaled_weights import own_weight
from fastgen.acceleration.tracing import Trace
from fastgen.acceleration.writes import written

_GROUPS_AT = 6  # among the arguments of either
_LEAST = 1 << 16  # weights: fewer cost less to compute for each sample than it costs to do without, of small images
_ZERO, _ONE = [(n, (n, n), [n, n]) for n in (0, 1)]  # as options of a convolution
_VIEWS = ("view", "reshape", "permute")
_BY_SAMPLE = "one convolution for all samples, their scales on the images"
_MATRICES = "as products of matrices, of the images as they lie"
_FILTER = "as one filter for all channels"


class _Found(NamedTuple):
    """A convolution; the views that lead to its input, none from one that is deferred, too; and, of one by sample, what
    its weights are computed from, and by.
    """

    conv: fx.Node
    views: list[fx.Node]
    kernel: fx.Node | None
    path: set[fx.Node]


def defer(trace: Trace, prefix: str, report: Report) -> None:
    """Rewrites the graph of the trace; what it found is no convolution for others any more, by `is_deferred`."""
    graph = trace.graph
    found: list[_Found] = []
    order = {node: i for i, node in enumerate(graph.nodes)}
    shared = memory(trace)
    writes = [(i, target) for node, i in order.items() for target in written(node, trace)]
    for node in graph.nodes:
        one = _find(node, trace, {other.conv for other in found})
        if one is not None and not _is_written_to(one, order, shared, writes):
            found.append(one)
    if not found:
        return
    deferred: set[fx.Node] = set()
    for conv, views, kernel, path in found:
        by_matrices = kernel is not None and _is_one_element(kernel, trace)
        reason = _FILTER if kernel is None else _MATRICES if by_matrices else _BY_SAMPLE
        report.fused.append(Entry(*name_of(conv, trace, prefix), reason))
        conv.meta["deferred"] = True
        deferred |= {conv, *views, *path}
    for node in graph.nodes:
        if _is_view(node) and _viewed(node) in deferred:
            deferred.add(node)
    for conv, views, kernel, path in found:
        source = _viewed(views[0]) if views else conv
        if source not in deferred and source.target is not images:
            with graph.inserting_before(views[0]):
                views[0].replace_input_with(source, graph.call_function(images, (source,)))
        if kernel is not None and not (_is_small(kernel, trace) and _is_one_element(kernel, trace)):
            first = min((n for n in kernel.users if n in path), key=order.__getitem__)
            known = isinstance(source, fx.Node) and order.get(source, len(order)) < order[first]
            with graph.inserting_before(first):
                given = (kernel, source) if known and _is_small(kernel, trace) else (kernel,)
                weight = graph.call_function(own_weight, given)
            kernel.replace_all_uses_with(weight, lambda user, path=path: user in path)  # type: ignore[misc]
    tensors: dict[fx.Node, fx.Node] = {}  # where they are needed
    for node in deferred:
        users = [user for user in node.users if user not in deferred and not asks_for_size(user)]
        if users:
            with graph.inserting_after(node):
                tensors[node] = graph.call_function(plain, (node,))
            node.replace_all_uses_with(tensors[node], lambda user, users=users: user in users)  # type: ignore[misc]
    convs = {one.conv for one in found}
    for node, tensor in tensors.items():
        behind = _reached([_last_conv(node, convs)], lambda n: [user for user in n.users if user in deferred])
        tensor.meta["alone"] = _last_conv(node, convs) in convs and [n for n in behind if n in tensors] == [node]


def is_deferred(node: fx.Node) -> bool:
    return "deferred" in node.meta


def is_alone(node: fx.Node) -> bool:
    """Of a tensor that a deferred convolution becomes: whether nothing else shares its memory."""
    return bool(node.meta.get("alone"))


def _last_conv(node: fx.Node, convs: set[fx.Node]) -> fx.Node:
    """The convolution that a deferred value is a view of, if it is one."""
    while node not in convs and _is_view(node):
        node = _viewed(node)
    return node


def _find(node: fx.Node, trace: Trace, others: set[fx.Node]) -> _Found | None:
    if node.op != "call_function" or node.target not in (F.conv2d, F.conv_transpose2d):
        return None
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    groups = node.args[_GROUPS_AT] if len(node.args) > _GROUPS_AT else node.kwargs.get("groups")
    weight: Any = given["weight"]
    if given.get("bias") is not None or not isinstance(weight, fx.Node) or weight.op == "get_attr":
        return None
    views = _views_to(given["input"])
    if not views and given["input"] not in others:
        return None
    before = _reached([weight], lambda n: [] if asks_for_size(n) else n.all_input_nodes)
    sources = {n: _source(n, trace) for n in before if n.op == "get_attr"}
    kernels = [n for n, value in sources.items() if value is not None and value.dim() >= 4]
    if isinstance(groups, fx.Node) and len(kernels) == 1:
        path = before & _reached(kernels, lambda n: list(n.users)) - set(kernels)
        if all(n.op in ("call_function", "call_method") for n in path):
            return _Found(node, views, kernels[0], path)
    small = [value is not None and value.dim() in (1, 2) for value in sources.values()]
    options = {"stride": _ONE, "padding": _ZERO, "dilation": _ONE}
    plainly = len(node.args) <= 3 and all(node.kwargs.get(name, plain[0]) in plain for name, plain in options.items())
    if node.target is F.conv2d and plainly and small and all(small):
        return _Found(node, views, None, set())
    return None


def _is_small(kernel: fx.Node, trace: Trace) -> bool:
    value = _source(kernel, trace)
    return value is not None and value.numel() < _LEAST


def _is_one_element(kernel: fx.Node, trace: Trace) -> bool:
    value = _source(kernel, trace)
    return value is not None and math.prod(value.shape[-2:]) == 1


def _is_written_to(
    found: _Found, order: dict[fx.Node, int], shared: dict[fx.Node, fx.Node], writes: list[tuple[int, fx.Node]]
) -> bool:
    """Whether anything that shares memory with what is deferred, or was before it, is written to from then on; but for
    the last of the views that the convolution becomes, when the others are not used any more.
    """
    begin = min(order[node] for node in (found.conv, *found.views, *found.path))
    behind = {found.conv}
    for node in order:
        if _is_view(node) and _viewed(node) in behind:
            behind.add(node)
    sources = [source for node in (*found.views, *found.path) for source in node.all_input_nodes]
    firsts = {shared[node] for node in (found.conv, *found.views, *found.path, *sources)}
    nodes = list(order)
    for i, target in writes:
        if i < begin or shared[target] not in firsts:
            continue
        if target not in behind:
            return True
        mine = _reached([nodes[i]], lambda n: list(n.users)) | {target}
        others = [n for n, first in shared.items() if first is shared[target] and n not in mine]
        if any(order[user] > i for other in others for user in other.users):
            return True
    return False


def _views_to(node: Any) -> list[fx.Node]:
    views: list[fx.Node] = []
    while isinstance(node, fx.Node) and _is_view(node):
        views.insert(0, node)
        node = _viewed(node)
    return views if isinstance(node, fx.Node) else []


def _is_view(node: fx.Node) -> bool:
    """Or an image with zeros around it."""
    if node.op == "call_method":
        return node.target in _VIEWS and not node.kwargs
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(isinstance(i, slice) for i in index)
    return node.op == "call_function" and node.target is F.pad and bool(node.args)


def _viewed(node: fx.Node) -> Any:
    return node.args[0]


def _reached(nodes: Iterable[fx.Node], step: Callable[[fx.Node], list[fx.Node]]) -> set[fx.Node]:
    """These, and all that the steps lead to."""
    found: set[fx.Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += step(node)
    return found


def _source(node: fx.Node, trace: Trace) -> Tensor | None:
    tensor = own_tensor(node, trace)
    return None if tensor is None or is_lazy(tensor.values[0]) else tensor.values[0]
