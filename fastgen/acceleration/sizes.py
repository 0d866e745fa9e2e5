"""Sizes of tensors in a graph: which nodes are integers, and what is known of them without a call."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch.nn.functional as F
from torch import fx

_ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg}
_KEEP = set("to float double half contiguous clone detach flip square sqrt rsqrt abs neg exp add_ mul_ clamp".split())
_BROADCAST = {operator.add, operator.sub, operator.mul, operator.truediv}
_MOST_STEPS = 30
Sizes = tuple[Any, ...]  # numbers, nodes that are these, or None


def is_size(node: Any) -> bool:
    """A size of a tensor, its number of dimensions or elements, or what integer arithmetic makes of these."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method":
        counts = node.target in ("dim", "numel") or (node.target == "size" and len(node.args) == 2)
        return counts and bool(node.args[0].meta.get("tensor"))  # type: ignore[union-attr]
    if node.target is getattr:
        return node.args[1] == "ndim" and bool(node.args[0].meta.get("tensor"))  # type: ignore[union-attr]
    if node.target is operator.getitem:
        return _dim_of(node) is not None
    terms = node.args if node.op == "call_function" and node.target in _ARITHMETIC else ()
    return bool(terms) and all(type(term) is int or is_size(term) for term in terms)


def _dim_of(node: Any) -> tuple[fx.Node, int] | None:
    """The tensor, and the dimension, that a node is the size of: of ``x.shape[2]`` and ``x.shape[1:][1]``."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or type(node.args[1]) is not int:
        return None
    shape: Any = node.args[0]
    dim: int = node.args[1]
    if isinstance(shape, fx.Node) and shape.target is operator.getitem and isinstance(shape.args[1], slice):
        part: Any
        shape, part = shape.args
        if part.step not in (None, 1) or part.stop is not None or type(part.start) is not int:
            return None
        if min(part.start, dim) < 0:
            return None
        dim += part.start
    tensor = tensor_of_shape(shape)
    return None if tensor is None else (tensor, dim)


def tensor_of_shape(node: Any) -> fx.Node | None:
    """What a node is the whole shape of."""
    if not isinstance(node, fx.Node):
        return None
    by_method = node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs
    if not by_method and not (node.target is getattr and node.args[1] == "shape"):
        return None
    tensor: Any = node.args[0]
    return tensor if tensor.meta.get("tensor") else None


def learn(question: fx.Node, truth: bool) -> None:
    """From a check that holds, or is an error of the original: of the size or number of dimensions that it compares."""
    if question.target is not (operator.eq if truth else operator.ne) or len(question.args) != 2:
        return
    size, value = question.args
    if not isinstance(size, fx.Node) or (type(value) is not int and not is_size(value)):
        return
    if size.target is getattr and is_size(size) and type(value) is int:
        size.args[0].meta.setdefault("rank", value)  # type: ignore[union-attr]
    elif (found := _dim_of(size)) is not None:
        tensor, dim = found
        tensor.meta.setdefault("sizes", {}).setdefault(dim, value)


def known_size(size: Any) -> Any:
    """What a size is known to be: a number, or an earlier node that is the same number; or itself."""
    found = _dim_of(size)
    return size if found is None else size_at(*found, size)


def size_at(tensor: fx.Node, dim: int, default: Any = None) -> Any:
    sizes = _sizes(tensor)
    learned = tensor.meta.get("sizes", {})
    found = learned.get(dim)
    if found is None and sizes is not None and -len(sizes) <= dim < len(sizes):
        found = learned.get(dim % len(sizes), learned.get(dim % len(sizes) - len(sizes)))
        found = sizes[dim] if found is None else found
    return default if found is None else found


def rank_of(tensor: fx.Node) -> int | None:
    """The number of dimensions, where it is known for certain."""
    sizes = _sizes(tensor)
    return tensor.meta.get("rank") if sizes is None else len(sizes)


def drop_unused(graph: fx.Graph) -> None:
    """Sizes that nobody asked for in the end, and what they were taken from."""
    for node in reversed(graph.nodes):
        if not node.users and (is_size(node) or _is_of_shape(node)):
            graph.erase_node(node)


def _is_of_shape(node: fx.Node) -> bool:
    part = node.target is operator.getitem and isinstance(node.args[1], slice)
    return tensor_of_shape(node.args[0] if part else node) is not None


def same_size(size: Any, other: Any) -> bool:
    """Whether two sizes are equal whatever the inputs are."""
    size, other = known_size(size), known_size(other)
    if not isinstance(size, fx.Node) or not isinstance(other, fx.Node):
        return type(size) is int and type(other) is int and size == other
    return size is other or (_dim_of(size) is not None and _dim_of(size) == _dim_of(other))


def _sizes(node: Any, steps: int = 0) -> Sizes | None:
    """Those of a tensor by what computes it, as far as they are known; the length of the result is always right."""
    if not isinstance(node, fx.Node) or steps > _MOST_STEPS or not node.meta.get("tensor"):
        return None
    if "own_shape" in node.meta:  # of a parameter or buffer, which must stay what it is
        return node.meta["own_shape"]()
    args: tuple[Any, ...] = node.args
    if node.op == "call_method" and node.target in ("view", "reshape", "repeat"):
        given = args[1:] if len(args) != 2 or not isinstance(args[1], list | tuple) else tuple(args[1])
        if node.kwargs or not all(type(size) is int or is_size(size) for size in given):
            return None
        before = _sizes(args[0], steps + 1)
        return _repeated(before, given) if node.target == "repeat" else _viewed(before, given)
    if node.target in _BROADCAST and len(args) == 2 and not node.kwargs and len(node.all_input_nodes) == 2:
        return _broadcast(*(_sizes(argument, steps + 1) for argument in args))
    inner = None
    if node.target == "clamp" and len(node.all_input_nodes) > 1:
        return None
    if node.op == "call_method" and node.target in _KEEP | {"unsqueeze", "narrow", "transpose"}:
        inner = _sizes(args[0], steps + 1)
    elif node.target in (F.leaky_relu, F.relu) or (
        node.target is operator.mul and isinstance(args[1], int | float) and isinstance(args[0], fx.Node)
    ):
        inner = _sizes(args[0], steps + 1) if args else None
    if inner is None:
        return None
    if node.target == "unsqueeze":
        fits = not node.kwargs and type(args[1]) is int and 0 <= args[1] <= len(inner)
        return (*inner[: args[1]], 1, *inner[args[1] :]) if fits else None
    if node.target == "transpose":
        fits = not node.kwargs and all(type(i) is int and 0 <= i < len(inner) for i in args[1:])
        order = list(range(len(inner)))
        if fits:
            order[args[1]], order[args[2]] = args[2], args[1]
        return tuple(inner[i] for i in order) if fits else None
    if node.target == "narrow":
        fits = not node.kwargs and all(type(i) is int for i in args[1:]) and 0 <= args[1] < len(inner)
        return (*inner[: args[1]], args[3], *inner[args[1] + 1 :]) if fits else None
    return inner


def _broadcast(first: Sizes | None, second: Sizes | None) -> Sizes | None:
    if first is None or second is None:
        return None
    rank = max(len(first), len(second))
    pairs = zip(*((*[1] * (rank - len(sizes)), *sizes) for sizes in (first, second)), strict=True)
    return tuple(_joined(*pair) for pair in pairs)


def _joined(size: Any, other: Any) -> Any:
    if type(size) is int and size == 1:
        return other
    if (type(other) is int and other == 1) or size is other:
        return size
    return next((known for known in (size, other) if type(known) is int), None)  # which the other is, too, or one


def _viewed(before: Sizes | None, given: Sizes) -> Sizes | None:
    sizes = [None if size == -1 else size for size in given]
    if sizes.count(None) == 1 and before is not None:
        known = [*before, *filter(None, sizes)]
        if all(type(size) is int and size > 0 for size in known):
            sizes[sizes.index(None)] = math.prod(before) // math.prod(filter(None, sizes))
    return tuple(sizes)


def _repeated(before: Sizes | None, times: Sizes) -> Sizes | None:
    if before is None or len(before) > len(times):
        return None
    before = (*[1] * (len(times) - len(before)), *before)
    return tuple(n if size == 1 else size if n == 1 else None for size, n in zip(before, times, strict=True))
