"""Steps and draws of a sampling plan (fastgen/sampling/plan.py), whatever the model.

A plane lies at `offset * batch` floats of the workspace as [rows][width][batch][channels], row y at y mod rows; what is
read outside of it is zero. Everything that differs between two rows of an image is read from `state`, so that launches
captured for one row serve all rows with the same steps: the image row y, seed and index of the first sample.

A step's rows are (column, sample) pairs. Its operands are rows of a table, `FIELDS` integers each: first what its
program reads, then its stores, then the product's blocks of at most `CHANNELS` channels, added in that order whatever
the tile, so that the batch changes no bit. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgen.kernels.elementary import exp, exp_beyond_tangent, tanh
from fastgen.kernels.philox import philox

# Of an operand: offset of its plane, rows kept, width, height, channels of the plane, first channel; dy, numerator and
# denominator of the row's ratio; the same of the column; 1 where one pixel is read at every position; channels to read;
# then the first row of the weight (of a block), or the offset of the table and the colour (of an encoding).
FIELDS = 16
CHANNELS = 32  # of the source, in a block of a product
_FIELDS = tl.constexpr(FIELDS)
_FAR = tl.constexpr(1 << 20)  # of the divisor: makes dividends positive, as division rounds towards zero


@triton.constexpr_function
def _part(program, i, j):
    """A field of an instruction; the compiler itself takes no strings out of tuples."""
    return program[i][j]


@triton.jit
def _floor_div(a, n):
    return (a + n * _FAR) // n - _FAR


@triton.jit
def _locate(operand, row, column, sample, batch):
    """Where an operand's first channel of position (row, column) of the step's frame lies, and whether it is inside."""
    rows, width, height = tl.load(operand + 1), tl.load(operand + 2), tl.load(operand + 3)
    y = _floor_div(row * tl.load(operand + 7) + tl.load(operand + 6), tl.load(operand + 8))
    x = _floor_div(column * tl.load(operand + 10) + tl.load(operand + 9), tl.load(operand + 11))
    broadcast = tl.load(operand + 12) != 0
    y = tl.where(broadcast, 0, y)
    x = tl.where(broadcast, 0, x)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = tl.where(inside, (y % rows) * width + x, 0)
    return (tl.load(operand) + at * tl.load(operand + 4)) * batch + sample * tl.load(operand + 4) + tl.load(
        operand + 5
    ), inside


@triton.jit
def _expm1(x):
    """e^x - 1 without cancellation near 0; above 88 as if it were 88."""
    x = tl.minimum(x, 88.0)
    return exp_beyond_tangent(x, exp(x)) + x


@triton.jit
def _apply(OP: tl.constexpr, a, b):
    if OP == "copy":
        return a
    elif OP == "neg":
        return -a
    elif OP == "abs":
        return tl.abs(a)
    elif OP == "relu":
        return tl.maximum(a, 0.0)
    elif OP == "elu":
        return tl.where(a > 0, a, _expm1(tl.minimum(a, 0.0)))
    elif OP == "expm1_of_minus_abs":
        return _expm1(-tl.abs(a))
    elif OP == "exp":
        return exp(a)
    elif OP == "expm1":
        return _expm1(a)
    elif OP == "log":
        return tl.log(a)
    elif OP == "sqrt":
        return tl.sqrt_rn(a)
    elif OP == "erf":
        return tl.erf(a)
    elif OP == "tanh":
        return tanh(a)
    elif OP == "sigmoid":
        return 1.0 / (1.0 + exp(-a))
    elif OP == "add":
        return a + b
    elif OP == "sub":
        return a - b
    elif OP == "mul":
        return a * b
    elif OP == "div":
        return tl.div_rn(a, b)
    elif OP == "max":
        return tl.maximum(a, b)
    elif OP == "min":
        return tl.minimum(a, b)
    else:
        tl.static_assert(OP == "positive_or", "a primitive without an implementation")
        return tl.where(a > 0, a, b)


@triton.jit
def _product(
    workspace, table, weight, bias, first, blocks, row, column, sample, exists, m, batch, width,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, INIT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Group GROUP of a step's sum; `first` is the table row of the first block, of `init` if there is one (-1)."""
    of_group = m < width
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if BIAS:
        acc += tl.load(bias + GROUP * width + m, of_group, 0.0)[None, :]
    if INIT:
        at, inside = _locate(table + (first - 1) * _FIELDS, row, column, sample, batch)
        known = (inside & exists)[:, None] & of_group[None, :]
        acc += tl.load(workspace + at[:, None] + GROUP * width + m[None, :], known, 0.0)
    c = tl.arange(0, CHANNELS)
    for block in range(blocks):
        operand = table + (first + block) * _FIELDS
        at, inside = _locate(operand, row, column, sample, batch)
        within = c < tl.load(operand + 13)
        a = tl.load(workspace + at[:, None] + c[None, :], (inside & exists)[:, None] & within[None, :], 0.0)
        k = tl.load(operand + 14) + c
        b = tl.load(
            weight + (k * GROUPS + GROUP)[:, None] * width + m[None, :], within[:, None] & of_group[None, :], 0.0
        )
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["first", "blocks", "lag", "stride", "column0", "every", "columns", "batch", "width"])
def step(
    workspace, table, weight, bias, constants, state, first, blocks, lag, stride, column0, every, columns, batch, width,
    LOADS: tl.constexpr, PROGRAM: tl.constexpr, STORES: tl.constexpr, GROUPS: tl.constexpr, INIT: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Columns column0, column0 + every, ... of a step's frame, in the row that lies at image row y - lag.

    PROGRAM: (op, register a, register b, operand) of each instruction; the operand of "load" counts in the table from
    `first`, that of "const" in `constants`. STORES: the registers stored. The workspace is float32, the weight
    [K, GROUPS, width] float32 or bfloat16.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = r < columns * batch
    column, sample = column0 + r // batch * every, r % batch
    row = (tl.load(state) - lag) // stride
    values = ()
    for i in tl.static_range(len(PROGRAM)):
        if _part(PROGRAM, i, 0) == "acc":
            value = _product(
                workspace, table, weight, bias, first + LOADS + len(STORES) + INIT, blocks, row, column, sample, exists,
                m, batch, width, _part(PROGRAM, i, 1), GROUPS, INIT, BIAS, PRECISION, ROWS, COLUMNS, CHANNELS,
            )  # fmt: skip
        elif _part(PROGRAM, i, 0) == "load":
            at, inside = _locate(table + (first + _part(PROGRAM, i, 3)) * _FIELDS, row, column, sample, batch)
            known = (inside & exists)[:, None] & (m < width)[None, :]
            value = tl.load(workspace + at[:, None] + m[None, :], known, 0.0)
        elif _part(PROGRAM, i, 0) == "const":
            value = tl.zeros([ROWS, COLUMNS], tl.float32) + tl.load(constants + _part(PROGRAM, i, 3))
        else:
            value = _apply(_part(PROGRAM, i, 0), values[_part(PROGRAM, i, 1)], values[_part(PROGRAM, i, 2)])
        values = values + (value,)
    for s in tl.static_range(len(STORES)):
        at, inside = _locate(table + (first + LOADS + s) * _FIELDS, row, column, sample, batch)
        tl.store(workspace + at[:, None] + m[None, :], values[STORES[s]], exists[:, None] & (m < width)[None, :])



# Draws


@triton.jit
def _uniform(state, INDEX: tl.constexpr, position, sample):
    """Uniform INDEX of a pixel, for each of the samples; the table of draws is in `fastgen.ops.philox`."""
    index = tl.load(state + 2) + sample
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    zero = low * 0
    lanes = philox(tl.load(state + 1), zero + INDEX // 4, zero + position.to(tl.uint32), low, high)
    return (lanes[INDEX % 4] >> 8 | 1).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _settle(
    workspace, table, encoded, levels, known, mask, level, COLOUR: tl.constexpr, y, x, sample, exists, batch,
    encodings, num_encodings, COLOURS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDEST: tl.constexpr,
):  # fmt: skip
    """Writes the level, or the given one, and its encodings; returns it."""
    pixel = y * WIDTH + x
    at = (sample * COLOURS + COLOUR) * HEIGHT * WIDTH + pixel
    given = tl.load(mask + sample * HEIGHT * WIDTH + pixel, exists, 0) != 0
    level = tl.where(given, tl.load(known + at, exists & given, 0), level)
    tl.store(levels + at, level, exists)
    c = tl.arange(0, WIDEST)
    for e in range(num_encodings):
        operand = table + (encodings + e) * _FIELDS
        to, _ = _locate(operand, y, x, sample, batch)
        count = tl.load(operand + 13)
        here = exists[:, None] & (c < count)[None, :] & (tl.load(operand + 15) == COLOUR)
        code = tl.load(encoded + (tl.load(operand + 14) + level * count)[:, None] + c[None, :], here, 0.0)
        tl.store(workspace + to[:, None] + c[None, :], code, here)
    return level


@triton.jit(do_not_specialize=["operand", "x", "batch", "encodings", "num_encodings"])
def draw_level(
    workspace, table, encoded, state, inverse_temperature, levels, known, mask, operand, x, batch, encodings,
    num_encodings, COLOUR: tl.constexpr, UNIFORM: tl.constexpr, COUNT: tl.constexpr, BERNOULLI: tl.constexpr,
    COLOURS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDEST: tl.constexpr, SAMPLES: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """Draws a colour of pixel (y, x): the smallest level whose cumulative probability is at least its uniform.

    `operand` is the table's row for the COUNT logits. Probabilities are float32, their sums float64.
    """
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    exists, y = sample < batch, tl.load(state)
    u = _uniform(state, UNIFORM, y * WIDTH + x, sample).to(tl.float64)
    at, _ = _locate(table + operand * _FIELDS, y, x, sample, batch)
    scale = tl.load(inverse_temperature)
    if BERNOULLI:
        logit = tl.load(workspace + at, exists, 0.0)
        odds = tl.exp(-tl.abs(logit.to(tl.float64) * scale))
        level = (tl.where(logit < 0, 1.0, odds) / (1.0 + odds) < u).to(tl.int32)
    else:
        k = tl.arange(0, LEVELS)
        logits = tl.load(workspace + at[:, None] + k[None, :], exists[:, None] & (k < COUNT)[None, :], -float("inf"))
        logits = tl.where(exists[:, None], logits, 0.0)
        apart = (logits - tl.max(logits, 1)[:, None]) * scale.to(tl.float32)
        e = tl.where((k < COUNT)[None, :] & (logits > -float("inf")), exp(apart), 0.0).to(tl.float64)
        below = (tl.cumsum(e, 1) < (u * tl.sum(e, 1))[:, None]) & (k < COUNT - 1)[None, :]
        level = tl.sum(below.to(tl.int32), 1)
    _settle(
        workspace, table, encoded, levels, known, mask, level, COLOUR, y, x, sample, exists, batch, encodings,
        num_encodings, COLOURS, HEIGHT, WIDTH, WIDEST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["operand", "x", "batch", "encodings", "num_encodings"])
def draw_mixture(
    workspace, table, encoded, values, state, inverse_temperature, levels, known, mask, operand, x, batch, encodings,
    num_encodings, COMPONENTS: tl.constexpr, NUM_LEVELS: tl.constexpr, COLOURS: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, WIDEST: tl.constexpr, SAMPLES: tl.constexpr, COMPONENT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Draws the colours of pixel (y, x) in float64; the definition is `fastgen.sampling.heads.LogisticMixture`.

    `operand` is the table's row for the parameters, `values` [NUM_LEVELS] what a level counts in the means of later
    colours.
    """
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    exists, y = sample < batch, tl.load(state)
    position = y * WIDTH + x
    at, _ = _locate(table + operand * _FIELDS, y, x, sample, batch)
    at = tl.where(exists, at, 0)
    scale = tl.load(inverse_temperature)
    k = tl.arange(0, COMPONENT_BLOCK)
    logits = tl.load(workspace + at[:, None] + k[None, :], (k < COMPONENTS)[None, :], -float("inf"))
    logits = logits.to(tl.float64) * scale
    e = tl.exp(logits - tl.max(logits, 1)[:, None])
    cdf = tl.cumsum(e / tl.sum(e, 1)[:, None], 1)
    u = _uniform(state, 0, position, sample).to(tl.float64)
    below = (cdf < u[:, None]) & (k < COMPONENTS - 1)[None, :]
    own = workspace + at + COMPONENTS + tl.sum(below.to(tl.int32), 1)
    KINDS: tl.constexpr = 3 if COLOURS == 3 else 2
    drawn = ()
    for c in tl.static_range(COLOURS):
        mean = tl.load(own + c * KINDS * COMPONENTS).to(tl.float64)
        for i in tl.static_range(c):
            coefficient = tl.load(own + ((i + c - 1) * KINDS + 2) * COMPONENTS).to(tl.float64)
            slope = 1.0 - 2.0 / (tl.exp(2.0 * coefficient) + 1.0)
            mean += slope * tl.load(values + drawn[i]).to(tl.float64)
        log_scale = tl.load(own + (c * KINDS + 1) * COMPONENTS).to(tl.float64)
        log_scale = tl.minimum(tl.maximum(log_scale, -7.0), 700.0)
        u = _uniform(state, 1 + c, position, sample).to(tl.float64)
        value = mean + tl.exp(log_scale) / scale * tl.log(u / (1.0 - u))
        place = (value + 1.0) * ((NUM_LEVELS - 1) / 2) - 0.5
        inner = tl.ceil(tl.minimum(tl.maximum(place, 0.0), NUM_LEVELS - 1.0)).to(tl.int32)
        level = tl.where(place > 0.0, inner, 0)
        level = _settle(
            workspace, table, encoded, levels, known, mask, level, c, y, x, sample, exists, batch, encodings,
            num_encodings, COLOURS, HEIGHT, WIDTH, WIDEST,
        )  # fmt: skip
        drawn = drawn + (level,)


@triton.jit
def next_row(state):
    tl.store(state, tl.load(state) + 1)
