"""What is sampled: a module together with the image shape and head that give its output a meaning."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgen._float32 import convolutions_like_products
from fastgen.sampling.graph import UnsupportedModel
from fastgen.sampling.heads import Categorical, Head

MAX_CHANNELS = 256  # of an image: what the schedule's keys have room for
# What a module reads besides images and labels: by position behind these, or by the name of the argument.
Conditions = dict[int | str, Tensor]
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


@dataclass(frozen=True)
class Subject:
    """module: `private`, so that running it changes nothing that others see.
    reads_channels: whether it reads images as [N, C, H, W]; else, of one channel, as [N, H, W].
    """

    module: nn.Module
    image_shape: tuple[int, int, int]
    head: Head
    num_classes: int | None
    reads_channels: bool = True

    def params(self, images: Tensor, labels: Tensor | None, conditions: Conditions) -> Tensor:
        """Head parameters [N, C*K, H, W] of levels [N, C, H, W], in the dtype and on the device of the module."""
        return self.forward(self.encode(images), labels, conditions)

    def forward(self, x: Tensor, labels: Tensor | None, conditions: Conditions) -> Tensor:
        """Head parameters [N, C*K, H, W] of encoded images [N, C, H, W]; as precise as an executor's on a GPU, too."""
        inputs = [x if self.reads_channels else x.squeeze(1)]
        if labels is not None:
            inputs.append(labels.to(self.like.device))
        own = {k: t.to(self.like.device, self._dtype_of(t), copy=True) for k, t in conditions.items()}  # to write into
        inputs += [tensor for key, tensor in own.items() if isinstance(key, int)]
        named = {key: tensor for key, tensor in own.items() if isinstance(key, str)}
        with convolutions_like_products():
            output = self._tensor_of(self.module(*inputs, **named), len(x))
        if output.shape in self._output_shapes(len(x))[1:]:
            return output.transpose(1, 2).flatten(1, 2)
        return output

    def _dtype_of(self, condition: Tensor) -> torch.dtype:
        return self.like.dtype if condition.is_floating_point() else condition.dtype

    def _output_shapes(self, n: int) -> list[tuple[int, ...]]:
        """Of head parameters for n images; the second one as losses take it."""
        channels, height, width = self.image_shape
        shapes: list[tuple[int, ...]] = [(n, self.head.num_params(channels), height, width)]
        return [*shapes, (n, self.head.levels, *self.image_shape)] if isinstance(self.head, Categorical) else shapes

    def _tensor_of(self, output: Any, n: int) -> Tensor:
        """What a module returned; of a mapping or dataclass its `logits`, of a tuple the one tensor that has a shape of
        head parameters: beside them come caches, hidden states and losses.
        """
        if isinstance(output, Tensor):
            return output
        shapes = self._output_shapes(n)
        entries = entries_of(output)
        if isinstance(entries.get("logits"), Tensor):
            return entries["logits"]
        parts = output if isinstance(output, tuple | list) else ()
        fitting = [part for part in parts if isinstance(part, Tensor) and part.shape in shapes]
        if len(fitting) == 1:
            return fitting[0]
        got = type(output).__name__
        if "logits" in entries:
            got += f" whose logits are a {type(entries['logits']).__name__}"
        elif entries:
            got += f" of {', '.join(map(str, entries))}, without logits"
        elif parts:
            each = (str([*p.shape]) if isinstance(p, Tensor) else type(p).__name__ for p in parts)
            got += f" ({', '.join(each)}) with {len(fitting) or 'none'} of that shape"
        raise UnsupportedModel(
            f"the network's output must be a tensor {' or '.join(str([*shape]) for shape in shapes)}, got {got}: "
            "wrap the model so that it returns its logits"
        )

    def encode(self, images: Tensor) -> Tensor:
        """What the module reads for levels [N, C, H, W], on its device and, unless it reads integers, in its dtype."""
        x = self.head.encode(images)
        return x.to(self.like) if x.is_floating_point() else x.to(self.like.device)

    @property
    def like(self) -> Tensor:
        """A floating point parameter: its dtype and device are the module's."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        return next((t for t in tensors if t.is_floating_point()), torch.zeros(()))


def entries_of(output: Any) -> dict[Any, Any]:
    """What a mapping or a dataclass holds; many libraries' outputs are one of them, or both."""
    if isinstance(output, Mapping):
        return dict(output)
    if is_dataclass(output) and not isinstance(output, type):
        return {f.name: getattr(output, f.name) for f in fields(output)}
    return {}


def make_subject(
    module: nn.Module,
    image_shape: tuple[int, ...] | None,
    head: Head | None,
    num_classes: int | None,
) -> Subject:
    """Take what is not given from the module's attributes `image_shape`, `head` and `num_classes`.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError("model must be a Python module, got one of TorchScript: pass what it was made of")
    image_shape = image_shape if image_shape is not None else getattr(module, "image_shape", None)
    head = head if head is not None else getattr(module, "head", None)
    num_classes = num_classes if num_classes is not None else getattr(module, "num_classes", None)
    if not isinstance(image_shape, Sequence) or len(image_shape) not in (2, 3) or not all(map(_positive, image_shape)):
        raise ValueError(f"image_shape must be (C, H, W) or (H, W) with positive integers, got {image_shape!r}")
    reads_channels = len(image_shape) == 3
    channels, height, width = image_shape if reads_channels else (1, *image_shape)
    if channels > MAX_CHANNELS:
        raise ValueError(f"image_shape must have at most {MAX_CHANNELS} channels, got {channels}")
    if not isinstance(head, Head):
        raise TypeError(f"head must be a fastgen.sampling.heads.Head, e.g. Categorical(256), got {type(head).__name__}")
    if num_classes is not None and not _positive(num_classes):
        raise ValueError(f"num_classes must be a positive integer or None, got {num_classes!r}")
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        raise ValueError("the model is on the meta device: its weights have no values")
    return Subject(private(module), (channels, height, width), head, num_classes, reads_channels)


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def private(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its tensors: modes, hooks and attributes that its forward sets are the copy's own,
    so that other threads, and later calls of the module, do not see them. What ``torch.compile`` wraps is unwrapped,
    and ``nn.TransformerEncoder`` computes padded positions as it does in training, instead of making them zeros.

    The module itself, where it cannot be copied.
    """
    module = _eager(module)
    parts = {id(part) for part in module.modules()}
    attributes = [dict(part.__dict__) for part in module.modules() if _eager(part) is part]
    leaves = [leaf for a in attributes for name in a if name != "_compiled_call_impl" for leaf in tree_leaves(a[name])]
    try:
        if any(isinstance(leaf, FunctionType) and _refers_to(leaf, parts) for leaf in leaves):
            return module  # a copy would share the function, and with it the original's parts
        result = copy.deepcopy(module, {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)})
    except Exception:  # locks, files, closures without end: whatever a module may hold
        return module
    for part in list(result.modules()):
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False
        for name, child in list(part._modules.items()):
            if child is not None and _eager(child) is not child:
                part._modules[name] = _eager(child)
    return result


def _refers_to(value: Any, modules: set[int]) -> bool:
    if not isinstance(value, FunctionType):
        return id(getattr(value, "__self__", value)) in modules
    inside = ([cell.cell_contents for cell in value.__closure__ or ()], value.__defaults__, value.__kwdefaults__)
    return any(_refers_to(v, modules) for v in tree_leaves(inside))


def _eager(module: nn.Module) -> nn.Module:
    """What ``torch.compile`` made the module of, which would be compiled anew for each way of running it."""
    inner = dict(module.named_children()).get("_orig_mod")
    return module if inner is None else _eager(inner)


@contextlib.contextmanager
def host_device() -> Iterator[None]:
    """New tensors are on the CPU, whatever the user's default."""
    # As a context, a device costs microseconds at each call of a torch function.
    with contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


@contextlib.contextmanager
def host_defaults() -> Iterator[None]:
    """New tensors are float32 on the CPU, whatever the user's defaults. The dtype is that of the whole process."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with host_device():
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """A model computes in the dtypes that it has, whatever is around the call."""
    with contextlib.ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, AUTOCAST_DEVICES):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No gradients, no autocast, and eval mode for all submodules; each gets its own mode back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), no_autocast():
            yield
    finally:
        for m, training in modes:
            m.training = training
