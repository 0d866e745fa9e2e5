"""Keeps what fused blocks leave channels-last away from code that takes contiguity for granted.

``x.view(n, -1)`` works behind a plain convolution and fails on a channels-last tensor. So a result of a fused block,
and what was computed from it elementwise, is made contiguous before it reaches anything that is not known to take any
strides; or, where a copy would part it from something that is written to in place, as soon as it is there.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastgen import ops
from fastgen.acceleration import blocks
from fastgen.acceleration.deferred import plain
from fastgen.acceleration.deferred_images import images
from fastgen.acceleration.finishing import finish
from fastgen.acceleration.links import asks_for_size, is_identity
from fastgen.acceleration.scaled_weights import own_weight
from fastgen.acceleration.sizes import is_size
from fastgen.acceleration.tracing import Trace
from fastgen.acceleration.writes import IN_PLACE, written
from fastgen.ops.conv_sequence import conv_bn_act_sequence

# Take any strides.
_ACTIVATIONS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.GELU,
    nn.SiLU,
    nn.Softplus,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Mish,
    nn.SELU,
    nn.CELU,
    nn.PReLU,
)
_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    *(
        nn.GroupNorm,
        nn.PixelShuffle,
        nn.PixelUnshuffle,
        nn.Identity,
        nn.Upsample,
        nn.UpsamplingNearest2d,
        nn.UpsamplingBilinear2d,
    ),
    *_ACTIVATIONS,
)
_BLOCKS = {
    *(blocks.conv_transpose2d_bn_act, conv_bn_act_sequence, ops.conv2d_bn_act),
    *(blocks.group_norm_act, blocks.instance_norm_act, finish),
}
_NEW = {  # return new memory
    *_BLOCKS,
    *(blocks.add_into, blocks.mul_into, blocks.activate_into),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg),
    *(operator.gt, operator.ge, operator.lt, operator.le),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.concat, torch.tanh, torch.sigmoid, torch.relu),
    *(torch.clamp, torch.exp, torch.abs, torch.sqrt, torch.maximum, torch.minimum, torch.where),
    *(F.conv2d, F.conv_transpose2d, F.pixel_shuffle, F.pixel_unshuffle),
    *(F.batch_norm, F.instance_norm, F.pad, F.interpolate, F.gelu, F.softplus, F.tanh, F.sigmoid),
    *(F.avg_pool2d, F.max_pool2d, torch.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
}
_WITH_INPLACE = {  # have such an argument
    *(F.relu, F.leaky_relu, F.elu, F.silu, F.hardtanh, F.relu6, F.hardswish, F.hardsigmoid, F.mish, F.selu, F.celu),
}
_FUNCTIONS = {
    *(_NEW | _WITH_INPLACE | IN_PLACE),
    operator.getitem,
    *(torch.relu_, torch.tanh_, torch.sigmoid_, F.relu_, F.leaky_relu_, F.elu_, F.hardtanh_),
}
_ELEMENTWISE = "add sub mul div pow neg tanh sigmoid relu clamp clamp_min clamp_max exp abs sqrt square".split()
_METHODS = {*_ELEMENTWISE, *(name + "_" for name in _ELEMENTWISE), "chunk", "detach", "float", "mean", "sum"}


def keep_contiguous(trace: Trace) -> None:
    """Inserts ``contiguous()`` into the graph where it is needed."""
    early: set[fx.Node] = set()  # made contiguous as soon as they are there
    while True:
        loose, copies = _follow(trace, early)
        more = _written_behind(trace, loose, copies)
        if not more:
            break
        early |= more
    for node, source in copies:
        if node.op == "call_method" and node.target == "contiguous":
            continue  # is the copy itself
        with trace.graph.inserting_before(node):
            node.replace_input_with(source, trace.graph.call_method("contiguous", (source,)))
    for node in early:
        with trace.graph.inserting_after(node):
            copy = trace.graph.call_method("contiguous", (node,))
        node.replace_all_uses_with(copy, lambda user, copy=copy: user is not copy)  # type: ignore[misc]
    _ask_sequences(trace.graph)


def _ask_sequences(graph: fx.Graph) -> None:
    """Sequences of blocks make their result contiguous by themselves where that is all that is done with it."""
    for node in list(graph.nodes):
        if node.target is not conv_bn_act_sequence or len(node.users) != 1:
            continue
        copy = next(iter(node.users))
        if copy.op == "call_method" and copy.target == "contiguous" and copy.args == (node,) and not copy.kwargs:
            node.kwargs = {"contiguous": True}
            copy.replace_all_uses_with(node)
            graph.erase_node(copy)


_Use = tuple[fx.Node, fx.Node]  # a node and one of its inputs


def _follow(trace: Trace, early: set[fx.Node]) -> tuple[set[fx.Node], list[_Use]]:
    """The nodes that may be of any strides, and the uses that need a contiguous copy.

    Flattening is one of these: it copies by itself only where it joins channels and positions.
    """
    loose: set[fx.Node] = set()
    copies = []
    for node in trace.graph.nodes:
        found = [(node, source) for source in node.all_input_nodes if source in loose]
        if node.target in _BLOCKS or node.target is plain or (found and _takes_any(node, trace)):
            if node not in early:
                loose.add(node)
        elif not _is_free(node):
            copies += found
    return loose, copies


def _written_behind(trace: Trace, loose: set[fx.Node], copies: Iterable[_Use]) -> set[fx.Node]:
    """Where the memory comes from that would be copied and, from then on, written to: both would have to see it."""
    order = {node: i for i, node in enumerate(trace.graph.nodes)}
    shared = memory(trace)
    writes = [(order[node], shared[target]) for node in order for target in written(node, trace)]
    torn = {what for node, source in copies for at, what in writes if what is shared[source] and at >= order[node]}
    return {node for node in loose if shared[node] in torn and not _may_alias(node, trace)}


def _takes_any(node: fx.Node, trace: Trace) -> bool:
    """Dropout does not: it draws in the order of memory. Nor does what returns several tensors at once to code that is
    not known, for which all of them would have to be copied.
    """
    if is_identity(node, trace):
        return True
    if _returns_several(node, trace) and any(user.target is not operator.getitem for user in node.users):
        return False
    if node.op == "call_module":
        return isinstance(trace.modules[str(node.target)], _LAYERS)
    return node.op in ("call_function", "call_method") and node.target in (_FUNCTIONS | _METHODS)


def _returns_several(node: fx.Node, trace: Trace) -> bool:
    if node.op == "call_module":
        return bool(getattr(trace.modules[str(node.target)], "return_indices", False))
    if node.target is torch.where:
        return len(node.args) + len(node.kwargs) == 1
    return node.target == "chunk" or bool(node.kwargs.get("return_indices"))


def _is_free(node: fx.Node) -> bool:
    """Takes any strides, too, and what it returns owes them nothing."""
    return asks_for_size(node) or node.target in (images, own_weight)


# Who shares memory with whom


def memory(trace: Trace) -> dict[fx.Node, fx.Node]:
    """One node for each set of nodes that may share memory."""
    first: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while first[node] is not node:
            node = first[node]
        return node

    own: dict[str, fx.Node] = {}  # by path
    for node in trace.graph.nodes:
        first[node] = own.setdefault(str(node.target), node) if node.op == "get_attr" else node
        if _may_alias(node, trace):
            for source in node.all_input_nodes:
                if not is_size(source):
                    first[find(source)] = node
    return {node: find(node) for node in first}


def _may_alias(node: fx.Node, trace: Trace) -> bool:
    if is_size(node) or asks_for_size(node):
        return False
    if "out" in node.kwargs or any(True for _ in written(node, trace)):
        return True
    if node.op == "call_module":
        return not isinstance(trace.modules[str(node.target)], _LAYERS) or is_identity(node, trace)
    if node.op == "call_method":
        return node.target not in _ELEMENTWISE
    return node.target not in _NEW | _WITH_INPLACE
