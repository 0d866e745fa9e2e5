"""Pass 2 for matrices that mix positions, as gMLP's spatial gating units have them (Liu et al. 2021, "Pay Attention to
MLPs", section 2.1): `Attention` without softmax.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.attention import check_order, grid_of, plane_of
from fastgen.sampling.graph import Attention, Constant, LayoutError
from fastgen.sampling.orders import are_positions
from fastgen.sampling.planes import pointwise_4d

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


def mixed(tracer: Tracer, codes: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Codes [..., positions] of codes [..., positions] times weight [positions, positions] plus bias [positions]. With
    a matrix for each head, codes are [heads, rows, positions] or, with all of a sample's next to each other, [N *
    heads, rows, positions]. None where the last dimension is no positions, or these would see later ones.
    """
    matrices = weight.detach().to("cpu", torch.float32).reshape(-1, *weight.shape[-2:])
    heads, size, samples = len(matrices), matrices.shape[1], tracer.graph.batch
    if matrices.shape[2] != size or not are_positions(tracer, codes):
        return None
    rows = codes.reshape(heads, -1, size)
    by_sample = heads > 1 and heads % samples == 0 and len(np.unique(tracer.graph.decode(rows[0].numpy())[1])) == 1
    if by_sample:
        heads //= samples
        tokens = rows.unflatten(0, (samples, heads))  # [N, heads, channels, positions]
    else:
        tokens = rows.unflatten(1, (samples, -1)).transpose(0, 1)
    if not (matrices.unflatten(0, (-1, heads)) == matrices[:heads]).all():
        return None
    with contextlib.suppress(LayoutError):
        found = _mix(tracer, tokens, matrices[:heads], bias)
        return None if found is None else (found if by_sample else found.transpose(0, 1)).reshape(codes.shape)
    return None


def _mix(tracer: Tracer, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Codes [N, heads, channels, positions] of such, times weight [heads, positions, positions], plus bias."""
    samples, heads, channels, size = tokens.shape
    order, grid = grid_of(tracer, tokens.transpose(2, 3))
    places = order.index[0].flatten()
    if (places >= size).any() or not (order.index >= 0).any():
        raise LayoutError
    there = (places >= 0)[:, None] & (places >= 0)
    # [heads, positions, keys], in raster order
    matrix = torch.where(there, weight.mT[:, places][:, :, places], 0).contiguous()
    if matrix.triu(1).any():
        return None
    used = (matrix != 0).any(0)
    some = used.any(1)
    begin = torch.where(some, used.int().argmax(1), 0)
    end = torch.where(some, len(places) - used.flip(1).int().argmax(1), 0)
    height, width = grid.shape[2:]
    node = Attention(tracer.module, heads * channels, height, width, heads=heads, scale=0.0, softmax=False)
    node.values, node.spans, node.bias = plane_of(tracer, grid), torch.stack([begin, end], 1).int(), matrix
    node.stride = node.values.stride
    check_order(tracer.graph, node)
    codes = tracer.add(node)
    if bias is not None:
        data = torch.where(places >= 0, bias.detach().to("cpu", torch.float32)[places], 0).view(1, height, width)
        constant = tracer.add(Constant(tracer.module, 1, height, width, data=data))
        codes = pointwise_4d(tracer, "add", [codes, constant.expand(codes.shape)])
    result = order.restored(codes.permute(0, 2, 3, 1), samples * size)
    return result.view(samples, size, heads, channels).permute(0, 2, 3, 1)
