"""`type`, `isinstance`, `callable`, `len` and `int` for traced code: symbols are of the type of what they stand for."""

from __future__ import annotations

import ast
import functools
from typing import Any

import torch
from torch import Tensor, fx

from fastgen.acceleration.nodes import is_tensor
from fastgen.acceleration.sizes import is_size
from fastgen.acceleration.symbols import Symbol

_LEGACY = type(torch.FloatTensor)  # of types of tensors that say dtype and device


def believed_type(value: Any) -> type:
    """The type of a value, of a symbol that of what it stands for."""
    return value.believed_type(checked=True) if issubclass(type(value), Symbol) else type(value)


class _MetaType(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return believed_type(args[0]) if len(args) == 1 and not kwargs else type(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(cls, other: Any) -> bool:
        return issubclass(other, type)


class BelievedType(type, metaclass=_MetaType):
    """Stands for `type` in code that is traced."""


def _is_instance(value: Any, kinds: Any) -> bool:
    if not issubclass(type(value), Symbol):
        return isinstance(value, kinds)
    if any(isinstance(kind, _LEGACY) for kind in (kinds if isinstance(kinds, tuple) else (kinds,))):
        raise fx.proxy.TraceError("it asks for a type of tensors that says their dtype and device")
    return issubclass(value.believed_type(checked=kinds is not Tensor), kinds)


def _is_callable(value: Any) -> bool:
    return callable(value) and not (issubclass(type(value), Symbol) and is_tensor(value.node))


def _length(value: Any) -> Any:
    """Of a tensor its first size, a symbol, which ``__len__`` could not return."""
    return value.shape[0] if issubclass(type(value), Symbol) and value._is_tensor() else len(value)


class _MetaInt(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        is_symbol = len(args) == 1 and not kwargs and issubclass(type(args[0]), Symbol)
        return args[0] if is_symbol and is_size(args[0].node) else int(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return _is_instance(value, int)

    def __subclasscheck__(cls, other: Any) -> bool:
        return issubclass(other, int)


class BelievedInt(metaclass=_MetaInt):
    """Stands for `int` in code that calls it, and asks ``isinstance`` for it, but does nothing else with it."""


@functools.lru_cache(maxsize=256)
def calls_int_only(source: str) -> bool:
    """Whether code does no more than that with the name."""
    nodes = list(ast.walk(ast.parse(source)))
    allowed: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            allowed |= {id(node.func)} if node.func.id == "int" and len(node.args) == 1 else set()
            if node.func.id == "isinstance" and len(node.args) == 2:
                kinds = node.args[1]
                allowed |= {id(kind) for kind in (kinds.elts if isinstance(kinds, ast.Tuple) else [kinds])}
    names = [node for node in nodes if isinstance(node, ast.Name) and node.id == "int"]
    return all(id(name) in allowed and isinstance(name.ctx, ast.Load) for name in names)


# Built in, as code sees them.
BELIEVED = {"type": BelievedType, "isinstance": _is_instance, "callable": _is_callable, "len": _length}
