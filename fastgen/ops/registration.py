"""How an operation becomes an operator of PyTorch, for real and for fake tensors, that its backends serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastgen import backends

_library = torch.library.Library("fastgen", "FRAGMENT")

Implementation = tuple[Callable[..., Any], "backends.WhyNot | None"]  # and why it cannot serve a call


def define(
    name: str,
    schema: str,
    check: Callable[..., None],
    empty: Callable[..., Any],
    implementations: dict[str, Implementation],
    *,
    check_values: Callable[..., None] | None = None,
) -> None:
    """Defines ``torch.ops.fastgen.NAME`` and registers what implements it.

    Args:
        name, schema: of the operator.
        check: raises where arguments are not as they should be, real or fake ones.
        empty: allocates what the operator returns.
        implementations: by backend, functions of the same arguments, each with its `why_not` (`backends.register`).
        check_values: checks what fake tensors do not have.
    """

    def real(*args: Any) -> Any:
        check(*args)
        if check_values:
            check_values(*args)
        return backends.select(name, *args)(*args)

    def fake(*args: Any) -> Any:
        check(*args)
        return empty(*args)

    for backend, (function, why_not) in implementations.items():
        backends.register(name, backend, function, why_not=why_not)
    _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgen::{name}", fake, lib=_library)
