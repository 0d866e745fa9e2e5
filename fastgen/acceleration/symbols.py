"""What Python code of a traced forward sees in place of tensors and their attributes.

Symbols answer what is known of the tensor that they stand for, and refuse what is not.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute

from fastgen.acceleration import blocks
from fastgen.acceleration.bytecode import following, truth_without_raising
from fastgen.acceleration.nodes import (
    COMPARISONS,
    RANK_OF_IMAGES,
    attribute_of,
    called_on,
    channels,
    is_stride_one,
    is_tensor,
    is_tensor_node,
    shown_rank,
    size_of_one_image,
)
from fastgen.acceleration.sizes import is_size, known_size, learn, rank_of, same_size, size_at, tensor_of_shape

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
        if self._is_tensor() or asks or following(caller)[0].opname == "MATCH_CLASS":
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
        opcode = following(sys._getframe(1))[0]
        if (count := self._length_unbound()) is not None:
            return iter([self[i] for i in range(count)])
        if opcode.opname == "UNPACK_SEQUENCE":
            source = attribute_of(self.node, "shape")
            if source is not None:
                source.meta["rank"] = opcode.argval  # or Python raises
            return iter([self[i] for i in range(opcode.argval)])
        return iter([self[i] for i in range(self._length_of_sizes())])

    def __len__(self) -> int:
        if self._is_tensor():  # in code outside of the modules' own files
            raise fx.proxy.TraceError("it calls len(tensor), which is not recorded there: tensor.shape[0] is")
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
        source = attribute_of(shape, "shape") or called_on(shape, "size")
        bounds = (part.start, part.stop, part.step)
        if not isinstance(source, fx.Node) or not all(bound is None or isinstance(bound, int) for bound in bounds):
            return self.tracer.iter(self)  # type: ignore[return-value]  # which raises
        return len(range(*part.indices(self._rank_of(source))))

    def _rank_of(self, source: fx.Node) -> int:
        rank = rank_of(source) or shown_rank(source) or RANK_OF_IMAGES
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
        source = attribute_of(attribute_of(self.node, "type"), "device")
        return source is not None and is_tensor(source)

    def __bool__(self) -> bool:
        """Of ``assert value`` and ``if value: raise ...``, taken to hold, and of what is assumed of inputs; checked at
        each call.
        """
        check: Any = blocks.expect
        truth = truth_without_raising(following(sys._getframe(1)))
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
        source = attribute_of(self.node, "ndim") or called_on(self.node, "dim")
        if source is None or not is_tensor(source):
            raise fx.proxy.TraceError("it makes a number of a computed value, which is not recorded")
        return self._rank_of(source)

    def _known_size(self) -> int:
        """Of a number of channels, which the layer before decides, where Python code asks for an integer or a float."""
        size = channels(self.node, self.tracer.root)  # type: ignore[attr-defined]
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
    if node.target not in COMPARISONS:
        device = tracer.device() if is_tensor_node(attribute_of(node, "is_cuda")) else None  # type: ignore[attr-defined]
        return None if device is None else device.type == "cuda"
    if len(node.args) != 2:
        return None
    asked, value = node.args
    compare: Any = node.target
    if isinstance(value, str):
        source = attribute_of(attribute_of(asked, "type"), "device")
        device = tracer.device() if is_tensor_node(source) else None  # type: ignore[attr-defined]
        return None if device is None else compare(device.type, value)
    if isinstance(value, fx.Node) and value.target is torch.device and not value.all_input_nodes:
        with torch._C.DisableTorchFunction():
            value = torch.device(*value.args, **value.kwargs)  # type: ignore[arg-type]
        device = tracer.device() if is_tensor_node(attribute_of(asked, "device")) else None  # type: ignore[attr-defined]
        return None if device is None else compare(device, value)
    if isinstance(value, torch.dtype):
        dtype = tracer.dtype() if is_tensor_node(attribute_of(asked, "dtype")) else None  # type: ignore[attr-defined]
        return None if dtype is None else compare(dtype, value)
    if (source := attribute_of(asked, "ndim") or called_on(asked, "dim")) is not None and is_tensor(source):
        rank = shown_rank(source)
        return compare(rank, value) if rank is not None and isinstance(value, int) else None
    if (stride := is_stride_one(asked, compare, value)) is not None:
        return stride
    size = size_of_one_image(asked)
    if size is None or not isinstance(value, int | float):
        return None
    if compare(size, value) is not compare(2 * size, value) and value < 2 * size:
        tracer.asked_for_images = True  # type: ignore[attr-defined]
        size = 2 * size if tracer.several else size  # type: ignore[attr-defined]
    return compare(size, value)


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
