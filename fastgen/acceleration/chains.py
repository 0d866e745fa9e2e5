"""Finds convolution, norm and activation in a row in a traced graph, and puts one fused call in their place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations, parametrize

from fastgen import ops
from fastgen.acceleration import blocks
from fastgen.acceleration.report import Entry, Report
from fastgen.acceleration.tracing import Trace, has_hooks
from fastgen.acceleration.writes import written
from fastgen.ops.conv_sequence import BLOCK_TENSORS, conv_transpose2d_bn_act_sequence
from fastgen.ops.conv_transpose2d_bn_act_cpu import Options


class _Skip(Exception):
    """Why something is left alone."""


class _TensorAt(NamedTuple):
    """A parameter or buffer, or, where `module` is set, the weight that a convolution under a norm computes."""

    path: str
    values: tuple[Tensor, ...]
    normed: bool = False


@dataclass
class _Link:
    """A convolution, norm or activation: its name, tensors and options as the fused call takes them."""

    path: str
    what: str
    tensors: list[_TensorAt | None] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def fuse(trace: Trace, prefix: str) -> tuple[Report, set[str]]:
    """Rewrites the graph of the trace; also returns the paths of the modules that are no longer called."""
    report, bypassed = Report(), set()
    for node in list(trace.graph.nodes):
        kind = _kind(node, trace)
        if kind is None:
            continue
        chain = _Chain(trace, node, prefix, report)
        try:
            chain.fuse(kind)
        except _Skip as reason:
            report.skipped.append(Entry(*_name(node, trace, prefix), str(reason)))
        else:
            bypassed |= chain.bypassed
    for run in _runs(trace.graph):
        _join(run, trace.graph)
    return report, bypassed


def _runs(graph: fx.Graph) -> list[list[fx.Node]]:
    """Fused transposed convolutions that each are all that takes the result of the one before, two or more."""
    runs: dict[fx.Node, list[fx.Node]] = {}  # by the last
    for node in graph.nodes:
        if node.target is not blocks.conv_transpose2d_bn_act or "output_size" in node.kwargs:
            continue
        before = runs.pop(node.args[0], []) if len(node.args[0].users) == 1 else []
        runs[node] = [*before, node]
    return [run for run in runs.values() if len(run) > 1]


def _join(run: list[fx.Node], graph: fx.Graph) -> None:
    tensors, options = [], []
    for node in run:
        tensors += [*node.args[1:], *[None] * (1 + BLOCK_TENSORS - len(node.args))]
        given = {"eps": 1e-5, "activation": "none", **node.kwargs}
        given["parameter"] = given.get("alpha" if given["activation"] == "elu" else "negative_slope", 0.0)
        options.append(tuple(False if name == "training" else given[name] for name in Options._fields))
    with graph.inserting_before(run[-1]):
        arguments = run[0].args[0], tuple(tensors), tuple(options)
        joined = graph.call_function(conv_transpose2d_bn_act_sequence, arguments)
    run[-1].replace_all_uses_with(joined)
    for node in reversed(run):
        graph.erase_node(node)


class _Chain:
    """The nodes from a convolution to its activation, each the only user of the one before, or the first, in place."""

    def __init__(self, trace: Trace, node: fx.Node, prefix: str, report: Report) -> None:
        self.trace, self.prefix, self.report = trace, prefix, report
        self.nodes = [node]
        self.bypassed: set[str] = set()
        self.leaves_norm = False

    def fuse(self, kind: str) -> None:
        first = self.nodes[0]
        conv, input, output_size = _convolution(first, self.trace)
        conv.path = first_path = _name(first, self.trace, self.prefix)[0]
        links = [conv, *self._followers()]
        if len(links) == 1 and kind == "conv2d" and self.leaves_norm:
            raise _Skip("the norm after it is left alone, and takes it as it is")
        if kind == "conv2d" and _is_a_product(conv.tensors[0]):
            raise _Skip("a kernel of one element, where PyTorch is as fast")
        _check_alike([tensor for link in links for tensor in link.tensors])
        function = blocks.conv_transpose2d_bn_act if kind == "conv_transpose2d" else ops.conv2d_bn_act
        options = {name: value for link in links for name, value in link.options.items()}
        if output_size is not None:
            options["output_size"] = output_size
        with self.trace.graph.inserting_before(first):
            tensors = [self._fetch(tensor) for link in links for tensor in link.tensors]
            fused = self.trace.graph.call_function(function, (input, *tensors), options)
        for node in self.nodes:
            node.replace_all_uses_with(fused, lambda user: user not in self.nodes)
        for node in reversed(self.nodes):
            if node.op == "call_module":
                self.bypassed.add(str(node.target))
            self.trace.graph.erase_node(node)
        how = "in one pass" if kind == "conv_transpose2d" else "in one pass, or PyTorch's where that is faster"
        self.report.fused.append(Entry(first_path, " + ".join(link.what for link in links), how))

    def _followers(self) -> list[_Link]:
        """The norm and the activation, as far as they may be fused."""
        links = []
        for match in (_norm, _activation):
            self._pass_identities()
            try:
                link = self._next(match)
            except _Skip as reason:
                user = next(iter(self.nodes[-1].users))
                self.report.skipped.append(Entry(*_name(user, self.trace, self.prefix), str(reason)))
                self.leaves_norm = match is _norm
                break
            links += [link] if link else []
        return links

    def _next(self, match: Callable[[fx.Node, Trace], _Link | None]) -> _Link | None:
        last = self.nodes[-1]
        first = next((node for node in self.trace.graph.nodes if node in last.users), None)
        if first is None:
            return None
        if len(last.users) > 1 and last not in written(first, self.trace):  # in place, all others see what it does
            if any(_matches(match, user, self.trace) for user in last.users):
                raise _Skip("what it takes is used elsewhere too")
            return None
        link = match(first, self.trace)
        if link is not None:
            if _input(first) is not last:
                return None
            self.nodes.append(first)
        return link

    def _pass_identities(self) -> None:
        while len(self.nodes[-1].users) == 1:
            user = next(iter(self.nodes[-1].users))
            if not is_identity(user, self.trace):
                return
            self.nodes.append(user)

    def _fetch(self, tensor: _TensorAt | None) -> fx.Node | None:
        if tensor is None:
            return None
        node = self.trace.graph.create_node("get_attr", tensor.path)
        return self.trace.graph.call_function(blocks.normed_weight, (node,)) if tensor.normed else node


def _matches(match: Callable[[fx.Node, Trace], _Link | None], node: fx.Node, trace: Trace) -> bool:
    try:
        return match(node, trace) is not None
    except _Skip:
        return True


# Convolutions

_LAYERS: dict[Any, str] = {nn.Conv2d: "conv2d", nn.ConvTranspose2d: "conv_transpose2d"}
_FUNCTIONS: dict[Any, str] = {F.conv2d: "conv2d", F.conv_transpose2d: "conv_transpose2d"}
_PARAMETERS = {
    "conv2d": {"stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    "conv_transpose2d": {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1},
}
_OTHER_FUNCTIONS = (F.conv1d, F.conv3d, F.conv_transpose1d, F.conv_transpose3d)


def _kind(node: fx.Node, trace: Trace) -> str | None:
    """The kind of convolution that a node is; "other" if it is of a kind that is left alone."""
    if node.op == "call_module":
        module = trace.modules[str(node.target)]
        other = "other" if isinstance(module, _ConvNd) else None
        return _LAYERS.get(parametrize.type_before_parametrizations(module), other)
    if node.op != "call_function":
        return None
    return _FUNCTIONS.get(node.target, "other" if node.target in _OTHER_FUNCTIONS else None)


def _convolution(node: fx.Node, trace: Trace) -> tuple[_Link, Any, Any]:
    """The convolution, its input and its output size."""
    kind = _kind(node, trace)
    what = _what(node, trace)
    if kind is None or kind == "other":
        raise _Skip("not a plain two-dimensional convolution")
    if node.op == "call_function":
        return *_functional(node, trace, kind, what), None
    path = str(node.target)
    module: Any = trace.modules[path]
    weight = _layer_weight(module, path)
    if module.padding_mode != "zeros":
        raise _Skip(f"padding_mode is {module.padding_mode!r}")
    options = {name: getattr(module, name) for name in _PARAMETERS[kind]}
    arguments = _bind(lambda input, output_size=None: None, node)
    link = _Link(path, what, [weight, _parameter(module, path, "bias")], options)
    return link, arguments["input"], arguments["output_size"]


def _layer_weight(module: torch.nn.Module, path: str) -> _TensorAt:
    _check_mode(module)
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        steps = [step for name in lists for step in lists[name]]
        if set(lists) != {"weight"} or not all(type(step) in _CONSTANT for step in steps):
            raise _Skip("parametrised by something other than weight_norm or spectral_norm")
        if any(step.training for step in steps):
            raise _Skip("its spectral norm is in training mode")
    hook = blocks.norm_hook(module)
    hooks = has_hooks(module) and (hook is None or module._forward_hooks or module._backward_hooks)
    if hooks or "forward" in module.__dict__:
        raise _Skip("has hooks")
    if hook is not None or parametrize.is_parametrized(module):
        return _TensorAt(path, tuple(blocks.norm_sources(module)), normed=True)
    weight = _parameter(module, path, "weight")
    if weight is None:
        raise _Skip("its weight is no parameter")
    return weight


_CONSTANT = (parametrizations._WeightNorm, parametrizations._SpectralNorm)


def _functional(node: fx.Node, trace: Trace, kind: str, what: str) -> tuple[_Link, Any]:
    names = ["input", "weight", "bias", *_PARAMETERS[kind]]
    arguments = {"bias": None, **_PARAMETERS[kind], **dict(zip(names, node.args, strict=False)), **node.kwargs}
    options = {name: _pair(arguments[name]) if name != "groups" else arguments[name] for name in _PARAMETERS[kind]}
    if any(isinstance(value, fx.Node) for value in options.values()):
        raise _Skip("its options are computed")
    weight, bias = _own_tensor(arguments["weight"], trace), _own_tensor(arguments["bias"], trace)
    if weight is None:
        raise _Skip("it has no weight")
    owner, _, _ = weight.path.rpartition(".")
    _check_mode(trace.modules[owner])
    return _Link(weight.path, what, [weight, bias], options), arguments["input"]


def _pair(value: Any) -> Any:
    if isinstance(value, int):
        return (value, value)
    value = tuple(value) if isinstance(value, list | tuple) else value
    if isinstance(value, tuple) and any(isinstance(v, fx.Node) for v in value):
        raise _Skip("its options are computed")
    return value * 2 if isinstance(value, tuple) and len(value) == 1 else value


# Norms


def _norm(node: fx.Node, trace: Trace) -> _Link | None:
    names = ("running_mean", "running_var", "weight", "bias")
    if node.op == "call_function" and node.target in (F.batch_norm, F.instance_norm):
        arguments = _bind(node.target, node)
        if arguments.get("training", arguments.get("use_input_stats")) is not False:
            raise _Skip("it normalises by its batch")
        tensors = [_own_tensor(arguments[name], trace) for name in names]
        eps = arguments["eps"]
    elif node.op == "call_module" and isinstance(trace.modules[str(node.target)], nn.modules.batchnorm._NormBase):
        path = str(node.target)
        module: Any = trace.modules[path]
        if type(module) not in (nn.BatchNorm2d, nn.InstanceNorm2d):
            raise _Skip("not a plain two-dimensional norm")
        _check_mode(module)
        if has_hooks(module) or "forward" in module.__dict__:
            raise _Skip("has hooks")
        if type(module) is nn.InstanceNorm2d and not module.track_running_stats:
            raise _Skip("it normalises by its input")
        tensors, eps = [_parameter(module, path, name) for name in names], module.eps
    else:
        return None
    if tensors[0] is None or tensors[1] is None:
        raise _Skip("it has no running statistics and normalises by its batch")
    return _Link("", _what(node, trace), tensors, {"eps": eps})


# Activations

_ACTIVATIONS: dict[Any, tuple[str, str | None, float]] = {
    **dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), ("relu", None, 0.0)),
    **dict.fromkeys((nn.Tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), ("tanh", None, 0.0)),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), ("sigmoid", None, 0.0)),
    **dict.fromkeys((nn.LeakyReLU, F.leaky_relu, F.leaky_relu_), ("leaky_relu", "negative_slope", 0.01)),
    **dict.fromkeys((nn.ELU, F.elu, F.elu_), ("elu", "alpha", 1.0)),
}


def _activation(node: fx.Node, trace: Trace) -> _Link | None:
    module = trace.modules[str(node.target)] if node.op == "call_module" else None
    key: Any = node.target if module is None else type(module)
    if node.op not in ("call_module", "call_function", "call_method") or key not in _ACTIVATIONS:
        if module is not None and type(module).__module__ == "torch.nn.modules.activation":
            raise _Skip("no fused form of this activation")
        return None
    name, option, default = _ACTIVATIONS[key]
    options: dict[str, Any] = {"activation": name}
    if module is not None:
        if has_hooks(module) or "forward" in module.__dict__:
            raise _Skip("has hooks")
        _check_mode(module)
    if option is not None:
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get(option, default)
        options[option] = given if module is None else getattr(module, option)
        if not isinstance(options[option], int | float):
            raise _Skip(f"its {option} is computed")
    return _Link("", _what(node, trace), [], options)


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def is_identity(node: fx.Node, trace: Trace) -> bool:
    """Dropout and the like in eval."""
    if node.op == "call_module":
        module = trace.modules[str(node.target)]
        passes = type(module) is nn.Identity or (type(module) in _DROPOUTS and not module.training)
        return passes and not has_hooks(module) and "forward" not in module.__dict__
    if node.op == "call_function" and node.target in (F.dropout, F.dropout2d):
        arguments = _bind(node.target, node)
        return arguments["training"] is False and isinstance(arguments["p"], int | float)
    return False


# What they share


def _check_mode(module: torch.nn.Module) -> None:
    if module.training:
        norm = isinstance(module, nn.modules.batchnorm._NormBase)
        raise _Skip("in training mode" + (": it normalises by its batch" if norm else ""))


def _check_alike(tensors: list[_TensorAt | None]) -> None:
    values = [value for tensor in tensors if tensor is not None for value in tensor.values]
    if any(torch.nn.parameter.is_lazy(value) for value in values):
        raise _Skip("not initialised yet")
    kinds = {(value.dtype, value.device) for value in values}
    if len(kinds) > 1 or not values[0].is_floating_point():
        raise _Skip(
            "its tensors are not of one floating dtype and device: " + ", ".join(map(str, sorted(kinds, key=str)))
        )


def _parameter(module: torch.nn.Module, path: str, name: str) -> _TensorAt | None:
    value = getattr(module, name)
    return None if value is None else _TensorAt(f"{path}.{name}".lstrip("."), (value,))


def _own_tensor(node: Any, trace: Trace) -> _TensorAt | None:
    if node is None:
        return None
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        raise _Skip("its weights are computed in forward")
    owner, _, name = str(node.target).rpartition(".")
    return _TensorAt(str(node.target), (getattr(trace.modules[owner], name),))


def _bind(function: Any, node: fx.Node) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _is_a_product(weight: _TensorAt | None) -> bool:
    return weight is not None and not weight.normed and tuple(weight.values[0].shape[2:]) == (1, 1)


def _input(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _what(node: fx.Node, trace: Trace) -> str:
    if node.op == "call_module":
        return parametrize.type_before_parametrizations(trace.modules[str(node.target)]).__name__
    return node.target if isinstance(node.target, str) else node.target.__name__


def _name(node: fx.Node, trace: Trace, prefix: str) -> tuple[str, str]:
    """Where and what, for the report; a function is where its weight is, else where it is called."""
    path = str(node.target) if node.op == "call_module" else node.meta["caller"]
    for argument in node.args[1:2]:
        if node.op == "call_function" and isinstance(argument, fx.Node) and argument.op == "get_attr":
            path = str(argument.target)
    return ".".join(filter(None, (prefix, path))).removesuffix(".weight"), _what(node, trace)
