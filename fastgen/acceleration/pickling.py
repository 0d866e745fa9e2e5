"""Lets modules under `torch.nn.utils.parametrize` be pickled, which PyTorch supports for their state dicts alone."""

from __future__ import annotations

import copyreg
from typing import Any

import torch
from torch.nn.utils import parametrize


def make_picklable(module: torch.nn.Module) -> None:
    """Gives a parametrised module a class of its own, known to `pickle` as the original class and what is injected."""
    lists: Any = module.parametrizations
    module.__class__ = type(_rebuild(parametrize.type_before_parametrizations(module), tuple(lists)))
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        name = getattr(getattr(hook, "hook", hook), "__qualname__", "")
        if tuple(lists) == ("weight",) and name.endswith("._weight_norm_compat_hook"):
            del hooks[key]  # a local function
            module._register_load_state_dict_pre_hook(_read_old_weight_norm)


def _rebuild(base: Any, names: tuple[str, ...]) -> torch.nn.Module:
    module = base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    copyreg.pickle(type(module), _reduce)
    return module


def _reduce(module: torch.nn.Module) -> tuple[Any, ...]:
    lists: Any = module.parametrizations
    return _rebuild, (parametrize.type_before_parametrizations(module), tuple(lists)), module.__dict__


def _read_old_weight_norm(state: dict[str, Any], prefix: str, *_: Any) -> None:
    """What `torch.nn.utils.parametrizations.weight_norm` does with state dicts of its predecessor."""
    old, new = [f"{prefix}weight_g", f"{prefix}weight_v"], f"{prefix}parametrizations.weight.original"
    if all(name in state for name in old):
        state.update({f"{new}{i}": state.pop(name) for i, name in enumerate(old)})
