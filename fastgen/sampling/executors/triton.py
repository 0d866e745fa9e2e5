"""The plan executed by Triton kernels (kernels/sample_plan.py); on a GPU, rows of an image are replayed CUDA graphs."""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen._arguments import signed
from fastgen._float32 import float32_products
from fastgen.kernels import sample_plan as kernels
from fastgen.kernels.launch import INTERPRETED, compiling_side_by_side, device_of
from fastgen.sampling.executors import Batch
from fastgen.sampling.executors.operands import Operands, pitch_of
from fastgen.sampling.heads import Bernoulli, LogisticMixture
from fastgen.sampling.plan import Attention, Draw, Plan, Step
from fastgen.sampling.schedule import Stage

_KEPT = 2  # batch sizes whose memory and graphs are kept: batches of one call differ by one sample at most
_MULTIPROCESSORS = 128  # of a large GPU
_MAX_ROWS = 2**31 - 2**10  # of a step: they are counted in 32 bits
_STAGES = 4  # of a product's pipeline
_ROW_SIZE = 256  # operands of a program of `begin_row`
# Of a program that draws from logits: samples; levels that it reads at a time, at most, and that a warp has of them;
# registers of a thread, with which as many warps as it may have just fit: left alone, ptxas takes fewer and spills.
_DRAW_SAMPLES, _DRAW_LEVELS, _DRAW_WARP, _DRAW_REGISTERS = 1, 2048, 128, 128
_MIXTURE_SAMPLES = 16
# Of attention: channels of a head that a program takes at a time, at most; keys, at least and at most; numbers of
# either keys or values, at most.
_ATTENTION_CHANNELS, _ATTENTION_KEYS = (4, (8, 8)) if INTERPRETED else (128, (8, 256))
_ATTENTION_NUMBERS = 4096
_ATTENTION_STAGES, _ATTENTION_WARPS = 3, 4
_WARP = 32  # threads


class Tile(NamedTuple):
    """programs: that a step has at least, so that small batches spread over the GPU."""

    programs: int
    rows: int
    columns: int
    warps: int
    stages: int = _STAGES


# Tensor cores multiply with other instructions from 64 rows on, and nobody promises that they sum in the same order. So
# tiles of a pixel step have fewer, even in large batches, those of a row step no less, even in small ones.
_ROW = {
    1: (Tile(2 * _MULTIPROCESSORS, 64, 128, 4, 3), Tile(_MULTIPROCESSORS, 64, 64, 4, 3), Tile(0, 64, 32, 4)),
    2: (Tile(_MULTIPROCESSORS, 64, 64, 4, 3), Tile(_MULTIPROCESSORS // 2, 64, 32, 4, 3), Tile(0, 64, 16, 4)),
}
_FULL = (Tile(2 * _MULTIPROCESSORS, 64, 64, 8), Tile(_MULTIPROCESSORS, 32, 32, 4), Tile(0, 16, 16, 4))
_TENSOR = (Tile(_MULTIPROCESSORS, 32, 32, 4), Tile(0, 16, 16, 4))
_NO_PRODUCT = (Tile(0, 16, 32, 4),)
_INTERPRETED = (Tile(0, 16, 16, 4),)  # so that small planes have several
_EMPTY = 0.25  # columns of the tiles of a row step beyond its width, at most
_PARTS = {"ieee": 3, "tf32": 2}  # bfloat16 numbers whose sum is a weight of a row step


def tiles(step: Step, precision: str, products: str) -> tuple[Tile, ...]:
    """Of a step without attention; weights of a precision, float32 products "ieee" or "tf32". All sum in one order."""
    if INTERPRETED:
        return _INTERPRETED
    if step.groups == 0:
        return _NO_PRODUCT
    if step.stage == Stage.ROW:
        *several, last = _ROW[1 if step.groups == 1 else 2]
        return (*(t for t in several if -step.width % t.columns <= _EMPTY * step.width), last)
    return _FULL if (precision, products) == ("fp32", "ieee") else _TENSOR


_Call = tuple[Any, tuple[int, int], tuple[Any, ...], dict[str, Any]]  # kernel, grid, arguments, constants
# Row steps and pixel steps that have work in an image row, and whether pixels are drawn.
Pattern = tuple[tuple[Step, ...], tuple[Step, ...], bool]


def key_of(pattern: Pattern) -> tuple[object, ...]:
    """The same for patterns of the same steps."""
    return tuple(id(s) for steps in pattern[:2] for s in steps), pattern[2]


class TritonExecutor:
    """Plans on the current GPU in float32, or on the CPU where Triton's kernels are interpreted.

    Products of float32 have its full precision unless ``torch.set_float32_matmul_precision`` asks for TF32. Those by
    bfloat16 weights are as precise: tensor cores multiply three bfloat16 parts of each number. So do row steps with
    float32 weights, which come in parts, too: three, or two instead of TF32. Attention is float32 in any case.

    Rows of an image with the same steps are one CUDA graph, captured the second time that a batch size comes to them.
    Between the first row and the end of a batch nothing waits for the GPU, but capturing, which PyTorch lets wait.
    Batches of several threads come one after the other.

    Raises:
        RuntimeError: there is no GPU.
    """

    def __init__(self, plan: Plan, device: torch.device | None = None, pixel_weights: bool = True):
        self.plan = plan
        self.device = _here() if device is None else device
        self.flops = plan.flops
        tables = Operands(plan, pixel_weights)
        self._tables = tables
        self._cleared = _cleared(plan, tables)
        self.sample_bytes = 4 * (tables.floats + max(map(_room, plan.draws)))
        self._row_fields = tables.integers(tables.row_fields, torch.int64).to(self.device)
        self._fields = tables.integers(tables.fields, torch.int32).to(self.device)
        dtype = torch.float32 if plan.precision == "fp32" else torch.bfloat16
        self._weight = _joined(tables.weights, dtype).to(self.device)
        self._row_weight = _parts(_joined(tables.row_weights, torch.float32), plan.precision).to(self.device)
        self._bias = _joined(tables.biases, torch.float32).to(self.device)
        self._constants = torch.tensor(tables.constants or [0.0], dtype=torch.float32, device="cpu").to(self.device)
        self._encoded = _joined([e.table for e in plan.encodings], torch.float32).to(self.device)
        self._seen = {id(s): _seen(s.attention, self.device) for s in plan.steps if s.attention is not None}
        self._values = plan.head.encoding().to(self.device)
        self._widest = _power(max((e.table.shape[1] for e in plan.encodings), default=1))
        self.weight_bytes = self._weight.nbytes + self._row_weight.nbytes
        tables.weights.clear()
        tables.row_weights.clear()
        tables.biases.clear()
        self.patterns = [self._pattern(y) for y in range(plan.first_row, plan.image_shape[1])]
        self._spaces: dict[tuple[int, str, int], Space] = {}
        self._one_at_a_time = threading.Lock()
        self._capturing = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def sample(self, batch: Batch) -> Tensor:
        """Levels [count, C, H, W], on the CPU."""
        precision = float32_products()
        with self._one_at_a_time, device_of(self._fields):
            space = self.space(batch.rows, precision, batch.streams)
            if not space.graphs and not INTERPRETED:
                self._compile(space)
            try:
                self._begin(batch, space)
                for y, pattern in enumerate(self.patterns, self.plan.first_row):
                    self._run(pattern, space)
                    if y >= 0:
                        batch.on_rows(1)
                return space.levels.to("cpu").to(self.plan.head.dtype)
            except BaseException:
                if self._capturing is not None:
                    torch.cuda.synchronize()  # the next batch may come on another stream
                raise

    def _run(self, pattern: Pattern, space: Space) -> None:
        """Launches a row; the second time, and on a GPU, captures it first."""
        key = key_of(pattern)
        graph = space.graphs.get(key)
        if graph is None and self._capturing is not None and key in space.graphs:
            graph = torch.cuda.CUDAGraph()
            # With a stream of its own: PyTorch's is on the device that captured first.
            with torch.cuda.graph(graph, stream=self._capturing, capture_error_mode="thread_local"):
                self.launch_row(pattern, space)
        space.graphs[key] = graph
        if graph is None:
            self.launch_row(pattern, space)  # compiles the kernels, which must not be captured
        else:
            graph.replay()

    def _pattern(self, y: int) -> Pattern:
        active = [s for s in self.plan.steps if self.plan.position(s, 0, y) is not None]
        rows = tuple(s for s in active if s.stage == Stage.ROW)
        return rows, tuple(s for s in active if s.stage == Stage.PIXEL), y >= 0

    def launch_row(self, pattern: Pattern, space: Space) -> None:
        """Everything of one image row, whose number is in the memory of the space."""
        operands = len(space.where)
        kernels.begin_row[(-(-operands // _ROW_SIZE),)](
            self._row_fields, space.where, space.state, operands, SIZE=_ROW_SIZE
        )
        for step in pattern[0]:
            self.launch_step(step, space, step.phase[1], self._num_columns(step))
        self.launch_pixels(pattern, space)
        kernels.end_row[(1,)](space.state)

    def launch_pixels(self, pattern: Pattern, space: Space) -> None:
        """The pixels of a row, one after the other."""
        plan, (_, pixel_steps, drawn) = self.plan, pattern
        for x in plan.columns():
            for rank, _ in enumerate(plan.draws):
                for step in pixel_steps:
                    column = plan.position(step, 1, x) if step.rank == rank else None
                    if column is not None:
                        self.launch_step(step, space, column, 1)
                if drawn and 0 <= x < plan.image_shape[2]:
                    self._launch_draw(rank, space, x)

    def launch_step(self, step: Step, space: Space, column: int, columns: int) -> None:
        if columns > 0:
            kernel, grid, arguments, options = self._call(step, space, column, columns)
            kernel[grid](*arguments, **options)

    def _call(self, step: Step, space: Space, column: int, columns: int) -> _Call:
        """The kernel of a step, its grid, arguments and constants."""
        if step.attention is not None:
            return self._attend(step, step.attention, space, column, columns)
        launch, rows = self._tables.launches[id(step)], columns * space.count
        several = tiles(step, self.plan.precision, space.precision)
        tile = next(t for t in several if -(-rows // t.rows) * -(-step.width // t.columns) >= t.programs)
        turns = sum(-(-t.count // kernels.CHANNELS) for t in step.taps)
        weight, parts = self._weight, 0
        if step.stage == Stage.ROW and step.groups > 0:
            weight, parts = self._row_weight, _PARTS[space.precision] if self.plan.precision == "fp32" else 1
        arguments = (
            space.planes, space.where, self._fields, weight.view(-1)[launch.weight :], self._bias[launch.bias :],
            self._constants[launch.constant :], launch.operand, launch.init, launch.first, turns, weight.shape[-1],
            column, step.period[1], columns, space.count, step.width // launch.vector,
        )  # fmt: skip
        options = {
            "PROGRAM": launch.program, "STORES": launch.stores, "GROUPS": step.groups, "VECTOR": launch.vector,
            "SPACING": launch.spacing, "PRECISION": space.precision, "PARTS": parts, "ROWS": tile.rows,
            "COLUMNS": tile.columns, "CHANNELS": kernels.CHANNELS,
            "FILLED": all(t.count % kernels.CHANNELS == 0 for t in step.taps), "STAGES": tile.stages,
            "num_warps": tile.warps,
        }  # fmt: skip
        return kernels.step, (-(-rows // tile.rows), -(-step.width // tile.columns)), arguments, options

    def _attend(self, step: Step, of: Attention, space: Space, column: int, columns: int) -> _Call:
        launch, tables, out = self._tables.launches[id(step)], self._tables, self.plan.planes[step.out]
        spans, bias = self._seen[id(step)]
        places: list[int] = []
        for read in (of.keys, of.values, of.of_keys or of.keys):
            places += tables.offsets[read.plane], pitch_of(self.plan.planes[read.plane]), read.channel
        arguments = (
            space.planes, space.where, self._fields, self._constants[launch.constant :], spans, bias, space.state,
            of.scale, of.cap, step.lag_y, out.stride[0], out.width, launch.operand, launch.query, *places,
            int(of.each_query), 0 if len(bias) == 1 else bias.stride(0), bias.stride(1), column, step.period[1],
            columns, space.count,
        )  # fmt: skip
        channels, width = (min(_power(n), _ATTENTION_CHANNELS) for n in (of.depth, of.width))
        options = {
            "PROGRAM": launch.program, "STORES": launch.stores, "VECTOR": launch.vector, "SPACING": launch.spacing,
            "CAPPED": of.cap != 0, "SOFTMAX": of.softmax, "BIASED": of.bias is not None,
            "ADDED": of.of_keys is not None, "DEPTH": of.depth, "WIDTH": of.width,
            "KEYS": _keys_at_once(of.depth, of.width, launch.vector), "CHANNELS": channels, "COLUMNS": width,
            "STAGES": _ATTENTION_STAGES, "num_warps": _ATTENTION_WARPS,
        }  # fmt: skip
        return kernels.attend, (columns * space.count, of.heads * -(-of.width // width)), arguments, options

    def _compile(self, space: Space) -> None:
        """The kernels of the steps, many at a time."""
        with compiling_side_by_side():
            for step in self.plan.steps if self._tables.pixel_weights else self.plan.row_steps():
                columns = 1 if step.stage == Stage.PIXEL else self._num_columns(step)
                if columns > 0:
                    kernel, grid, arguments, options = self._call(step, space, 0, columns)
                    kernel.warmup(*arguments, grid=grid, **options)

    def _num_columns(self, step: Step) -> int:
        """Of a row step's frame, that it computes."""
        return len(range(step.phase[1], self.plan.planes[step.out].width, step.period[1]))

    def _launch_draw(self, rank: int, space: Space, x: int) -> None:
        head, draw, tables = self.plan.head, self.plan.draws[rank], self._tables
        colours, height, width = self.plan.image_shape
        group = head.groups(colours)[rank]
        where = (space.levels, space.known, space.mask, tables.draws[rank], x, space.count, *tables.encodings)
        if isinstance(head, LogisticMixture):
            kernels.draw_mixture[(-(-space.count // _MIXTURE_SAMPLES),)](
                space.planes, space.where, self._fields, self._encoded, self._values, space.state,
                space.inverse_temperature, *where, height, width, head.levels, COMPONENTS=head.components,
                COLOURS=colours, WIDEST=self._widest, SAMPLES=_MIXTURE_SAMPLES, COMPONENT_BLOCK=_power(head.components),
            )  # fmt: skip
            return
        levels = _levels_at_once(draw)
        kernels.draw_level[(-(-len(space.levels) // _DRAW_SAMPLES),)](
            space.planes, space.where, self._fields, self._encoded, space.odds, space.state, space.inverse_temperature,
            space.top_k, space.top_p, space.guidance, *where, colours, height, width, group.colours.start,
            group.uniforms.start, draw.count, BERNOULLI=isinstance(head, Bernoulli), WIDEST=self._widest,
            STREAMS=space.streams, SAMPLES=_DRAW_SAMPLES, LEVELS=levels, WHOLE=draw.count <= levels,
            num_warps=max(2, levels // _DRAW_WARP), maxnreg=_DRAW_REGISTERS,
        )  # fmt: skip

    def space(self, count: int, precision: str, streams: int = 1) -> Space:
        """The memory of so many rows, `streams` for each sample, and a precision of float32 products, "ieee" or
        "tf32".
        """
        key = count, precision, streams
        if key not in self._spaces:
            while len(self._spaces) >= _KEPT:
                del self._spaces[next(iter(self._spaces))]
            with torch.inference_mode(False):  # later batches, which may come outside of it, are written there too
                space = Space(self.plan, self._tables, count, precision, self.device, streams)
                for i, plane in enumerate(self.plan.planes):
                    if plane.data is not None:
                        self._fill(space, i, plane.data[None])
            self._spaces[key] = space
        return self._spaces[key]

    def _fill(self, space: Space, plane: int, data: Tensor) -> None:
        """A plane with its values [count or 1, channels, height, width]."""
        of = self.plan.planes[plane]
        shape = of.height, of.width, space.count, pitch_of(of)
        part = space.planes[self._tables.offsets[plane] * space.count :][: math.prod(shape)].view(shape)
        part[..., : of.channels].copy_(data.to(self.device).permute(2, 3, 0, 1))

    def _begin(self, batch: Batch, space: Space) -> None:
        """Writes everything that differs between batches: conditions, and zeros to the planes that steps write."""
        for begin, end in self._cleared:
            space.planes[begin * space.count : end * space.count].zero_()
        for i, condition in zip(self.plan.conditions, batch.conditions, strict=True):
            self._fill(space, i, condition)
        start = [self.plan.first_row, signed(batch.seed), batch.start]
        space.state.copy_(torch.tensor(start, dtype=torch.int64, device="cpu"))
        # Finite in float32, so that times the zero of the likeliest level it is zero.
        space.inverse_temperature.fill_(min(1.0 / batch.temperature, torch.finfo(torch.float32).max))
        top_k = batch.truncation.top_k or 0
        space.top_k.fill_(top_k if top_k < max(draw.count for draw in self.plan.draws) else 0)
        space.top_p.fill_(batch.truncation.top_p)
        space.guidance.fill_(1.0 if batch.guidance is None else batch.guidance.scale)
        space.mask.zero_() if batch.mask is None else space.mask.copy_(batch.mask)
        if batch.known is not None:
            space.known.copy_(batch.known)


class Space:
    """Memory and graphs of batches of `count` rows, `streams` for each sample."""

    def __init__(
        self, plan: Plan, tables: Operands, count: int, precision: str, device: torch.device, streams: int = 1
    ) -> None:
        if count * max(p.width for p in plan.planes) >= _MAX_ROWS:
            raise ValueError(f"rows of a batch of {count} images are too long: a smaller max_batch is needed")

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.count, self.precision, self.streams = count, precision, streams
        self.planes = zeros(count * tables.floats, dtype=torch.float32)
        self.where = zeros(len(tables.fields), dtype=torch.int64)
        samples = count // streams
        self.levels = zeros(samples, *plan.image_shape, dtype=torch.int32)
        self.known = zeros(samples, *plan.image_shape, dtype=torch.int32)
        self.mask = zeros(samples, *plan.image_shape[1:], dtype=torch.uint8)
        self.state = zeros(3, dtype=torch.int64)  # image row, seed, index of the first sample
        self.inverse_temperature, self.top_p = zeros(1, dtype=torch.float64), zeros(1, dtype=torch.float64)
        self.top_k = zeros(1, dtype=torch.int32)  # 0: all levels
        self.guidance = zeros(1, dtype=torch.float32)
        # Of draws from more levels than are read at a time.
        self.odds = zeros(max(1, samples * max(map(_room, plan.draws))), dtype=torch.float32)
        self.graphs: dict[tuple[Any, ...], torch.cuda.CUDAGraph | None] = {}  # None: seen once


def _levels_at_once(draw: Draw) -> int:
    return min(_power(draw.count), _DRAW_LEVELS)


def _room(draw: Draw) -> int:
    """Floats per sample for the odds of more levels than are read at a time."""
    levels = _levels_at_once(draw)
    return 0 if draw.count <= levels else -(-draw.count // levels) * levels


def _cleared(plan: Plan, tables: Operands) -> list[tuple[int, int]]:
    """Where the planes that a batch begins with zeros in lie, in floats per sample: all but constants."""
    ends = [*tables.offsets[1:], tables.floats]
    runs: list[tuple[int, int]] = []
    for plane, begin, end in zip(plan.planes, tables.offsets, ends, strict=True):
        if plane.data is not None:
            continue
        if runs and runs[-1][1] == begin:
            begin = runs.pop()[0]
        runs.append((begin, end))
    return runs


def _here() -> torch.device:
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("the triton executor needs a GPU: torch.cuda sees none")
    return torch.device("cuda", torch.cuda.current_device())


def _keys_at_once(depth: int, width: int, vector: int) -> int:
    """Of an attention with so many channels. Half of what might be where registers would not do: floats that are read
    one by one have an address each, and where a warp reads a key, all its threads have the key's score.
    """
    fewest, most = _ATTENTION_KEYS
    largest = _power(max(depth, width))
    numbers = _ATTENTION_NUMBERS if vector > 1 and largest < _WARP * vector else _ATTENTION_NUMBERS // 2
    return min(max(numbers // largest, fewest), most)


def _seen(of: Attention, device: torch.device) -> tuple[Tensor, Tensor]:
    """Spans, and the bias or one number that stands for none."""
    bias = torch.zeros(1, 1, 1) if of.bias is None else of.bias
    return of.spans.to(device).contiguous(), bias.to(device).contiguous()


def _joined(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([t.detach().flatten().to("cpu", dtype) for t in tensors] or [torch.zeros(1, dtype=dtype)])


def _parts(weight: Tensor, precision: str) -> Tensor:
    """[parts, n] bfloat16, whose sum it is."""
    parts = [weight.bfloat16()]
    while precision == "fp32" and len(parts) < _PARTS["ieee"]:
        weight = weight - parts[-1]
        parts.append(weight.bfloat16())
    return torch.stack(parts)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
