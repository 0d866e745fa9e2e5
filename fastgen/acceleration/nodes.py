"""What nodes of a graph show of themselves: whether they are tensors, of how many dimensions, channels and images."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastgen.acceleration import blocks
from fastgen.acceleration.sizes import rank_of

_LAYERS = (
    *(nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd),
    *(nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._MaxPoolNd),
    *(nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd),
    *(nn.GroupNorm, nn.LayerNorm, nn.Linear, nn.Embedding, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle),
)
_FUNCTIONS = {
    *(F.conv2d, F.conv_transpose2d, F.linear, F.interpolate, F.pad, F.normalize, F.softmax, F.embedding),
    *(F.relu, F.leaky_relu, F.elu, F.silu, F.gelu, F.softplus, torch.relu, torch.tanh, torch.sigmoid, torch.exp),
    *(torch.cat, torch.stack, torch.flip, torch.sqrt, torch.rsqrt, torch.square, torch.pow, torch.abs, torch.clamp),
    *(torch.mean, torch.sum, torch.matmul, torch.bmm, torch.addmm),
    *(F.avg_pool2d, F.adaptive_avg_pool2d, F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm),
}
_OPERATORS = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg, operator.matmul),
    *(operator.getitem, torch.add, torch.sub, torch.mul, torch.div, blocks.iadd, blocks.isub, blocks.imul),
    blocks.itruediv,
}
_METHODS = set(
    "add sub mul div pow square sqrt rsqrt exp abs neg tanh sigmoid relu clamp sum mean view reshape flatten permute"
    " transpose t unsqueeze squeeze expand repeat contiguous clone detach float double half to type_as flip"
    " matmul narrow lerp norm add_ sub_ mul_ div_ clamp_".split()
)


def is_tensor(node: fx.Node) -> bool:
    """Whether the result of a node is known to be one, by what computes it."""
    return bool(node.meta.get("tensor"))


def returns_tensor(node: fx.Node) -> bool:
    """The same of a new node."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "call_module":
        layer = node.meta["layer"]
        elementwise = (
            type(layer).__module__ == "torch.nn.modules.activation" and type(layer) is not nn.MultiheadAttention
        )
        return elementwise or (isinstance(layer, _LAYERS) and not getattr(layer, "return_indices", False))
    if node.op == "call_method":
        return node.target in _METHODS and isinstance(node.args[0], fx.Node) and is_tensor(node.args[0])
    if node.target in _OPERATORS:
        given = node.args[:1] if node.target is operator.getitem else node.args
        return any(isinstance(argument, fx.Node) and is_tensor(argument) for argument in given)
    return node.target is blocks.tensor or node.target in _FUNCTIONS


RANK_OF_IMAGES = 4
_LAYERS_2D = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d)
_MOST_STEPS = 30


def shown_rank(node: Any, steps: int = 0) -> int | None:
    """The number of dimensions of a tensor, as far as it shows from what computes it: of several, the most."""
    if not isinstance(node, fx.Node) or not is_tensor(node) or steps > _MOST_STEPS:
        return None
    if "rank" in node.meta:
        return node.meta["rank"]
    if node.op == "call_module" or node.target in (F.conv2d, F.conv_transpose2d):
        return RANK_OF_IMAGES if node.op == "call_function" or type(node.meta["layer"]) in _LAYERS_2D else None
    if node.op == "call_method" and node.target in ("view", "reshape"):
        sizes: Any = node.args[1:]
        return len(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else len(sizes)
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        inner = max(shown_rank(node.args[0], steps + 1) or 0, len(index) - index.count(None))
        return inner + index.count(None) if all(i is None or isinstance(i, slice) for i in index) else None
    if (node.op == "call_method" and node.target in _CHANGING) or node.target in _CHANGING_FUNCTIONS:
        return None
    ranks = [shown_rank(argument, steps + 1) for argument in node.all_input_nodes]
    return max(filter(None, ranks), default=None)


_CHANGING = set("flatten unsqueeze squeeze sum mean".split())
_CHANGING_FUNCTIONS = {torch.stack, torch.mean, torch.sum, F.embedding, torch.matmul, operator.matmul}


def is_stride_one(asked: Any, compare: Any, value: Any) -> bool | None:
    """Of ``x.stride()[1] == 1`` and ``x.stride(1) == 1``."""
    if not isinstance(asked, fx.Node) or value != 1 or compare not in (operator.eq, operator.ne):
        return None
    tensor, dim = (asked.args[0], asked.args[1]) if asked.target is operator.getitem else (asked, None)
    tensor = called_on(tensor, "stride") if dim is not None else None
    if dim is None and asked.op == "call_method" and asked.target == "stride" and len(asked.args) == 2:
        tensor, dim = asked.args
    if not is_tensor_node(tensor) or type(dim) is not int or rank_of(tensor) is None:  # type: ignore[arg-type]
        return None
    is_last = dim in (-1, rank_of(tensor) - 1)  # type: ignore
    return compare(1 if is_last else 2, 1)


COMPARISONS = {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}


def size_of_one_image(node: Any) -> float | None:
    """Of ``x.shape[0]`` and ``x.size(0)``, 1; of the number of elements, which is compared with what is large, too; of
    multiples of these.
    """
    if not isinstance(node, fx.Node):
        return None
    if node.target is operator.getitem and node.args[1] == 0:
        return 1 if _has_batch_of_input(attribute_of(node.args[0], "shape")) else None
    if (node.target == "size" and node.args[1:] == (0,)) or (node.target == "numel" and len(node.args) == 1):
        return 1 if _has_batch_of_input(node.args[0]) else None
    if node.target is operator.mul and isinstance(node.args[1], int | float):
        size = size_of_one_image(node.args[0])
        return None if size is None else size * node.args[1]
    return None


def _has_batch_of_input(node: Any) -> bool:
    """Of a tensor that layers, activations and the like make of an input, which keep the number of images."""
    seen: set[fx.Node] = set()
    left = [node]
    while left:
        node = left.pop()
        if not is_tensor_node(node) or node in seen:
            continue
        if node.op == "placeholder":
            return True
        seen.add(node)
        left += _of_as_many_images(node)
    return False


def _of_as_many_images(node: fx.Node) -> tuple[Any, ...]:
    """The arguments that may have as many images as the result."""
    if node.op == "call_method":
        parts = node.target in ("unsqueeze", "narrow", "repeat")
        return node.args[:2] if node.target in _KEEP_IMAGES and (not parts or _keeps_first(node)) else ()
    if node.target in (torch.addmm, torch.matmul, operator.add, operator.mul, operator.sub, operator.truediv):
        return node.args
    if node.target is torch.cat:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return tuple(node.args[0]) if type(dim) is int and dim > 0 and isinstance(node.args[0], list | tuple) else ()
    keeps = node.op == "call_module" or node.target in _FUNCTIONS - {torch.cat, torch.stack, torch.flip}
    return (input_of(node),) if keeps else ()


def input_of(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


_KEEP_IMAGES = set(
    "to float double half contiguous clone detach square sqrt rsqrt abs neg exp add sub mul div matmul".split()
)
_KEEP_IMAGES |= set("add_ sub_ mul_ div_ clamp lerp relu tanh sigmoid unsqueeze narrow repeat".split())


def _keeps_first(node: fx.Node) -> bool:
    """Of ``x.unsqueeze(1)``, ``x.narrow(1, ...)`` and ``x.repeat(1, ...)``."""
    first: Any = node.args[1] if len(node.args) > 1 else 0
    first = first[0] if isinstance(first, list | tuple) and first else first
    return type(first) is int and (first == 1 if node.target == "repeat" else first != 0)


def called_on(node: Any, name: str) -> fx.Node | None:
    """What a node calls the method of that name of, without arguments."""
    is_call = isinstance(node, fx.Node) and node.op == "call_method" and node.target == name and len(node.args) == 1
    return node.args[0] if is_call else None


def is_tensor_node(node: Any) -> bool:
    return isinstance(node, fx.Node) and is_tensor(node)


def attribute_of(node: Any, name: str) -> fx.Node | None:
    """What a node takes the attribute of that name of."""
    if isinstance(node, fx.Node) and node.target is getattr and node.args[1] == name:
        return node.args[0]  # type: ignore[return-value]
    return None


_CHANNELS: dict[type, str] = {
    **dict.fromkeys((torch.nn.Conv2d, torch.nn.ConvTranspose2d), "out_channels"),
    **{torch.nn.BatchNorm2d: "num_features", torch.nn.GroupNorm: "num_channels"},
}


def channels(node: fx.Node, root: torch.nn.Module) -> int | None:
    """The number that ``x.shape[1]``, or ``x.size(1)`` or ``x.size()[1]``, is of the result of a layer."""
    if node.target == "size" and node.args[1:] == (1,):
        source: Any = node.args[0]
    elif node.target is operator.getitem and node.args[1] == 1:
        shape: Any = node.args[0]
        if not (shape.target == "size" and len(shape.args) == 1) and not (
            shape.target is getattr and shape.args[1] == "shape"
        ):
            return None
        source = shape.args[0]
    else:
        return None
    layer = root.get_submodule(str(source.target)) if source.op == "call_module" else None
    return getattr(layer, _CHANNELS[type(layer)]) if type(layer) in _CHANNELS else None
