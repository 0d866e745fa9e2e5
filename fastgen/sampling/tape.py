"""Calls that depend on labels or condition alone, recorded in the traced call, to be run again for others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

TRACE_BATCH = 2  # two samples tell the batch dimension from a broadcast one, and show a mix-up of samples
MOST_VARIANTS = 8  # of one input

Call = tuple[Callable, tuple, dict, list[Tensor]]  # its results last


class Tape:
    """The calls that depend on labels or condition but not on the image, to be run again for others.

    Whatever else they read or write into is kept as it was at the call: weights may change later, and a replay must
    find the zeros that a one-hot row is written into.
    """

    def __init__(self, inputs: list[Tensor], names: str):
        """inputs: labels and conditions, each [TRACE_BATCH, ...]. names: what errors call them."""
        self.inputs, self.names = inputs, names
        self.calls: list[Call] = []
        self._tainted = {storage_key(t): t for t in self.inputs}
        self._before: dict[int, Tensor] = {}  # storages that a call wrote into: their elements before
        self._known: dict[Hashable, int] = {}  # what was computed so far -> its number
        self._numbers = {storage_key(t): self._number(("input", i)) for i, t in enumerate(inputs)}

    def depends(self, tensor: Tensor) -> bool:
        return storage_key(tensor) in self._tainted

    def will_write(self, tensor: Tensor) -> None:
        """A call that depends on the inputs is about to write into `tensor`."""
        if not self.depends(tensor):
            before = self._before[storage_key(tensor)] = whole_storage(tensor).clone()
            self._numbers[storage_key(tensor)] = self._number(_content(before))
            self._tainted[storage_key(tensor)] = tensor

    def record(self, func: Callable, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
        def keep(x: Any) -> Any:
            return x.clone() if isinstance(x, Tensor) and not self.depends(x) else x

        leaves, form = tree_flatten((args, kwargs))
        call = self._number((func, str(form), *(self.name(x) if isinstance(x, Tensor) else repr(x) for x in leaves)))
        self.calls.append((func, tree_map(keep, args), tree_map(keep, kwargs), outputs))
        new = [t for t in outputs if storage_key(t) not in self._numbers]
        for i, tensor in enumerate([*new, *written(func, args, kwargs)]):
            self._numbers[storage_key(tensor)] = self._number((self._numbers.get(storage_key(tensor)), call, i))
        self._tainted.update((storage_key(t), t) for t in outputs)

    def name(self, tensor: Tensor) -> Hashable:
        """The same for tensors that are computed in the same way, as those of the layers of a network may be."""
        found = self._numbers.get(storage_key(tensor))
        if found is None:  # it does not depend on the inputs
            return _content(tensor), tensor.stride()
        return found, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _number(self, what: Hashable) -> int:
        return self._known.setdefault(what, len(self._known))

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor that depends on the inputs, which later calls may overwrite."""
        return self.call(torch.ops.aten.clone.default, tensor)

    def by_sample(self, tensor: Tensor) -> tuple[Tensor, list[int]] | None:
        """A tensor with its samples in the first dimension, and the order in which its dimensions are the tensor's. One
        that has them in another, as tokens in PyTorch's own order do, or [samples * parts, ...] or [parts * samples,
        ...], as matrix products have them, as [samples, parts, ...]. None where that cannot be told.
        """
        if tensor.dim() == 0:
            return None
        found = self._arranged(tensor, self._samples_by_values(tensor))
        return self._arranged(tensor, self._samples_by_strides(tensor)) if found is None else found

    def _arranged(self, tensor: Tensor, samples: Tensor | None) -> tuple[Tensor, list[int]] | None:
        """`by_sample`, of a tensor whose elements belong to these samples."""
        if samples is None:
            return None
        expected = torch.arange(TRACE_BATCH).to(samples)
        for d in range(tensor.dim()):
            along = expected.view(-1, *[1] * (tensor.dim() - 1 - d))
            if tensor.shape[d] == TRACE_BATCH and torch.equal(samples, along.expand_as(samples)):
                order = list(range(tensor.dim()))
                order[0], order[d] = d, 0
                return tensor if d == 0 else self.call(torch.ops.aten.transpose.int, tensor, 0, d), order
        if tensor.shape[0] % TRACE_BATCH:
            return None
        found = samples.flatten(1)
        rest, parts = range(2, tensor.dim() + 1), len(tensor) // TRACE_BATCH
        if torch.equal(found, expected.repeat_interleave(parts)[:, None].expand_as(found)):
            split = self.call(torch.ops.aten.view.default, tensor, [TRACE_BATCH, parts, *tensor.shape[1:]])
            return split, [0, 1, *rest]
        if torch.equal(found, expected.repeat(parts)[:, None].expand_as(found)):
            split = self.call(torch.ops.aten.view.default, tensor, [parts, TRACE_BATCH, *tensor.shape[1:]])
            return self.call(torch.ops.aten.transpose.int, split, 0, 1), [1, 0, *rest]
        return None

    def _samples_by_values(self, tensor: Tensor) -> Tensor | None:
        """The sample that each element of a tensor belongs to, by where NaN gets to that takes the place of the last
        sample, or of what is first made of its integers.
        """
        inputs = [t.clone() for t in self.inputs]
        for floats in (t for t in inputs if t.is_floating_point()):
            floats[1:] = torch.nan

        def spoil(call: Call, results: list[Tensor]) -> None:
            for index in (t for t in tensors_in(call[1:3]) if not t.is_floating_point()):
                own = self._samples_by_strides(index)
                for result in (r for r in results if own is not None and r.is_floating_point()):
                    if own is not None and result.shape[: own.dim()] == own.shape:
                        result[own == 1] = torch.nan

        value = self._run(inputs, self._needed([tensor]), spoil).get(id(tensor))
        return None if value is None else value.isnan().long()

    def _samples_by_strides(self, tensor: Tensor) -> Tensor | None:
        """The sample that each element of a view of a tensor [samples, ...] belongs to; -1 where that is not known."""
        key = storage_key(tensor)
        made = (t for call in reversed(self.calls) for t in call[3] if storage_key(t) == key)
        own = (t for t in self.inputs if storage_key(t) == key)
        whole = next((t for t in (*made, *own) if t.dim() and len(t) == TRACE_BATCH and t.stride(0)), None)
        if whole is None:
            return None
        sample = torch.full_like(whole_storage(whole), -1, dtype=torch.int64)
        sizes = [n if stride else 1 for n, stride in zip(whole.shape, whole.stride(), strict=True)]  # not expanded
        torch.as_strided(sample, sizes, whole.stride(), whole.storage_offset()).copy_(
            torch.arange(TRACE_BATCH).view(-1, *[1] * (whole.dim() - 1))
        )
        return torch.as_strided(sample, tensor.shape, tensor.stride(), tensor.storage_offset())

    def gather(self, tensor: Tensor, index: Tensor) -> Tensor:
        """The elements tensor[n].flatten()[index], [N, *index.shape]."""
        ops = torch.ops.aten
        copy = self.call(ops.clone.default, tensor, memory_format=torch.contiguous_format)
        flat = self.call(ops.view.default, copy, [len(tensor), -1])
        picked = self.call(ops.index_select.default, flat, 1, index.flatten().to(tensor.device))
        return self.call(ops.view.default, picked, [-1, *index.shape])

    def rows(self, table: Tensor, tensor: Tensor, elements: Tensor, scale: int, shift: int) -> Tensor:
        """Rows [N, n, columns] of a table by scale * tensor[n].flatten()[elements] + shift."""
        ops = torch.ops.aten
        index = self.call(ops.mul.Scalar, self.gather(tensor, elements), scale)
        return self.call(ops.embedding.default, table, self.call(ops.add.Scalar, index, shift))

    def call(self, func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The result of a function, called now and at each replay."""
        result = func(*args, **kwargs)
        self.record(func, args, kwargs, [result])
        return result

    def variants(self, tensor: Tensor) -> Iterator[Tensor]:
        """What a recorded tensor is in the traced call, and for other inputs of the same shapes: one of them all zeros
        or ones, if it is of floats or bools, or all one of its integers.
        """
        yield tensor
        calls = self._needed([tensor])
        for changed in self.inputs:
            integers = changed[0].unique()[:MOST_VARIANTS].tolist()
            for value in [0, 1] if changed.is_floating_point() or changed.dtype == torch.bool else integers:
                inputs = [torch.full_like(t, value) if t is changed else t for t in self.inputs]
                try:
                    found = self._run(inputs, calls)[id(tensor)]
                except Exception:  # whatever the model makes of values that are not its own
                    continue
                yield found

    def replay(self, inputs: list[Tensor], wanted: list[Tensor]) -> list[Tensor]:
        """Values [n, ...] of the recorded tensors `wanted` for inputs [n, ...] on the CPU, any n."""
        first, index = _distinct(inputs)
        calls = self._needed(wanted)
        each = [self._replay_sample([t[i] for t in inputs], wanted, calls) for i in first]
        return [torch.stack(values)[index] for values in zip(*each, strict=True)]

    def _replay_sample(self, inputs: list[Tensor], wanted: list[Tensor], calls: list[Call]) -> list[Tensor]:
        """For one sample, which fills a batch by itself: the last bits of a product may differ between rows."""
        values = self._run([torch.stack([value] * TRACE_BATCH) for value in inputs], calls)
        return [values[id(t)][0] for t in wanted]

    def _needed(self, wanted: list[Tensor]) -> list[Call]:
        """The calls that make the recorded tensors `wanted`."""
        needed, calls = {storage_key(t) for t in wanted}, []
        for call in reversed(self.calls):
            func, args, kwargs, outputs = call
            if any(storage_key(t) in needed for t in (*outputs, *written(func, args, kwargs))):
                calls.append(call)
                needed.update(map(storage_key, tensors_in((args, kwargs))))
        return calls[::-1]

    def _run(
        self, inputs: list[Tensor], calls: list[Call], after: Callable[[Call, list[Tensor]], None] | None = None
    ) -> dict[int, Tensor]:
        """What the recorded tensors that calls make become for inputs [TRACE_BATCH, ...], by their ids. after: is given
        each call and its results.
        """
        values = {id(traced): value.to(traced) for traced, value in zip(self.inputs, inputs, strict=True)}
        written = {key: flat.clone() for key, flat in self._before.items()}

        def value(x: Any) -> Any:
            if not isinstance(x, Tensor) or id(x) in values:
                return values.get(id(x), x)
            flat = written.get(storage_key(x))
            return x if flat is None else torch.as_strided(flat, x.shape, x.stride(), x.storage_offset())

        for call in calls:
            func, args, kwargs, outputs = call
            results = tensors_in(func(*tree_map(value, args), **tree_map(value, kwargs)))
            if after is not None:
                after(call, results)
            values.update((id(old), new) for old, new in zip(outputs, results, strict=True))
        return values


def _distinct(inputs: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Of the samples whose inputs have the same bits the first one, and for each sample which of these it equals."""
    # A copy has a stride of 1 where it has a single element, too: a contiguous tensor need not.
    copies = (t.clone(memory_format=torch.contiguous_format).view(len(t), -1) for t in inputs)
    rows = np.concatenate([t.view(torch.uint8).numpy() for t in copies], axis=1)
    _, first, index = np.unique(rows.view(f"V{rows.shape[1]}")[:, 0], return_index=True, return_inverse=True)
    return first, index


def _content(tensor: Tensor) -> Hashable:
    flat = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
    return tensor.dtype, tensor.shape, hashlib.sha256(flat.numpy().tobytes()).digest()


def written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that a call of an operator writes into."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    return tensors_in(
        [named.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    )


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def whole_storage(tensor: Tensor) -> Tensor:
    """All elements of a tensor's storage, flat."""
    return torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def tensors_in(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]
