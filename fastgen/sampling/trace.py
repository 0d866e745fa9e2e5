"""Pass 1, trace: run the module once on real tensors and follow every ATen call.

Tensors that depend on the image have a *shadow*: for each element the code of the plane element that it holds (see
`fastgen.sampling.graph`).  The shadow belongs to the storage, with the strides of the values, so views and in-place
writes need no rule of their own.  Calls that depend on parameters alone just run: weight normalisation, masks and the
like are folded by having happened.  Calls that depend on the labels or the condition, but not on the image, run and are
recorded on a tape, which is replayed for the labels and conditions at hand before sampling.

A dispatch mode sees the calls one by one with the values at hand; masks that are applied in place to the weights, also
through ``.data``, are therefore as good as any.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen import backends, ops
from fastgen.sampling import (  # noqa: F401  (some for their rules)
    attention,
    channels,
    choices,
    elementwise,
    joined_scores,
    logits,
    lowering,
    mixing,
    planes,
    products,
    recurrent,
    rules,
    score_rules,
    scores,
)
from fastgen.sampling.graph import (
    TOP_LEVEL,
    Condition,
    Constant,
    Graph,
    Image,
    LayoutError,
    Node,
    Ref,
    UnsupportedModel,
)
from fastgen.sampling.orders import Order
from fastgen.sampling.precision import weights_in
from fastgen.sampling.subject import Conditions, Subject, host_defaults
from fastgen.sampling.tape import TRACE_BATCH, Tape, storage_key, tensors_in, whole_storage, written


def _cheap_convolution(func: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """The result of aten::convolution in shape and strides: values of what depends on the image serve nobody, and those
    of convolutions take most of the time.  Two channels, because one has the strides of any memory format.
    """
    transposed, groups = rest[4], rest[6]
    if groups > 1:
        return func(x, weight, *rest)
    return func(x[:, :2], weight[:2] if transposed else weight[:, :2], *rest)


def _has_shape_by_values(func: Any, inputs: list[Tensor]) -> bool:
    """Whether the values of the inputs decide on the shape of the result."""
    if func is torch.ops.aten.index.Tensor:
        return any(index.dtype in (torch.bool, torch.uint8) for index in inputs[1:])
    return torch.Tag.dynamic_output_shape in func.tags


class Tracer(TorchDispatchMode):
    """Builds a Graph from the calls made while the mode is active."""

    def __init__(self, inputs: list[Tensor], names: str, precision: str = "fp32"):
        super().__init__()
        self.precision = precision
        self.graph = Graph(TRACE_BATCH)
        self.tape = Tape(inputs, names)
        self.log_softmaxes: dict[int, np.ndarray] = {}  # by node: see `fastgen.sampling.logits`
        self.module = ""  # path of the module whose forward is running
        # storage -> (flat codes, the storage, which keeps its key but not its memory)
        self._shadows: dict[int, tuple[Tensor, StorageWeakRef]] = {}
        # Orders of elements or rows of tensors as feature maps, by shape; where codes of the last results are found.
        self.orders: dict[tuple[int, ...], Order] = {}
        self.made: dict[int, tuple[weakref.ref, Order, Ref]] = {}
        self._scores: dict[int, tuple[scores.Known, StorageWeakRef]] = {}
        self.repeated: dict[tuple[int, ...], Node] = {}  # constants for all heads: see `fastgen.sampling.planes`
        self.masks: dict[Hashable, Tensor] = {}  # of conditions, by how they are made: see `fastgen.sampling.key_masks`
        self.turns: list[Constant] = []  # factors of rotated queries and keys: see `fastgen.sampling.rotations`

    # Shadows.

    def depends(self, tensor: Tensor) -> bool:
        """Whether any element may depend on the image."""
        return storage_key(tensor) in self._shadows or storage_key(tensor) in self._scores

    def varies(self, tensor: Tensor) -> bool:
        """Whether any element may depend on the image, the labels or the condition."""
        return self.depends(tensor) or self.tape.depends(tensor)

    def codes(self, tensor: Tensor) -> Tensor:
        """int64 codes with the shape of `tensor`; parameters and conditions become planes of their own."""
        found = self.scores_of(tensor)
        if found is not None:
            raise scores.lost_in(found)
        if tensor.is_complex():  # its storage has the codes of both parts
            raise LayoutError("on complex numbers")
        if self.depends(tensor):
            flat, _ = self._shadows[storage_key(tensor)]
            return torch.as_strided(flat, tensor.shape, tensor.stride(), tensor.storage_offset())
        return self._outside_codes(tensor)

    def set_codes(self, tensor: Tensor, codes: Tensor) -> None:
        """`tensor` now holds the plane elements `codes`."""
        key = storage_key(tensor)
        if key not in self._shadows:
            whole = whole_storage(tensor)
            covered = codes.numel() == whole.numel()  # else the rest of the storage keeps its values
            flat = torch.empty(whole.shape, dtype=torch.int64)
            if not covered:
                if self.tape.depends(whole):
                    raise self.unsupported(
                        f"writing the image into a part of a tensor that depends on {self.tape.names}"
                    )
                flat = self._outside_codes(whole) * (whole.cpu() != 0)
            # New memory costs more than all else here: that of tensors which are gone is taken again.
            self._shadows = {k: shadow for k, shadow in self._shadows.items() if not shadow[1].expired()}
            self._shadows[key] = (flat, StorageWeakRef(tensor.untyped_storage()))
            self._scores.pop(key, None)
        flat, _ = self._shadows[key]
        torch.as_strided(flat, tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(codes)

    def scores_of(self, tensor: Tensor) -> scores.Known | None:
        found = self._scores.get(storage_key(tensor))
        return None if found is None else found[0]

    def set_scores(self, tensor: Tensor, known: scores.Known) -> None:
        self._scores = {k: kept for k, kept in self._scores.items() if not kept[1].expired()}
        self._scores[storage_key(tensor)] = known, StorageWeakRef(tensor.untyped_storage())

    def _outside_codes(self, tensor: Tensor) -> Tensor:
        """Codes of a tensor that does not depend on the image: its elements form a new plane; zeros are zeros."""
        if self.tape.depends(tensor):
            return self._codes_of_samples(tensor)
        value = tensor.detach().to("cpu", torch.float32)
        if not value.any():
            return torch.zeros(value.shape, dtype=torch.int64)
        if value.dim() > 1 and value.shape[0] % TRACE_BATCH == 0:
            first, *others = value.chunk(TRACE_BATCH)
            if all(torch.equal(first, other) for other in others):  # the same for every sample
                codes = self._constant_codes(first)
                if len(first) == 1:
                    return codes.expand(tensor.shape)
                return codes.repeat(TRACE_BATCH, *[1] * (first.dim() - 1))
        return self._constant_codes(value)

    def _codes_of_samples(self, tensor: Tensor) -> Tensor:
        """Codes of a tensor that depends on labels or condition: a plane, which is given with each batch."""
        if tensor.dim() == 0 or tensor.shape[0] != TRACE_BATCH or TRACE_BATCH in tensor.shape[1:]:
            found = self.tape.by_sample(tensor)
            if found is not None and found[0] is not tensor:
                return self._codes_of_samples(found[0]).permute(found[1]).reshape(tensor.shape)
            if found is None and (tensor.dim() == 0 or tensor.shape[0] != TRACE_BATCH):
                raise self.unsupported(
                    f"a tensor of shape {tuple(tensor.shape)} that depends on {self.tape.names} and whose first "
                    "dimension is not the batch"
                )
        depth, height, width = tensor.shape[1:] if tensor.dim() == 4 else (tensor[0].numel(), 1, 1)
        kept = self.tape.keep(tensor)
        return self.add(Condition(self.module, depth, height, width, tensor=kept)).view(tensor.shape)

    def _constant_codes(self, value: Tensor) -> Tensor:
        whole = value.dim() == 4 and value.shape[0] == 1
        size = tuple(value.shape[1:]) if whole else (value.numel(), 1, 1)
        data = value.reshape(size).clone()
        return self.add(Constant(self.module, size[0], size[1], size[2], data=data)).view(value.shape)

    # Calls.

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import all of torch.compile, two seconds, to keep it away from this mode

    def unsupported(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(f"module {self.module or TOP_LEVEL!r}: {what} cannot be sampled incrementally")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        if any(self.depends(t) for t in inputs):
            return self._lower(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self.unsupported(f"a network that is random (operator {func})")
        on_tape = any(self.tape.depends(t) for t in inputs)
        if on_tape:
            for tensor in written(func, args, kwargs):
                self.tape.will_write(tensor)
        result = func(*args, **kwargs)
        if on_tape:
            if (func._schema.returns and not tensors_in(result)) or _has_shape_by_values(func, inputs):
                raise self.unsupported(f"Python code that reads the values of {self.tape.names} (operator {func})")
            self.tape.record(func, args, kwargs, tensors_in(result))
        return result

    def _lower(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run a call that depends on the image, and its rule."""
        if not rules.named(func):
            with self:  # in inference mode composite operators come undecomposed
                result = func.decompose(*args, **kwargs)
                if result is NotImplemented:
                    result = scores.unfused(func, args, kwargs)
            if result is not NotImplemented:
                return result
        with self.refusing(func), host_defaults():
            result = scores.lower(self, func, args, kwargs)
        if result is not NotImplemented:
            return result
        rule = rules.find(func)
        if rule is None:
            hint = rules.HINTS.get(func._schema.name.removeprefix("aten::"))
            hint = "fastgen.sampling.rules.supported() lists those that can" if hint is None else hint
            raise self.unsupported(f"operator {func} ({hint})")
        with self.refusing(func):
            with host_defaults():
                for tensor in written(func, args, kwargs):
                    if not self.depends(tensor):
                        self.set_codes(tensor, self.codes(tensor))  # what it holds before the call
            convolution = func is torch.ops.aten.convolution.default
            result = _cheap_convolution(func, *args) if convolution else func(*args, **kwargs)
            with host_defaults():
                rule(self, func, args, kwargs, tensors_in(result))
        return result

    @contextlib.contextmanager
    def refusing(self, func: object) -> Iterator[None]:
        """What has no rule becomes an error that names the operator."""
        try:
            yield
        except LayoutError as error:
            what = str(error) or "on tensors that are not shifted windows of feature maps"
            raise self.unsupported(f"operator {func} {what}") from None

    def recognise(self, codes: Tensor, pieces: int = 1) -> Ref:
        """`Graph.recognise`, with new planes for constants and conditions in another layout. With pieces = 1, also
        where views lie beside each other, and where elements were set to zero inside a plane (a crop that was padded
        again); with 2, where both is so.
        """
        with contextlib.suppress(LayoutError):
            return self.graph.recognise(codes)
        codes = planes.rebuilt(self, codes)
        if not pieces:
            return self.graph.recognise(codes)
        codes = codes.clamp(min=0)
        for attempt in (self.graph.recognise, functools.partial(planes.pieced, self)):
            with contextlib.suppress(LayoutError):
                return attempt(codes)
        if pieces == 1:
            return planes.blanked(self, codes)
        with contextlib.suppress(LayoutError):
            return planes.blanked(self, codes)
        return planes.overlaid(self, codes)

    def add(self, node: Node) -> Tensor:
        """Add a node; returns its codes [N, C, h, w]."""
        return self.graph.codes(self.graph.add(node))


class _Watch(TorchFunctionMode):
    """For what no dispatch mode sees: values that leave for Python, where they would stay those of the trace."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tracer, tensor, name = self.tracer, args[0] if args else None, getattr(func, "__name__", "")
        if isinstance(tensor, Tensor) and tracer.varies(tensor):
            if name in ("tolist", "numpy", "__array__", "__dlpack__"):
                what = "the image" if tracer.depends(tensor) else tracer.tape.names
                raise tracer.unsupported(f"Python code that reads the values of {what} (Tensor.{func.__name__})")
            if func is F.one_hot:  # it looks at the values itself
                return _one_hot(tracer, *args, **kwargs)
        if isinstance(tensor, Tensor) and tracer.depends(tensor):
            with tracer.refusing(name), host_defaults():
                if func is ops.row_lstm:
                    return recurrent.row_lstm(tracer, *args)
                if name in recurrent.LAYERS:
                    return recurrent.lower(tracer, name, args)
        return func(*args, **kwargs)


def _one_hot(tracer: Tracer, tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        raise tracer.unsupported("F.one_hot without num_classes")
    return F.embedding(tensor, torch.eye(num_classes, dtype=tensor.dtype, device=tensor.device))


@contextlib.contextmanager
def _module_paths(root: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Keep tracer.module at the path of the submodule that is running."""
    stack: list[str] = []
    handles = []
    for path, module in root.named_modules():

        def enter(_module: nn.Module, _args: Any, path: str = path) -> None:
            stack.append(tracer.module)
            tracer.module = path

        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            tracer.module = stack.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace(
    subject: Subject,
    image: Tensor,
    labels: Tensor | None = None,
    conditions: Conditions | None = None,
    precision: str = "fp32",
) -> tuple[Graph, Tape]:
    """Follow subject.forward(image, labels, conditions).

    Args:
        subject: its module in eval mode.
        image: encoded images [TRACE_BATCH, C, H, W]; the values matter only to operators that do not depend on them in
            a supported model.
        labels: [TRACE_BATCH] or None.
        conditions: [TRACE_BATCH, ...] each, or None; nobody else's memory.
        precision: that the weights are rounded to; "bf16" is left to the plan, which can round them one by one.

    Returns:
        the graph, its `output` set, and the tape of calls that depend on labels or condition alone.

    Raises:
        UnsupportedModel: an operator without a lowering, an output of the wrong shape, or an error in the forward.
    """
    conditions = conditions or {}
    inputs = [*([] if labels is None else [labels]), *conditions.values()]
    names = [*([] if labels is None else ["the labels"]), *(["the condition"] if conditions else [])]
    tracer = Tracer(inputs, " or ".join(names), precision)
    with host_defaults():
        tracer.set_codes(image, tracer.add(Image("", *image.shape[1:])))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(backends.backend("reference"))
        stack.enter_context(scores.undisguised())
        stack.enter_context(_module_paths(subject.module, tracer))
        stack.enter_context(_Watch(tracer))
        stack.enter_context(tracer)
        if precision == "int8":
            stack.enter_context(weights_in(precision))
        output = _forward(subject, tracer, image, labels, conditions)
    if output.dim() != 4 or output.shape[0] != TRACE_BATCH:
        raise UnsupportedModel(
            f"the network's output must be a tensor [N, parameters, H, W] or, for Categorical, [N, levels, C, H, W], "
            f"got shape {tuple(output.shape)}"
        )
    if tuple(output.shape[2:]) != tuple(image.shape[2:]):
        raise UnsupportedModel(
            f"the network's output has height and width {tuple(output.shape[2:])}, the image {tuple(image.shape[2:])}"
        )
    try:
        with host_defaults():
            codes = tracer.codes(output)
            found = tracer.recognise(codes)
            tracer.graph.output = tracer.graph.at_stride(found, (1, 1), (output.shape[2], output.shape[3]))
    except LayoutError as error:
        what = "is not made of shifted windows of feature maps, as those of convolutions and attention are"
        what = f"depends {error}" if str(error).startswith("on ") else what
        raise UnsupportedModel(f"the network's output {what}") from None
    if output.shape[1] == subject.head.num_params(subject.image_shape[0]):  # `compile_graph` refuses others
        logits.check_logits(tracer, codes, subject.head)
    return tracer.graph, tracer.tape


def _forward(subject: Subject, tracer: Tracer, image: Tensor, labels: Tensor | None, conditions: Conditions) -> Tensor:
    try:
        return subject.forward(image, labels, conditions)
    except UnsupportedModel:
        raise
    except Exception as error:
        shape = tuple(image.shape if subject.reads_channels else image.squeeze(1).shape)
        given = f"{image.dtype} of shape {shape}"
        for condition in conditions.values():
            given += f" and a condition of shape {tuple(condition.shape)}"
        raise UnsupportedModel(
            f"module {tracer.module or TOP_LEVEL!r} of {type(subject.module).__name__}, which was given {given}, "
            f"raised {type(error).__name__}: {error}"
        ) from error
