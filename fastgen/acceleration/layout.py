"""Keeps what fused blocks leave channels-last away from code that takes contiguity for granted.

``x.view(n, -1)`` works behind a plain convolution and fails on a channels-last tensor. So a result of a fused block,
and what was computed from it elementwise, is made contiguous before it reaches anything that is not known to take any
strides.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastgen import ops
from fastgen.acceleration import blocks
from fastgen.acceleration.chains import is_identity
from fastgen.acceleration.tracing import Trace

_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.Hardtanh, nn.PReLU),
    *(nn.GroupNorm, nn.PixelShuffle, nn.Identity, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
)
_FUNCTIONS = {
    *(ops.conv2d_bn_act, blocks.conv_transpose2d_bn_act, blocks.iadd, blocks.isub, blocks.imul, blocks.itruediv),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.getitem),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.concat, torch.tanh, torch.sigmoid, torch.relu),
    *(F.conv2d, F.conv_transpose2d, F.batch_norm, F.instance_norm, F.relu, F.leaky_relu, F.elu, F.pad, F.interpolate),
    *(F.avg_pool2d, F.gelu, F.silu, F.softplus, F.hardtanh),
}
_METHODS = {"add", "sub", "mul", "div", "add_", "mul_", "tanh", "sigmoid", "relu", "clamp", "chunk", "detach", "float"}
_REORDERING = {torch.flatten, torch.reshape, "flatten", "reshape", "mean", "sum", "contiguous", "size", "dim"}


def keep_contiguous(trace: Trace) -> None:
    """Inserts ``contiguous()`` into the graph where it is needed."""
    loose: set[fx.Node] = set()  # of any strides
    for node in list(trace.graph.nodes):
        found = [argument for argument in node.all_input_nodes if argument in loose]
        if node.target in (blocks.conv_transpose2d_bn_act, ops.conv2d_bn_act) or (found and _takes_any(node, trace)):
            loose.add(node)
        elif found and not _reorders(node, trace):
            for argument in found:
                with trace.graph.inserting_before(node):
                    node.replace_input_with(argument, trace.graph.call_method("contiguous", (argument,)))


def _takes_any(node: fx.Node, trace: Trace) -> bool:
    """Dropout does not: it draws in the order of memory."""
    if is_identity(node, trace):
        return True
    if node.op == "call_module":
        return isinstance(trace.modules[str(node.target)], _LAYERS)
    return node.op in ("call_function", "call_method") and node.target in (_FUNCTIONS | _METHODS)


def _reorders(node: fx.Node, trace: Trace) -> bool:
    """Whether it takes any strides, and its result owes them nothing."""
    target: Any = node.target
    if node.op == "call_module":
        return isinstance(trace.modules[target], nn.Flatten | nn.modules.pooling._AdaptiveAvgPoolNd)
    if target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return node.op in ("call_function", "call_method") and target in _REORDERING
