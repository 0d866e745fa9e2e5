"""What a module was at some time, to see at every call whether it still is.

Attributes count with all that they hold: a forward may have decided by any value in a nested configuration. Parameters
and buffers do not, as the rewritten code fetches them at every call.
"""

from __future__ import annotations

import collections
import copy
import enum
import logging
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastgen.acceleration.report import Report

# Compared as they are; containers of nothing else by a copy.
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type, enum.Enum, torch.dtype, torch.device)
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_SIMPLE = (*_CONSTANTS, *_FUNCTIONS, torch.nn.Module, Tensor, MethodType, ModuleType, logging.Logger, Report)
_FLAT = (list, tuple, dict, set, collections.deque)

_OWN = set(torch.nn.Module().__dict__)
_KEPT = ("_parameters", "_buffers", "_state_dict_hooks", "_load_state_dict_pre_hooks")
_MOST = 1000  # what a nested attribute may hold, as Python code compares it


class Incomparable(Exception):
    """An attribute holds too much to be compared at every call."""


def state(module: torch.nn.Module) -> dict[str, Any]:
    """The attributes of a module, without what its parameters and buffers hold; for `unchanged`.

    Raises:
        Incomparable: with the reason.
    """
    hooks: Any = module._forward_pre_hooks.values()
    computed = {hook.name for hook in hooks if type(hook) in (WeightNorm, SpectralNorm)}
    before: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        try:
            before[name] = _Computed() if name in computed else _snapshot(name, value)
        except Incomparable:
            raise Incomparable(f"its attribute {name!r} holds too much to be compared at every call") from None
    return before


def unchanged(module: torch.nn.Module, before: dict[str, Any]) -> bool:
    """Whether all of these attributes are as they were; there may be new ones, but for another forward."""
    now = module.__dict__
    try:
        return bool(now == before) or (
            ("forward" in now) == ("forward" in before)
            and all(name in now and (now[name] is value or now[name] == value) for name, value in before.items())
        )
    except Exception:  # arrays that were replaced do not compare to one truth value
        return False


def guarded(before: dict[str, Any]) -> dict[str, Any] | None:
    """Those of the attributes that a forward may decide by, for ``torch.compile`` to compare with ``==``.

    None where it cannot: it compiles anew when such an attribute changes, but not for what is in other objects.
    """
    values = {name: value for name, value in before.items() if name == "training" or name not in _OWN | {"forward"}}
    values = {name: value for name, value in values.items() if not isinstance(value, Tensor | Report | _Computed)}
    return values if all(map(_is_guarded, values.values())) else None


def _is_guarded(value: Any) -> bool:
    if type(value) in _FLAT:
        return all(map(_is_guarded, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (*_CONSTANTS, *_FUNCTIONS, torch.nn.Module))


def _snapshot(name: str, value: Any) -> Any:
    """What equals the value as long as nothing in it changes."""
    if isinstance(value, _SIMPLE) or name in _KEPT:
        return value
    if isinstance(value, _FLAT) and not getattr(value, "__dict__", None):
        items = value.values() if isinstance(value, dict) else value
        if name in _OWN or all(isinstance(item, _SIMPLE) for item in items):
            return copy.copy(value)
    return _Nested(value)


class _Computed:
    """Stands for a tensor that a hook computes anew before every forward."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tensor)

    __hash__ = None  # type: ignore[assignment]


class _Nested:
    """Stands for an object, or for containers in containers."""

    __array_ufunc__ = None  # arrays leave the comparison to it

    def __init__(self, value: Any) -> None:
        self.contents = _contents(value, [_MOST])

    def __eq__(self, other: object) -> bool:
        return bool(_contents(other, [_MOST]) == self.contents)

    __hash__ = None  # type: ignore[assignment]


def _contents(value: Any, room: list[int], holders: tuple[int, ...] = ()) -> Any:
    """All that is in a value, in tuples; `room` counts down, `holders` are the objects that it is in."""
    room[0] -= 1 + value.nbytes // 64 if isinstance(value, np.ndarray) else 1
    if room[0] < 0:
        raise Incomparable
    if isinstance(value, _SIMPLE) or id(value) in holders:
        return value
    holders = (*holders, id(value))
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype, value.tobytes()
    items: Any = ()
    if isinstance(value, dict):
        items = [(name, _contents(item, room, holders)) for name, item in value.items()]
    elif isinstance(value, list | tuple | collections.deque):
        items = [_contents(item, room, holders) for item in value]
    elif isinstance(value, set):
        items = copy.copy(value)
    attributes = [(name, _contents(item, room, holders)) for name, item in _attributes(value)]
    return type(value), items, attributes, None if type(value) in _FLAT else value


def _attributes(value: Any) -> list[tuple[str, Any]]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    found = [(name, getattr(value, name, None)) for name in slots if not name.startswith("__")]
    return [*getattr(value, "__dict__", {}).items(), *found]
