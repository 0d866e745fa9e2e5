"""Finds convolution, norm and activation in a row in a traced graph, and puts one fused call in their place.

What a norm normalises by its input ends such a row and begins another, of norm and activation. A convolution after an
upsampling that repeats pixels becomes a transposed one, which does not multiply the repeated ones again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastgen import ops
from fastgen._hooks import has_hooks
from fastgen.acceleration import blocks
from fastgen.acceleration.deferring import defer, is_alone, is_deferred
from fastgen.acceleration.links import (
    Link,
    Skip,
    TensorAt,
    activation,
    asks_for_kind,
    check_alike,
    convolution,
    even_padding,
    input_norm,
    is_identity,
    kind_of,
    name_of,
    norm,
    silu_gate,
    takers,
    upsampling,
)
from fastgen.acceleration.nodes import input_of
from fastgen.acceleration.passes import finish_in_one_pass
from fastgen.acceleration.report import Entry, Report
from fastgen.acceleration.tracing import Trace
from fastgen.acceleration.writes import written
from fastgen.ops.conv_cpu import Options
from fastgen.ops.conv_sequence import conv_bn_act_sequence
from fastgen.ops.known_convs import BLOCK_TENSORS


def fuse(trace: Trace, prefix: str) -> tuple[Report, set[str]]:
    """Rewrites the graph of the trace; also returns the paths of the modules that are no longer called."""
    report, bypassed = Report(), set()
    _write_silu(trace)
    defer(trace, prefix, report)
    for node in list(trace.graph.nodes):
        kind = kind_of(node, trace)
        if kind is None or is_deferred(node):
            continue
        chain = Chain(trace, node, prefix, report)
        try:
            chain.fuse(kind)
        except Skip as reason:
            report.skipped.append(Entry(*name_of(node, trace, prefix), str(reason)))
        else:
            bypassed |= chain.bypassed
    if report.fused:
        _compute_in_place(trace)
        finish_in_one_pass(trace)
    for run in _runs(trace):
        _join(run, trace.graph)
    return report, bypassed


_FUSED = (blocks.conv_transpose2d_bn_act, ops.conv2d_bn_act, blocks.group_norm_act, blocks.instance_norm_act)
_INTO: dict[Any, Any] = {
    **dict.fromkeys((operator.add, torch.add, "add"), blocks.add_into),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), blocks.mul_into),
}


def _compute_in_place(trace: Trace) -> None:
    """Sums, products and activations are left where what they are of is, if nobody else takes that: new memory costs
    more than they do.
    """
    for node in trace.graph.nodes:
        into = _INTO.get(node.target)
        if into is not None and len(node.args) == 2 and not node.kwargs and node.args[0] is not node.args[1]:
            fresh = next((term for term in node.args if _is_fresh(term, trace) and len(takers(term)) == 1), None)
            if fresh is not None:
                node.op, node.target = "call_function", into
                node.args = (fresh, node.args[1] if fresh is node.args[0] else node.args[0])
            continue
        options = _function_of(node, trace)
        input = input_of(node) if options else None
        if options and _is_fresh(input, trace) and len(takers(input)) == 1:  # type: ignore[arg-type]
            parameter = options.get("alpha", options.get("negative_slope", 0.0))
            node.op, node.target, node.kwargs = "call_function", blocks.activate_into, {}
            node.args = (input, options["activation"], parameter)


def _function_of(node: fx.Node, trace: Trace) -> dict[str, Any]:
    """The options of an activation that is a function or method, and none of those that are in place already."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method") or name.endswith("_") or node.kwargs.get("inplace"):
        return {}
    try:
        link = activation(node, trace)
    except Skip:
        return {}
    return link.options if link is not None and link.options["activation"] in blocks.IN_PLACE else {}


def _is_fresh(node: Any, trace: Trace) -> bool:
    """Whether it is a tensor in memory of its own."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method" and node.target == "add_" and isinstance(node.args[0], fx.Node):
        return _is_fresh(node.args[0], trace) and len(takers(node.args[0])) == 1
    plain = node.op == "call_module" and type(trace.modules[str(node.target)]) is nn.Conv2d
    if node.target in (blocks.add_into, blocks.mul_into, blocks.activate_into) or is_alone(node):
        return True
    return node.target in _FUSED or (plain and not has_hooks(trace.modules[str(node.target)]))


def _runs(trace: Trace) -> list[list[fx.Node]]:
    """Fused convolutions that each are all that takes the result of the one before, or that stand alone.

    A run takes its input where its last one stands, so that nothing may be written to in between.
    """
    runs: dict[fx.Node, list[fx.Node]] = {}  # by the last
    ended: list[list[fx.Node]] = []
    for node in trace.graph.nodes:
        if any(True for _ in written(node, trace)):
            ended += runs.values()
            runs = {}
        if node.target not in (blocks.conv_transpose2d_bn_act, ops.conv2d_bn_act):
            continue
        if "output_size" in node.kwargs or isinstance(node.kwargs["padding"], str):
            continue
        input = node.args[0]
        alone = isinstance(input, fx.Node) and all(user is node or _questions(user) for user in input.users)
        runs[node] = [*(runs.pop(input, []) if alone else []), node]
    return ended + list(runs.values())


def _questions(user: fx.Node) -> list[fx.Node]:
    """Of a node that asks for what all results in a run share, it and those that check the answer, if that is all: this
    may be asked after the run. Nothing of other nodes.
    """
    if not asks_for_kind(user):
        return []
    found = [user]
    for node in found:
        if node.target in (blocks.assume, blocks.expect):
            continue
        if not all(next.target in _ANSWERED for next in node.users):
            return []
        others = [other for next in node.users for other in next.all_input_nodes if other is not node]
        if not all(other.target is getattr and other.args[0].op == "get_attr" for other in others):  # type: ignore[union-attr]
            return []
        found += node.users
    return found


_ANSWERED = (getattr, operator.eq, operator.ne, blocks.assume, blocks.expect)


def _join(run: list[fx.Node], graph: fx.Graph) -> None:
    tensors: list[Any] = []
    options = []
    for node in run:
        tensors += [*node.args[1:], *[None] * (1 + BLOCK_TENSORS - len(node.args))]
        given = {"output_padding": (0, 0), "training": False, "eps": 1e-5, "activation": "none", **node.kwargs}
        given["parameter"] = given.get("alpha" if given["activation"] == "elu" else "negative_slope", 0.0)
        block = tuple(given[name] for name in Options._fields)
        options.append((node.target is blocks.conv_transpose2d_bn_act, block))
    with graph.inserting_before(run[-1]):
        arguments = run[0].args[0], tuple(tensors), tuple(options)
        joined = graph.call_function(conv_bn_act_sequence, arguments)
    run[-1].replace_all_uses_with(joined)
    for node in run[:-1]:
        for user in list(node.users):
            for question in reversed(_questions(user)):
                joined.append(question)
                question.replace_input_with(node, joined)
    for node in reversed(run):
        graph.erase_node(node)


def _write_silu(trace: Trace) -> None:
    """x * sigmoid(x) as the function that it is."""
    for node in list(trace.graph.nodes):
        gate = silu_gate(node)
        if gate is None or _written_between(gate, node, trace):
            continue
        with trace.graph.inserting_before(node):
            silu = trace.graph.call_function(F.silu, gate.args)
        silu.meta.update(node.meta)
        node.replace_all_uses_with(silu)
        trace.graph.erase_node(node)
        trace.graph.erase_node(gate)


def _written_between(first: fx.Node, last: fx.Node, trace: Trace) -> bool:
    """Whether anything is written to by a node after the first and before the last."""
    node = first.next
    while node is not last:
        if any(True for _ in written(node, trace)):
            return True
        node = node.next
    return False


class Chain:
    """The nodes from a convolution to its activation, each the only user of the one before, or the first, in place."""

    def __init__(self, trace: Trace, node: fx.Node, prefix: str, report: Report) -> None:
        self.trace, self.prefix, self.report = trace, prefix, report
        self.nodes = [node]
        self.bypassed: set[str] = set()
        self.leaves_norm = False

    def fuse(self, kind: str) -> None:
        first = self.nodes[0]
        if kind == "norm":
            link, input = input_norm(first, self.trace)
            links = [link, *self.followers(activation)]
            grouped = "num_groups" in link.options
            function: Any = blocks.group_norm_act if grouped else blocks.instance_norm_act
            self._replace(function, input, links)
            return
        link, input, output_size = convolution(first, self.trace)
        if kind == "conv_transpose2d" and _is_depthwise(link):
            raise Skip("of each channel by itself, where PyTorch is faster")
        links = [link, *self.followers(norm, activation)]
        if len(links) == 1 and kind == "conv2d" and self.leaves_norm:
            raise Skip("the norm after it is left alone, and takes it as it is")
        if kind == "conv_transpose2d":
            options = {} if output_size is None else {"output_size": output_size}
            self._replace(blocks.conv_transpose2d_bn_act, input, links, **options)
        elif (found := self._upsampled(input, link)) is not None:
            self._fuse_upsampling(input, links, *found)
        else:
            if (padding := even_padding(link)) is not None:
                link.options["padding"] = padding
            self._replace(ops.conv2d_bn_act, input, links, how="in one pass, or PyTorch's where that is faster")

    def _replace(
        self, function: Any, input: Any, links: list[Link], how: str = "in one pass", scale: Any = None, **options: Any
    ) -> fx.Node:
        """Puts a call in the place of the nodes; with a `scale`, of weights for as many times more pixels."""
        check_alike([tensor for link in links for tensor in link.tensors])
        first, graph = self.nodes[0], self.trace.graph
        options = {name: value for link in links for name, value in link.options.items()} | options
        with graph.inserting_before(first):
            tensors = [self.fetch(tensor) for link in links for tensor in link.tensors]
            if scale is not None:
                tensors[0] = graph.call_function(blocks.upsampling_weight, (tensors[0], scale))
            fused = graph.call_function(function, (input, *tensors), options)
        what = " + ".join(link.what for link in links)
        self.report.fused.append(Entry(name_of(first, self.trace, self.prefix)[0], what, how))
        for node in self.nodes:
            node.replace_all_uses_with(fused, lambda user: user not in self.nodes)
        for node in reversed(self.nodes):
            self.erase(node)
        return fused

    def erase(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self.bypassed.add(str(node.target))
        self.trace.graph.erase_node(node)

    # Upsampling

    def _upsampled(self, input: Any, conv: Link) -> tuple[fx.Node, tuple[int, int], tuple[int, int]] | None:
        """What a convolution may read instead of the result of an upsampling, the scale of that, and the padding."""
        found, padding, options = upsampling(input, self.trace), even_padding(conv), conv.options
        if found is None or padding is None or _written_between(input, self.nodes[0], self.trace):
            return None
        if any(value.device.type != "cpu" for tensor in conv.tensors[:1] if tensor for value in tensor.values):
            return None  # cuDNN's convolutions may be faster than ours by more than what they multiply in vain
        plain = (options["groups"], options["stride"], options["dilation"]) == (1, (1, 1), (1, 1))
        fits = all(p < k for p, k in zip(padding, conv.kernel, strict=True))
        return (*found, padding) if plain and fits else None

    def _fuse_upsampling(
        self, up: fx.Node, links: list[Link], input: fx.Node, scale: tuple[int, int], padding: tuple[int, int]
    ) -> None:
        kernel, graph = links[0].kernel, self.trace.graph
        if kernel == (1, 1):  # each pixel alone: repeated afterwards
            fused = self._replace(ops.conv2d_bn_act, input, links, how="before the upsampling")
            with graph.inserting_after(fused):
                repeated = graph.call_function(F.interpolate, (fused,), {"scale_factor": scale})
            fused.replace_all_uses_with(repeated, lambda user: user is not repeated)
        else:
            given: dict[str, Any] = {"stride": scale, "output_padding": (0, 0)}
            given["padding"] = tuple(k - 1 - p for k, p in zip(kernel, padding, strict=True))
            how = "in one pass, as a transposed convolution of what was upsampled"
            self._replace(blocks.conv_transpose2d_bn_act, input, links, how, scale, **given)
        for user in list(up.users):
            if asks_for_kind(user):  # the same of what was upsampled
                user.replace_input_with(up, input)
        if not up.users:
            self.erase(up)

    def followers(self, *matches: Callable[[fx.Node, Trace], Link | None]) -> list[Link]:
        """The norm and the activation, as far as they may be fused."""
        links = []
        for match in matches:
            self.pass_identities()
            try:
                link = self._next(match)
            except Skip as reason:
                user = takers(self.nodes[-1])[0]
                self.report.skipped.append(Entry(*name_of(user, self.trace, self.prefix), str(reason)))
                self.leaves_norm = match is norm
                break
            links += [link] if link else []
        return links

    def _next(self, match: Callable[[fx.Node, Trace], Link | None]) -> Link | None:
        last = self.nodes[-1]
        users = takers(last)
        first = next((node for node in self.trace.graph.nodes if node in users), None)
        if first is None:
            return None
        if len(users) > 1 and last not in written(first, self.trace):  # in place, all others see what it does
            if any(_matches(match, user, self.trace) for user in users):
                raise Skip("what it takes is used elsewhere too")
            return None
        link = match(first, self.trace)
        if link is not None:
            if input_of(first) is not last:
                return None
            self.nodes.append(first)
        return link

    def pass_identities(self) -> None:
        while len(users := takers(self.nodes[-1])) == 1:
            (user,) = users
            if not is_identity(user, self.trace):
                return
            self.nodes.append(user)

    def fetch(self, tensor: TensorAt | None) -> fx.Node | None:
        if tensor is None:
            return None
        graph = self.trace.graph
        if tensor.function is not None:
            nodes = [graph.create_node("get_attr", path) for path in tensor.paths]
            return graph.call_function(tensor.function, tuple(nodes))
        node = graph.create_node("get_attr", tensor.path)
        return graph.call_function(blocks.normed_weight, (node,)) if tensor.normed else node


def _is_depthwise(link: Link) -> bool:
    """Of a convolution: whether each channel is by itself."""
    weight = link.tensors[0]
    if link.options["groups"] == 1 or weight is None:
        return False
    kernel = (1, *link.kernel)
    return any(value.dim() == 4 and tuple(value.shape[1:]) == kernel for value in weight.values)


def _matches(match: Callable[[fx.Node, Trace], Link | None], node: fx.Node, trace: Trace) -> bool:
    try:
        return match(node, trace) is not None
    except Skip:
        return True
