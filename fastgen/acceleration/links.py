"""What nodes of a traced graph are to the operations they may become part of: convolutions, norms, activations."""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations, parametrize

from fastgen._hooks import has_hooks
from fastgen.acceleration import blocks
from fastgen.acceleration.constants import Constant, constant_of
from fastgen.acceleration.nodes import input_of
from fastgen.acceleration.tracing import Trace
from fastgen.acceleration.writes import changed


class Skip(Exception):
    """Why something is left alone."""


class TensorAt(NamedTuple):
    """A parameter or buffer, or, where `normed` is set, the weight that a convolution under a norm computes; or what a
    function makes of those at several `paths`.
    """

    path: str
    values: tuple[Tensor, ...]
    normed: bool = False
    function: Constant | None = None
    paths: tuple[str, ...] = ()


@dataclass
class Link:
    """A convolution, norm or activation: its tensors and options as the fused call takes them."""

    what: str
    tensors: list[TensorAt | None] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    kernel: tuple[int, ...] = ()  # sizes, of a convolution


# Convolutions

_LAYERS: dict[Any, str] = {nn.Conv2d: "conv2d", nn.ConvTranspose2d: "conv_transpose2d"}
_FUNCTIONS: dict[Any, str] = {F.conv2d: "conv2d", F.conv_transpose2d: "conv_transpose2d"}
_PARAMETERS = {
    "conv2d": {"stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    "conv_transpose2d": {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1},
}
_OTHER_FUNCTIONS = (F.conv1d, F.conv3d, F.conv_transpose1d, F.conv_transpose3d)


def kind_of(node: fx.Node, trace: Trace) -> str | None:
    """The kind of convolution that a node is, "norm" of one that begins with a norm by its own input, "other" of a
    convolution that is left alone.
    """
    if node.op == "call_module":
        module = trace.modules[str(node.target)]
        if type(module) is nn.GroupNorm or (type(module) is nn.InstanceNorm2d and not module.track_running_stats):
            return "norm"
        other = "other" if isinstance(module, _ConvNd) else None
        return _LAYERS.get(parametrize.type_before_parametrizations(module), other)
    if node.op != "call_function":
        return None
    if node.target in (F.group_norm, F.instance_norm):
        return None if _uses_statistics(node) else "norm"
    return _FUNCTIONS.get(node.target, "other" if node.target in _OTHER_FUNCTIONS else None)


def convolution(node: fx.Node, trace: Trace) -> tuple[Link, Any, Any]:
    """The convolution, its input and its output size."""
    kind = kind_of(node, trace)
    what = what_is(node, trace)
    if kind is None or kind == "other":
        raise Skip("not a plain two-dimensional convolution")
    if node.op == "call_function":
        return *_functional(node, trace, kind, what), None
    path = str(node.target)
    module: Any = trace.modules[path]
    weight = _layer_weight(module, path)
    if module.padding_mode != "zeros":
        raise Skip(f"padding_mode is {module.padding_mode!r}")
    options = {name: getattr(module, name) for name in _PARAMETERS[kind]}
    arguments = _bind(lambda input, output_size=None: None, node)
    link = Link(what, [weight, _parameter(module, path, "bias")], options, module.kernel_size)
    return link, arguments["input"], arguments["output_size"]


def linear(node: fx.Node, trace: Trace) -> tuple[Link, Any]:
    """A linear layer and its input."""
    if node.op == "call_module":
        path = str(node.target)
        module = trace.modules[path]
        tensors = [_layer_weight(module, path), _parameter(module, path, "bias")]
        return Link(what_is(node, trace), tensors), _bind(lambda input: None, node)["input"]
    arguments = _bind(lambda input, weight, bias=None: None, node)
    tensors = [own_tensor(arguments["weight"], trace), own_tensor(arguments["bias"], trace)]
    if tensors[0] is None or tensors[0].values[0].dim() != 2:
        raise Skip("not a plain linear layer")
    _check_mode(trace.modules[tensors[0].path.rpartition(".")[0]])
    return Link(what_is(node, trace), tensors), arguments["input"]


def _layer_weight(module: torch.nn.Module, path: str) -> TensorAt:
    _check_mode(module)
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        steps = [step for name in lists for step in lists[name]]
        if set(lists) != {"weight"} or not all(type(step) in _CONSTANT for step in steps):
            raise Skip("parametrised by something other than weight_norm or spectral_norm")
        if any(step.training for step in steps):
            raise Skip("its spectral norm is in training mode")
    hook = blocks.norm_hook(module)
    hooks = has_hooks(module) and (hook is None or module._forward_hooks or module._backward_hooks)
    if hooks or "forward" in module.__dict__:
        raise Skip("has hooks")
    if hook is not None or parametrize.is_parametrized(module):
        return TensorAt(path, tuple(blocks.norm_sources(module)), normed=True)
    weight = _parameter(module, path, "weight")
    if weight is None:
        raise Skip("its weight is no parameter")
    return weight


_CONSTANT = (parametrizations._WeightNorm, parametrizations._SpectralNorm)


def _functional(node: fx.Node, trace: Trace, kind: str, what: str) -> tuple[Link, Any]:
    names = ["input", "weight", "bias", *_PARAMETERS[kind]]
    arguments = {"bias": None, **_PARAMETERS[kind], **dict(zip(names, node.args, strict=False)), **node.kwargs}
    options = {name: _pair(arguments[name]) if name != "groups" else arguments[name] for name in _PARAMETERS[kind]}
    if any(isinstance(value, fx.Node) for value in options.values()):
        raise Skip("its options are computed")
    weight, bias = own_tensor(arguments["weight"], trace), own_tensor(arguments["bias"], trace)
    if weight is None:
        raise Skip("it has no weight")
    owner, _, _ = weight.path.rpartition(".")
    _check_mode(trace.modules[owner])
    return Link(what, [weight, bias], options, tuple(weight.values[0].shape[2:])), arguments["input"]


def _pair(value: Any) -> Any:
    if isinstance(value, int):
        return (value, value)
    value = tuple(value) if isinstance(value, list | tuple) else value
    if isinstance(value, tuple) and any(isinstance(v, fx.Node) for v in value):
        raise Skip("its options are computed")
    return value * 2 if isinstance(value, tuple) and len(value) == 1 else value


# Norms


def _uses_statistics(node: fx.Node) -> bool:
    """Of an instance norm as a function: running ones."""
    arguments = _bind(node.target, node)
    return any(arguments.get(name) is not None for name in ("running_mean", "running_var"))


def input_norm(node: fx.Node, trace: Trace) -> tuple[Link, Any]:
    """A norm by the groups or channels of each image, and its input."""
    options: dict[str, Any] = {}
    if node.op == "call_module":
        path = str(node.target)
        module: Any = trace.modules[path]
        _check_mode(module)
        if has_hooks(module) or "forward" in module.__dict__:
            raise Skip("has hooks")
        tensors, eps = [_parameter(module, path, name) for name in ("weight", "bias")], module.eps
        input = _bind(lambda input: None, node)["input"]
        if type(module) is nn.GroupNorm:
            options["num_groups"] = module.num_groups
    else:
        arguments = _bind(node.target, node)
        if arguments.get("use_input_stats", True) is not True:
            raise Skip("its options are computed")
        tensors, eps = [own_tensor(arguments[name], trace) for name in ("weight", "bias")], arguments["eps"]
        input = arguments["input"]
        if node.target is F.group_norm:
            options["num_groups"] = arguments["num_groups"]
    if not isinstance(options.get("num_groups", 1), int) or not isinstance(eps, int | float):
        raise Skip("its options are computed")
    return Link(what_is(node, trace), tensors, {**options, "eps": eps}), input


def norm(node: fx.Node, trace: Trace) -> Link | None:
    """One on running statistics, of images."""
    return _norm(node, trace, (nn.BatchNorm2d, nn.InstanceNorm2d), (F.batch_norm, F.instance_norm))


def norm_of_rows(node: fx.Node, trace: Trace) -> Link | None:
    """The same of vectors."""
    return _norm(node, trace, (nn.BatchNorm1d,), (F.batch_norm,))


def _norm(node: fx.Node, trace: Trace, layers: tuple[Any, ...], functions: tuple[Any, ...]) -> Link | None:
    names = ("running_mean", "running_var", "weight", "bias")
    if kind_of(node, trace) == "norm":
        return None
    if node.op == "call_function" and node.target in functions:
        arguments = _bind(node.target, node)
        if arguments.get("training", arguments.get("use_input_stats")) is not False:
            raise Skip("it normalises by its batch")
        tensors = [own_tensor(arguments[name], trace) for name in names]
        eps = arguments["eps"]
    elif node.op == "call_module" and isinstance(trace.modules[str(node.target)], nn.modules.batchnorm._NormBase):
        path = str(node.target)
        module: Any = trace.modules[path]
        if type(module) not in layers:
            raise Skip(f"not a plain {layers[0].__name__}")
        _check_mode(module)
        if has_hooks(module) or "forward" in module.__dict__:
            raise Skip("has hooks")
        tensors, eps = [_parameter(module, path, name) for name in names], module.eps
    else:
        return None
    if tensors[0] is None or tensors[1] is None:
        raise Skip("it has no running statistics and normalises by its batch")
    return Link(what_is(node, trace), tensors, {"eps": eps})


# Activations

_ACTIVATIONS: dict[Any, tuple[str, str | None, float]] = {
    **dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), ("relu", None, 0.0)),
    **dict.fromkeys((nn.Tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), ("tanh", None, 0.0)),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), ("sigmoid", None, 0.0)),
    **dict.fromkeys((nn.SiLU, F.silu), ("silu", None, 0.0)),
    **dict.fromkeys((nn.GELU, F.gelu), ("gelu", None, 0.0)),
    **dict.fromkeys((nn.LeakyReLU, F.leaky_relu, F.leaky_relu_), ("leaky_relu", "negative_slope", 0.01)),
    **dict.fromkeys((nn.ELU, F.elu, F.elu_), ("elu", "alpha", 1.0)),
}


def activation(node: fx.Node, trace: Trace) -> Link | None:
    module = trace.modules[str(node.target)] if node.op == "call_module" else None
    key: Any = node.target if module is None else type(module)
    if node.op not in ("call_module", "call_function", "call_method") or key not in _ACTIVATIONS:
        if module is not None and type(module).__module__ == "torch.nn.modules.activation":
            raise Skip("no fused form of this activation")
        return None
    name, option, default = _ACTIVATIONS[key]
    options: dict[str, Any] = {"activation": name}
    if module is not None:
        if has_hooks(module) or "forward" in module.__dict__:
            raise Skip("has hooks")
        _check_mode(module)
    if name == "gelu" and _approximation(node, module) != "none":
        raise Skip("no fused form of this activation")
    if option is not None:
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get(option, default)
        options[option] = given if module is None else getattr(module, option)
        if not isinstance(options[option], int | float):
            raise Skip(f"its {option} is computed")
    return Link(what_is(node, trace), [], options)


def _approximation(node: fx.Node, module: Any) -> Any:
    return node.kwargs.get("approximate", "none") if module is None else module.approximate


def silu_gate(node: fx.Node) -> fx.Node | None:
    """Of x * sigmoid(x) the second factor, if nobody else takes it."""
    if node.target in (operator.mul, torch.mul, "mul") and len(node.args) == 2 and not node.kwargs:
        for x, gate in (node.args, node.args[::-1]):
            if isinstance(gate, fx.Node) and gate.target in _GATES and gate.args == (x,) and len(gate.users) == 1:
                return gate
    return None


_GATES = (torch.sigmoid, F.sigmoid, "sigmoid")


# Upsampling

_MOST_SCALE = 4  # up to which PyTorch's positions, which it computes in float32, are those of whole numbers


def upsampling(node: Any, trace: Trace) -> tuple[fx.Node, tuple[int, int]] | None:
    """The input of a node that repeats each pixel, and how many times it does along either axis."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        module: Any = trace.modules[str(node.target)]
        if type(module) not in (nn.Upsample, nn.UpsamplingNearest2d) or module.size is not None:
            return None
        if has_hooks(module) or "forward" in module.__dict__:
            return None
        mode, scale, input = module.mode, module.scale_factor, input_of(node)
    elif node.op == "call_function" and node.target is F.interpolate:
        arguments = _bind(node.target, node)
        if arguments["size"] is not None or arguments["antialias"] is not False:
            return None
        mode, scale, input = arguments["mode"], arguments["scale_factor"], arguments["input"]
    else:
        return None
    scales = tuple(scale) if isinstance(scale, list | tuple) else (scale, scale)
    whole = all(isinstance(s, int | float) and s in range(1, _MOST_SCALE + 1) for s in scales)
    if mode not in ("nearest", "nearest-exact") or len(scales) != 2 or not whole or not isinstance(input, fx.Node):
        return None
    return input, (int(scales[0]), int(scales[1]))


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
        raise Skip("in training mode" + (": it normalises by its batch" if norm else ""))


def check_alike(tensors: list[TensorAt | None]) -> None:
    values = [value for tensor in tensors if tensor is not None for value in tensor.values]
    if any(torch.nn.parameter.is_lazy(value) for value in values):
        raise Skip("not initialised yet")
    kinds = {(value.dtype, value.device) for value in values}
    if len(kinds) > 1 or not all(value.is_floating_point() for value in values[:1]):
        raise Skip(
            "its tensors are not of one floating dtype and device: " + ", ".join(map(str, sorted(kinds, key=str)))
        )


def _parameter(module: torch.nn.Module, path: str, name: str) -> TensorAt | None:
    value = getattr(module, name)
    return None if value is None else TensorAt(f"{path}.{name}".lstrip("."), (value,))


def own_tensor(node: Any, trace: Trace) -> TensorAt | None:
    """A parameter or buffer, what is computed from such alone, or nothing."""
    if node is None:
        return None
    if isinstance(node, fx.Node) and node.op == "get_attr":
        return TensorAt(str(node.target), (_value_at(str(node.target), trace),))
    found = constant_of(node, lambda n: n in changed(trace)) if isinstance(node, fx.Node) else None
    if found is None:
        raise Skip("its weights are computed in forward")
    paths, function = found
    with torch.no_grad():
        value = function(*[_value_at(path, trace) for path in paths])
    if not isinstance(value, Tensor):
        raise Skip("its weights are computed in forward")
    return TensorAt(paths[0], (value,), function=function, paths=tuple(paths))


def _value_at(path: str, trace: Trace) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(trace.modules[owner], name)


def _bind(function: Any, node: fx.Node) -> dict[str, Any]:
    try:
        bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    except TypeError as error:  # as in branches that are not taken
        raise Skip(f"it is called with other arguments: {error}") from error
    bound.apply_defaults()
    return bound.arguments


def even_padding(conv: Link) -> tuple[int, int] | None:
    """Of a convolution; None if it is not the same on both sides."""
    padding = conv.options["padding"]
    if padding == "valid":
        return 0, 0
    if padding == "same":
        total = [step * (size - 1) for step, size in zip(conv.options["dilation"], conv.kernel, strict=True)]
        return None if any(size % 2 for size in total) else (total[0] // 2, total[1] // 2)
    return (padding, padding) if isinstance(padding, int) else tuple(padding)


def asks_for_size(node: fx.Node) -> bool:
    """Or for dtype or device: for nothing that activations and norms change."""
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim") or asks_for_kind(node)
    return node.target is blocks.expect_rank or (node.op == "call_method" and node.target in ("size", "dim", "numel"))


def asks_for_kind(node: fx.Node) -> bool:
    """For dtype or device."""
    return node.target is getattr and node.args[1] in ("dtype", "device", "is_cuda")


def takers(node: fx.Node) -> list[fx.Node]:
    """The users that take more of it than that."""
    return [user for user in node.users if not asks_for_size(user)]


def what_is(node: fx.Node, trace: Trace) -> str:
    if node.op == "call_module":
        return parametrize.type_before_parametrizations(trace.modules[str(node.target)]).__name__
    return node.target if isinstance(node.target, str) else node.target.__name__


def name_of(node: fx.Node, trace: Trace, prefix: str) -> tuple[str, str]:
    """Where and what, for the report; a function is where its weight is, else where it is called."""
    path = str(node.target) if node.op == "call_module" else node.meta["caller"]
    for argument in node.args[1:2]:
        if node.op == "call_function" and isinstance(argument, fx.Node) and argument.op == "get_attr":
            path = str(argument.target)
    return ".".join(filter(None, (prefix, path))).removesuffix(".weight"), what_is(node, trace)
