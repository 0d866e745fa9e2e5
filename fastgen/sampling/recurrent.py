"""Pass 2 for recurrent layers: planes that read themselves, at positions that come before.

A layer over the pixels in raster order has its state from the pixel on the left or, at the left edge, from the last
pixel of the row above; layers over each row, or each column, from the left, or from above.  What reads itself in its
own row is computed pixel by pixel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgen.sampling.graph import LayoutError, Linear, Pointwise, Ref, taps_of
from fastgen.sampling.lowering import spatial
from fastgen.sampling.orders import Order, rasters
from fastgen.sampling.planes import pointwise_4d
from fastgen.sampling.precision import rounded

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer

Offset = tuple[int, int]  # (dy, dx)


class _Layer:
    """The nodes of a recurrent layer; `like`: codes [N, C, h, w] of a feature map of its size and stride."""

    def __init__(self, tracer: Tracer, like: Tensor, offsets: Sequence[Offset]):
        """offsets: where a position finds its state; at most one of them lies in the plane."""
        self.tracer, self.offsets = tracer, offsets
        self.size = like.shape[2:]
        self.stride = tracer.recognise(like).stride
        self._first = len(tracer.graph.nodes)

    def emit(self, op: str, *operands: Tensor | float) -> Tensor:
        return pointwise_4d(self.tracer, op, operands)

    def before(self, channels: int) -> tuple[Pointwise, Tensor]:
        """(node, codes) of the state of the position before; the node has no operands yet."""
        height, width = self.size
        op = "copy" if len(self.offsets) == 1 else "add"
        node = Pointwise(self.tracer.module, channels, height, width, stride=self.stride, op=op)
        return node, self.tracer.add(node)

    def product(self, columns: int, bias: Tensor | None = None) -> tuple[Linear, Tensor]:
        """(node, codes) of a product that has no taps yet."""
        height, width = self.size
        node = Linear(self.tracer.module, columns, height, width, stride=self.stride, bias=bias)
        return node, self.tracer.add(node)

    def close(
        self, product: Linear, output: Tensor, weights: dict[Offset, Tensor], *states: tuple[Pointwise, Tensor]
    ) -> None:
        """Let the layer read itself.

        Args:
            product: gets the output at some offsets times a weight [channels, columns].
            states: nodes of `before` with codes of the state that they are to read.
        """
        for before, codes in states:
            before.operands = [self._moved(codes, offset) for offset in self.offsets]
        for offset, weight in weights.items():
            product.taps += taps_of(self._moved(output, offset), weight)
        for node in self.tracer.graph.nodes[self._first :]:
            node.sequential = any(dy == 0 for dy, _ in self.offsets)

    def _moved(self, codes: Tensor, offset: Offset) -> Ref:
        return self.tracer.graph.moved(self.tracer.graph.recognise(codes), *offset)

    def lstm_cell(self, gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """(cell, output) of gates [N, 4h, H, W], in PyTorch's order: input, forget, cell, output."""
        i, f, g, o = gates.chunk(4, dim=1)
        kept = self.emit("mul", self.emit("sigmoid", f), cell)
        cell = self.emit("add", kept, self.emit("mul", self.emit("sigmoid", i), self.emit("tanh", g)))
        return cell, self.emit("mul", self.emit("sigmoid", o), self.emit("tanh", cell))


# Layers of PyTorch. Each takes the layer, its inputs and their weight [K, columns], the weight of the state
# [h, columns] and two biases, and gives codes of the output and of the cell, where there is one.

Rule = Callable[[_Layer, Ref, Tensor, Tensor, Tensor, Tensor], list[Tensor]]


def _lstm(layer: _Layer, x: Ref, of_x: Tensor, of_h: Tensor, bias_x: Tensor, bias_h: Tensor) -> list[Tensor]:
    product, gates = layer.product(of_x.shape[1], bias_x + bias_h)
    product.taps += taps_of(x, of_x)
    node, before = layer.before(len(of_h))
    cell, output = layer.lstm_cell(gates, before)
    layer.close(product, output, dict.fromkeys(layer.offsets, of_h), (node, cell))
    return [output, cell]


def _gru(layer: _Layer, x: Ref, of_x: Tensor, of_h: Tensor, bias_x: Tensor, bias_h: Tensor) -> list[Tensor]:
    """One product: reset and update gates, and apart from each other what inputs and state add to the new one."""
    h = len(of_h)
    gates, new = slice(0, 2 * h), slice(2 * h, 3 * h)
    bias = torch.cat([bias_x[gates] + bias_h[gates], bias_x[new], bias_h[new]])
    product, sums = layer.product(4 * h, bias)
    product.taps += taps_of(x, torch.cat([of_x, torch.zeros(len(of_x), h)], 1))
    reset, update, from_x, from_h = sums.chunk(4, dim=1)
    node, before = layer.before(h)
    fresh = layer.emit("tanh", layer.emit("add", from_x, layer.emit("mul", layer.emit("sigmoid", reset), from_h)))
    kept = layer.emit("mul", layer.emit("sigmoid", update), layer.emit("sub", before, fresh))
    output = layer.emit("add", fresh, kept)
    of_h = torch.cat([of_h[:, gates], torch.zeros(h, h), of_h[:, new]], 1)
    layer.close(product, output, dict.fromkeys(layer.offsets, of_h), (node, output))
    return [output]


def _rnn(op: str) -> Rule:
    def add(layer: _Layer, x: Ref, of_x: Tensor, of_h: Tensor, bias_x: Tensor, bias_h: Tensor) -> list[Tensor]:
        product, sums = layer.product(of_x.shape[1], bias_x + bias_h)
        product.taps += taps_of(x, of_x)
        output = layer.emit(op, sums)
        layer.close(product, output, dict.fromkeys(layer.offsets, of_h))
        return [output]

    return add


LAYERS: dict[str, Rule] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn("tanh"), "rnn_relu": _rnn("relu")}


def lower(tracer: Tracer, name: str, args: tuple) -> tuple[Tensor, ...]:
    """A call of torch.lstm, gru, rnn_tanh or rnn_relu: (output, last output, last cell)."""
    if len(args) != 9 or not isinstance(args[3], bool):
        raise LayoutError("on packed sequences")
    x, initial, parameters, has_bias, num_layers, _, _, bidirectional, batch_first = args
    initial = list(initial) if isinstance(initial, tuple | list) else [initial]
    if bidirectional:
        raise LayoutError("in two directions")
    if any(tracer.varies(t) or t.any() for t in initial):
        raise LayoutError("with a state to begin with that is not zero")
    if any(tracer.varies(p) for p in parameters):
        raise LayoutError("with parameters that depend on the image, the labels or the condition")
    each = 4 if has_bias else 2
    if len(parameters) != each * num_layers:
        raise LayoutError("with a projection of its output")
    codes = tracer.codes(x) if batch_first else tracer.codes(x).transpose(0, 1)
    count, length = codes.shape[:2]
    order, offsets = _order(tracer, codes)
    grid = order.of(codes.reshape(count * length, -1)).permute(0, 3, 1, 2).contiguous()
    ref = spatial(tracer, tracer.recognise(grid), grid)
    last: list[list[Tensor]] = []
    for i in range(num_layers):
        of_x, of_h, *biases = (
            p.detach().to("cpu", torch.float32).clone() for p in parameters[i * each : (i + 1) * each]
        )
        if tracer.precision == "int8":
            of_x, of_h = (rounded(weight, "int8", (0,)) for weight in (of_x, of_h))
        biases = biases or [torch.zeros(len(of_x))] * 2
        layer = _Layer(tracer, grid, offsets)
        states = LAYERS[name](layer, ref, of_x.t().contiguous(), of_h.t().contiguous(), *biases)
        tokens = []
        for state in states:
            rows = order.restored(state.permute(0, 2, 3, 1), count * length)
            tokens.append(rows.view(count, length, -1))
        last.append([t[:, -1] for t in tokens])
        output, grid = tokens[0], states[0]
        ref = tracer.graph.recognise(grid)
    found = [output if batch_first else output.transpose(0, 1), *(torch.stack(t) for t in zip(*last, strict=True))]
    results = tuple(torch.empty(f.shape, dtype=x.dtype, device=x.device) for f in found)
    for result, f in zip(results, found, strict=True):
        tracer.set_codes(result, f)
    return results


def _order(tracer: Tracer, codes: Tensor) -> tuple[Order, list[Offset]]:
    """Codes [sequences, tokens, channels] as a feature map: the order [N, h, w] of tokens, and where they find the one
    before.
    """
    samples, (count, length) = tracer.graph.batch, codes.shape[:2]
    each, rows = count // samples, codes.flatten(0, 1)
    image = tracer.graph.image
    for pieces in (False, True):
        found: list[tuple[Tensor, list[Offset]]] = []
        index = torch.arange(count * length)
        if count == samples:
            for width, before in rasters(tracer, [codes.transpose(1, 2)], pieces):
                offsets = [(0, -1)] if width == length else [(0, -1), (-1, width - 1)]
                found += [(index.view(samples, -1, width), offsets)] * (before == 0)
        elif count == each * samples:
            found.append((index.view(samples, each, length), [(0, -1)]))
            found.append((index.view(samples, each, length).transpose(1, 2), [(-1, 0)]))
        found.sort(key=lambda f: f[0].shape[1] > image.height or f[0].shape[2] > image.width)  # zeros leave a choice
        for order, offsets in found:
            with contextlib.suppress(LayoutError):
                tracer.recognise(rows[order].permute(0, 3, 1, 2).contiguous(), pieces)
                return Order(order), offsets
    raise LayoutError("over tokens that are neither in raster order nor those of each row or column")


def row_lstm(tracer: Tracer, gates: Tensor, weight: Tensor) -> Tensor:
    """A call of `fastgen.ops.row_lstm`, with arguments that it has checked."""
    if tracer.varies(weight):
        raise LayoutError("with a weight that depends on the image, the labels or the condition")
    codes = tracer.codes(gates)
    columns, channels, size = weight.shape
    weight = weight.detach().to("cpu", torch.float32)
    if tracer.precision == "int8":
        weight = rounded(weight, "int8", (0,))
    taps = weight.permute(2, 1, 0).contiguous()
    layer = _Layer(tracer, codes, [(-1, 0)])
    product, from_above = layer.product(columns)
    node, before = layer.before(channels)
    cell, output = layer.lstm_cell(layer.emit("add", codes, from_above), before)
    layer.close(product, output, {(-1, i - size // 2): taps[i] for i in range(size)}, (node, cell))
    result = torch.empty_like(gates[:, :channels])
    tracer.set_codes(result, output)
    return result
