"""The rules by which ATen operators act on planes, by name.

A rule is called after the operator ran, with the values and their codes at hand. View operators need none: a view
shares its storage, hence its codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer

F = TypeVar("F", bound=Callable[..., Any])
Rule = Callable[["Tracer", Any, tuple, dict, list[Tensor]], None]
_RULES: dict[str, Rule] = {}


def adding_to(rules: dict[str, F]) -> Callable[..., Callable[[F], F]]:
    """A decorator that enters functions under the names that it is given."""

    def named(*names: str) -> Callable[[F], F]:
        def add(function: F) -> F:
            rules.update(dict.fromkeys(names, function))
            return function

        return add

    return named


rule = adding_to(_RULES)

OVER_POSITIONS = "which takes in pixels that are drawn later"
HINTS = {
    "_softmax": "as the last layer leave it out: heads take logits",
    "native_group_norm": f"over positions, {OVER_POSITIONS}; over the channels of each it is a LayerNorm",
}  # on operators without a rule


def supported() -> list[str]:
    """Names of the ATen operators that have a rule; views are supported besides."""
    return sorted(_RULES)


def named(func: Any) -> bool:
    """Whether an ATen operator has a rule of its own."""
    return func._schema.name.removeprefix("aten::") in _RULES


def find(func: Any) -> Rule | None:
    """The rule of an ATen overload, or None."""
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    if name in _RULES:
        return _RULES[name]
    if func.is_view:
        return nothing
    return _RULES.get(name.removesuffix("_")) if schema.is_mutable and "out" not in func._overloadname else None


def nothing(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """The rule of views."""
