"""Steps, with products or attention, and draws of a sampling plan (fastgen/sampling/plan.py), whatever the model.

A plane lies at `offset * batch` floats of the workspace as [rows][width][batch][channels], row y at y mod rows; what is
read outside of it is zero. An operand is what a kernel reads or writes: some channels of a plane, seen from the frame
of a step. `begin_row` finds the row of each, in the image row that is drawn; all else is the same in all rows with the
same steps, so that launches captured for one serve the others. `state` holds the image row, the seed and the index of
the first sample.

A step's rows are (column, sample) pairs. Its product is summed over taps and channels in one order, whatever the tile,
so that the batch changes no bit; so is attention over keys. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgen.kernels.elementary import exp, expm1, relu, tanh
from fastgen.kernels.philox import philox

# Of an operand, int64: lag and stride of the frame's rows; numerator and denominator of its ratio to the plane's, and
# dy; height of the plane, rows kept, floats of a row, offset of the plane.
ROW_FIELDS = 9
# int32: numerator and denominator of the columns' ratio, and dx; width of the plane, floats of a position, first
# channel; channels to read; then the first row of the weight (of a tap), or the offset of the table and the colour (of
# an encoding).
FIELDS = 9
CHANNELS = 32  # of a tap that are multiplied at a time
PITCH = 16  # columns of weights and biases come in multiples of it
ALIGNED = 8  # numbers: parts of weights lie multiples of it apart, and Triton looks whether pointers are multiples
_ROW_FIELDS, _FIELDS, _PITCH = tl.constexpr(ROW_FIELDS), tl.constexpr(FIELDS), tl.constexpr(PITCH)
_ALIGNED = tl.constexpr(ALIGNED)
_FAR = tl.constexpr(1 << 18)  # of the divisor: makes dividends positive, as division rounds towards zero


@triton.constexpr_function
def _part(program, i, j):
    """A field of an instruction; the compiler itself takes no strings out of tuples."""
    return program[i][j]


@triton.jit
def _floor_div(a, n):
    return (a + n * _FAR) // n - _FAR


@triton.jit(do_not_specialize=["operands"])
def begin_row(row_fields, where, state, operands, SIZE: tl.constexpr):
    """where[i]: floats, per sample, before the row of operand i; -1 where it lies outside of its plane."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    exists = i < operands
    field = row_fields + i.to(tl.int64) * _ROW_FIELDS
    row = _floor_div(tl.load(state) - tl.load(field, exists, 0), tl.load(field + 1, exists, 1))
    y = _floor_div(row * tl.load(field + 2, exists, 0) + tl.load(field + 4, exists, 0), tl.load(field + 3, exists, 1))
    inside = (y >= 0) & (y < tl.load(field + 5, exists, 0))
    kept = tl.where(inside, y, 0) % tl.load(field + 6, exists, 1)
    at = tl.load(field + 8, exists, 0) + kept * tl.load(field + 7, exists, 0)
    tl.store(where + i, tl.where(inside, at, -1), exists)


@triton.jit
def end_row(state):
    tl.store(state, tl.load(state) + 1)


@triton.jit
def _locate(where, fields, operand, column, every, j, sample, batch, VECTOR: tl.constexpr, SPACING: tl.constexpr):
    """Where an operand's first channel lies in column `column + j * every` of the frame, at a multiple of VECTOR;
    whether it is inside. SPACING: see `step`.
    """
    row, field = tl.load(where + operand), fields + operand * _FIELDS
    num, dx = tl.load(field), tl.load(field + 2)
    if SPACING == "whole":
        x = column * num + dx + j * (every * num)
    elif SPACING == "even":
        den = tl.load(field + 1)
        x = _floor_div(column * num + dx, den) + j * (every * num // den)
    else:
        x = _floor_div((column + j * every) * num + dx, tl.load(field + 1))
    inside = (row >= 0) & (x >= 0) & (x < tl.load(field + 3))
    position = tl.where(inside, x * batch + sample, 0).to(tl.int64)
    at = tl.where(row >= 0, row * batch, 0) + position * tl.load(field + 4) + tl.load(field + 5)
    return tl.multiple_of(at, [VECTOR]), inside


@triton.jit
def _apply(OP: tl.constexpr, a, b):
    if OP == "copy":
        return a
    elif OP == "neg":
        return -a
    elif OP == "abs":
        return tl.abs(a)
    elif OP == "relu":
        return relu(a)
    elif OP == "elu":
        return tl.where(a > 0, a, expm1(tl.minimum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)))
    elif OP == "expm1_of_minus_abs":
        return expm1(-tl.abs(a))
    elif OP == "exp":
        return exp(a)
    elif OP == "expm1":
        return expm1(a)
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
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "min":
        return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(OP == "positive_or", "a primitive without an implementation")
        return tl.where(a > 0, a, b)


@triton.jit
def _multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b for float32 a. A bfloat16 b is multiplied by the three bfloat16 numbers whose sum is a: exactly."""
    if b.dtype == tl.bfloat16:
        high, middle, low = _split(a)
        return tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b, acc)))
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _upper(a):
    """The first eight digits of a float32; cut off, because rounding to bfloat16 and back costs more."""
    return (a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _split(a):
    """The three bfloat16 numbers whose sum is a.

    Of an infinite a the others are NaN, inf - inf, and so is the sum of products, which may be infinite where float32
    is multiplied whole. To clear them would cost instructions in the inner loop, and not suffice: parts of weights are
    zero, or of either sign, and NaN comes of them again.
    """
    high = _upper(a)
    rest = a - high
    middle = _upper(rest)
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), (rest - middle).to(tl.bfloat16)


@triton.jit
def _multiply_parts(a, b, acc, PARTS: tl.constexpr):
    """acc + a b, where a is float32 in three bfloat16 parts, b the first PARTS of three; without the products that are
    too small to matter beside the parts that are left out. Small ones are summed first, and all of them apart from
    acc, because tensor cores cut off what they add.
    """
    new = tl.zeros_like(acc)
    if PARTS == 1:
        new = tl.dot(a[1], b[0], tl.dot(a[2], b[0], new))
    elif PARTS == 2:
        new = tl.dot(a[0], b[1], tl.dot(a[1], b[0], new))
    else:
        new = tl.dot(a[0], b[2], tl.dot(a[1], b[1], tl.dot(a[2], b[0], new)))
        new = tl.dot(a[0], b[1], tl.dot(a[1], b[0], new))
    new = tl.dot(a[0], b[0], new)
    return acc + new


@triton.jit
def _product(
    workspace, where, fields, weight, bias, init, tap, turns, part, column, every, j, sample, exists, batch, width,
    GROUPS: tl.constexpr, VECTOR: tl.constexpr, SPACING: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, FILLED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The groups of a step's sum, from its bias and, unless negative, the operand `init`. Two groups are multiplied as
    one, of twice the columns. All taps are one loop, so that its pipeline fills once.
    """
    AT_ONCE: tl.constexpr = 2 if GROUPS == 2 else 1
    pitch = (width + _PITCH - 1) // _PITCH * _PITCH
    n = tl.arange(0, AT_ONCE * COLUMNS)
    m, group = tl.program_id(1) * COLUMNS + n % COLUMNS, n // COLUMNS
    of_weight = m < pitch
    at, inside = _locate(where, fields, tl.maximum(init, 0), column, every, j, sample, batch, VECTOR, SPACING)
    done = (inside & exists & (init >= 0))[:, None] & (m < width)[None, :]
    sums = ()
    for g in tl.static_range(0, GROUPS, AT_ONCE):
        begun = tl.load(workspace + at[:, None] + ((group + g) * width + m)[None, :], done, 0.0)
        sums = sums + (begun + tl.load(bias + (group + g) * pitch + m, of_weight, 0.0)[None, :],)
    part = tl.multiple_of(tl.cast(part, tl.int64), _ALIGNED)
    c = tl.arange(0, CHANNELS)
    of_row = c[:, None] * (GROUPS * pitch)
    place, known = tl.zeros_like(at), exists  # in units of VECTOR: Triton sees no alignment past a condition
    turn, count, row = 0, 0, 0
    tap -= 1
    for _ in tl.range(0, turns, num_stages=STAGES):
        if turn * CHANNELS >= count:
            tap += 1
            at, inside = _locate(where, fields, tap, column, every, j, sample, batch, VECTOR, SPACING)
            place, known = at // VECTOR, inside & exists
            turn, count, row = 0, tl.load(fields + tap * _FIELDS + 6), tl.load(fields + tap * _FIELDS + 7)
        channel = turn * CHANNELS
        a_read, b_read = known[:, None], of_weight[None, :]
        if not FILLED:
            left = tl.multiple_of(count - channel, VECTOR)
            a_read, b_read = a_read & (c < left)[None, :], b_read & (c < left)[:, None]
        a = tl.load(workspace + (place * VECTOR + channel)[:, None] + c[None, :], a_read, 0.0)
        rows = weight + tl.cast(row + channel, tl.int64) * (GROUPS * pitch)
        weights = ()
        for g in tl.static_range(0, GROUPS, AT_ONCE):
            here = rows + of_row + ((group + g) * pitch + m)[None, :]
            for p in tl.static_range(PARTS if PARTS > 0 else 1):
                weights = weights + (tl.load(here + p * part, b_read, 0.0),)
        if PARTS > 0:
            parts = _split(a)
        added = ()
        for i in tl.static_range(len(sums)):
            if PARTS > 0:
                new = _multiply_parts(parts, weights[i * PARTS : i * PARTS + PARTS], sums[i], PARTS)
            else:
                new = _multiply(a, weights[i], sums[i], PRECISION)
            added = added + (new,)
        sums = added
        turn += 1
    if AT_ONCE == 1:
        return sums
    else:
        return tl.split(tl.permute(tl.reshape(sums[0], [ROWS, 2, COLUMNS]), [0, 2, 1]))


@triton.jit(
    do_not_specialize=["operand", "init", "tap", "turns", "part", "column", "every", "columns", "batch", "vectors"]
)
def step(
    workspace, where, fields, weight, bias, constants, operand, init, tap, turns, part, column, every, columns, batch,
    vectors, PROGRAM: tl.constexpr, STORES: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
    SPACING: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, FILLED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Columns column, column + every, ... of a step's frame, and VECTOR * vectors channels.

    PROGRAM: (op, register a, register b, operand) of each instruction; that of a "load" counts from `operand`, that of
    a "const" in `constants`. STORES: (register, operand) of each store. The product has GROUPS groups, none for 0.
    Its taps are the operands from `tap` on, of which CHANNELS are multiplied in each of all `turns`; FILLED: there are
    as many in every turn. The workspace is float32, the weight [K, GROUPS, width] float32 or bfloat16, its width filled
    up to a multiple of PITCH; or, with PARTS, that many bfloat16 weights whose sum it is, `part` elements apart.
    All operands, and their channels, are multiples of VECTOR.
    SPACING of the columns that operands lie in: "whole" if no ratio has a denominator, "even" if columns of the frame
    are as far from each other there, "any".
    """
    width = vectors * VECTOR
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists, j, sample = r < columns * batch, r // batch, r % batch
    sums = ()
    if GROUPS > 0:
        sums = _product(
            workspace, where, fields, weight, bias, init, tap, turns, part, column, every, j, sample, exists, batch,
            width, GROUPS, VECTOR, SPACING, PRECISION, PARTS, ROWS, COLUMNS, CHANNELS, FILLED, STAGES,
        )  # fmt: skip
    _finish(
        workspace, where, fields, constants, operand, column, every, j, sample, exists, batch, m, m < width, sums,
        PROGRAM, STORES, VECTOR, SPACING, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _finish(
    workspace, where, fields, constants, operand, column, every, j, sample, exists, batch, m, wanted, sums,
    PROGRAM: tl.constexpr, STORES: tl.constexpr, VECTOR: tl.constexpr, SPACING: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A step's program of its sums, and its stores; of the channels m that are wanted."""
    values = ()
    for i in tl.static_range(len(PROGRAM)):
        if _part(PROGRAM, i, 0) == "acc":
            value = sums[_part(PROGRAM, i, 1)]
        elif _part(PROGRAM, i, 0) == "load":
            read = operand + _part(PROGRAM, i, 3)
            at, inside = _locate(where, fields, read, column, every, j, sample, batch, VECTOR, SPACING)
            known = (inside & exists)[:, None] & wanted[None, :]
            value = tl.load(workspace + at[:, None] + m[None, :], known, 0.0)
        elif _part(PROGRAM, i, 0) == "const":
            value = tl.zeros([ROWS, COLUMNS], tl.float32) + tl.load(constants + _part(PROGRAM, i, 3))
        else:
            value = _apply(_part(PROGRAM, i, 0), values[_part(PROGRAM, i, 1)], values[_part(PROGRAM, i, 2)])
        values = values + (value,)
    for s in tl.static_range(len(STORES)):
        to = operand + _part(STORES, s, 1)
        at, inside = _locate(where, fields, to, column, every, j, sample, batch, VECTOR, SPACING)
        here = (inside & exists)[:, None] & wanted[None, :]
        tl.store(workspace + at[:, None] + m[None, :], values[_part(STORES, s, 0)], here)


# Attention


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _locate_positions(plane, pitch, channel, s, sample, batch, VECTOR: tl.constexpr):
    """Where channels of positions s, in raster order, lie in a plane that has all its rows."""
    at = tl.cast(plane, tl.int64) * batch + (s.to(tl.int64) * batch + sample) * pitch + channel
    return tl.multiple_of(at, [VECTOR])


@triton.jit(
    do_not_specialize=[
        "scale", "cap", "lag", "stride", "frame", "operand", "query", "keys", "key_pitch", "key_channel", "values",
        "value_pitch", "value_channel", "added", "added_pitch", "added_channel", "each_query", "of_head", "of_position",
        "column", "every", "columns", "batch",
    ]
)  # fmt: skip
def attend(
    workspace, where, fields, constants, spans, bias, state, scale, cap, lag, stride, frame, operand, query, keys,
    key_pitch, key_channel, values, value_pitch, value_channel, added, added_pitch, added_channel, each_query, of_head,
    of_position, column, every, columns, batch,
    PROGRAM: tl.constexpr, STORES: tl.constexpr, VECTOR: tl.constexpr, SPACING: tl.constexpr, CAPPED: tl.constexpr,
    SOFTMAX: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A step with attention (`fastgen.sampling.plan.Attention`): one of its rows, and up to COLUMNS channels of a head.

    The step's frame has `frame` columns, its row is that of the image, less `lag`, over `stride`. `query` is an
    operand; the planes of keys and values begin at `keys` and `values` floats per sample. A head has DEPTH channels of
    queries and keys, of which CHANNELS are multiplied at a time, and WIDTH of values. Numbers of `bias`, unless there
    are none, lie `of_head` and `of_position` from each other. With ADDED, a channel of the plane at `added` is added to
    the scores: of position p the one that lies p times `each_query` behind the first. The rest: see `step`.

    Keys are read KEYS at a time. Each of these has a largest score and sums of its own until the end, so that threads
    need not wait for each other. The order of the sums is the same in all batches.
    """
    PARTS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    # Neighbours have the same keys.
    own, of_sample, head = tl.program_id(0) % columns, tl.program_id(0) // columns, tl.program_id(1) // PARTS
    j, sample = own + tl.arange(0, 1), of_sample + tl.arange(0, 1)
    position = _floor_div(tl.load(state) - lag, stride) * frame + column + own * every
    begin, end = tl.load(spans + 2 * position), tl.load(spans + 2 * position + 1)
    bias += tl.cast(of_head, tl.int64) * head + position * of_position
    c, d, k = tl.arange(0, COLUMNS), tl.arange(0, CHANNELS), tl.arange(0, KEYS)
    first = tl.program_id(1) % PARTS * COLUMNS
    wanted = c < WIDTH - first
    m = head * WIDTH + first + c
    at, inside = _locate(where, fields, query, column, every, j, sample, batch, VECTOR, SPACING)
    queries = ()
    for i in tl.static_range(0, DEPTH, CHANNELS):
        here = inside[:, None] & (d < DEPTH - i)[None, :]
        queries = queries + (tl.load(workspace + at[:, None] + (head * DEPTH + i + d)[None, :], here, 0.0),)
    most = tl.full([KEYS], -float("inf"), tl.float32)
    total, sums = tl.zeros([KEYS], tl.float32), tl.zeros([KEYS, COLUMNS], tl.float32)
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        s = start + k
        exists = s < end
        of_key = _locate_positions(keys, key_pitch, key_channel, s, of_sample, batch, VECTOR)
        score = tl.zeros([KEYS], tl.float32)
        for i in tl.static_range(len(queries)):
            known = exists[:, None] & (d < DEPTH - i * CHANNELS)[None, :]
            key = tl.load(workspace + of_key[:, None] + (head * DEPTH + i * CHANNELS + d)[None, :], known, 0.0)
            score += tl.sum(queries[i] * key, 1)
        score *= scale
        if CAPPED:
            score = tanh(tl.div_rn(score, cap)) * cap
        if BIASED:
            score += tl.load(bias + s, exists, 0.0)
        if ADDED:
            channel = added_channel + position * each_query
            of_sum = _locate_positions(added, added_pitch, channel, s, of_sample, batch, 1)
            score += tl.load(workspace + of_sum, exists, 0.0)
        score = tl.where(exists, score, -float("inf"))
        of_value = _locate_positions(values, value_pitch, value_channel, s, of_sample, batch, VECTOR)
        value = tl.load(workspace + of_value[:, None] + m[None, :], exists[:, None] & wanted[None, :], 0.0)
        if SOFTMAX:
            larger = _larger(most, score)
            base = tl.where(larger == -float("inf"), 0.0, larger)
            left, weight = exp(most - base), tl.where(score == -float("inf"), 0.0, exp(score - base))
            total = total * left + weight
            sums = sums * left[:, None] + weight[:, None] * value
            most = larger
        else:
            sums += tl.where(exists, score, 0.0)[:, None] * value
    if SOFTMAX:
        largest = tl.reduce(most, 0, _larger)
        unseen = largest == -float("inf")  # all keys
        share = exp(most - tl.where(unseen, 0.0, largest))
        whole = tl.where(unseen, 1.0, tl.sum(total * share, 0))
        result = tl.where(unseen, 0.0, tl.div_rn(tl.sum(sums * share[:, None], 0), whole))
    else:
        result = tl.sum(sums, 0)
    _finish(
        workspace, where, fields, constants, operand, column, every, j, sample, sample < batch, batch, m, wanted,
        (result[None, :],), PROGRAM, STORES, VECTOR, SPACING, 1, COLUMNS,
    )  # fmt: skip


# Draws


@triton.jit
def _uniform(state, index, position, sample):
    """Uniform `index` of a pixel, for each of the samples; the table of draws is in `fastgen.ops.philox`."""
    number = tl.load(state + 2) + sample
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    zero = low * 0
    lanes = philox(tl.load(state + 1), zero + tl.cast(index // 4, tl.uint32), zero + position.to(tl.uint32), low, high)
    lane = index % 4
    bits = tl.where(lane < 2, tl.where(lane == 0, lanes[0], lanes[1]), tl.where(lane == 2, lanes[2], lanes[3]))
    return ((bits >> 8 | 1).to(tl.float32) * 5.9604644775390625e-08).to(tl.float64)


@triton.jit
def _settle(
    workspace, where, fields, encoded, levels, known, mask, level, colour, y, x, sample, exists, batch,
    encodings, num_encodings, colours, height, width, WIDEST: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """Writes the level, or the given one, and its encodings in all rows of the sample; returns it."""
    pixel = y * width + x
    at = (sample * colours + colour) * height * width + pixel
    given = tl.load(mask + sample * height * width + pixel, exists, 0) != 0
    level = tl.where(given, tl.load(known + at, exists & given, 0), level)
    tl.store(levels + at, level, exists)
    c = tl.arange(0, WIDEST)
    for e in range(encodings, encodings + num_encodings):
        count = tl.load(fields + e * _FIELDS + 6)
        here = exists[:, None] & (c < count)[None, :] & (tl.load(fields + e * _FIELDS + 8) == colour)
        code = tl.load(encoded + (tl.load(fields + e * _FIELDS + 7) + level * count)[:, None] + c[None, :], here, 0.0)
        for stream in tl.static_range(STREAMS):
            to, _ = _locate(where, fields, e, x, 0, 0, sample * STREAMS + stream, batch, 1, "whole")
            tl.store(workspace + to[:, None] + c[None, :], code, here)
    return level


@triton.jit(
    do_not_specialize=[
        "operand", "x", "batch", "encodings", "num_encodings", "colours", "height", "width", "colour", "uniform",
        "count",
    ]
)  # fmt: skip
def draw_level(
    workspace, where, fields, encoded, room, state, inverse_temperature, top_k, top_p, guidance, levels, known, mask,
    operand, x, batch, encodings, num_encodings, colours, height, width, colour, uniform, count,
    BERNOULLI: tl.constexpr, WIDEST: tl.constexpr, STREAMS: tl.constexpr, SAMPLES: tl.constexpr, LEVELS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Draws a colour of pixel (y, x): the smallest level whose cumulative probability is at least its uniform.

    `operand` is that of the `count` logits, which are read LEVELS at a time. Probabilities are float32, their sums
    float64. Levels that `top_k`, where it is not 0, and `top_p` leave out have none
    (`fastgen.sampling.truncation.Truncation`). A sample has STREAMS of the `batch` rows, two with `guidance`
    (`fastgen.sampling.guidance.Guidance`).

    Odds, which are probabilities but for a factor, are computed once. WHOLE: there are LEVELS at most, and they stay in
    registers; otherwise `room` has those of each sample, filled up with zeros to a multiple of LEVELS.
    """
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    exists, y = sample * STREAMS < batch, tl.load(state)
    at, _ = _locate(where, fields, operand, x, 0, 0, sample * STREAMS, batch, 1, "whole")
    null, _ = _locate(where, fields, operand, x, 0, 0, sample * STREAMS + STREAMS - 1, batch, 1, "whole")
    apart = null - at
    scale = tl.load(inverse_temperature)
    if BERNOULLI:
        u = _uniform(state, uniform, y * width + x, sample)
        logit = _logits(workspace + at, exists, apart, guidance, STREAMS)
        odds = tl.exp(-tl.abs(logit.to(tl.float64) * scale))
        level = (tl.where(logit < 0, 1.0, odds) / (1.0 + odds) < u).to(tl.int32)
    else:
        k, end = tl.arange(0, LEVELS), LEVELS if WHOLE else count
        logits, apart = workspace + at[:, None] + k[None, :], apart[:, None]
        largest = tl.full([SAMPLES, LEVELS], -float("inf"), tl.float32)
        for start in range(0, end, LEVELS):
            here = exists[:, None] & (k < count - start)[None, :]
            largest = tl.maximum(largest, _logits(logits + start, here, apart, guidance, STREAMS))
        most = tl.where(exists, tl.max(largest, 1), 0.0)
        odds = _odds(logits, exists[:, None] & (k < count)[None, :], apart, guidance, most, scale, STREAMS)
        room += (sample * ((count + LEVELS - 1) // LEVELS * LEVELS))[:, None] + k[None, :]
        if not WHOLE:
            tl.store(room, odds, exists[:, None])
            for start in range(LEVELS, count, LEVELS):
                here = exists[:, None] & (k < count - start)[None, :]
                own = _odds(logits + start, here, apart, guidance, most, scale, STREAMS)
                tl.store(room + start, own, exists[:, None])
            tl.debug_barrier()  # other threads read them
        least, number, share = tl.zeros([SAMPLES], tl.float32), tl.load(top_k), tl.load(top_p)
        if number > 0:
            wanted = least + number
            least = _threshold(odds, room, exists, end, least, wanted, True, LEVELS, WHOLE)
        if share < 1:
            wanted = share * _total(odds, room, exists, end, least, LEVELS, WHOLE)
            least = _threshold(odds, room, exists, end, least, wanted, False, LEVELS, WHOLE)
        target = _uniform(state, uniform, y * width + x, sample)
        target *= _total(odds, room, exists, end, least, LEVELS, WHOLE)
        before, first = tl.zeros([SAMPLES], tl.float64), tl.zeros([SAMPLES], tl.int32)
        if not WHOLE:
            for start in range(0, count - LEVELS, LEVELS):
                after = before + tl.sum(_kept(odds, room + start, exists, least, WHOLE), 1)
                passed = (first == start) & (after < target)
                before, first = tl.where(passed, after, before), tl.where(passed, start + LEVELS, first)
        sums = before[:, None] + tl.cumsum(_kept(odds, room + first[:, None], exists, least, WHOLE), 1)
        below = (sums < target[:, None]) & (k[None, :] < (count - 1 - first)[:, None])
        level = first + tl.sum(below.to(tl.int32), 1)
    _settle(
        workspace, where, fields, encoded, levels, known, mask, level, colour, y, x, sample, exists, batch, encodings,
        num_encodings, colours, height, width, WIDEST, STREAMS,
    )  # fmt: skip


@triton.jit
def _logits(logits, given, apart, guidance, STREAMS: tl.constexpr):
    """Logits, with two streams led away from those that lie `apart`; -inf where none are given."""
    own = tl.load(logits, given, -float("inf"))
    if STREAMS == 2:
        null = tl.load(logits + apart, given, -float("inf"))
        own = tl.where(null == -float("inf"), null, null + tl.load(guidance) * (own - null))
    return own


@triton.jit
def _odds(logits, given, apart, guidance, most, scale, STREAMS: tl.constexpr):
    """float32 e^((logits - most) * scale), 0 where none are given."""
    below = _logits(logits, given, apart, guidance, STREAMS) - most[:, None]
    odds = exp((below.to(tl.float64) * scale).to(tl.float32))
    return tl.where(given & (below > -float("inf")), odds, 0.0)


@triton.jit
def _read(odds, room, exists, WHOLE: tl.constexpr):
    if WHOLE:
        return odds
    else:
        return tl.load(room, exists[:, None], 0.0)


@triton.jit
def _kept(odds, room, exists, least, WHOLE: tl.constexpr):
    """float64 odds, 0 below `least`."""
    own = _read(odds, room, exists, WHOLE)
    return tl.where(own >= least[:, None], own, 0.0).to(tl.float64)


@triton.jit
def _total(odds, room, exists, end, least, LEVELS: tl.constexpr, WHOLE: tl.constexpr):
    total = tl.zeros(odds.shape, tl.float64)
    for start in range(0, end, LEVELS):
        total += _kept(odds, room + start, exists, least, WHOLE)
    return tl.sum(total, 1)


@triton.jit
def _threshold(
    odds, room, exists, end, least, wanted, COUNTED: tl.constexpr, LEVELS: tl.constexpr, WHOLE: tl.constexpr
):
    """A float32, at least `least`, that leaves enough of the levels whose odds are no smaller: `wanted` of them, or a
    sum of so much. Larger ones that leave enough leave the same.

    Positive floats have the order of their bits. Three of these are found at a time, because threads wait for each
    other at every sum, until the sums say that a single level lies between what is enough and what is not.
    """
    low, shift = (least * 0).to(tl.int32), 27  # odds are 1 at most, whose bits are below 2^30
    enough, too_few = wanted * 0 + float("inf"), wanted * 0  # sums: from `low` on, and from `1 << shift` above it on
    while shift >= 0:
        sums = _sums(odds, room, exists, end, least, low, shift, COUNTED, LEVELS, WHOLE)
        reached = sums >= wanted[:, None]
        low += tl.maximum(tl.sum(reached.to(tl.int32), 1) - 1, 0) << shift
        enough = tl.minimum(enough, tl.min(tl.where(reached, sums, float("inf")), 1))
        too_few = tl.maximum(too_few, tl.max(tl.where(reached, 0.0, sums), 1))
        smallest = tl.maximum(least, low.to(tl.float32, bitcast=True))
        # Two levels there would sum to twice this or more; what is between is for the rounding of the sums.
        several = enough - too_few >= 1.5 * (1.0 if COUNTED else smallest)
        shift = tl.where(tl.max(several.to(tl.int32), 0) > 0, shift - 3, -1)
    return tl.maximum(least, low.to(tl.float32, bitcast=True))


@triton.jit
def _sums(
    odds, room, exists, end, least, low, shift, COUNTED: tl.constexpr, LEVELS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """[SAMPLES, 8], in any order: for each j, the odds that are at least `least` and whose bits are at least
    low + (j << shift), summed in float64; or counted, those above 0.
    """
    sums = ()
    for _ in tl.static_range(8):
        sums = sums + (tl.zeros(odds.shape, tl.float32 if COUNTED else tl.float64),)
    for start in range(0, end, LEVELS):
        own = _read(odds, room + start, exists, WHOLE)
        if COUNTED:
            worth = tl.where(own > 0, 1.0, 0.0)
        else:
            worth = own.to(tl.float64)
        added = ()
        for j in tl.static_range(8):
            bound = tl.maximum(least, (low + (j << shift)).to(tl.float32, bitcast=True))
            added = added + (sums[j] + tl.where(own >= bound[:, None], worth, 0.0),)
        sums = added
    halves = (tl.join(tl.join(sums[0], sums[1]), tl.join(sums[2], sums[3])),)
    halves = halves + (tl.join(tl.join(sums[4], sums[5]), tl.join(sums[6], sums[7])),)
    return tl.sum(tl.reshape(tl.join(halves[0], halves[1]), [odds.shape[0], LEVELS, 8]), 1)


@triton.jit(do_not_specialize=["operand", "x", "batch", "encodings", "num_encodings", "height", "width", "num_levels"])
def draw_mixture(
    workspace, where, fields, encoded, values, state, inverse_temperature, levels, known, mask, operand, x, batch,
    encodings, num_encodings, height, width, num_levels, COMPONENTS: tl.constexpr, COLOURS: tl.constexpr,
    WIDEST: tl.constexpr, SAMPLES: tl.constexpr, COMPONENT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Draws the colours of pixel (y, x) in float64; the definition is `fastgen.sampling.heads.LogisticMixture`.

    `operand` is that of the parameters, `values` [num_levels] what a level counts in the means of later colours.
    """
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    exists, y = sample < batch, tl.load(state)
    position = y * width + x
    at, _ = _locate(where, fields, operand, x, 0, 0, sample, batch, 1, "whole")
    at = tl.where(exists, at, 0)
    scale = tl.load(inverse_temperature)
    k = tl.arange(0, COMPONENT_BLOCK)
    logits = tl.load(workspace + at[:, None] + k[None, :], (k < COMPONENTS)[None, :], -float("inf"))
    logits = logits.to(tl.float64) * scale
    e = tl.exp(logits - tl.max(logits, 1)[:, None])
    cdf = tl.cumsum(e / tl.sum(e, 1)[:, None], 1)
    below = (cdf < _uniform(state, 0, position, sample)[:, None]) & (k < COMPONENTS - 1)[None, :]
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
        u = _uniform(state, 1 + c, position, sample)
        value = mean + tl.exp(log_scale) / scale * tl.log(u / (1.0 - u))
        last = (num_levels - 1).to(tl.float64)
        place = (value + 1.0) * (last / 2) - 0.5
        inner = tl.ceil(tl.minimum(tl.maximum(place, 0.0), last)).to(tl.int32)
        level = tl.where(place > 0.0, inner, 0)
        level = _settle(
            workspace, where, fields, encoded, levels, known, mask, level, c, y, x, sample, exists, batch, encodings,
            num_encodings, COLOURS, height, width, WIDEST, 1,
        )  # fmt: skip
        drawn = drawn + (level,)
