"""ELU of features and their negatives: formulas in float64, gradients, dropout against the table of Philox, layouts."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastgen
from fastgen import ops
from fastgen.ops import philox
from tests.instruction_sets import ISAS, chosen

module = importlib.import_module("fastgen.ops.concat_elu")  # the package has the function of this name

SHAPES = {
    "one": [(1, 1, 1, 1)],
    "three channels": [(2, 3, 4, 5)],
    "a vector and one": [(2, 17, 3, 2)],
    "several": [(3, 33, 5, 2), (3, 16, 5, 2), (3, 1, 5, 2)],
    "many": [(2, 160, 4, 4)],
}

all_shapes = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)


def tensors(shapes, dtype=torch.float32):
    return [2 * torch.randn(shape, dtype=dtype) for shape in shapes]


def run(function, inputs):
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def formula(*inputs, negate=True):
    x = torch.cat(inputs, dim=1)
    x = torch.cat([x, -x], dim=1) if negate else x
    return torch.where(x > 0, x, torch.expm1(x))


def native(**options):
    def function(*inputs):
        with fastgen.backend("cpu"):
            return ops.concat_elu(*inputs, **options)

    return function


def rms(tensor):
    return float(tensor.square().mean().sqrt())


@all_shapes
@pytest.mark.parametrize("negate", [True, False])
def test_float32_is_as_accurate_as_pytorch(shapes, negate):
    inputs = tensors(shapes)
    plain = run(lambda *x: F.elu(torch.cat([*x, *(-each for each in x)] if negate else x, dim=1)), inputs)
    truth = run(lambda *x: formula(*x, negate=negate), [x.double() for x in inputs])
    for ours, theirs, exact in zip(run(native(negate=negate), inputs), plain, truth, strict=True):
        assert rms(ours - exact) <= max(2 * rms(theirs - exact), 2**-24 * rms(exact))


@all_shapes
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_instruction_set(shapes, isa, dtype):
    inputs, options = tensors(shapes, dtype), {"dropout": 0.3, "seed": 5}
    with fastgen.backend("reference"):
        expected = run(lambda *x: ops.concat_elu(*x, **options), inputs)
    with chosen(isa):
        actual = run(native(**options), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("features", [1, 5, 63, 64, 65, 200])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_dropped_is_in_the_table(features, backend):
    """One draw of Philox after the other, as the table in `philox` says."""
    seed, share = 2**62 + 12345, 0.4
    x = torch.ones(2, features, 2, 3)
    with fastgen.backend(backend):
        y = ops.concat_elu(x, negate=False, dropout=share, seed=seed)
    blocks, threshold = 8 * math.ceil(features / 64), round(share * 65536)
    for n, row, column in itertools.product(*map(range, (2, 2, 3))):
        draws = [philox.uint32(seed, block, row * 3 + column, n).tolist() for block in range(blocks)]
        for feature in range(features):
            quad, half = divmod(feature, 4)
            number = draws[quad % blocks][2 * (quad // blocks) + half // 2]
            kept = (number >> 16 * (half % 2)) % 65536 >= threshold
            assert y[n, feature, row, column] == pytest.approx(kept * 65536 / (65536 - threshold))


def test_dropout_is_fair():
    x = torch.ones(16, 64, 16, 16)
    y = ops.concat_elu(x, negate=False, dropout=0.25, seed=1)
    kept = (y > 0).double()
    count = kept.numel()
    assert abs(float(kept.mean()) - 0.75) < 4 * math.sqrt(0.75 * 0.25 / count)
    assert float(y.double().mean()) == pytest.approx(1, abs=0.01)
    for dim in (0, 1, 3):  # neighbours are independent
        a, b = kept.narrow(dim, 1, kept.shape[dim] - 1), kept.narrow(dim, 0, kept.shape[dim] - 1)
        assert abs(float((a * b).mean()) - 0.75**2) < 4 * math.sqrt(0.5 / a.numel())


def test_dropout_depends_on_seed_and_index_alone():
    x, y = torch.randn(3, 8, 4, 5), torch.randn(3, 3, 4, 5)
    drawn = ops.concat_elu(x, y, dropout=0.5, seed=7)
    assert torch.equal(ops.concat_elu(x[:2], y[:2], dropout=0.5, seed=7), drawn[:2])
    assert not torch.equal(ops.concat_elu(x, y, dropout=0.5, seed=8), drawn)


def test_without_a_seed_the_generator_decides():
    x = torch.randn(2, 8, 4, 5)
    for backend in ("auto", "reference"):
        with fastgen.backend(backend):
            torch.manual_seed(3)
            first, second = ops.concat_elu(x, dropout=0.5), ops.concat_elu(x, dropout=0.5)
            torch.manual_seed(3)
            assert torch.equal(ops.concat_elu(x, dropout=0.5), first)
            assert not torch.equal(first, second)
            state = torch.get_rng_state()
            ops.concat_elu(x)
            assert torch.equal(torch.get_rng_state(), state)


def test_bits_do_not_depend_on_threads(monkeypatch):
    inputs, options = tensors([(3, 30, 7, 5), (3, 5, 7, 5)]), {"dropout": 0.5, "seed": 1}
    monkeypatch.setattr(module, "_THREAD_ELEMENTS", 1)
    one = run(native(**options), inputs)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(native(**options), inputs), one))


def test_special_values():
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-30, -1e-30, -200.0, 200.0]).view(1, 9, 1, 1)
    values, slopes = run(native(), [x])
    with fastgen.backend("reference"):
        expected, expected_slopes = run(ops.concat_elu, [x])
    torch.testing.assert_close(values, expected, equal_nan=True)
    nan = x.isnan()  # where PyTorch's slope depends on the instruction set
    assert slopes[nan].isnan().all()
    torch.testing.assert_close(slopes[~nan], expected_slopes[~nan])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_dropped_is_zero_whatever_it_was(backend):
    x = torch.tensor([math.nan, math.inf]).repeat(32).view(1, 64, 1, 1)
    with fastgen.backend(backend):
        y = ops.concat_elu(x, dropout=0.5, seed=1)
        kept = ops.concat_elu(torch.ones_like(x), dropout=0.5, seed=1) != 0
    assert (y[~kept] == 0).all()
    assert (y[kept].isnan() | y[kept].isinf() | (y[kept] == -2)).all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_derivatives(dropout):
    leaves = [x.requires_grad_() for x in tensors([(2, 3, 2, 2), (2, 2, 2, 2)], torch.float64)]

    def function(*x):
        return ops.concat_elu(*x, dropout=dropout, seed=2)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


DEPENDENT = {
    "one without gradient": lambda x: (x, torch.full_like(x, 0.3)),
    "twice the same": lambda x: (x, x),
    "one made of the other": lambda x: (x, 1.5 * x.square()),
}


@pytest.mark.parametrize("inputs", DEPENDENT.values(), ids=DEPENDENT)
def test_gradients_of_gradients_of_inputs_that_depend_on_each_other(inputs):
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def penalised(function):
        (first,) = torch.autograd.grad(function(*inputs(x)).square().sum(), x, create_graph=True)
        return first.detach(), torch.autograd.grad(first.square().sum(), x)[0]

    for ours, theirs in zip(penalised(ops.concat_elu), penalised(formula), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("negate", [True, False])
def test_the_plain_gradient_operator(negate):
    inputs = tensors([(2, 3, 4, 5), (2, 2, 4, 5)], torch.float64)
    grad = torch.randn_like(formula(*inputs, negate=negate))
    leaves = [x.requires_grad_() for x in inputs]
    expected = torch.autograd.grad(formula(*leaves, negate=negate), leaves, grad)
    with fastgen.backend("reference"):
        actual = torch.ops.fastgen.concat_elu_grad(grad, inputs, negate, 0.0, 0)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_transforms_and_autocast_take_plain_pytorch():
    x = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(torch.vmap(lambda x: ops.concat_elu(x[None])[0])(x), formula(x))
    _, tangent = torch.func.jvp(ops.concat_elu, (x,), (torch.ones_like(x),))
    signs = torch.cat([torch.ones_like(x), -torch.ones_like(x)], dim=1)
    both = torch.cat([x, -x], dim=1)
    torch.testing.assert_close(tangent, signs * torch.where(both > 0, 1, both.exp()))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.concat_elu(x, x.bfloat16()).shape == (3, 16, 2, 2)


def test_the_seed_is_drawn_on_the_cpu():
    x = torch.ones(1, 64, 4, 4)
    torch.manual_seed(0)
    expected = ops.concat_elu(x, dropout=0.5)
    torch.manual_seed(0)
    with torch.device("meta"):
        assert torch.equal(ops.concat_elu(x, dropout=0.5), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    inputs = tensors([(2, 3, 4, 5), (2, 2, 4, 5)])
    operators = torch.ops.fastgen
    with fastgen.backend(backend):
        opcheck(operators.concat_elu.default, (inputs, True, 0.5, 3))
        opcheck(operators.concat_elu.default, (inputs, False, 0.0, 0))
        opcheck(operators.concat_elu_grad.default, (torch.randn(2, 10, 4, 5), inputs, True, 0.5, 3))


def test_compiles_as_one_graph():
    def function(x, y):
        return ops.concat_elu(x, y).sigmoid()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = tensors([(2, 3, 4, 5), (2, 2, 4, 5)])
    for ours, theirs in zip(run(compiled, inputs), run(function, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    dropping = torch.compile(lambda x: ops.concat_elu(x, dropout=0.5), fullgraph=True, backend="aot_eager")
    assert (dropping(torch.ones(1, 64, 8, 8)) == 0).any()


def test_layouts_and_empty_batch():
    x = torch.randn(2, 6, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    sliced = torch.stack((x, -x), dim=-1).flatten(3)[..., ::2]
    expected = run(native(), [x, x])
    assert expected[0].is_contiguous()
    for others in ([last, last], [sliced, x], [x, last]):
        actual = run(native(), others)
        assert all(map(torch.equal, actual, expected))
        assert actual[0].is_contiguous(memory_format=torch.channels_last)
    drawn = native(dropout=0.5, seed=1)
    assert drawn(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(drawn(x), drawn(last))
    assert native()(x[:0]).shape == (0, 12, 4, 5)


ERRORS = {
    "nothing": ((), {}, ValueError, "expected at least one tensor"),
    "a list": (([1.0],), {}, TypeError, r"inputs\[0\] must be a tensor, got list"),
    "3-d": ((torch.ones(2, 3, 4),), {}, ValueError, r"inputs\[0\] must be \[N, C, H, W\].*got \[2, 3, 4\]"),
    "sizes": ((torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5)), {}, ValueError, "agree in all but their channels"),
    "dtypes": ((torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1).double()), {}, TypeError, r"inputs\[1\] must have the"),
    "integers": ((torch.ones(1, 1, 1, 1).int(),), {}, TypeError, "floating dtype"),
    "all dropped": ((torch.ones(1, 1, 1, 1),), {"dropout": 1}, ValueError, "at least 0 and below 1, got 1"),
    "negative": ((torch.ones(1, 1, 1, 1),), {"dropout": -0.1}, ValueError, "at least 0 and below 1"),
    "seed": ((torch.ones(1, 1, 1, 1),), {"seed": -1}, ValueError, "seed must be from 0"),
}


@pytest.mark.parametrize(("inputs", "options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(inputs, options, error, message):
    with pytest.raises(error, match=message):
        ops.concat_elu(*inputs, **options)


def test_many_features_with_dropout_take_plain_pytorch():
    x = torch.ones(1, 4097, 1, 1)
    assert ops.concat_elu(x, dropout=0.5, seed=0).shape == (1, 8194, 1, 1)
    with fastgen.backend("cpu"), pytest.raises(RuntimeError, match="at most 8192 output channels"):
        ops.concat_elu(x, dropout=0.5, seed=0)
