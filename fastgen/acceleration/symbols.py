"""What Python code of a traced forward sees in place of tensors and their attributes.

Symbols answer what is known of the tensor that they stand for, and refuse what is not.
"""

from __future__ import annotations

import ast
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
from fastgen.acceleration.sizes import is_size, known_size, learn, rank_of, same_size, size_at, tensor_of_shape

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
        if is_size(self.node):
            return int
        if not self._is_tensor():
            raise fx.proxy.TraceError("it asks for the type of a computed value")
        tracer: Any = self.tracer
        if checked and self.node.op == "placeholder":
            tracer.create_proxy("call_function", blocks.expect_plain, (self,), {})
        return Tensor if self.node.op != "get_attr" else tracer.type_of(str(self.node.target))

    __class__ = property(_seen_class)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name) or (is_size(self.node) and not hasattr(int, name)):
            if self._is_tensor():
                raise AttributeError(f"'Tensor' object has no attribute '{name}'")
            raise fx.proxy.TraceError(f"it asks a computed value for {name!r}")
        if name in _OF_GRADIENTS:
            raise fx.proxy.TraceError(f"it asks a tensor for {name!r}")
        known = _known_of_own(self, name) if name in ("shape", "ndim") else None
        if known is None and name == "ndim" and self._is_tensor():
            known = rank_of(self.node)
        return _Attribute(self, name) if known is None else known

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._OWN:
            raise fx.proxy.TraceError(f"it sets the attribute {name!r} of a tensor")
        object.__setattr__(self, name, value)

    def __getitem__(self, index: Any) -> Any:
        self._refuse_parts()
        tensor = tensor_of_shape(self.node) if type(index) is int else None
        known = None if tensor is None else size_at(tensor, index)
        if known is not None:
            return self.tracer.proxy(known) if isinstance(known, fx.Node) else known
        return super().__getitem__(index)  # type: ignore[misc]

    def __iter__(self) -> Any:
        self._refuse_parts()
        opcode = _following(sys._getframe(1))[0]
        if (count := self._length_unbound()) is not None:
            return iter([self[i] for i in range(count)])
        if opcode.opname == "UNPACK_SEQUENCE":
            source = _attribute_of(self.node, "shape")
            if source is not None:
                source.meta["rank"] = opcode.argval  # or Python raises
            return iter([self[i] for i in range(opcode.argval)])
        return iter([self[i] for i in range(self._length_of_sizes())])

    def __len__(self) -> int:
        return self._length_of_sizes()

    def _length_unbound(self) -> int | None:
        """Of what ``x.unbind(dim)`` returns, where the size along the dimension is known."""
        node, dim = self.node, self.node.kwargs.get("dim", self.node.args[1] if len(self.node.args) > 1 else 0)
        if (
            node.op != "call_method"
            or node.target != "unbind"
            or not is_tensor_node(node.args[0])
            or type(dim) is not int
        ):
            return None
        size = size_at(node.args[0], dim)  # type: ignore[arg-type]
        return size if type(size) is int else None

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
        return len(range(*part.indices(self._rank_of(source))))

    def _rank_of(self, source: fx.Node) -> int:
        rank = rank_of(source) or _rank(source) or _RANK_OF_IMAGES
        if rank_of(source) is None:
            self.tracer.create_proxy("call_function", blocks.expect_rank, (fx.Proxy(source, self.tracer), rank), {})
            source.meta["rank"] = rank
        return rank

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
        if check is blocks.expect:
            learn(self.node, truth)
        return truth

    def __eq__(self, other: object) -> Any:
        same = self._is_same_size(other)
        return super().__eq__(other) if same is None else same

    def __ne__(self, other: object) -> Any:
        same = self._is_same_size(other)
        return super().__ne__(other) if same is None else not same

    def __hash__(self) -> int:
        if is_size(self.node):
            raise fx.proxy.TraceError("it looks for a size in a table")
        return fx.Proxy.__hash__(self)

    def _is_same_size(self, other: object) -> bool | None:
        """True where it shows without a call; False of two numbers that are known; else None."""
        mine = known_size(self.node) if is_size(self.node) else None
        if mine is None:
            return None
        others = other.node if issubclass(type(other), Symbol) else other  # type: ignore[attr-defined]
        if same_size(mine, others):
            return True
        return False if type(mine) is int and type(known_size(others)) is int else None

    def __index__(self) -> int:
        """Of a number of dimensions, as in ``range(x.ndim)``; checked at each call."""
        source = _attribute_of(self.node, "ndim") or _called_on(self.node, "dim")
        if source is None or not is_tensor(source):
            raise fx.proxy.TraceError("it makes a number of a computed value, which is not recorded")
        return self._rank_of(source)

    def _known_size(self) -> int:
        """Of a number of channels, which the layer before decides, where Python code asks for an integer or a float."""
        size = _channels(self.node, self.tracer.root)  # type: ignore[attr-defined]
        if size is None and is_size(self.node):
            size = known_size(self.node)
            if type(size) is not int:
                self.tracer.wants_int(sys._getframe(2).f_globals)  # type: ignore[attr-defined]
                size = None
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
    " transpose t unsqueeze squeeze expand repeat contiguous clone detach float double half to type_as flip"
    " matmul narrow lerp norm add_ sub_ mul_ div_ clamp_".split()
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
    of one for strides, that the images are contiguous and have more than a pixel;
    of one for the batch, that it is of a single image, or of several where the tracer says so.
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
    if (stride := _is_stride_one(asked, compare, value)) is not None:
        return stride
    size = _size_of_one_image(asked)
    if size is None or not isinstance(value, int | float):
        return None
    if compare(size, value) is not compare(2 * size, value) and value < 2 * size:
        tracer.asked_for_images = True  # type: ignore[attr-defined]
        size = 2 * size if tracer.several else size  # type: ignore[attr-defined]
    return compare(size, value)


def _is_stride_one(asked: Any, compare: Any, value: Any) -> bool | None:
    """Of ``x.stride()[1] == 1`` and ``x.stride(1) == 1``."""
    if not isinstance(asked, fx.Node) or value != 1 or compare not in (operator.eq, operator.ne):
        return None
    tensor, dim = (asked.args[0], asked.args[1]) if asked.target is operator.getitem else (asked, None)
    tensor = _called_on(tensor, "stride") if dim is not None else None
    if dim is None and asked.op == "call_method" and asked.target == "stride" and len(asked.args) == 2:
        tensor, dim = asked.args
    if not is_tensor_node(tensor) or type(dim) is not int or rank_of(tensor) is None:  # type: ignore[arg-type]
        return None
    is_last = dim in (-1, rank_of(tensor) - 1)  # type: ignore
    return compare(1 if is_last else 2, 1)


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
    """Of a tensor that layers, activations and the like make of an input, which keep the number of images."""
    seen: set[fx.Node] = set()
    left = [node]
    while left:
        node = left.pop()
        if not is_tensor_node(node) or node in seen:
            continue
        if node.op == "placeholder":
            return True
        seen.add(node)
        left += _of_as_many_images(node)
    return False


def _of_as_many_images(node: fx.Node) -> tuple[Any, ...]:
    """The arguments that may have as many images as the result."""
    if node.op == "call_method":
        parts = node.target in ("unsqueeze", "narrow", "repeat")
        return node.args[:2] if node.target in _KEEP_IMAGES and (not parts or _keeps_first(node)) else ()
    if node.target in (torch.addmm, torch.matmul, operator.add, operator.mul, operator.sub, operator.truediv):
        return node.args
    if node.target is torch.cat:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return tuple(node.args[0]) if type(dim) is int and dim > 0 and isinstance(node.args[0], list | tuple) else ()
    keeps = node.op == "call_module" or node.target in _FUNCTIONS - {torch.cat, torch.stack, torch.flip}
    return (_input_of(node),) if keeps else ()


def _input_of(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


_KEEP_IMAGES = set(
    "to float double half contiguous clone detach square sqrt rsqrt abs neg exp add sub mul div matmul".split()
)
_KEEP_IMAGES |= set("add_ sub_ mul_ div_ clamp lerp relu tanh sigmoid unsqueeze narrow repeat".split())


def _keeps_first(node: fx.Node) -> bool:
    """Of ``x.unsqueeze(1)``, ``x.narrow(1, ...)`` and ``x.repeat(1, ...)``."""
    first: Any = node.args[1] if len(node.args) > 1 else 0
    first = first[0] if isinstance(first, list | tuple) and first else first
    return type(first) is int and (first == 1 if node.target == "repeat" else first != 0)


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
    behind = [step for step in steps if step.offset > jump.offset]
    if jump.argval > jump.offset:
        behind = [step for step in behind if step.offset < jump.argval]
    left = next((step for step in behind if _leaves(step.opname)), None)
    raises = left is not None and left.opname == "RAISE_VARARGS"
    if jump.argval > jump.offset:  # back to the head of a loop otherwise
        raises = raises and left is behind[-1]
    if raises:
        return jump.opname.endswith("IF_TRUE")
    target = [step for step in steps if step.offset >= jump.argval] if jump.argval > jump.offset else []
    leads_to = next((step for step in target if _leaves(step.opname)), None)  # as of ``assert a and b``
    return jump.opname.endswith("IF_FALSE") if leads_to is not None and leads_to.opname == "RAISE_VARARGS" else None


def _leaves(name: str) -> bool:
    return "JUMP" in name or name.startswith(("RETURN", "YIELD", "FOR_", "SEND", "RAISE"))
