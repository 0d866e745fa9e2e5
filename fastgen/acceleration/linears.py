"""Linear layers in a row, with the norms on running statistics and the activations between them, become one call.

Generators and decoders of linear layers (Goodfellow et al. 2014, Kingma and Welling 2014) take most of their time, for
a few rows, on the way to each layer.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fastgen import backends
from fastgen.acceleration import blocks
from fastgen.acceleration.chains import Chain
from fastgen.acceleration.links import (
    Link,
    Skip,
    activation,
    check_alike,
    linear,
    name_of,
    norm_of_rows,
)
from fastgen.acceleration.nodes import input_of
from fastgen.acceleration.report import Entry, Report
from fastgen.acceleration.tracing import Trace
from fastgen.ops.conv_block import activate, goes_straight, wants_grad
from fastgen.ops.conv_cpu import Options
from fastgen.ops.conv_sequence import conv_bn_act_sequence
from fastgen.ops.known_convs import BLOCK_TENSORS, Blocks, call_known, of_block

_MOST_ROWS = 64  # from there on PyTorch's products are as fast
_LEAST_WEIGHTS = 1 << 19  # of all layers of a run: with fewer it is the code around the call that costs
_DTYPES = (torch.float32, torch.float64)


# Rewriting


def fuse_linears(trace: Trace, prefix: str) -> tuple[Report, set[str]]:
    """Rewrites the graph of the trace; also returns the paths of the modules that are no longer called."""
    report, bypassed = Report(), set()
    done: set[fx.Node] = set()
    for node in list(trace.graph.nodes):
        if node in done or not is_linear(node, trace):
            continue
        run = _run_from(node, trace, prefix)
        done |= {node for chain, _, _ in run for node in chain.nodes}
        if len(run) > 1 and _weights(run) >= _LEAST_WEIGHTS:
            _replace(run, trace, report, prefix)
            for chain, _, _ in run:
                bypassed |= chain.bypassed
    return report, bypassed


_Run = list[tuple[Chain, list[Link], Any]]  # of each layer its nodes, what they are, and its input


def _run_from(node: fx.Node, trace: Trace, prefix: str) -> _Run:
    """Layers that are each all that takes the result of the one before."""
    run: _Run = []
    while True:
        chain = Chain(trace, node, prefix, Report())
        try:
            link, input = linear(node, trace)
            links = [link, *chain.followers(norm_of_rows, activation)]
            check_alike([tensor for _, before, _ in run for link in before for tensor in link.tensors] + link.tensors)
        except Skip:
            return run
        chain.pass_identities()
        run.append((chain, links, input))
        last, users = chain.nodes[-1], {user for node in chain.nodes for user in node.users if user not in chain.nodes}
        next = users.pop() if len(users) == 1 else None
        if next is None or next not in last.users or not is_linear(next, trace) or input_of(next) is not last:
            return run
        node = next


def _weights(run: _Run) -> int:
    first: list[Any] = [links[0].tensors[0] for _, links, _ in run]
    return sum(max(value.numel() for value in tensor.values) for tensor in first)


def is_linear(node: fx.Node, trace: Trace) -> bool:
    if node.op == "call_module":
        return parametrize.type_before_parametrizations(trace.modules[str(node.target)]) is nn.Linear
    return node.op == "call_function" and node.target is F.linear


def _replace(run: _Run, trace: Trace, report: Report, prefix: str) -> None:
    first, graph = run[0][0].nodes[0], trace.graph
    tensors: list[fx.Node | None] = []
    layers = []
    for chain, links, _ in run:
        options = {name: value for link in links for name, value in link.options.items()}
        name = options.get("activation", "none")
        parameter = options.get("alpha" if name == "elu" else "negative_slope", 0.0)
        layers.append(_as_block(options.get("eps", 0.0), name, parameter))
        with graph.inserting_before(first):
            own = [chain.fetch(tensor) for link in links for tensor in link.tensors]
        tensors += [*own, *[None] * (BLOCK_TENSORS - len(own))]
        what = " + ".join(link.what for link in links)
        how = f"in one pass, for up to {_MOST_ROWS} rows"
        report.fused.append(Entry(name_of(chain.nodes[0], trace, prefix)[0], what, how))
    with graph.inserting_before(first):
        fused = graph.call_function(linear_sequence, (run[0][2], tuple(tensors), tuple(layers)))
    nodes = [node for chain, _, _ in run for node in chain.nodes]
    for node in run[-1][0].nodes:
        node.replace_all_uses_with(fused, lambda user: user not in nodes)
    for chain, _, _ in reversed(run):
        for node in reversed(chain.nodes):
            chain.erase(node)


def _as_block(*act: Any) -> tuple[bool, tuple[Any, ...]]:
    """The convolution by kernels of one element that a layer is to images of one pixel; eps, activation, parameter."""
    return False, tuple(Options((1, 1), (0, 0), (0, 0), 1, (1, 1), False, *act))


# What the rewritten code calls


def linear_sequence(input: Tensor, tensors: tuple[Tensor | None, ...], layers: Blocks) -> Tensor:
    """The last result of linear layers with norm and activation, each of the result of the one before.

    Args:
        input: [..., C].
        tensors: weight, bias, running_mean, running_var, and weight and bias of the norm, of one layer after the other.
        layers: as convolutions.
    """
    if _is_for_kernels(input, tensors):
        images, kernels = input.reshape(-1, input.shape[-1], 1, 1), _with_kernels(tensors)
        output = call_known(images, kernels, layers)
        if output is None and goes_straight((input, *tensors)):
            output = conv_bn_act_sequence(images, kernels, layers)
        if output is not None:
            return output.view(*input.shape[:-1], -1)
    for i, (_, block) in enumerate(layers):
        weight, bias, mean, var, scale, shift = of_block(tensors, i)
        options = Options(*block)
        input = F.linear(input, weight, bias)
        if mean is not None:
            input = F.batch_norm(input, mean, var, scale, shift, training=False, eps=options.eps)
        into = blocks.activate_into if options.activation in blocks.IN_PLACE else activate
        input = into(input, options.activation, options.parameter)
    return input


def _is_for_kernels(input: Tensor, tensors: tuple[Tensor | None, ...]) -> bool:
    if torch.compiler.is_compiling():
        return False
    if not isinstance(input, Tensor) or input.dtype not in _DTYPES:
        return False
    weight: Any = tensors[0]
    if input.dim() != 2 and (input.dim() == 0 or any(mean is not None for mean in tensors[2::BLOCK_TENSORS])):
        return False  # the channels of a norm are the second dimension
    if weight.is_inference():
        return False  # which has no version counter
    if input.shape[-1] != weight.shape[1] or not 0 < input.numel() <= _MOST_ROWS * weight.shape[1]:
        return False
    return input.dtype is weight.dtype and not wants_grad((input, *tensors))


# By the identity of the first weight, as long as it lives: what the tensors were, and the same with kernels.
_kernels: dict[int, tuple[Any, tuple[Tensor | None, ...]]] = {}


def _with_kernels(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The weights [O, I] as [O, I, 1, 1], the same tensors as long as nothing has changed."""
    first: Any = tensors[0]
    known = _kernels.get(id(first))
    if known is None or not known[0].still(tensors):
        if known is None:
            weakref.finalize(first, _kernels.pop, id(first), None).atexit = False
        made = tuple(
            tensor.detach()[:, :, None, None] if i % BLOCK_TENSORS == 0 else tensor  # type: ignore[union-attr]
            for i, tensor in enumerate(tensors)
        )
        known = _kernels[id(first)] = (backends.native_cpu().SeenTensors(tensors), made)
    return known[1]
