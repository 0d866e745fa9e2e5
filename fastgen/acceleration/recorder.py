"""Records the forward of a module, on symbols, as nodes of a graph; what a graph could not say is refused."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fastgen
from fastgen import ops
from fastgen._hooks import has_hooks
from fastgen.acceleration import blocks
from fastgen.acceleration.beliefs import BELIEVED, BelievedInt, believed_type
from fastgen.acceleration.nodes import COMPARISONS, returns_tensor
from fastgen.acceleration.sizes import is_size
from fastgen.acceleration.states import Incomparable
from fastgen.acceleration.symbols import Symbol
from fastgen.nn import ConvBNAct, ConvTransposeBNAct
from fastgen.ops.conv_block import activate

_DEVICES = ("cpu", "cuda")
_MODES = ("gradients", "inference mode", *_DEVICES)  # in the order of `ambient`
_MOST_QUESTIONS = 10_000  # of one forward

# Take sizes, and so symbols, in places where PyTorch looks for numbers alone.
_FACTORIES = "zeros ones full empty eye arange linspace tensor rand randn randint randperm normal".split()


# The same with gradients and autocast, or without.
_FREE = {getattr, blocks.assume, blocks.expect, blocks.expect_rank, blocks.expect_plain, blocks.keep, *COMPARISONS}


class Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(
        self,
        tensors: Sequence[str],
        refused: dict[str, str],
        constants: dict[str, Any] | None = None,
        several: bool = False,
    ) -> None:
        super().__init__()
        self.tensors = tensors
        self.constants = constants or {}  # arguments that are none, and not at their defaults
        self.refused = refused  # modules that are one node, and why
        self.ambient = self.inner = ambient()  # outside of the forward, and where it computes
        self.computes = False
        self.gradients = torch.is_grad_enabled()  # by what the forward calls: autograd switches them off by itself
        self.caller = ""
        self.thread = threading.get_ident()  # fx replaces methods of modules for all of them
        self.inlined: set[str] = set()
        self.opaque: dict[str, str] = {}
        self.read: set[torch.nn.Module] = set()
        self.kinds: dict[tuple[str, str], Any] = {}
        self.kept: set[tuple[str, str]] = set()
        self.questions = 0
        self.several, self.asked_for_images = several, False
        self.calls_int: list[dict[str, Any]] = []  # globals of code that makes integers of sizes
        self.own: dict[str, Tensor] = {}

    def wants_int(self, scope: dict[str, Any]) -> None:
        """Where code makes an integer of a size, which stays a symbol in another try."""
        if not any(known is scope for known in self.calls_int):
            self.calls_int.append(scope)

    def count_question(self) -> None:
        """As in a loop that never ends with what is assumed of inputs."""
        self.questions += 1
        if self.questions > _MOST_QUESTIONS:
            raise fx.proxy.TraceError("control flow that asks again and again")

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Symbol(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if node.op.startswith("call_") and node.target not in _FREE and not is_size(node):
            self.expect_ambient()
        node.meta["caller"] = self.caller
        node.meta["layer"] = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        node.meta["tensor"] = returns_tensor(node)
        if node.op == "get_attr":
            with torch._C.DisableTorchFunction():
                path = str(node.target)
                own = self._own_tensor(path)
                node.meta["rank"] = None if is_lazy(own) else own.dim()
                if not is_lazy(own):
                    node.meta["own_shape"] = functools.partial(self.kind_of, path, "shape")
        return node

    def expect_ambient(self) -> None:
        """Of all that is computed the same: gradients and autocast as they were outside, or switched off."""
        now = ambient()
        switched_on = now[1] is not self.ambient[1] or any(on > was for on, was in zip(now, self.ambient, strict=True))
        if switched_on or now[0] is not self.gradients or (self.computes and now != self.inner):
            raise fx.proxy.TraceError("it switches gradients or autocast on or off")
        self.computes, self.inner = True, now

    def set_gradients(self, on: bool) -> None:
        if torch.is_grad_enabled() is self.gradients:  # else in the forward of an autograd function
            self.gradients = on

    def off(self) -> dict[str, bool]:
        """Of what was on outside, whether the forward switches it off."""
        pairs = zip(_MODES, self.ambient, self.inner, strict=True)
        return {name: not inside for name, outside, inside in pairs if outside}

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, np.generic):  # whose text names a module; to tensors it is a number
            a = a.item()
        if isinstance(a, Tensor) and not isinstance(a, torch.nn.Parameter) and not self._path_of_tensor(a):
            raise fx.proxy.TraceError("it uses a tensor that is no input, parameter or buffer")
        if isinstance(a, list | tuple | dict) and not _is_plain_container(a):
            raise fx.proxy.TraceError(f"it makes a {type(a).__name__}, which is not recorded")
        return super().create_arg(a)

    def _path_of_tensor(self, tensor: Tensor) -> bool:
        return tensor in self.tensor_attrs or any(tensor is buffer for buffer in self.root.buffers())

    def path_of(self, tensor: Tensor) -> str | None:
        """Where the root has it as a parameter or buffer."""
        return next((path for path, own in self._own_tensors() if own is tensor), None)

    def kind_of(self, path: str, name: str) -> Any:
        """A dtype, device, shape or number of dimensions, which must stay what it is."""
        with torch._C.DisableTorchFunction():
            return self.kinds.setdefault((path, name), getattr(self._own_tensor(path), name))

    def dtype(self) -> torch.dtype | None:
        """The floating dtype of all parameters and buffers that have one; None if there are several, or none."""
        with torch._C.DisableTorchFunction():
            dtypes = {tensor.dtype for _, tensor in self._own_tensors() if tensor.is_floating_point()}
        return dtypes.pop() if len(dtypes) == 1 else None

    def type_of(self, path: str) -> type:
        return type(self._own_tensor(path))

    def _own_tensor(self, path: str) -> Tensor:
        if path not in self.own:
            self.own = dict(self._own_tensors())
        return self.own[path]

    def device(self) -> torch.device | None:
        """The device of all parameters and buffers, which must then stay there; None if there are several, or none."""
        own = self._own_tensors()
        with torch._C.DisableTorchFunction():
            devices = {tensor.device for _, tensor in own}
        return self.kind_of(own[0][0], "device") if len(devices) == 1 else None

    def _own_tensors(self) -> list[tuple[str, Tensor]]:
        named = self.root.named_parameters(remove_duplicate=False), self.root.named_buffers(remove_duplicate=False)
        return [item for items in named for item in items]

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        required = [name for name, default in arguments(self.root).items() if default is inspect.Parameter.empty]
        given = dict.fromkeys(required) | {
            name: self.create_proxy("placeholder", name, (), {}) for name in self.tensors
        }
        given |= self.constants

        def forward(root: Any) -> Any:
            fx._symbolic_trace._is_fx_tracing_flag = False  # which code asks for, to do something else
            return (_in_turn(root) or functools.partial(root_fn, root))(**given)

        forward.__annotations__ = {}
        return forward, [self.root]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        if isinstance(attr_val, torch.nn.Module):
            self.read.add(attr_val)
        return super().getattr(attr, attr_val, {})  # a node of a submodule that was given up must not come back

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return is_torch_layer(m) or (m.__module__.startswith("fastgen.nn.") and _in_turn(m) is None)

    def call_module(
        self, m: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        self.expect_ambient()
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        if path in self.refused:
            self.opaque[path] = self.refused[path]
        elif has_hooks(m):
            self.opaque[path] = "has hooks"
        elif "forward" in m.__dict__:
            self.opaque[path] = "its forward was replaced on the instance"
        else:
            last, caller = next(iter(reversed(self.graph.nodes)), None), self.caller
            self.caller = path
            try:
                result = (_in_turn(m) or forward)(*args, **kwargs)
                self.inlined.add(path)
                return result
            except Exception as error:
                self.opaque[path] = describe(error)
                self._forget_after(last)
            finally:
                self.caller = caller
        return self.create_proxy("call_function", blocks.tensor, (self._call(path, args, kwargs),), {})

    def _call(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.create_proxy("call_module", path, args, kwargs)

    def _forget_after(self, last: fx.Node | None) -> None:
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)


def _in_turn(module: torch.nn.Module) -> Callable[..., Any] | None:
    """Of our own blocks in eval, what runs their members in turn, so that they are fused with what is around them."""
    for kind in (ConvBNAct, ConvTransposeBNAct):
        if type(module).forward is kind.forward and not any(part.training for part in module.modules()):
            return functools.partial(kind.in_turn, module)  # type: ignore[arg-type]
    return None


def is_torch_layer(module: torch.nn.Module) -> bool:
    """A layer of PyTorch, which is one node."""
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(
        module, torch.nn.Sequential
    )


def _is_plain_container(value: Any) -> bool:
    kind = type(value)
    return kind in (list, tuple, dict) or kind.__module__.startswith("torch.fx") or hasattr(kind, "_fields")


def arguments(module: torch.nn.Module) -> dict[str, Any]:
    """The defaults of the arguments that the forward names; more, in ``*args`` or ``**kwargs``, are not traced."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


class Recorder(TorchFunctionMode):
    """Records the functions that no symbol would: those that make tensors."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch._C._set_grad_enabled:
            self.tracer.set_gradients(*args)
            return function(*args)
        if str(function).startswith("profiler._record_function"):
            return function(*args, **kwargs)  # of a label for profilers, which is dropped
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return fx.Proxy.__torch_function__(function, types, args, kwargs)
        if function in (Tensor.dtype.__get__, Tensor.device.__get__):  # type: ignore[attr-defined]
            path = self.tracer.path_of(args[0])
            if path is not None:
                return getattr(self.tracer.create_proxy("get_attr", path, (), {}), function.__self__.__name__)
        if any(isinstance(leaf, Tensor) for leaf in leaves) or torch.overrides.is_tensor_method_or_property(function):
            raise fx.proxy.TraceError("it computes with tensors that are neither inputs, parameters nor buffers")
        return self.tracer.create_proxy("call_function", function, args, kwargs)


@contextlib.contextmanager
def recorded_functions(tracer: Tracer) -> Iterator[None]:
    """Those that make tensors, and our own operations, as what they are by definition, so that they are fused with what
    is around them. In other threads, too, but these pass no symbols.
    """

    def make(function: Any, *args: Any, **kwargs: Any) -> Any:
        if _has_symbols(args, kwargs):
            return tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    def define(function: Any, *args: Any, **kwargs: Any) -> Any:
        if _has_symbols(args, kwargs):
            return _by_definition(function, *args, **kwargs)
        return function(*args, **kwargs)

    replaced = [(torch, name, make) for name in _FACTORIES]
    replaced += [(ops, name, define) for name in ("conv2d_bn_act", "conv_transpose2d_bn_act", "group_norm_act")]
    originals = [(place, name, getattr(place, name)) for place, name, _ in replaced]
    try:
        for (place, name, wrapper), (*_, original) in zip(replaced, originals, strict=True):
            setattr(place, name, functools.partial(wrapper, original))
        with _no_functions_of_symbols():
            yield
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


@contextlib.contextmanager
def _no_functions_of_symbols() -> Iterator[None]:
    """``autograd.Function.apply`` refuses symbols: as they say that they are tensors, PyTorch 2.14 would take them for
    such and crash.
    """
    own = "apply" in vars(torch.autograd.Function)  # else it is inherited
    original = inspect.getattr_static(torch.autograd.Function, "apply")

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if _has_symbols(args, kwargs):
            raise fx.proxy.TraceError("it calls an autograd.Function, which has a gradient of its own")
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        if own:
            torch.autograd.Function.apply = original  # type: ignore[method-assign]
        else:
            del torch.autograd.Function.apply


def _has_symbols(*values: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(values))


def _by_definition(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation of ours for inference, in functions of PyTorch."""
    bound = inspect.signature(operation).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given.get("training"):
        raise fx.proxy.TraceError(f"it calls {operation.__name__} in training mode")
    input, weight, bias = given["input"], given["weight"], given["bias"]
    if "num_groups" in given:
        x = F.group_norm(input, given["num_groups"], weight, bias, given["eps"])
    else:
        convolve = F.conv_transpose2d if "output_padding" in given else F.conv2d
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        x = convolve(input, weight, bias, **{name: given[name] for name in names if name in given})
        if given["running_mean"] is not None:
            statistics, affine = (given["running_mean"], given["running_var"]), (given["bn_weight"], given["bn_bias"])
            x = F.batch_norm(x, *statistics, *affine, training=False, eps=given["eps"])
    return activate(x, given["activation"], given["alpha" if given["activation"] == "elu" else "negative_slope"])


@contextlib.contextmanager
def believed_types(root: torch.nn.Module, calls_int: Sequence[dict[str, Any]] = ()) -> Iterator[None]:
    """Questions for types and lengths, in the code of the module's classes, answered for symbols as for what they stand
    for; and `calls_int` are globals of code where ``int`` returns symbols that are integers already.
    """
    classes = {base for part in root.modules() for base in type(part).__mro__}
    names = {base.__module__ for base in classes if not base.__module__.startswith(("torch.", "fastgen.", "builtins"))}
    places = {id(place): vars(place) for name in names if (place := sys.modules.get(name)) is not None}
    scopes = list(places.values())  # one module may have several names
    hidden = [(scope, name, value) for scope in scopes for name, value in BELIEVED.items() if name not in scope]
    hidden += [(scope, "int", BelievedInt) for scope in calls_int]
    jit_isinstance = torch.jit.isinstance

    def isinstance_of(value: Any, target: Any) -> bool:
        symbols = [leaf for leaf in tree_leaves(value) if isinstance(leaf, fx.Proxy)]
        if symbols and (len(symbols) > 1 or value is not symbols[0]):
            raise fx.proxy.TraceError("it asks for the type of a computed value")
        with torch._C.DisableTorchFunction():
            return jit_isinstance(torch.empty(0).as_subclass(believed_type(value)) if symbols else value, target)

    torch.jit.isinstance = isinstance_of
    for scope, name, value in hidden:
        scope[name] = value
    try:
        yield
    finally:
        torch.jit.isinstance = jit_isinstance
        for scope, name, _ in hidden:
            del scope[name]


def ambient() -> tuple[Any, ...]:
    """What context managers change and a graph does not record."""
    autocast = [torch.is_autocast_enabled(device) for device in _DEVICES]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


@contextlib.contextmanager
def autocast(on: bool) -> Iterator[None]:
    was = [torch.is_autocast_enabled(device) for device in _DEVICES]
    try:
        for device in _DEVICES:
            torch.set_autocast_enabled(device, on)
        yield
    finally:
        for device, enabled in zip(_DEVICES, was, strict=True):
            torch.set_autocast_enabled(device, enabled)


def describe(error: Exception) -> str:
    """One line."""
    text = str(error).strip().split("\n")[0] or type(error).__name__
    if "control flow" in text:
        return "control flow that depends on data" + _where(error)
    known = isinstance(error, fx.proxy.TraceError | Incomparable)
    return text if known else f"{type(error).__name__} while tracing: {text}"


def _where(error: Exception) -> str:
    """The line of the user's code that an error comes from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_USERS)]
    if not frames:
        return ""
    last = frames[-1]
    return f": {last.line} ({os.path.basename(last.filename)}, line {last.lineno})"


_NOT_USERS = (os.path.dirname(torch.__file__), os.path.dirname(fastgen.__file__))
