"""Symbolic tracing of a module's forward into a graph that does the same, or an honest refusal.

`torch.fx` traces more than it can keep its word for: it takes ``x is None`` and ``isinstance(x, Tensor)`` for what they
are of a placeholder, freezes random numbers and side effects at what they were during the trace, forgets in-place
additions and ``no_grad``. The tracer here records all of that faithfully or refuses. A submodule that it cannot look
into becomes one node, and the rest of the parent is still traced.
"""

from __future__ import annotations

import copy
import dis
import inspect
import random
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fastgen.acceleration import blocks
from fastgen.acceleration.beliefs import calls_int_only
from fastgen.acceleration.recorder import (
    Recorder,
    Tracer,
    ambient,
    arguments,
    autocast,
    believed_types,
    describe,
    is_torch_layer,
    recorded_functions,
)
from fastgen.acceleration.states import state, unchanged

# Gradients, inference mode, autocast: a forward that asks for them is one that is not the same in all of these.
_MODES = [(True, False, False), (False, False, False), (False, True, False)]
_MODES += [(gradients, inference, True) for gradients, inference, _ in _MODES]
_ASKS_FOR_MODES = "it asks whether gradients, inference mode or autocast are on"
_LOCK = threading.RLock()  # a trace replaces functions of PyTorch for the whole process


class Untraceable(Exception):
    """The forward cannot be recorded faithfully; the text says why."""


_Call = tuple[Sequence[str], "dict[str, Any] | None", bool]  # arguments of `trace`


@dataclass
class Trace:
    """A graph of the forward, whose placeholders are the arguments that are tensors.

    `inlined` holds the paths of the submodules whose forward is part of the graph, `opaque` those that are one node and
    why, `read` those that the forward took something from. `kinds` are the dtypes and devices of parameters and buffers
    that it decided by, by the path of the tensor and the name. `kept` are the attributes, path and name, that it keeps
    the shape of a tensor in. It runs without "gradients", or autocast on the devices, that are `off`.
    """

    graph: fx.Graph
    modules: dict[str, torch.nn.Module]
    inlined: set[str] = field(default_factory=set)
    opaque: dict[str, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    kinds: dict[tuple[str, str], Any] = field(default_factory=dict)
    kept: set[tuple[str, str]] = field(default_factory=set)
    asked_for_images: bool = False  # and was told one, or several
    off: tuple[str, ...] = ()
    changed: set[fx.Node] | None = None  # those that are written to, once asked for


def trace(
    module: torch.nn.Module,
    tensors: Sequence[str],
    constants: dict[str, Any] | None = None,
    several: bool = False,
) -> Trace:
    """Traces ``module.forward`` with the arguments named in `tensors` as tensors, those in `constants` as these, and
    all others at their defaults, or None where they have none; for one image where it asks, or for `several`.

    Raises:
        Untraceable: with the reason.
    """
    if "forward" in module.__dict__:
        raise Untraceable("its forward was replaced on the instance")
    skeleton = copy.deepcopy(module, {id(tensor): tensor for tensor in _tensors(module)})
    noise = _random_state()
    try:
        with _LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tracer, graph, off = _record_in_all_modes(skeleton, (tensors, constants, several))
    except Exception as error:
        raise Untraceable(describe(error)) from error
    finally:
        drew = _random_state() != noise
        _restore_random_state(noise)
    if drew:
        raise Untraceable("it draws random numbers outside PyTorch's functions")
    modules = dict(skeleton.named_modules())
    read = {path for path, part in modules.items() if part in tracer.read and not _is_within(path, tracer.opaque)}
    read |= {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    return Trace(
        graph, modules, tracer.inlined, tracer.opaque, read, tracer.kinds, tracer.kept, tracer.asked_for_images, off
    )


def _record_in_all_modes(module: torch.nn.Module, call: _Call) -> tuple[Tracer, fx.Graph, tuple[str, ...]]:
    """The graph, if it is one for all, and what is off in it; submodules of which this is not true become one node."""
    before = {part: state(part) for part in module.modules()}
    opaque: dict[str, str] = {}
    calls_int: list[dict[str, Any]] = []
    while True:
        known = len(opaque)
        found = []
        for mode in _MODES:
            found.append(_record(module, before, call, opaque, mode, calls_int))
            for path, reason in found[-1][0].opaque.items():
                opaque.setdefault(path, reason)
            if len(opaque) > known:
                break  # the others would have to be recorded anew
        if len(opaque) > known:
            continue
        graphs = [graph for _, graph in found]
        blamed = next((path for graph in graphs for path in _difference(graphs[0], graph)), None)
        off = [tracer.off() for tracer, _ in found]
        switched = tuple(sorted({name for one in off for name in one if one[name]}))
        alike = all(one.get(name, True) for one in off for name in switched)
        if blamed is None and alike:
            return *found[0], switched
        if not blamed:
            raise fx.proxy.TraceError(_ASKS_FOR_MODES)
        opaque[blamed] = _ASKS_FOR_MODES


def _record(
    module: torch.nn.Module,
    before: dict[torch.nn.Module, dict[str, Any]],
    call: _Call,
    opaque: dict[str, str],
    mode: tuple[bool, bool, bool],
    calls_int: list[dict[str, Any]],
) -> tuple[Tracer, fx.Graph]:
    gradients, inference, with_autocast = mode
    tensors, constants, several = call
    attributes = {part: dict(part.__dict__) for part in before}
    with torch.inference_mode(inference), torch.set_grad_enabled(gradients), autocast(with_autocast):
        tracer = Tracer(tensors, opaque, constants, several)
        with recorded_functions(tracer), believed_types(module, calls_int), Recorder(tracer):
            graph = _unless_int(tracer, module, calls_int)
            if graph is not None:
                _record_kept_shapes(tracer, graph, attributes)
        if ambient() != tracer.ambient:
            raise fx.proxy.TraceError("it leaves gradients or autocast switched on or off")
    if graph is None:
        calls_int += tracer.calls_int
        return _record(module, before, call, opaque, mode, calls_int)
    for part, was in before.items():
        if not unchanged(part, was) or len(part.__dict__) > len(was):
            new = ", ".join(name for name in part.__dict__ if name not in was)
            raise fx.proxy.TraceError("it changes attributes of its modules" + (f": {new}" if new else ""))
    if any(_writes_to_own_tensor(node) for node in graph.nodes):
        raise fx.proxy.TraceError("it changes its parameters or buffers")
    return tracer, graph


def _unless_int(tracer: Tracer, module: torch.nn.Module, known: Sequence[dict[str, Any]]) -> fx.Graph | None:
    """The graph; none if code that is not `known` made integers of sizes, and may as well get symbols."""
    error, graph = None, None
    try:
        graph = tracer.trace(module)
    except Exception as found:
        error = found
    tracer.calls_int = [scope for scope in tracer.calls_int if _calls_int_only(scope)]
    if any(all(scope is not other for other in known) for scope in tracer.calls_int):
        return None
    if error is not None:
        raise error
    return graph


def _calls_int_only(scope: dict[str, Any]) -> bool:
    module = sys.modules.get(scope.get("__name__", ""))
    if module is None or vars(module) is not scope or "int" in scope:
        return False
    try:
        return calls_int_only(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return False


def _record_kept_shapes(tracer: Tracer, graph: fx.Graph, attributes: dict[torch.nn.Module, dict[str, Any]]) -> None:
    """As in ``self.last_z_shape = z.shape``, where no method of the module looks at it: the forward has not, either."""
    found = [
        (path, part, name, value)
        for path, part in tracer.root.named_modules()
        for name, value in part.__dict__.items()
        if isinstance(value, fx.Proxy)
    ]
    if not found:
        return
    (output,) = [node for node in graph.nodes if node.op == "output"]
    kinds: set[type] = {type(part) for part in attributes if not is_torch_layer(part)}
    read = {name for kind in kinds for name in _names_read(kind)}
    for path, part, name, value in found:
        with graph.inserting_before(output):
            if name in read or not _is_shape(value.node):
                continue
            graph.call_function(blocks.keep, (path, name, value.node)).meta["caller"] = path
        tracer.kept.add((path, name))
        if name in attributes[part]:
            part.__dict__[name] = attributes[part][name]
        else:
            del part.__dict__[name]


def _is_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1 and not node.kwargs
    return node.target is getattr and node.args[1] == "shape"


def _names_read(kind: type) -> set[str]:
    """The attributes that code of a class may load, of whatever: it names them, or has their names as strings."""
    members = [vars(base).values() for base in kind.__mro__ if base not in (torch.nn.Module, object)]
    functions = [getattr(value, "fget", getattr(value, "__func__", value)) for values in members for value in values]
    codes, names = [function.__code__ for function in functions if hasattr(function, "__code__")], set()
    while codes:
        code = codes.pop()
        names |= {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_ATTR", "LOAD_METHOD")}
        names |= {constant for constant in code.co_consts if isinstance(constant, str)}
        codes += [inner for inner in code.co_consts if isinstance(inner, type(code))]
    return names


def _difference(graph: fx.Graph, other: fx.Graph) -> Iterator[str]:
    """The paths of the modules that make different nodes."""
    for pair in zip(graph.nodes, other.nodes, strict=False):
        first, second = [(node.op, node.target, str(node.args), str(node.kwargs)) for node in pair]
        if first != second:
            yield next(filter(None, [node.meta["caller"] for node in pair]), "")


def _is_within(path: str, others: Iterable[str]) -> bool:
    return any(f"{path}.".startswith(f"{other}.") for other in others)


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    attributes = [value for part in module.modules() for value in part.__dict__.values() if isinstance(value, Tensor)]
    return [*module.parameters(), *module.buffers(), *attributes]


def _random_state() -> tuple[Any, ...]:
    state: Any = np.random.get_state()  # noqa: NPY002
    name, keys, *rest = state
    return random.getstate(), (name, keys.tobytes(), *rest), bytes(torch.get_rng_state().numpy())


def _restore_random_state(was: tuple[Any, ...]) -> None:
    random.setstate(was[0])
    name, keys, *rest = was[1]
    np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(torch.frombuffer(bytearray(was[2]), dtype=torch.uint8))


def _writes_to_own_tensor(node: fx.Node) -> bool:
    in_place = node.target in (blocks.iadd, blocks.isub, blocks.imul, blocks.itruediv) or (
        node.op == "call_method" and str(node.target).endswith("_")
    )
    return in_place and isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"


def variants(module: torch.nn.Module) -> list[tuple[str, ...]]:
    """The sets of arguments that may be tensors: the required ones, and none, one or all of those that default to None;
    and the first required one without one or all of the others, as some pass None.

    Raises:
        Untraceable: the forward names no arguments.
    """
    defaults = arguments(module)
    required = [name for name, default in defaults.items() if default is inspect.Parameter.empty]
    optional = [name for name, default in defaults.items() if default is None]
    if not defaults:
        raise Untraceable("its forward names no arguments")
    some = dict.fromkeys([(), *((name,) for name in optional), tuple(optional)])
    less = dict.fromkeys([*((name,) for name in required[1:]), tuple(required[1:])])
    choices = [{*required, *given} for given in some] + [{*required} - {*left} for left in less if left]
    return [tuple(name for name in defaults if name in choice) for choice in choices]
