"""The nearest code: exact arithmetic with ties, distances in float64, layouts, instruction sets, threads, NaN."""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fastgen
from fastgen import ops
from tests.instruction_sets import ISAS, chosen

module = importlib.import_module("fastgen.ops.nearest_code")  # the package has the function of this name

SHAPES = [(1, 1), (3, 7), (2, 5, 9), (2, 3, 5, 7), (1, 2, 3, 3, 2), (65,)]  # without features
DEPTHS, COUNTS = [1, 3, 17, 64], [1, 2, 7, 17, 513]

both = pytest.mark.parametrize("backend", ["reference", "cpu"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def run(backend, *args):
    with fastgen.backend(backend):
        return ops.nearest_code(*args)


def features(shape, depth, dtype=torch.float32):
    return torch.randn(shape[0], depth, *shape[1:], dtype=dtype)


def close_codes(count, depth, dtype=torch.float32, spread=1e-3):
    """All nearly as far from anything: rounding decides."""
    return torch.randn(depth, dtype=dtype) + spread * torch.randn(count, depth, dtype=dtype)


def rows_of(input):
    return input.movedim(1, -1).reshape(-1, input.shape[1])


def by_hand(input, codebook):
    """In NumPy, which says that the first of equal ones is found, from differences."""
    x, codes = rows_of(input).double().numpy(), codebook.double().numpy()
    index = [np.square(row - codes).sum(1).argmin() for row in x]
    return torch.tensor(index, dtype=torch.int64).reshape(input.shape[0], *input.shape[2:])


@pytest.mark.parametrize("isa", ["reference", *ISAS])
@dtypes
def test_integers_and_ties(isa, dtype):
    """Nothing is rounded: the lowest index of many equal ones."""
    with chosen("" if isa == "reference" else isa):
        for depth, count, shape in itertools.product(DEPTHS, COUNTS, SHAPES[::2]):
            x, codes = features(shape, depth, dtype).round(), torch.randn(count, depth, dtype=dtype).round()
            codes[count // 2 :] = codes[: count - count // 2].clone()
            actual = run("reference" if isa == "reference" else "cpu", x, codes)
            assert actual.dtype == torch.int64 and actual.is_contiguous()
            assert torch.equal(actual, by_hand(x, codes)), (depth, count, shape)


@both
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clear_answers(backend, dtype, shape):
    """Also of more codes and positions than are met at a time, and of sums of several chunks."""
    for depth, count in [(3, 7), (64, 513), (300, 50)]:
        codes = 4 * torch.randn(count, depth, dtype=dtype)
        expected = torch.randint(count, shape)
        x = (codes[expected] + 0.01 * torch.randn(*shape, depth, dtype=dtype)).movedim(-1, 1)
        assert torch.equal(run(backend, x, codes), expected)
        many = x.repeat(-(-400 // expected.numel()), *[1] * (x.dim() - 1))
        assert torch.equal(run(backend, many, codes), expected.repeat(len(many) // len(x), *[1] * (x.dim() - 2)))


@both
@pytest.mark.parametrize("depth", [3, 64, 256, 1000])
def test_float32_is_as_accurate_as_pytorch(backend, depth):
    """How much farther the chosen codes are than the nearest, summed over vectors for which rounding decides."""
    x, codes = torch.randn(600, depth), close_codes(300, depth, spread=1e-6)
    exact = torch.cdist(x.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    plain = (x.square().sum(1, keepdim=True) - 2 * x @ codes.T + codes.square().sum(1)).argmin(1)
    excess = exact - exact.amin(1, keepdim=True)
    theirs, ours = (float(excess.gather(1, i[:, None]).sum()) for i in (plain, run(backend, x, codes)))
    assert 0 < theirs and ours <= 2 * theirs, (ours, theirs)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.stack((t, -t), dim=-1).flatten(3)[..., ::2],
    "channels sliced": lambda t: LAYOUTS["channels_last"](torch.cat((t, -t), dim=1))[:, : t.shape[1]],
    "planes sliced": lambda t: torch.cat((t, -t), dim=1)[:, : t.shape[1]],
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "offset": lambda t: torch.cat((torch.zeros(1), t.flatten()))[1:].view(t.shape),
    "negated": lambda t: torch.complex(t, -t).conj().imag,  # of which the memory has the other sign
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 4, 8), (37, 1, 1)], ids=str)
def test_layouts_give_the_same_bits(layout, shape):
    for depth, count in [(1, 20), (17, 40), (64, 90)]:
        x, codes = features(shape, depth), close_codes(count, depth)
        expected = run("cpu", x, codes)
        arranged = LAYOUTS[layout](x)
        assert torch.equal(arranged, x)
        assert torch.equal(run("cpu", arranged, codes), expected)
        assert torch.equal(run("cpu", x, codes.T.contiguous().T), expected)
        assert torch.equal(run("cpu", rows_of(arranged), codes), expected.flatten())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_usual_layouts_are_not_copied(layout):
    x = LAYOUTS[layout](features((2, 5, 7), 17))
    vectors, sizes, strides = module._vectors(x)
    assert vectors.data_ptr() == x.data_ptr()
    assert (sizes, strides) == {
        "contiguous": ((2, 35, 17), (17 * 35, 1, 35)),
        "channels_last": ((1, 70, 17), (0, 17, 1)),
    }[layout]


@dtypes
def test_bits_do_not_depend_on_batch_or_threads(dtype, monkeypatch):
    monkeypatch.setattr(module, "_THREAD_PRODUCTS", 1)
    monkeypatch.setattr(module, "_THREAD_POSITIONS", 1)
    x, codes = features((5, 7, 9), 150, dtype), close_codes(130, 150, dtype, 1e-3 if dtype == torch.float32 else 1e-12)
    expected = run("cpu", x, codes)
    for n, y, column in itertools.product(range(5), range(7), (0, 4, 8)):
        assert run("cpu", x[n, :, y, column][None], codes).item() == expected[n, y, column]
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(run("cpu", x, codes), expected), threads


@dtypes
def test_the_lower_of_two_copies(dtype):
    """Wherever the codes are, their scores are rounded alike."""
    x, codes = features((5, 7, 9), 150, dtype), close_codes(65, 150, dtype)
    order = torch.randperm(130)
    expected = torch.stack((order.argsort()[:65], order.argsort()[65:])).amin(0)
    assert torch.equal(run("cpu", x, codes.repeat(2, 1)[order]), expected[run("cpu", x, codes)])


@both
@dtypes
def test_what_is_not_finite(backend, dtype):
    """Vectors that are not get index 0, codes that are not are never taken; no other index changes."""
    x, codes = features((3, 4, 7), 5, dtype), torch.randn(40, 5, dtype=dtype)
    expected = run(backend, x, codes)
    bad = x.clone()
    for column, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        bad[1, column, 2, column] = value
    actual = run(backend, bad, codes)
    assert actual[1, 2, :3].tolist() == [0, 0, 0]
    actual[1, 2, :3] = expected[1, 2, :3]
    assert torch.equal(actual, expected)
    more = torch.randn(80, 5, dtype=dtype)
    more[::3][:13, 1] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max]).repeat(4)[:13]
    usable = torch.arange(80)[more.square().sum(1).isfinite()]
    assert torch.equal(run(backend, x, more), usable[run(backend, x, more[usable])])
    for value in (torch.nan, torch.inf, torch.finfo(dtype).max):
        assert run(backend, x, torch.full((20, 5), value, dtype=dtype)).eq(0).all()
    huge = torch.full((1, 5), torch.finfo(dtype).max, dtype=dtype)
    assert 0 <= run(backend, huge, 1e3 * codes).item() < 40


@both
@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty(backend, shape):
    output = run(backend, features(shape, 3), torch.randn(5, 3))
    assert output.shape == shape and output.dtype == torch.int64


def test_reference_in_parts(monkeypatch):
    x, codes = features((2, 5, 7), 17), torch.randn(40, 17)
    expected = run("reference", x, codes)
    for most in (1, 3 * 40, 69 * 40):
        monkeypatch.setattr(module, "_MAX_SCORES", most)
        assert torch.equal(run("reference", x, codes), expected)


@both
def test_expanded_inputs(backend):
    x, codes = torch.randn(1, 4, 1, 6).expand(3, 4, 5, 6), torch.randn(1, 4).expand(7, 4)
    assert torch.equal(run(backend, x, codes), torch.zeros(3, 5, 6, dtype=torch.int64))
    codes = torch.randn(7, 4)
    assert torch.equal(run(backend, x, codes), by_hand(x, codes))


# Gradients, transforms, registration


@both
def test_no_gradient(backend):
    x, codes = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    assert not run(backend, x, codes).requires_grad
    with fastgen.backend(backend):
        assert not torch.ops.fastgen.nearest_code(x, codes).requires_grad


@both
def test_opcheck(backend):
    x, codes = features((2, 3, 5), 7), torch.randn(9, 7)
    with fastgen.backend(backend):
        opcheck(torch.ops.fastgen.nearest_code.default, (x, codes))
        opcheck(torch.ops.fastgen.nearest_code.default, (x.requires_grad_(), codes))
        opcheck(torch.ops.fastgen.nearest_code.default, (rows_of(features((2, 3), 7)).T.contiguous().T, codes))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic):
    def function(x, codes):
        return torch.nn.functional.embedding(ops.nearest_code(x * 2.0, codes), codes).relu()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    codes = torch.randn(9, 5, requires_grad=True)
    for n in (2, 3):
        x = features((n, 3, 4), 5)
        ours, expected = compiled(x, codes), function(x, codes)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), codes)[0] for y in (ours, expected)))


def test_transforms():
    x, codes = features((2, 3, 4), 5), torch.randn(9, 5)
    stack = torch.stack((x, -x))
    mapped = torch.func.vmap(ops.nearest_code, (0, None))(stack, codes)
    assert torch.equal(mapped, torch.stack([ops.nearest_code(x, codes) for x in stack]))
    with_codes = torch.func.grad(lambda codes: codes[ops.nearest_code(x, codes)].sum())(codes)
    counts = torch.bincount(ops.nearest_code(x, codes).flatten(), minlength=9)
    torch.testing.assert_close(with_codes, counts[:, None].expand(9, 5).float())


def test_jit_trace_takes_other_sizes(monkeypatch):
    monkeypatch.setattr(module, "_MAX_SCORES", 1)
    codes = torch.randn(9, 5)
    traced = torch.jit.trace(lambda x: ops.nearest_code(x, codes), features((2, 3, 4), 5))
    x = features((4, 6, 5), 5)
    assert torch.equal(traced(x), ops.nearest_code(x, codes))


def test_reference_traces_to_plain_aten():
    x, codes = features((2, 3, 4), 5), torch.randn(9, 5)
    with fastgen.backend("reference"):
        graph = make_fx(lambda x: ops.nearest_code(x, codes))(x).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert "aten.argmin.default" in names
    assert not any("fastgen" in name for name in names)


def test_modes_see_the_operator():
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (features((2, 3, 4), 5), torch.randn(9, 5))]
        output = run("cpu", *fake)
        assert output.shape == (2, 3, 4) and output.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precisions_are_compared_in_float32(dtype):
    x, codes = features((2, 3, 4), 64).to(dtype), close_codes(50, 64, spread=0.05).to(dtype)
    expected = by_hand(x, codes)
    assert torch.equal(ops.nearest_code(x, codes), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.nearest_code(x, codes.float()), expected)
        assert torch.equal(ops.nearest_code(x.float(), codes.float()), expected)
        assert torch.equal(run("reference", x.float(), codes.float()), expected)
    with fastgen.backend("cpu"), pytest.raises(RuntimeError, match="takes float32 and float64"):
        ops.nearest_code(x, codes)


image, book = torch.ones(2, 6, 3, 4), torch.ones(5, 6)
ERRORS = {
    "input a list": (([1.0], book), TypeError, "input must be a tensor, got list"),
    "codebook a number": ((image, 1.0), TypeError, "codebook must be a tensor, got float"),
    "1-d": ((torch.ones(6), book), ValueError, r"input must be \[N, D\] or .*, got \[6\]"),
    "no features": ((torch.ones(2, 0, 3), book[:, :0]), ValueError, r"D at least 1, got \[2, 0, 3\]"),
    "features": ((image, book[:, :5]), ValueError, r"codebook must be \[K, 6\].*got \[5, 5\]"),
    "no codes": ((image, book[:0]), ValueError, r"K at least 1, got \[0, 6\]"),
    "codebook 3-d": ((image, book[None]), ValueError, r"codebook must be \[K, 6\].*got \[1, 5, 6\]"),
    "dtype": ((image, book.double()), TypeError, "codebook must have the dtype of the input, torch.float32"),
    "integers": ((image.int(), book.int()), TypeError, "input must be of a floating dtype, got torch.int32"),
    "device": ((image, book.to("meta")), ValueError, "codebook must be on the device of the input, cpu, got meta"),
}


@pytest.mark.parametrize(("args", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        ops.nearest_code(*args)
    if all(isinstance(x, torch.Tensor) for x in args):
        with pytest.raises(error, match=message):
            torch.ops.fastgen.nearest_code(*args)
