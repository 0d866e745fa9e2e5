"""Up- and downsampling with a filter: loops, PyTorch in float64, layouts, threads, gradients, errors."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

import fastgen
from fastgen import ops
from tests.ops.test_conv2d_bn_act import assert_as_accurate
from tests.ops.test_group_norm_act import LAYOUTS

module = importlib.import_module("fastgen.ops.upfirdn2d")  # the package has the function of this name

# Input, filter, up, down, padding (left, right, top, bottom).
CASES = {
    "one pixel": ((1, 1, 1, 1), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
    "one pixel, filter larger": ((2, 3, 1, 1), (4, 4), (1, 1), (1, 1), (3, 2, 1, 3)),
    "blur": ((2, 19, 9, 7), (4, 4), (1, 1), (1, 1), (1, 1, 1, 1)),
    "blur, wide": ((1, 8, 3, 67), (3, 5), (1, 1), (1, 1), (2, 2, 1, 1)),
    "blur, no padding": ((2, 5, 6, 11), (4, 3), (1, 1), (1, 1), (0, 0, 0, 0)),
    "upsampling": ((2, 3, 5, 6), (4, 4), (2, 2), (1, 1), (2, 1, 2, 1)),
    "upsampling, channels": ((1, 37, 5, 3), (4, 4), (2, 2), (1, 1), (2, 1, 2, 1)),
    "upsampling by three, and two": ((1, 4, 3, 5), (5, 4), (3, 2), (1, 1), (1, 2, 4, 0)),
    "downsampling": ((2, 6, 9, 8), (4, 4), (1, 1), (2, 2), (1, 1, 1, 1)),
    "both": ((1, 6, 7, 5), (6, 5), (3, 2), (2, 3), (4, 3, 2, 5)),
    "cut off": ((2, 5, 9, 8), (3, 2), (1, 1), (1, 1), (-2, -1, -3, 0)),
    "cut off, upsampled": ((1, 5, 4, 6), (2, 3), (2, 3), (1, 2), (-3, 2, 1, -5)),
    "wider than the image": ((1, 9, 2, 3), (7, 6), (1, 1), (1, 1), (6, 5, 6, 6)),
    "long rows": ((2, 3, 5, 70), (4, 4), (1, 1), (1, 1), (1, 2, 2, 1)),
    "long rows cut off": ((1, 2, 9, 83), (3, 4), (1, 1), (1, 1), (-3, -1, 2, -2)),
    "rows alone": ((1, 3, 6, 40), (1, 9), (1, 1), (1, 1), (4, 4, 0, 0)),
    # Planes in several bands of lines.
    "tall": ((1, 2, 1100, 20), (4, 4), (1, 1), (1, 1), (1, 1, 1, 1)),
    "tall, upsampled": ((1, 2, 500, 40), (2, 3), (2, 2), (1, 1), (1, 1, 1, 0)),
    "tall, downsampled": ((1, 2, 700, 40), (4, 4), (1, 1), (2, 2), (1, 1, 1, 1)),
    "padding beyond the filter": ((1, 9, 3, 4), (2, 2), (1, 1), (1, 1), (5, 4, 3, 6)),
}
every_case = pytest.mark.parametrize("name", CASES)


def make(name, dtype=torch.float32):
    """Input and filter, and the options."""
    shape, kernel, up, down, padding = CASES[name]
    tensors = torch.randn(shape, dtype=torch.double).to(dtype), torch.randn(kernel, dtype=torch.double).to(dtype)
    return tensors, {"up": up, "down": down, "padding": padding}


def plain(input, filter, *, up, down, padding, flip_filter=False):
    """By a convolution of zeros and pixels."""
    n, c, h, w = input.shape
    spread = input.new_zeros(n, c, h * up[0], w * up[1])
    spread[:, :, :: up[0], :: up[1]] = input
    kernel = filter if flip_filter else filter.flip(0, 1)
    return F.conv2d(F.pad(spread, padding).flatten(0, 1)[:, None], kernel[None, None], stride=down).unflatten(
        0, (n, c)
    )[:, :, 0]


def loops(input, filter, *, up, down, padding):
    """The sum as it is written, of one channel."""
    h, w = input.shape
    left, right, top, bottom = padding
    height, width = h * up[0] + top + bottom, w * up[1] + left + right
    result = []
    for y in range(0, height - filter.shape[0] + 1, down[0]):
        for x in range(0, width - filter.shape[1] + 1, down[1]):
            total = 0.0
            for i in range(filter.shape[0]):
                for j in range(filter.shape[1]):
                    row, column = y + i - top, x + j - left
                    inside = 0 <= row < h * up[0] and 0 <= column < w * up[1]
                    if inside and row % up[0] == 0 and column % up[1] == 0:
                        tap = filter[filter.shape[0] - 1 - i, filter.shape[1] - 1 - j]
                        total += float(tap * input[row // up[0], column // up[1]])
            result.append(total)
    return torch.tensor(result, dtype=torch.double).view(-1, (width - filter.shape[1]) // down[1] + 1)


@every_case
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equals_loops(name, backend):
    (input, filter), options = make(name, torch.double)
    with fastgen.backend(backend):
        output = ops.upfirdn2d(input, filter, **options)
    torch.testing.assert_close(output[-1, -1], loops(input[-1, -1], filter, **options))


@every_case
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
def test_equals_pytorch_in_float64(name, layout):
    (input, filter), options = make(name)
    input = LAYOUTS[layout](input) if layout != "contiguous" else input
    output = ops.upfirdn2d(input, filter, **options)
    truth = plain(input.double(), filter.double(), **options)
    assert_as_accurate(output, plain(input, filter, **options), truth)
    expected = torch.contiguous_format if input.is_contiguous() else torch.channels_last
    assert output.is_contiguous(memory_format=expected)


@every_case
def test_correlates(name):
    (input, filter), options = make(name)
    output = ops.upfirdn2d(input, filter.t().contiguous().t(), flip_filter=True, **options)
    assert torch.equal(output, ops.upfirdn2d(input, filter.flip(0, 1), **options))
    torch.testing.assert_close(output, plain(input, filter, flip_filter=True, **options))


@every_case
def test_bits_depend_on_neither_layout_nor_batch_nor_threads(name, monkeypatch):
    monkeypatch.setattr(module, "_THREAD_PRODUCTS", 1)
    (input, filter), options = make(name)
    with fastgen.backend("cpu"):
        output = ops.upfirdn2d(input, filter, **options)
        assert torch.equal(ops.upfirdn2d(LAYOUTS["channels_last"](input), filter, **options), output)
        assert torch.equal(ops.upfirdn2d(input[-1:], filter, **options), output[-1:])
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(ops.upfirdn2d(input, filter, **options), output)
        finally:
            torch.set_num_threads(threads)


def test_integers_stand_for_both_axes():
    (input, filter), _ = make("blur")
    output = ops.upfirdn2d(input, filter, up=2, down=3, padding=1)
    assert torch.equal(output, ops.upfirdn2d(input, filter, up=(2, 2), down=[3, 3], padding=(1, 1, 1, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    (input, filter), options = make("both", dtype)
    output = ops.upfirdn2d(input, filter, **options)
    assert output.dtype == dtype
    torch.testing.assert_close(output, plain(input.float(), filter.float(), **options).to(dtype), atol=0.1, rtol=0.02)


def test_filters_larger_than_the_native_one():
    input, filter = torch.randn(1, 2, 40, 40), torch.randn(33, 32)
    torch.testing.assert_close(
        ops.upfirdn2d(input, filter), plain(input, filter, up=(1, 1), down=(1, 1), padding=(0, 0, 0, 0)),
        atol=1e-3, rtol=1e-4,
    )  # fmt: skip
    with fastgen.backend("cpu"), pytest.raises(RuntimeError, match="filters of up to 1024 elements, got 1056"):
        ops.upfirdn2d(input, filter)


def test_no_images():
    (input, filter), options = make("both")
    assert ops.upfirdn2d(input[:0], filter, **options).shape == (0, *ops.upfirdn2d(input, filter, **options).shape[1:])


def test_gradients():
    (input, filter), options = make("both", torch.double)
    input, filter = input[:, :2].requires_grad_(), filter.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, f: ops.upfirdn2d(x, f, **options), (input, filter))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("layout", ["channels_last", "cropped"])
def test_opcheck(backend, layout):
    (input, filter), options = make("both")
    with fastgen.backend(backend):
        args = (LAYOUTS[layout](input), filter, *options.values(), False)
        opcheck(torch.ops.fastgen.upfirdn2d.default, args)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic):
    (input, filter), options = make("upsampling")

    def function(x, f):
        return ops.upfirdn2d(x * 2.0, f, **options).sigmoid()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        x = torch.randn(batch, *input.shape[1:])
        torch.testing.assert_close(compiled(x, filter), function(x, filter))


def test_modes_and_transforms():
    (input, filter), options = make("both")
    output = ops.upfirdn2d(input, filter, **options)
    with FakeTensorMode() as mode:
        fake = ops.upfirdn2d(mode.from_tensor(input), mode.from_tensor(filter), **options)
        assert fake.shape == output.shape
    mapped = torch.func.vmap(lambda x: ops.upfirdn2d(x, filter, **options))(torch.stack([input, -input]))
    torch.testing.assert_close(mapped, torch.stack([output, -output]))


image, kernel = torch.ones(2, 6, 3, 4), torch.ones(2, 2)
ERRORS = {
    "input a list": (([1.0], kernel), {}, TypeError, "input must be a tensor, got list"),
    "filter a list": ((image, [1.0]), {}, TypeError, "filter must be a tensor, got list"),
    "3-d": ((image[0], kernel), {}, ValueError, r"input must be \[N, C, H, W\].*got \[6, 3, 4\]"),
    "empty": ((image[:, :0], kernel), {}, ValueError, r"without empty dimensions but N, got \[2, 0, 3, 4\]"),
    "filter 1-d": ((image, kernel[0]), {}, ValueError, r"filter must be \[kh, kw\], got \[2\]"),
    "filter empty": ((image, kernel[:0]), {}, ValueError, r"filter must be \[kh, kw\], got \[0, 2\]"),
    "dtype": ((image, kernel.double()), {}, TypeError, "filter must have the dtype of the input, torch.float32"),
    "integers": ((image.int(), kernel.int()), {}, TypeError, "input must be of a floating dtype, got torch.int32"),
    "device": ((image, kernel.to("meta")), {}, ValueError, "filter must be on the device of the input, cpu, got meta"),
    "up": ((image, kernel), {"up": 0}, ValueError, r"up must be positive integers, got \(0, 0\)"),
    "down": ((image, kernel), {"down": (1, 1.5)}, ValueError, r"down must be positive integers, got \(1, 1.5\)"),
    "three": ((image, kernel), {"up": (1, 2, 3)}, ValueError, r"up must be an integer or two \(height, width\)"),
    "padding": (
        (image, kernel),
        {"padding": (1, 2)},
        ValueError,
        r"padding must be .*\(left, right, top, bottom\), got",
    ),
    "all cut": ((image, kernel), {"padding": (0, 0, -3, 5)}, ValueError, r"leaves nothing of an image of \[3, 4\]"),
    "large filter": ((image, torch.ones(5, 2)), {"padding": 0}, ValueError, r"\[5, 2\] is larger than .* \[3, 4\]"),
}


@pytest.mark.parametrize(("args", "options", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, error, message):
    with pytest.raises(error, match=message):
        ops.upfirdn2d(*args, **options)
