"""Weights that a forward computes from parameters and buffers alone: computed once, and again once these have changed.

Equalised learning rates (``self.weight * self.scale``), standardised and normalised weights are of this kind.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastgen.acceleration.blocks import may_keep
from fastgen.ops.packed_weights import kept

_FUNCTIONS = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg, operator.getitem),
    *(operator.matmul, torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.square, torch.sqrt, torch.rsqrt),
    *(torch.exp, torch.abs, torch.sum, torch.mean, torch.var, torch.std, torch.norm, torch.flip, torch.reshape),
    *(torch.transpose, torch.permute, torch.unsqueeze, torch.squeeze, torch.clamp, torch.tanh, torch.sigmoid),
    *(torch.matmul, F.normalize, F.pad, F.softplus, getattr),
}
_METHODS = set(
    "add sub mul div pow square sqrt rsqrt exp abs neg sum mean var std norm flip view reshape flatten permute"
    " transpose t unsqueeze squeeze expand expand_as contiguous clamp clamp_min tanh sigmoid size dim numel repeat"
    " float".split()
)
_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "data", "T", "mT")


class _Value(NamedTuple):
    """What a step before returned."""

    step: int


class _Step(NamedTuple):
    """A function, or the name of a method, and its arguments; lists are tuples, and keywords pairs."""

    function: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


def constant_of(node: fx.Node, is_changed: Callable[[fx.Node], bool]) -> tuple[list[str], Constant] | None:
    """The paths of the tensors that a node is computed from and the function of them; None if it is not known to depend
    on nothing else, or anything of it is changed in place.
    """
    order: list[fx.Node] = []
    if not _collect(node, order, is_changed):
        return None
    places = {n: i for i, n in enumerate(sorted(order, key=lambda n: n.op != "get_attr"))}  # tensors first
    paths = [str(n.target) for n in places if n.op == "get_attr"]

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return _Value(places[value])
        if isinstance(value, list | tuple):
            return tuple(map(plain, value))
        if isinstance(value, slice):
            return _Step(slice, (plain(value.start), plain(value.stop), plain(value.step)), ())
        return value

    steps = [
        _Step(n.target, plain(n.args), tuple((name, plain(value)) for name, value in n.kwargs.items()))
        for n in places
        if n.op != "get_attr"
    ]
    try:
        hash(tuple(steps))
    except TypeError:
        return None
    return (paths, Constant(tuple(steps))) if paths else None


def _collect(node: fx.Node, order: list[fx.Node], is_changed: Callable[[fx.Node], bool]) -> bool:
    """Appends a node and what it is computed from, in the order of the graph."""
    found, left = set(), [node]
    while left:
        n = left.pop()
        if n in found:
            continue
        pure = n.target in _FUNCTIONS if n.op == "call_function" else n.op == "call_method" and n.target in _METHODS
        pure = pure and (n.target is not getattr or n.args[1] in _ATTRIBUTES)
        if is_changed(n) or (n.op != "get_attr" and not pure):
            return False
        found.add(n)
        left += n.all_input_nodes
    order += [n for n in node.graph.nodes if n in found]
    return True


class Constant:
    """A function of tensors, which is computed again only once one of them has changed."""

    def __init__(self, steps: tuple[_Step, ...]) -> None:
        self.steps = steps
        self.__name__ = "constant"  # in code that calls it

    def __call__(self, *tensors: Tensor) -> Tensor:
        if may_keep(tensors):
            # Known by the largest, as a small one may be shared by many. A view of that itself would keep it for good.
            first = max(range(len(tensors)), key=lambda i: tensors[i].numel())
            ordered = (tensors[first], *tensors[:first], *tensors[first + 1 :])
            return kept(ordered, (first, self.steps), lambda: _compute(self.steps, [t.detach() for t in tensors]))
        return _compute(self.steps, tensors)


def _compute(steps: Sequence[_Step], tensors: Sequence[Tensor]) -> Any:
    values: list[Any] = list(tensors)

    def filled(value: Any) -> Any:
        if type(value) is _Value:
            return values[value.step]
        if type(value) is _Step:
            return slice(*map(filled, value.args))
        return tuple(map(filled, value)) if isinstance(value, tuple) else value

    for function, args, kwargs in steps:
        given = {name: filled(value) for name, value in kwargs}
        if isinstance(function, str):
            owner, *rest = filled(args)
            values.append(getattr(owner, function)(*rest, **given))
        else:
            values.append(function(*filled(args), **given))
    return values[-1]
