"""Pass 2 for attention: scores (`fastgen.sampling.scores`) times values become one `Attention` node."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling import key_masks
from fastgen.sampling.graph import Attention, Constant, Graph, LayoutError, Node, Pointwise, Ref
from fastgen.sampling.joined_scores import once_each, some_values
from fastgen.sampling.key_masks import MASKED
from fastgen.sampling.orders import Order, appended, depends, feature_map
from fastgen.sampling.planes import pointwise_4d, rebuilt
from fastgen.sampling.rotations import turned
from fastgen.sampling.scores import Attended, Scores, is_batch, known_of, rule

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


@rule("bmm")
def _product(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    """Of probabilities and values, or their transposes."""
    x, y = named["self"], named["mat2"]
    transposed = tracer.scores_of(x) is None
    scores, values = (y, x) if transposed else (x, y)
    known = known_of(tracer, scores)
    if known.softmax in (None, "exp") or tracer.scores_of(values) is not None or not is_batch(tracer, values):
        raise LayoutError("of products of queries and keys and anything but softmax and values")
    if scores.numel() < math.prod(known.shape) and not transposed:
        return some_values(tracer, known, scores, values)
    axes = [0, 2, 1] if transposed else [0, 1, 2]
    codes = tracer.codes(values).permute(axes)
    result = torch.empty(x.shape[0], x.shape[1], y.shape[2], dtype=x.dtype, device=x.device)
    heads = known.shape[0] // len(scores)  # that share their values, see `_heads_apart`
    apart = scores.view(known.shape) if heads > 1 and scores.is_contiguous() and not transposed else scores
    if apart.dim() != 3 or not known.fits(apart.permute(axes)):
        raise LayoutError("that sums over anything but the keys")
    attended = known.join(_attend(tracer, known, known.split(codes.repeat_interleave(heads, 0))))
    tracer.set_codes(result, attended.reshape(result.permute(axes).shape).permute(axes))
    return result


def added(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    """Attention, where the values of all keys are added up."""
    x, y = named["self"], named["other"]
    a, b = tracer.scores_of(x), tracer.scores_of(y) if isinstance(y, Tensor) else None
    if not isinstance(a, Attended) or not isinstance(b, Attended) or a.of is not b.of or x.shape != y.shape:
        raise LayoutError("to probabilities of some keys times values")
    if not x.is_contiguous() or not y.is_contiguous() or (a.there & b.there).any() or named.get("alpha", 1) != 1:
        raise LayoutError("of probabilities of the same keys times values")
    if "sub" in func._schema.name:
        raise LayoutError("of probabilities of some keys times values")
    there = a.there | b.there
    values = torch.where(a.there[:, None], a.values, b.values)
    result = x if func._schema.is_mutable else torch.empty_like(x)
    if not there.all():
        tracer.set_scores(result, Attended(a.of, values, there))
        return result
    tracer.set_codes(result, a.of.join(_attend(tracer, a.of, values)).reshape(result.shape))
    return result


def _attend(tracer: Tracer, known: Scores, values: Tensor) -> Tensor:
    """Codes [N, heads, queries, width] of attention to values [N, heads, keys, width]."""
    blocks = _blocks(tracer, known.query[0])
    if blocks.shape[1] == 1:
        return _attend_all(tracer, *once_each(tracer, known, values))
    query, keys, values = (t[:, blocks].flatten(2, 3) for t in (known.query, known.keys, values))
    all_blocks = known.each(lambda v, outside: _block_diagonal(v, blocks, known.shape[1:], outside))
    all_blocks, values = once_each(tracer, replace(all_blocks, query=query, keys=keys), values)
    result = torch.empty(*known.query.shape[:3], values.shape[3], dtype=torch.int64)
    result[:, blocks] = _attend_all(tracer, all_blocks, values).unflatten(2, (blocks.shape[1], -1))
    return result


def _blocks(tracer: Tracer, query: Tensor) -> Tensor:
    """Of the matrices [heads * blocks, queries, depth] of a sample, those of each head, in the same order of blocks:
    [heads, blocks]. Blocks, as rows that attend each by itself, have queries at other positions.
    """
    _, _, _, y, x = tracer.graph.decode(query[:, :, 0].numpy())
    _, block = np.unique(y * (1 + x.max()) + x, axis=0, return_inverse=True)
    counts = np.bincount(block.ravel())
    if (counts != counts[0]).any():
        raise LayoutError("of positions that do not attend in all heads")
    return torch.from_numpy(np.argsort(block.ravel(), kind="stable").reshape(len(counts), -1).T.copy())


def _block_diagonal(value: Tensor, blocks: Tensor, size: tuple[int, int], outside: float) -> Tensor:
    """Of each block [heads * blocks or 1, queries or 1, keys or 1] -> [heads or 1, blocks * queries, blocks * keys]."""
    count, (queries, keys) = blocks.shape[1], size
    each = value.expand(-1, queries, keys)
    each = each[blocks] if len(value) > 1 else each[None].expand(1, count, -1, -1)
    result = torch.full((len(each), count, queries, count, keys), outside, dtype=value.dtype)
    for i in range(count):
        result[:, i, :, i] = each[:, i]
    return result.flatten(3).flatten(1, 2)


def _attend_all(tracer: Tracer, known: Scores, values: Tensor) -> Tensor:
    """`_attend`, of a single block."""
    samples, heads, queries, width = *known.query.shape[:3], values.shape[3]
    key_order, keys = grid_of(tracer, known.keys)
    # Queries that are parameters do not say where they are.
    own = queries != known.shape[2] or depends(tracer, known.query)
    query_order, query = grid_of(tracer, known.query, None if own else key_order)
    _, values = grid_of(tracer, values, key_order)
    for order, count in ((query_order, queries), (key_order, known.shape[2])):
        if (order.index[0] >= count).any():
            raise LayoutError("that mixes samples")
    query, keys, values = (turned(tracer, codes, heads) for codes in (query, keys, values))
    known, added = key_masks.of_keys(tracer, known, query_order, key_order)
    seen = _seen(known, query_order.index[0].flatten(), key_order.index[0].flatten())
    of_query, by = _without_number(tracer.graph, plane_of(tracer, _times(tracer, query, seen.of_queries)))
    of_keys, times = _without_number(tracer.graph, plane_of(tracer, _times(tracer, keys, seen.of_keys)))
    found = Attention(
        tracer.module,
        heads * width,
        query.shape[2],
        query.shape[3],
        heads=heads,
        scale=seen.scale * by * times,
        cap=seen.cap,
        query=of_query,
        keys=of_keys,
        values=plane_of(tracer, values),
        spans=seen.spans,
        bias=seen.bias,
        of_keys=added,
    )
    found.stride = found.query.stride
    check_order(tracer.graph, found)
    codes = _times(tracer, tracer.add(found), seen.factor)
    result = query_order.restored(codes.permute(0, 2, 3, 1), samples * queries)
    return result.view(samples, queries, heads, width).transpose(1, 2)


def grid_of(tracer: Tracer, codes: Tensor, order: Order | None = None) -> tuple[Order, Tensor]:
    """Codes [N, heads, positions, channels] as a feature map: the order [N, h, w] of the rows of a tensor [N *
    positions, ...] that make it, given or found, and the codes [N, heads * channels, h, w].
    """
    rows = codes.transpose(1, 2).flatten(2).flatten(0, 1)
    if order is None:
        # A key that is appended for all to see would be computed last.
        tokens = codes.permute(0, 1, 3, 2).flatten(1, 2)
        first = torch.arange(len(rows)).view(len(codes), -1).roll(appended(tracer, [tokens]), 1).flatten()
        order, grid, found = feature_map(tracer, rows[first])
        wider = _in_place_of(tracer.graph, order, found)
        if wider is not None:
            order, grid = wider, wider.of(rows[first]).permute(0, 3, 1, 2).contiguous()
        return order.among(first), grid
    return order, order.of(rows).permute(0, 3, 1, 2).contiguous()


def _in_place_of(graph: Graph, order: Order, found: Ref) -> Order | None:
    """The order in the frame of the plane that positions were found in, where they are a window of it: pixels behind a
    text stay behind it.
    """
    node, (dy, dx) = graph.nodes[found.plane[0]], (int(found.dy[0]), int(found.dx[0]))
    samples, height, width = order.index.shape
    if found.plane[0] < 0 or node.given or node.stride != found.stride or node.width != width or dx:
        return None
    if not dy or (found.plane != node.id).any() or (found.dy != dy).any() or (found.dx != dx).any():
        return None
    index = torch.full((samples, node.height, width), -1)
    rows = torch.arange(height) + dy
    inside = (rows >= 0) & (rows < node.height)
    if (order.index[:, ~inside] >= 0).any():
        return None
    index[:, rows[inside]] = order.index[:, inside]
    return Order(index)


def _times(tracer: Tracer, codes: Tensor, factor: Tensor | None) -> Tensor:
    """Codes [N, heads * channels, h, w] times [heads or 1, positions]."""
    if factor is None:
        return codes
    channels, height, width = codes.shape[1:]
    data = factor.float().unflatten(1, (height, width)).repeat_interleave(channels // len(factor), 0).contiguous()
    constant = tracer.add(Constant(tracer.module, channels, height, width, data=data))
    return pointwise_4d(tracer, "mul", [codes, constant.expand(codes.shape)])


def plane_of(tracer: Tracer, grid: Tensor) -> Ref:
    """Codes [N, channels, h, w] as channels of one plane that differs between samples, in place."""
    for codes in (grid, rebuilt(tracer, grid)):
        with contextlib.suppress(LayoutError):
            ref = tracer.recognise(codes)
            if _in_place(tracer.graph, ref, grid.shape[2], grid.shape[3]):
                return ref
    return tracer.graph.recognise(pointwise_4d(tracer, "copy", [grid]))


def _without_number(graph: Graph, ref: Ref) -> tuple[Ref, float]:
    """What a plane is times a number, in place, and the number: in `F.scaled_dot_product_attention` both factors of
    scores have been multiplied by one, which costs a step each.
    """
    node, number = graph.nodes[ref.plane[0]], 1.0
    while isinstance(node, Pointwise) and node.op == "mul":
        of, factor = node.operands
        if not isinstance(of, Ref) or not isinstance(factor, float):
            break
        of = of.take(ref.channel)
        if not _in_place(graph, of, node.height, node.width):
            break
        ref, number, node = of, number * factor, graph.nodes[of.plane[0]]
    return ref, number


def _in_place(graph: Graph, ref: Ref, height: int, width: int) -> bool:
    node = graph.nodes[ref.plane[0]]
    if ref.plane[0] < 0 or ref.breaks().any() or ref.dy.any() or ref.dx.any() or isinstance(node, Constant):
        return False
    return (node.height, node.width) == (height, width) and (node.given or node.stride == ref.stride)


def check_order(graph: Graph, node: Attention) -> None:
    """Positions are computed in raster order: those of a text in front, too, which may well see each other."""
    keys = graph.nodes[node.values.plane[0]]
    begin, end = node.spans.numpy().T
    ahead = (end > begin) & (end - 1 > np.arange(len(end)))
    if (keys.height, keys.width) != (node.height, node.width) or not ahead.any():
        return
    known: dict[int, np.ndarray] = {}
    query, *seen = (_outside(graph, ref, node, known).ravel() for ref in node.sources())
    image = np.concatenate([[0], np.cumsum(~(seen[0] & seen[1]))])
    if (query & (image[end] == image[begin]))[ahead].all():
        raise LayoutError("of positions that do not depend on the image and see later ones")


def _outside(graph: Graph, ref: Ref, frame: Node, known: dict[int, np.ndarray]) -> np.ndarray:
    """The positions [h, w] of a frame that do not depend on the image."""
    result = np.ones((frame.height, frame.width), dtype=bool)
    for plane, dy, dx in np.unique(np.stack([ref.plane, ref.dy, ref.dx]), axis=1).T.tolist():
        node = graph.nodes[plane]
        if plane < 0 or node.given:
            continue
        if plane not in known:
            parts = [_outside(graph, source, node, known) for source in node.sources()]
            own = bool(parts) and not isinstance(node, Attention) and getattr(node, "period", (1, 1)) == (1, 1)
            known[plane] = np.all(parts, axis=0) if own else np.zeros((node.height, node.width), dtype=bool)
        y, x = np.arange(frame.height) + dy, np.arange(frame.width) + dx
        inside = ((y >= 0) & (y < node.height))[:, None] & ((x >= 0) & (x < node.width))
        there = known[plane][y.clip(0, node.height - 1)][:, x.clip(0, node.width - 1)]
        result &= (~inside | there) if node.stride == ref.stride else False
    return result


@dataclass(eq=False)
class _Seen:
    """What an `Attention` node has of scores: scale, cap, spans and bias; what queries, keys and its result are
    multiplied by, [heads or 1, positions] or None.
    """

    scale: float
    spans: Tensor
    bias: Tensor | None
    cap: float = 0.0
    of_queries: Tensor | None = None
    of_keys: Tensor | None = None
    factor: Tensor | None = None


def _seen(known: Scores, rows: Tensor, columns: Tensor) -> _Seen:
    """Of scores whose rows and columns, in this order, are the positions and keys of an `Attention`; -1 for those that
    nobody asks for.
    """
    _, queries, keys = known.shape
    heads = max(len(v) for v in (known.gain, known.bias, known.weight, *(known.capped or ())))
    known = replace(known, given=None).each(lambda v, outside: v.expand(heads, queries, keys)[:, rows][:, :, columns])
    gain, bias, weight = known.gain, known.bias, known.weight
    keys = len(columns)
    seen = (bias > MASKED) & (weight != 0).any(2, keepdim=True) & (rows >= 0)[:, None] & (columns >= 0)
    if known.softmax == "plain":
        alone = ~seen.any(2) & (weight != 0).any(2) & (rows >= 0)
        if alone.any():
            raise LayoutError("of a position that sees no key: softmax makes it see all of them, or NaN")
    factor = _alike(weight, seen, 2)
    if factor is None:
        raise LayoutError("of probabilities times what differs between keys")
    any_head = seen.any(0)
    some = any_head.any(1)
    begin = torch.where(some, any_head.int().argmax(1), 0)
    end = torch.where(some, keys - any_head.flip(1).int().argmax(1), 0)
    spans = torch.stack([begin, end], 1).int()
    index = torch.arange(keys)
    inside = (index >= begin[:, None]) & (index < end[:, None])
    bias = torch.where(seen, bias, -torch.inf)
    simple = torch.equal(seen, inside.expand(seen.shape)) and not bias[seen].any()
    result = _Seen(1.0, spans, None if simple else bias.float().contiguous())
    result.factor = None if (factor == 1).all() else factor
    if known.capped is not None:
        result.cap, gain = _cap(gain[seen], *known.capped, seen)
    scales = gain[seen]
    if (scales == scales[:1]).all():
        result.scale = float(scales[0]) if len(scales) else 1.0
        return result
    result.of_queries = _alike(gain, seen, 2)
    result.of_keys = _alike(gain, seen, 1) if result.of_queries is None else None
    if result.of_queries is None and result.of_keys is None:
        raise LayoutError("of products of queries and keys times what differs between both")
    if known.lowered and result.of_queries is None:
        raise LayoutError("of products of queries and keys less their maximum, times what differs between keys")
    return result


def _cap(caps: Tensor, gain: Tensor, bias: Tensor, seen: Tensor) -> tuple[float, Tensor]:
    """Of scores cap * tanh(gain * query . key + bias), the cap, and what query . key is multiplied by where it is
    written as cap * tanh(product / cap).
    """
    if (caps != caps[:1]).any():
        raise LayoutError("of capped products of queries and keys times what differs between them")
    if bias[seen].any():
        raise LayoutError("of products of queries and keys that had a bias or a mask before they were capped")
    cap = float(caps[0]) if len(caps) else 0.0
    return abs(cap), gain * cap


def _alike(value: Tensor, seen: Tensor, dim: int) -> Tensor | None:
    """The value [heads, queries, keys] without a dimension along which it is the same wherever it is seen, 1 where
    nothing is; or None.
    """
    low = torch.where(seen, value, torch.inf).amin(dim)
    high = torch.where(seen, value, -torch.inf).amax(dim)
    some = seen.any(dim)
    if ((high - low).abs() > 1e-6 * high.abs())[some].any():
        return None
    return torch.where(some, low, 1.0)
