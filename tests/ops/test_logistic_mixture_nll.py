"""Mixtures of discretised logistics: loops over the formula, sums over levels, the reference in float64, extremes."""

from __future__ import annotations

import importlib
import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.library import opcheck

import fastgen
from fastgen import losses, ops
from tests.instruction_sets import FUSED, ISAS, chosen

module = importlib.import_module("fastgen.ops.logistic_mixture_nll")  # the package has the function of this name


class Case(NamedTuple):
    channels: int
    components: int
    levels: int
    batch: int = 2
    size: tuple[int, int] = (5, 7)
    spread: float = 1.0  # standard deviation of the parameters

    def tensors(self, dtype=torch.float32):
        """params, images with plenty of edge levels, gradient of the result."""
        shape = (self.batch, self.channels, *self.size)
        images = torch.randint(self.levels, shape, dtype=torch.uint8)
        edges = torch.randint(2, shape, dtype=torch.uint8) * (self.levels - 1)
        images = torch.where(torch.rand(shape) < 0.2, edges, images)
        params = self.spread * torch.randn(self.batch, self.count, *self.size, dtype=dtype)
        return params, images, torch.randn(self.batch, *self.size, dtype=dtype)

    @property
    def count(self):
        return self.components * (10 if self.channels == 3 else 3)


CASES = {
    "one of all": Case(1, 1, 2, 1, (1, 1)),
    "grey": Case(1, 10, 256),
    "grey narrow": Case(1, 3, 256, spread=5.0),
    "two levels": Case(3, 4, 2),
    "17 levels": Case(3, 5, 17),
    "rgb": Case(3, 10, 256),
    "rgb one component": Case(3, 1, 256),
    "rgb wide spread": Case(3, 7, 256, spread=4.0),
    "odd image": Case(3, 3, 256, 3, (17, 23)),
    "one column": Case(3, 3, 5, 2, (33, 1)),
    "many components": Case(1, 37, 256, 1, (4, 5)),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def run(function, case, params, images, grad):
    """Result and gradient."""
    params = params.detach().requires_grad_()
    nll = function(params, images, levels=case.levels)
    return nll.detach(), torch.autograd.grad(nll, params, grad.to(nll.dtype))[0]


def native(*args, **kwargs):
    with fastgen.backend("cpu"):
        return ops.logistic_mixture_nll(*args, **kwargs)


def reference(*args, **kwargs):
    with fastgen.backend("reference"):
        return ops.logistic_mixture_nll(*args, **kwargs)


def pixel_nll(params, levels, count):
    """The formula of the paper for the parameters and levels of one pixel, as it stands."""
    params, channels = [float(p) for p in params], len(levels)
    kinds = 3 if channels == 3 else 2
    components = len(params) // (1 + channels * kinds)
    x = [2 * int(level) / (count - 1) - 1 for level in levels]
    likelihood = 0.0
    for k in range(components):
        probability = math.exp(params[k]) / sum(math.exp(p) for p in params[:components])
        own = [params[components + c * kinds * components :] for c in range(channels)]
        for c in range(channels):
            mean = own[c][k]
            if c == 1:
                mean += math.tanh(own[0][2 * components + k]) * x[0]
            if c == 2:
                mean += math.tanh(own[1][2 * components + k]) * x[0] + math.tanh(own[2][2 * components + k]) * x[1]
            scale = math.exp(max(own[c][components + k], -7.0))
            upper = 1 / (1 + math.exp(-(x[c] - mean + 1 / (count - 1)) / scale))
            lower = 1 / (1 + math.exp(-(x[c] - mean - 1 / (count - 1)) / scale))
            upper = 1.0 if levels[c] == count - 1 else upper
            lower = 0.0 if levels[c] == 0 else lower
            probability *= upper - lower
        likelihood += probability
    return -math.log(likelihood)


@pytest.mark.parametrize("function", [reference, native])
@pytest.mark.parametrize("name", ["grey", "two levels", "17 levels", "rgb", "many components"])
def test_against_the_formula(name, function):
    case = CASES[name]
    params, images, _ = case.tensors(torch.float64)
    nll = function(params.clamp(-3, 3), images, levels=case.levels)
    for n, y, x in itertools.product(range(case.batch), *map(range, case.size)):
        expected = pixel_nll(params[n, :, y, x].clamp(-3, 3), images[n, :, y, x], case.levels)
        assert nll[n, y, x].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("function", [reference, native])
@pytest.mark.parametrize("case", [Case(1, 3, 256), Case(1, 2, 2), Case(3, 2, 2), Case(3, 3, 11)], ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0, 10.0])
def test_probabilities_sum_to_one(case, function, spread):
    levels = torch.cartesian_prod(*[torch.arange(case.levels)] * case.channels).view(1, -1, 1, case.channels)
    images = levels.permute(0, 3, 1, 2).to(torch.uint8)
    for _ in range(3):
        params = spread * torch.randn(1, case.count, 1, 1, dtype=torch.float64)
        nll = function(params.expand(-1, -1, *images.shape[2:]), images, levels=case.levels)
        assert nll.neg().exp().sum().item() == pytest.approx(1.0, abs=1e-12)


@all_cases
def test_float32_is_as_accurate_as_pytorch(case):
    tensors = case.tensors()
    params, images, grad = tensors
    expected = run(reference, case, params.double(), images, grad)
    for name, truth, theirs, ours in zip(
        ("nll", "gradient"), expected, run(reference, case, *tensors), run(native, case, *tensors), strict=True
    ):
        error, plain = rms(ours - truth), rms(theirs - truth)
        assert error <= max(2 * plain, 2**-23 * rms(truth)), f"{name}: error {error:.2e}, plain PyTorch {plain:.2e}"


def rms(tensor):
    return float(tensor.square().mean().sqrt())


@all_cases
@pytest.mark.parametrize("isa", ISAS)
def test_float64_on_every_instruction_set(case, isa):
    tensors = case.tensors(torch.float64)
    expected = run(reference, case, *tensors)
    with chosen(isa):
        actual = run(native, case, *tensors)
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["grey", "rgb", "odd image"])
def test_bits_are_the_same_on_every_fused_instruction_set(name):
    case = CASES[name]
    tensors, results = case.tensors(), []
    for isa in FUSED:
        with chosen(isa):
            results.append(run(native, case, *tensors))
    for result, first in zip(results[1:], itertools.repeat(results[0])):
        assert all(map(torch.equal, result, first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_threads(dtype, monkeypatch):
    monkeypatch.setattr(module, "_MIN_THREAD_PIXELS", 1)
    case = CASES["odd image"]
    tensors = case.tensors(dtype)
    one = run(native, case, *tensors)
    for threads in (2, 3, 7, 19):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(native, case, *tensors), one)), threads


def test_bits_do_not_depend_on_the_batch():
    case = CASES["odd image"]
    tensors = case.tensors()
    whole = run(native, case, *tensors)
    for n in range(case.batch):
        alone = run(native, case, *(tensor[n : n + 1] for tensor in tensors))
        assert torch.equal(alone[0][0], whole[0][n])
        assert torch.equal(alone[1][0], whole[1][n])


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.stack((t, t + 1), dim=-1).flatten(3)[..., ::2],
    "channels sliced": lambda t: torch.cat((t, t), dim=1).contiguous(memory_format=torch.channels_last)[
        :, : t.shape[1]
    ],
    "offset": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["grey", "rgb", "odd image", "rgb one component"])
def test_layouts_give_the_same_bits(name, layout):
    case = CASES[name]
    params, images, grad = case.tensors()
    expected = run(native, case, params, images, grad)
    arrange = LAYOUTS[layout]
    actual = run(native, case, arrange(params), arrange(images), arrange(grad.unsqueeze(1)).squeeze(1))
    assert all(map(torch.equal, actual, expected))


def test_gradient_has_the_layout_of_the_parameters():
    params, images, _ = CASES["rgb"].tensors()
    for arrange in (LAYOUTS["contiguous"], LAYOUTS["channels_last"]):
        arranged = arrange(params).detach().requires_grad_()
        ops.logistic_mixture_nll(arranged, images).sum().backward()
        assert arranged.grad.stride() == arranged.stride()


def test_expanded_inputs():
    case = Case(3, 2, 256)
    params = torch.randn(1, case.count, 1, 7, dtype=torch.float64).expand(2, -1, 5, -1)
    images, grad = case.tensors()[1][:1].expand(2, -1, -1, -1), torch.ones((), dtype=torch.float64).expand(2, 5, 7)
    for ours, truth in zip(
        run(native, case, params, images, grad), run(reference, case, params, images, grad), strict=True
    ):
        torch.testing.assert_close(ours, truth)


def test_offsets_beyond_32_bits():
    memory = torch.from_numpy(np.zeros(2**31 + 64, np.float32))  # touched at both ends alone
    params = memory.as_strided((2, 3, 4, 4), (2**31, 16, 4, 1))
    params.copy_(torch.randn(2, 3, 4, 4))
    images = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
    assert torch.equal(native(params, images), native(params.clone(), images))


EXTREMES = {
    "logits": [-3.4e38, 0.0, 3.4e38],
    "means": [-3.4e38, -1e30, -500.0, -1.0, 0.1, 1.004, 1e4, 3.4e38],
    "log scales": [-3.4e38, -1e4, -7.0, -6.9, -4.8, 0.0, 20.0, 80.0, 104.0, 1e4, 3.4e38],
    "levels": [0, 1, 128, 254, 255],
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("function", [reference, native])
def test_finite_for_all_finite_parameters(channels, function):
    """A grid of extremes for the first component and the first colour; the others are drawn from the same values."""
    grid = torch.cartesian_prod(*(torch.tensor(values, dtype=torch.float32) for values in EXTREMES.values()))
    count, case = len(grid), Case(channels, 2, 256)
    values = torch.tensor([*itertools.chain(*EXTREMES.values())])
    params = values[torch.randint(len(values), (count, case.count))]
    params[:, 0], params[:, 2], params[:, 4] = grid[:, 0], grid[:, 1], grid[:, 2]
    images = torch.tensor(EXTREMES["levels"])[torch.randint(5, (count, channels))]
    images[:, 0] = grid[:, 3]
    params, images = params.view(count, -1, 1, 1), images.to(torch.uint8).view(count, -1, 1, 1)
    nll, gradient = run(function, case, params, images, torch.ones(count, 1, 1))
    assert nll.isfinite().all() and gradient.isfinite().all()
    truth, true_gradient = run(reference, case, params.double(), images, torch.ones(count, 1, 1))
    moderate = truth < 1e36  # beyond, float32 gives the largest that it can add up
    torch.testing.assert_close(nll[moderate].double(), truth[moderate], rtol=1e-4, atol=1e-4)
    assert (nll[~moderate] > 1e35).all()
    close = (gradient - true_gradient).abs() <= 1e-3 * true_gradient.abs() + 1e-3
    # Where parts that differ by 1e30 tie in float32, so do the components.
    assert close[moderate[:, None].expand_as(close)].float().mean() > 0.995


def test_log_scales_below_the_limit_count_as_the_limit():
    case = Case(3, 3, 256)
    params, images, grad = case.tensors()
    split = params.view(case.batch, 10, 3, *case.size)
    split[:, [2, 5, 8]] = -7.0
    at_limit = run(native, case, params, images, grad)
    split[:, [2, 5, 8]] = -9.0
    below = run(native, case, params, images, grad)
    assert torch.equal(below[0], at_limit[0])
    gradients = below[1].view_as(split), at_limit[1].view_as(split)
    assert (gradients[0][:, [2, 5, 8]] == 0).all() and (gradients[1][:, [2, 5, 8]] != 0).any()
    assert torch.equal(gradients[0][:, [1, 4, 7]], gradients[1][:, [1, 4, 7]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_stays_in_its_pixel(dtype):
    case = CASES["rgb"]
    params, images, grad = case.tensors(dtype)
    expected = run(native, case, params, images, grad)
    for p in range(0, case.count, 7):
        spoilt = params.clone()
        spoilt[1, p, 2, 3] = float("nan")
        nll, gradient = run(native, case, spoilt, images, grad)
        assert nll[1, 2, 3].isnan() and gradient[1, :, 2, 3].isnan().any()
        assert nll.isnan().sum() == 1
        assert (nll != expected[0]).sum() == 1
        assert (gradient != expected[1]).any(1).sum() == 1


@pytest.mark.parametrize("name", ["grey", "two levels", "17 levels", "rgb one component"])
def test_gradcheck(name):
    case = CASES[name]
    params, images, _ = case.tensors(torch.float64)
    params = params[:, :, :2, :3].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: native(p, images[:, :, :2, :3], levels=case.levels), params)


def test_second_derivatives():
    case = Case(3, 2, 17, 1, (1, 2))
    params, images, _ = case.tensors(torch.float64)
    params.requires_grad_()
    for function in (native, reference):
        assert torch.autograd.gradgradcheck(lambda p, f=function: f(p, images, levels=17), params)

    def penalised(function):
        nll = function(params, images, levels=17).sum()
        (grad,) = torch.autograd.grad(nll, params, create_graph=True)
        return torch.autograd.grad(nll + grad.square().sum(), params)[0]

    torch.testing.assert_close(penalised(native), penalised(reference))


def test_backward_pass_keeps_the_inputs_alone():
    params, images, _ = CASES["rgb"].tensors()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        native(params.requires_grad_(), images)
    assert sorted(kept) == sorted([params.data_ptr(), images.data_ptr()])


@pytest.mark.parametrize("function", [reference, native])
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)], ids=str)
def test_empty(function, shape):
    n, height, width = shape
    params = torch.randn(n, 20, height, width, requires_grad=True)
    nll = function(params, torch.zeros(n, 3, height, width, dtype=torch.uint8), levels=7)
    nll.sum().backward()
    assert nll.shape == shape and params.grad.shape == params.shape


def test_opcheck():
    """Native; the reference's gradient is plain autograd, which the modes of opcheck switch off."""
    operators = torch.ops.fastgen
    for case in (CASES["17 levels"], CASES["grey"]):
        params, images, grad = case.tensors()
        opcheck(operators.logistic_mixture_nll.default, (params, images, case.levels))
        opcheck(operators.logistic_mixture_nll_grad.default, (grad, params, images, case.levels))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_operators_agree_with_the_reference(backend):
    case = CASES["17 levels"]
    params, images, grad = case.tensors(torch.float64)
    expected = run(reference, case, params, images, grad)
    with fastgen.backend(backend):
        nll = torch.ops.fastgen.logistic_mixture_nll(params, images, 17)
        gradient = torch.ops.fastgen.logistic_mixture_nll_grad(grad, params, images, 17)
    torch.testing.assert_close(nll, expected[0])
    torch.testing.assert_close(gradient, expected[1])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic):
    def function(params, images, levels):
        return ops.logistic_mixture_nll(params * 2, images, levels=levels).sqrt()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3):
        case = Case(3, 2, 17, n)
        tensors = case.tensors()
        assert all(map(torch.equal, run(compiled, case, *tensors), run(function, case, *tensors)))


def test_low_precision_is_widened():
    params, images, _ = CASES["rgb"].tensors()
    low = params.bfloat16().requires_grad_()
    nll = ops.logistic_mixture_nll(low, images)
    assert torch.equal(nll, ops.logistic_mixture_nll(low.float(), images))
    nll.sum().backward()
    assert low.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.logistic_mixture_nll(params, images), ops.logistic_mixture_nll(params.clone(), images))


def test_loss_of_that_name():
    assert fastgen.losses.logistic_mixture_nll is ops.logistic_mixture_nll is losses.logistic_mixture_nll


def arguments(**changes):
    given = {"params": torch.zeros(2, 20, 5, 6), "images": torch.zeros(2, 3, 5, 6, dtype=torch.uint8), "levels": 17}
    return {**given, **changes}


ERRORS = {
    "params a list": ({"params": [1.0]}, TypeError, "params must be a tensor, got list"),
    "params integers": ({"params": torch.zeros(2, 20, 5, 6).int()}, TypeError, "params must be of a floating dtype"),
    "params 3-d": ({"params": torch.zeros(20, 5, 6)}, ValueError, r"params must be \[2, P, 5, 6\].*got \[20, 5, 6\]"),
    "params count": ({"params": torch.zeros(2, 25, 5, 6)}, ValueError, r"multiple of 10, got \[2, 25, 5, 6\]"),
    "no params": ({"params": torch.zeros(2, 0, 5, 6)}, ValueError, r"multiple of 10, got \[2, 0, 5, 6\]"),
    "params size": ({"params": torch.zeros(2, 20, 6, 5)}, ValueError, r"got \[2, 20, 6, 5\]"),
    "images floats": ({"images": torch.zeros(2, 3, 5, 6)}, TypeError, "images must be of dtype torch.uint8"),
    "two channels": ({"images": torch.zeros(2, 2, 5, 6).byte()}, ValueError, r"C 1 or 3, got \[2, 2, 5, 6\]"),
    "device": ({"params": torch.zeros(2, 20, 5, 6, device="meta")}, ValueError, "images must be on the device"),
    "levels": ({"levels": 257}, ValueError, r"levels must be an integer in 2\.\.256, got 257"),
    "level": ({"images": torch.full((2, 3, 5, 6), 17).byte()}, ValueError, r"levels in 0\.\.16, got 17"),
}


@pytest.mark.parametrize("function", [reference, native])
@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changes, error, message, function):
    with pytest.raises(error, match=message):
        function(**arguments(**changes))


def test_operator_checks_the_gradient():
    params, images, _ = CASES["rgb"].tensors()
    with pytest.raises(ValueError, match=r"grad must be \[2, 5, 7\] torch.float32, got \[2, 7, 5\]"):
        torch.ops.fastgen.logistic_mixture_nll_grad(torch.ones(2, 7, 5), params, images, 256)
