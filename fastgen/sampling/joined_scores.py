"""Pass 2 for softmax over the scores of several products: those of a text and of a row of the image, say, which are
joined, and whose probabilities are taken apart again, each for its values (dalle-pytorch's axial attention).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.graph import LayoutError
from fastgen.sampling.key_masks import MASKED
from fastgen.sampling.scores import Attended, Scores, Unusable, known_of, rule

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


@rule("cat")
def _cat(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    """Scores of the same queries are joined; what else is made of them, as of those that are returned, is of no use."""
    try:
        return _joined(tracer, named)
    except LayoutError:
        if any(tracer.depends(t) and tracer.scores_of(t) is None for t in named["tensors"]):
            raise
        result = func(*named.values())
        tracer.set_scores(result, Unusable(func))
        return result


def _joined(tracer: Tracer, named: dict[str, Any]) -> Tensor:
    tensors = named["tensors"]
    if named.get("dim", 0) % tensors[0].dim() != tensors[0].dim() - 1:
        raise LayoutError("along anything but the keys")
    parts = [_of_queries(known_of(tracer, t), t) for t in tensors]
    first = parts[0]
    if not all(torch.equal(p.query, first.query) for p in parts):
        raise LayoutError("of products of other queries")
    sizes = [max(s) for s in zip(*(v.shape[:2] for p in parts for v in (p.gain, p.bias)), strict=True)]
    gain, bias = (
        torch.cat([getattr(p, name).expand(*sizes, p.keys.shape[2]) for p in parts], 2) for name in ("gain", "bias")
    )
    result = torch.empty(*tensors[0].shape[:-1], gain.shape[2], dtype=tensors[0].dtype, device=tensors[0].device)
    tracer.set_scores(result, replace(first, keys=torch.cat([p.keys for p in parts], 2), gain=gain, bias=bias))
    return result


def _of_queries(known: Scores, tensor: Tensor) -> Scores:
    """Scores of as many queries as a tensor [..., queries, keys] of them has: rows of an image have the keys of a text
    in common, and come as one matrix.
    """
    known.check_not_given()
    _, queries, keys = known.shape
    count = tensor.shape[-2] if tensor.dim() > 2 else 0
    whole = tensor.is_contiguous() and not tensor.storage_offset() and tensor.numel() == math.prod(known.shape)
    if known.softmax or known.capped is not None or known.swapped or known.lowered or not whole:
        raise LayoutError("of products of queries and keys that were capped, lowered or made probabilities before")
    if tensor.shape[-1] != keys or not count or queries % count or not (known.by_sample or count == queries):
        raise LayoutError("of products of queries and keys in another layout")
    times = queries // count
    if times == 1:
        return known

    def apart(value: Tensor, outside: float) -> Tensor:
        if value.shape[:2] == (1, 1):
            return value
        return value.expand(len(known.query[0]), queries, -1).unflatten(1, (times, count)).flatten(0, 1)

    query = known.query.unflatten(2, (times, count)).flatten(1, 2)
    return replace(known.each(apart), query=query, keys=known.keys.repeat_interleave(times, 1))


def some_values(tracer: Tracer, known: Scores, scores: Tensor, values: Tensor) -> Tensor:
    """The product of probabilities of some keys, that follow each other, and their values."""
    batch, queries, keys = known.shape
    count, rows, some = scores.shape
    first = scores.storage_offset()
    as_they_are = scores.stride() == (rows * keys, keys, 1) and count * rows == batch * queries
    if not as_they_are or batch % count or first + some > keys or not (known.by_sample or count == batch):
        raise LayoutError("of some of the probabilities of attention in another layout")
    codes = known.split(tracer.codes(values).repeat_interleave(batch // count, 0))
    all_values = torch.full((*codes.shape[:2], keys, codes.shape[3]), -1)
    all_values[:, :, first : first + some] = codes
    there = torch.zeros(keys, dtype=torch.bool)
    there[first : first + some] = True
    result = torch.empty(count, rows, values.shape[2], dtype=scores.dtype, device=scores.device)
    tracer.set_scores(result, Attended(known, all_values, there))
    return result


def once_each(tracer: Tracer, known: Scores, values: Tensor) -> tuple[Scores, Tensor]:
    """Scores and values with each key once, where there are several of the same: those that all rows of an image have
    in common, of which each query sees one.
    """
    keys, (_, queries, count) = known.keys, known.shape
    each = torch.cat([keys[0, 0], values[0, 0]], 1).numpy()
    _, found, inverse = np.unique(each, axis=0, return_index=True, return_inverse=True)
    if len(found) == count:
        return known, values
    plane, _, _, y, x = tracer.graph.decode(each[found, 0])
    given = tracer.graph.given(plane)
    order = np.lexsort((found, *(np.where(given, 0, v) for v in (x, y, plane)), ~given))  # those of no pixel, rows
    first, index = torch.from_numpy(found[order]), torch.from_numpy(np.argsort(order)[inverse.ravel()])
    if not all(torch.equal(v, v[:, :, first][:, :, index]) for v in (keys, values)):
        return known, values
    seen = ((known.bias > MASKED) & (known.weight != 0)).expand(-1, queries, count)
    which = first.expand(len(seen), queries, -1).clone()
    head, query, key = seen.nonzero(as_tuple=True)
    which[head, query, index[key]] = key
    times = torch.zeros_like(which).index_add_(2, index, seen.long()).amax((0, 1))
    if (times[torch.from_numpy(~given[order])] > 1).any():
        raise LayoutError("of keys that are seen twice")
    if (times > 1).any():
        return known, values

    def once(value: Tensor, outside: float) -> Tensor:
        heads = max(len(value), len(which))
        return value.expand(heads, queries, count).gather(2, which.expand(heads, -1, -1))

    return replace(known.each(once), keys=keys[:, :, first]), values[:, :, first]
