"""What Python code of a traced forward sees in place of tensors and their attributes.

Symbols answer what is known of the tensor that they stand for, and refuse what is not.
"""

from __future__ import annotations

import bisect
import dis
import functools
import operator
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from fastgen.acceleration import blocks

_LEGACY = type(torch.FloatTensor)  # of types of tensors that say dtype and device
_QUESTIONS = {"isinstance", "issubclass", "__class__"}
_OF_GRADIENTS = ("grad_fn", "grad", "_base")  # which are None, or not, by how they came about


class Symbol(fx.Proxy):
    """A value of the graph, which Python code sees as the tensor that it stands for, where it is known to be one."""

    _OWN = ("tracer", "node", "root", "attr", "_node")

    def _is_tensor(self) -> bool:
        return not isinstance(self, Attribute) and is_tensor(self.node)

    def _seen_class(self) -> type:
        """For ``isinstance``, which asks for it where the type itself does not match; so do checks of PyTorch."""
        caller = sys._getframe(1)
        module = caller.f_globals.get("__name__", "")
        if module.startswith(("torch.", __name__)):
            return type(self)
        asks = module in ("abc", "functools") or not _QUESTIONS.isdisjoint(caller.f_code.co_names)
        if self._is_tensor() or asks or _following(caller)[0].opname == "MATCH_CLASS":
            return self.believed_type()
        return type(self)

    def believed_type(self, checked: bool = False) -> type:
        """Of what it stands for, an input by assumption, `checked` where a subclass would not do."""
        if not self._is_tensor():
            raise fx.proxy.TraceError("it asks for the type of a computed value")
        tracer: Any = self.tracer
        if checked and self.node.op == "placeholder":
            tracer.create_proxy("call_function", blocks.expect_plain, (self,), {})
        return Tensor if self.node.op != "get_attr" else tracer.type_of(str(self.node.target))

    __class__ = property(_seen_class)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            if self._is_tensor():
                raise AttributeError(f"'Tensor' object has no attribute '{name}'")
            raise fx.proxy.TraceError(f"it asks a computed value for {name!r}")
        if name in _OF_GRADIENTS:
            raise fx.proxy.TraceError(f"it asks a tensor for {name!r}")
        known = _known_of_own(self, name) if name in ("shape", "ndim") else None
        return _Attribute(self, name) if known is None else known

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._OWN:
            raise fx.proxy.TraceError(f"it sets the attribute {name!r} of a tensor")
        object.__setattr__(self, name, value)

    def __getitem__(self, index: Any) -> Any:
        self._refuse_parts()
        return super().__getitem__(index)  # type: ignore[misc]

    def __iter__(self) -> Any:
        self._refuse_parts()
        opcode = _following(sys._getframe(1))[0]
        if opcode.opname == "UNPACK_SEQUENCE":
            source = _attribute_of(self.node, "shape")
            if source is not None:
                source.meta["rank"] = opcode.argval  # or Python raises
            return iter([self[i] for i in range(opcode.argval)])
        return iter([self[i] for i in range(self._length_of_sizes())])

    def __len__(self) -> int:
        return self._length_of_sizes()

    def _length_of_sizes(self) -> int:
        """Of a shape or a part of it: that of images where nothing else is known of the tensor; checked at calls."""
        part = slice(None)
        shape = self.node
        if shape.target is operator.getitem and isinstance(shape.args[1], slice):
            shape, part = shape.args  # type: ignore[assignment]
        source = _attribute_of(shape, "shape") or _called_on(shape, "size")
        bounds = (part.start, part.stop, part.step)
        if not isinstance(source, fx.Node) or not all(bound is None or isinstance(bound, int) for bound in bounds):
            return self.tracer.iter(self)  # type: ignore[return-value]  # which raises
        rank = _rank(source) or _RANK_OF_IMAGES
        if "rank" not in source.meta:
            self.tracer.create_proxy("call_function", blocks.expect_rank, (fx.Proxy(source, self.tracer), rank), {})
            source.meta["rank"] = rank
        return len(range(*part.indices(rank)))

    def __contains__(self, item: Any) -> bool:
        """Of ``"cuda" in x.device.type``."""
        device = self.tracer.device() if self._is_device_type() else None  # type: ignore[attr-defined]
        if device is None:
            raise fx.proxy.TraceError("it looks into a computed value")
        self.tracer.create_proxy("call_function", blocks.assume, (self == device.type, True), {})
        return item in device.type

    def _is_device_type(self) -> bool:
        source = _attribute_of(_attribute_of(self.node, "type"), "device")
        return source is not None and is_tensor(source)

    def __bool__(self) -> bool:
        """Of ``assert value`` and ``if value: raise ...``, taken to hold, and of what is assumed of inputs; checked at
        each call.
        """
        check: Any = blocks.expect
        truth = _truth_without_raising(_following(sys._getframe(1)))
        if truth is None:
            check, truth = blocks.assume, _assumed(self)
            self.tracer.count_question()  # type: ignore[attr-defined]
        if truth is None:
            return self.tracer.to_bool(self)
        self.tracer.create_proxy("call_function", check, (self, truth), {})
        return truth

    def _known_size(self) -> int:
        """Of a number of channels, which the layer before decides, where Python code asks for an integer or a float."""
        size = _channels(self.node, self.tracer.root)  # type: ignore[attr-defined]
        if size is None:
            raise fx.proxy.TraceError("it makes a number of a size, which is not recorded")
        return size

    def __int__(self) -> int:
        return self._known_size()

    def __float__(self) -> float:
        return float(self._known_size())

    def _refuse_parts(self) -> None:
        """Of a module that is one node, as nothing shows whether they are those of a tensor."""
        if not isinstance(self, Attribute) and self.node.target is blocks.tensor:
            raise fx.proxy.TraceError(f"it takes parts of what {self.node.args[0]} returns, which cannot be traced")

    def _in_place(self, function: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(blocks.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(blocks.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(blocks.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(blocks.itruediv, other)

    def _refuse_in_place(self, other: Any) -> Any:
        raise fx.proxy.TraceError("it changes a tensor by an operator that is not recorded")

    __ifloordiv__ = __imod__ = __ipow__ = __iand__ = __ior__ = __ixor__ = __imatmul__ = _refuse_in_place
    __ilshift__ = __irshift__ = _refuse_in_place


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


BELIEVED = {"type": BelievedType, "isinstance": _is_instance, "callable": _is_callable}  # built in, as code sees them


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
    " transpose t unsqueeze squeeze expand repeat contiguous clone detach float double half to type_as flip".split()
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


_RANK_OF_IMAGES = 4
_LAYERS_2D = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d)
_MOST_STEPS = 30


def _rank(node: Any, steps: int = 0) -> int | None:
    """The number of dimensions of a tensor, as far as it shows from what computes it: of several, the most."""
    if not isinstance(node, fx.Node) or not is_tensor(node) or steps > _MOST_STEPS:
        return None
    if "rank" in node.meta:
        return node.meta["rank"]
    if node.op == "call_module" or node.target in (F.conv2d, F.conv_transpose2d):
        return _RANK_OF_IMAGES if node.op == "call_function" or type(node.meta["layer"]) in _LAYERS_2D else None
    if node.op == "call_method" and node.target in ("view", "reshape"):
        sizes: Any = node.args[1:]
        return len(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else len(sizes)
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        inner = max(_rank(node.args[0], steps + 1) or 0, len(index) - index.count(None))
        return inner + index.count(None) if all(i is None or isinstance(i, slice) for i in index) else None
    if (node.op == "call_method" and node.target in _CHANGING) or node.target in _CHANGING_FUNCTIONS:
        return None
    ranks = [_rank(argument, steps + 1) for argument in node.all_input_nodes]
    return max(filter(None, ranks), default=None)


_CHANGING = set("flatten unsqueeze squeeze sum mean".split())
_CHANGING_FUNCTIONS = {torch.stack, torch.mean, torch.sum, F.embedding, torch.matmul, operator.matmul}


def _known_of_own(symbol: Symbol, name: str) -> Any:
    """Of a parameter or buffer, what must stay as it is; None of other tensors."""
    tracer: Any = symbol.tracer
    return tracer.kind_of(str(symbol.node.target), name) if symbol.node.op == "get_attr" else None


def _assumed(symbol: Symbol) -> bool | None:
    """Of a question for device or dtype, those of a module that has but one; of one for dimensions, what shows of them;
    of one for the batch, that it is of a single image.
    """
    tracer, node = symbol.tracer, symbol.node
    assert isinstance(tracer, fx.Tracer)
    if node.target not in _COMPARISONS:
        device = tracer.device() if is_tensor_node(_attribute_of(node, "is_cuda")) else None  # type: ignore[attr-defined]
        return None if device is None else device.type == "cuda"
    if len(node.args) != 2:
        return None
    asked, value = node.args
    compare: Any = node.target
    if isinstance(value, str):
        source = _attribute_of(_attribute_of(asked, "type"), "device")
        device = tracer.device() if is_tensor_node(source) else None  # type: ignore[attr-defined]
        return None if device is None else compare(device.type, value)
    if isinstance(value, fx.Node) and value.target is torch.device and not value.all_input_nodes:
        with torch._C.DisableTorchFunction():
            value = torch.device(*value.args, **value.kwargs)  # type: ignore[arg-type]
        device = tracer.device() if is_tensor_node(_attribute_of(asked, "device")) else None  # type: ignore[attr-defined]
        return None if device is None else compare(device, value)
    if isinstance(value, torch.dtype):
        dtype = tracer.dtype() if is_tensor_node(_attribute_of(asked, "dtype")) else None  # type: ignore[attr-defined]
        return None if dtype is None else compare(dtype, value)
    if (source := _attribute_of(asked, "ndim") or _called_on(asked, "dim")) is not None and is_tensor(source):
        rank = _rank(source)
        return compare(rank, value) if rank is not None and isinstance(value, int) else None
    size = _size_of_one_image(asked)
    return compare(size, value) if size is not None and isinstance(value, int | float) else None


_COMPARISONS = {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}


def _size_of_one_image(node: Any) -> float | None:
    """Of ``x.shape[0]`` and ``x.size(0)``, 1; of the number of elements, which is compared with what is large, too; of
    multiples of these.
    """
    if not isinstance(node, fx.Node):
        return None
    if node.target is operator.getitem and node.args[1] == 0:
        return 1 if _has_batch_of_input(_attribute_of(node.args[0], "shape")) else None
    if (node.target == "size" and node.args[1:] == (0,)) or (node.target == "numel" and len(node.args) == 1):
        return 1 if _has_batch_of_input(node.args[0]) else None
    if node.target is operator.mul and isinstance(node.args[1], int | float):
        size = _size_of_one_image(node.args[0])
        return None if size is None else size * node.args[1]
    return None


def _has_batch_of_input(node: Any) -> bool:
    """Of a tensor that layers and activations make of an input, which keep the number of images."""
    while is_tensor_node(node) and node.op != "placeholder":
        keeps = node.op == "call_module" or node.target in _FUNCTIONS - {torch.cat, torch.stack, torch.flip}
        if not (keeps or node.target in (operator.add, operator.mul, operator.sub, operator.truediv)):
            return False
        node = node.args[0] if node.args else None
    return is_tensor_node(node)


def _called_on(node: Any, name: str) -> fx.Node | None:
    """What a node calls the method of that name of, without arguments."""
    is_call = isinstance(node, fx.Node) and node.op == "call_method" and node.target == name and len(node.args) == 1
    return node.args[0] if is_call else None


def is_tensor_node(node: Any) -> bool:
    return isinstance(node, fx.Node) and is_tensor(node)


def _attribute_of(node: Any, name: str) -> fx.Node | None:
    """What a node takes the attribute of that name of."""
    if isinstance(node, fx.Node) and node.target is getattr and node.args[1] == name:
        return node.args[0]  # type: ignore[return-value]
    return None


_CHANNELS: dict[type, str] = {
    **dict.fromkeys((torch.nn.Conv2d, torch.nn.ConvTranspose2d), "out_channels"),
    **{torch.nn.BatchNorm2d: "num_features", torch.nn.GroupNorm: "num_channels"},
}


def _channels(node: fx.Node, root: torch.nn.Module) -> int | None:
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


class _Attribute(Symbol, Attribute):
    """An attribute or method of a symbol. The dtype or device of a parameter or buffer is known if it is looked at."""

    def _known(self) -> Any:
        known = (
            isinstance(self.root, Symbol) and not isinstance(self.root, Attribute) and self.attr in ("dtype", "device")
        )
        return _known_of_own(self.root, self.attr) if known else None  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        known = self._known()
        return super().__getattr__(name) if known is None else getattr(known, name)

    def __eq__(self, other: object) -> Any:
        known = self._known()
        return super().__eq__(other) if known is None else known == other

    def __ne__(self, other: object) -> Any:
        known = self._known()
        return super().__ne__(other) if known is None else known != other

    __hash__ = fx.Proxy.__hash__


def _following(frame: Any) -> list[dis.Instruction]:
    """The instructions of a function from the present one on."""
    steps = _instructions(frame.f_code)
    return steps[bisect.bisect_left(steps, frame.f_lasti, key=operator.attrgetter("offset")) :]


@functools.lru_cache(maxsize=1024)
def _instructions(code: CodeType) -> list[dis.Instruction]:
    return list(dis.get_instructions(code))


def _truth_without_raising(steps: list[dis.Instruction]) -> bool | None:
    """The truth value that skips a block which does nothing but raise, where that is what it decides."""
    jump = next((step for step in steps[:2] if step.opname.startswith("POP_JUMP")), None)
    if jump is None or not jump.opname.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    body = [step.opname for step in steps if jump.offset < step.offset < jump.argval]
    leaves = [name for name in body if "JUMP" in name or name.startswith(("RETURN", "YIELD", "FOR_", "SEND", "RAISE"))]
    return jump.opname.endswith("IF_TRUE") if leaves == ["RAISE_VARARGS"] == body[-1:] else None
