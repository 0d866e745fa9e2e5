"""The ordinary convolution: plain PyTorch in float64, every option, layouts, stale weights, who computes it."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

import fastgen
from fastgen import backends, ops
from fastgen.ops import conv_cpu as cpu
from fastgen.ops.conv_block import pair as make_pair
from tests.instruction_sets import ISAS, chosen

module = importlib.import_module("fastgen.ops.conv2d_bn_act")  # the package has the function of this name


class Case(NamedTuple):
    shape: tuple[int, int, int, int]  # N, Cin, H, W
    out: int
    kernel: tuple[int, int]
    options: Mapping[str, Any] = MappingProxyType({})

    def tensors(self, dtype=torch.float32, bias=True, norm=True):
        """input, weight, bias, running_mean, running_var, bn_weight, bn_bias."""
        x = torch.randn(self.shape, dtype=dtype)
        weight = torch.randn(self.out, self.shape[1] // self.options.get("groups", 1), *self.kernel, dtype=dtype)
        weight /= weight[0].numel() ** 0.5  # so that the norm's variances are those of what it gets
        vectors = [torch.randn(self.out, dtype=dtype) for _ in range(4)]
        var = torch.rand(self.out, dtype=dtype) + 0.5
        return [x, weight, vectors[0] if bias else None, *((vectors[1], var, *vectors[2:]) if norm else (None,) * 4)]


CASES = {
    "one of all": Case((1, 1, 1, 1), 1, (1, 1)),
    "k3s1p1": Case((2, 5, 7, 11), 19, (3, 3), {"padding": 1}),
    "k4s2p1": Case((3, 17, 6, 8), 33, (4, 4), {"stride": 2, "padding": 1}),
    "k4s2p1 odd": Case((3, 17, 7, 9), 33, (4, 4), {"stride": 2, "padding": 1}),
    "k1": Case((2, 6, 3, 5), 20, (1, 1)),
    "k1s2": Case((2, 6, 4, 5), 20, (1, 1), {"stride": 2}),
    "k4 of 4x4": Case((5, 10, 4, 4), 24, (4, 4)),
    "last layer k7": Case((2, 16, 9, 7), 3, (7, 7), {"padding": 3}),
    "last layer k3": Case((2, 8, 9, 13), 3, (3, 3), {"padding": 1}),
    "one channel": Case((2, 1, 8, 8), 1, (5, 5), {"stride": 2, "padding": 2}),
    "groups": Case((2, 12, 5, 6), 18, (3, 3), {"stride": 2, "groups": 3}),
    "depthwise": Case((2, 21, 7, 15), 21, (3, 3), {"padding": 1, "groups": 21}),
    "depthwise k7": Case((1, 40, 12, 13), 40, (7, 7), {"padding": 3, "groups": 40}),
    "depthwise, one line": Case((3, 9, 1, 8), 9, (1, 3), {"groups": 9}),
    "depthwise, steps": Case(
        (2, 9, 9, 12), 9, (5, 2), {"groups": 9, "stride": (2, 1), "dilation": (1, 3), "padding": 2}
    ),
    "depthwise, padding above kernel": Case((2, 3, 2, 3), 3, (3, 2), {"groups": 3, "padding": 4}),
    "two of each channel": Case((2, 6, 5, 6), 12, (3, 3), {"padding": 1, "groups": 6}),
    "dilation": Case((2, 4, 9, 11), 6, (3, 2), {"dilation": (2, 3), "padding": (1, 0)}),
    "dilation, stride": Case((2, 4, 9, 10), 6, (3, 3), {"dilation": (2, 3), "stride": (3, 2), "padding": 2}),
    "stride above kernel": Case((2, 4, 9, 10), 6, (2, 1), {"stride": (3, 4)}),
    "sides differ": Case((2, 4, 5, 7), 17, (4, 3), {"stride": (2, 1), "padding": (1, 0)}),
    "padding above kernel": Case((2, 4, 3, 3), 7, (3, 3), {"padding": 4}),
    "kernel larger than image": Case((2, 4, 2, 3), 5, (7, 9), {"padding": (3, 4)}),
    "wide": Case((1, 3, 2, 130), 5, (4, 4), {"stride": 2, "padding": 1}),
    "several items": Case((5, 8, 24, 23), 18, (3, 3), {"padding": 1}),
    "deep": Case((2, 150, 3, 3), 40, (3, 3)),
    "same": Case((2, 4, 5, 6), 17, (3, 5), {"padding": "same"}),
    "same, even kernel": Case((2, 4, 5, 6), 17, (4, 2), {"padding": "same", "dilation": (1, 3)}),
    "overlap k7": Case((1, 160, 12, 14), 6, (7, 7), {"padding": 3}),
    "overlap k3": Case((2, 64, 28, 27), 3, (3, 3), {"padding": 1}),
    "overlap k4": Case((3, 64, 8, 9), 1, (4, 4)),
    "overlap, sides differ": Case((2, 64, 9, 11), 2, (3, 4), {"padding": (2, 1)}),
    "valid": Case((2, 4, 5, 6), 17, (4, 2), {"padding": "valid"}),
}
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, -0.3),
    "elu": lambda x: F.elu(x, 1.7),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
}

all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
all_activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def test_plans_of_few_output_channels():
    """Ordinary convolutions by overlap-add are among the cases."""
    for name, case in CASES.items():
        if name.startswith("overlap"):
            sides = [
                make_pair(key, case.options.get(key, 0 if key == "padding" else 1)) for key in ("stride", "padding")
            ]
            (py, px), size = sides[1], case.shape[2:]
            out = (size[0] + 2 * py - case.kernel[0] + 1, size[1] + 2 * px - case.kernel[1] + 1)
            geometry = (1, (case.shape[1], case.out), size, out, case.kernel, *sides, (1, 1), torch.float32)
            assert cpu.conv_plan(False, *geometry).overlap_add, name


@pytest.fixture(params=[True, False], ids=["native", "folded"])
def native(request, monkeypatch):
    """Which of the two computes it, whatever the shape."""
    monkeypatch.setattr(cpu, "_served", {})
    monkeypatch.setattr(module, "is_native_better", lambda *_: request.param)
    return request.param


@pytest.fixture
def natively(monkeypatch):
    monkeypatch.setattr(cpu, "_served", {})
    monkeypatch.setattr(module, "is_native_better", lambda *_: True)


def plain(case, tensors, activation="none"):
    """The definition, in the dtype of the tensors."""
    x, weight, bias, mean, var, bn_weight, bn_bias = tensors
    output = F.conv2d(x, weight, bias, **case.options)
    if mean is not None:
        output = F.batch_norm(output, mean, var, bn_weight, bn_bias, False, 0.0, 0.8)
    return ACTIVATIONS[activation](output)


def fused(case, tensors, activation="none"):
    more = {"negative_slope": -0.3, "alpha": 1.7, "eps": 0.8}
    return ops.conv2d_bn_act(*tensors, **case.options, activation=activation, **more)


def doubles(tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def assert_as_accurate(ours, theirs, truth):
    def rms(x):
        return float(x.square().mean().sqrt())

    floor = 2**-23 if truth.numel() >= 64 else 2**-20
    assert rms(ours - truth) <= max(2 * rms(theirs - truth), floor * rms(truth))


@all_cases
def test_float32_is_as_accurate_as_pytorch(case, native):
    tensors = case.tensors()
    output = fused(case, tensors)
    if native:
        assert_as_accurate(output, plain(case, tensors), plain(case, doubles(tensors)))
    else:  # oneDNN's convolution of channels-last data errs more than the other; it is used where it does not
        torch.testing.assert_close(output, plain(case, tensors), rtol=1e-4, atol=1e-4)
    as_it_came = case.kernel == (1, 1) and not native
    assert output.is_contiguous(memory_format=torch.contiguous_format if as_it_came else torch.channels_last)


@all_activations
@pytest.mark.parametrize("name", ["k4s2p1", "last layer k7", "groups"])
def test_activations_are_as_accurate_as_pytorch(name, activation, native):
    case = CASES[name]
    tensors = case.tensors()
    truth = plain(case, doubles(tensors), activation)
    assert_as_accurate(fused(case, tensors, activation), plain(case, tensors, activation), truth)


@all_cases
@pytest.mark.parametrize("isa", ISAS)
def test_float64_on_every_instruction_set(case, isa, natively):
    tensors = case.tensors(torch.float64)
    with chosen(isa):
        actual = fused(case, tensors, "elu")
    torch.testing.assert_close(actual, plain(case, tensors, "elu"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_without_parts(bias, norm, native):
    for name in ("k4s2p1", "last layer k3"):
        tensors = CASES[name].tensors(torch.float64, bias, norm)
        torch.testing.assert_close(fused(CASES[name], tensors, "relu"), plain(CASES[name], tensors, "relu"))


def test_norm_without_scale_and_shift(native):
    case = CASES["k4s2p1"]
    tensors = [*case.tensors(torch.float64)[:5], None, None]
    torch.testing.assert_close(fused(case, tensors, "relu"), plain(case, tensors, "relu"))


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (1, 2, 7, 3)])
def test_against_loops(shape, natively):
    case = Case(shape, 3, (3, 2), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)})
    x, weight, *_ = tensors = case.tensors(torch.float64, bias=False, norm=False)
    output = fused(case, tensors)
    expected = torch.zeros_like(output)
    for y, x_, ky, kx in itertools.product(*map(range, (*output.shape[2:], 3, 2))):
        at_y, at_x = 2 * y - 1 + ky, x_ - 2 + 2 * kx
        if 0 <= at_y < shape[2] and 0 <= at_x < shape[3]:
            expected[:, :, y, x_] += x[:, :, at_y, at_x] @ weight[:, :, ky, kx].T
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["k4s2p1", "last layer k3", "several items", "groups", "depthwise", "one of all"])
def test_bits_do_not_depend_on_threads_or_batch(name, natively, monkeypatch):
    monkeypatch.setattr(backends.native_cpu(), "worthwhile_threads", lambda positions, weights, threads: threads)
    cpu._block.cache_clear()
    case = CASES[name]
    x, *rest = case.tensors()
    expected = fused(case, [x, *rest], "relu")
    for n in range(len(x)):
        assert torch.equal(fused(case, [x[n : n + 1], *rest], "relu")[0], expected[n])
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert torch.equal(fused(case, [x, *rest], "relu"), expected), threads


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.stack((t, -t), dim=-1).flatten(3)[..., ::2],
    "offset": lambda t: torch.cat((torch.zeros(1), t.flatten()))[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["k4s2p1", "last layer k3", "groups", "depthwise", "depthwise, steps"])
def test_layouts(name, layout, native):
    x, weight, *rest = CASES[name].tensors()
    expected = fused(CASES[name], [x, weight, *rest], "relu")
    actual = fused(CASES[name], [LAYOUTS[layout](x), LAYOUTS[layout](weight), *rest], "relu")
    torch.testing.assert_close(actual, expected, rtol=0 if native else 1e-4, atol=0 if native else 1e-4)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_empty_batch(native):
    case = Case((0, 4, 5, 6), 6, (3, 3), {"stride": 2})
    assert fused(case, case.tensors(), "relu").shape == (0, 6, 2, 2)


CHANGES = {
    "no_grad": lambda weight: weight.view(-1)[5].add_(100.0),
    "data replaced": lambda weight: setattr(weight, "data", torch.randn_like(weight)),
    "data in place": lambda weight: weight.data.mul_(2.0),
    "numpy": lambda weight: weight.detach().numpy().__imul__(2.0),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_changed_tensors_are_followed(change, norm, native):
    case = CASES["deep"]
    tensors = case.tensors(norm=norm)
    tensors[1] = torch.nn.Parameter(tensors[1])
    for changed in [None, *tensors[1:]]:
        if changed is not None:
            change(changed)
        if norm:
            tensors[4].data.abs_()
        expected = plain(case, doubles(tensors))
        torch.testing.assert_close(fused(case, tensors).double(), expected, rtol=1e-3, atol=1e-2)


def test_inference_tensors(native):
    case = CASES["k4s2p1"]
    with torch.inference_mode():
        tensors = case.tensors(torch.float64)
        for _ in range(2):
            torch.testing.assert_close(fused(case, tensors, "relu"), plain(case, tensors, "relu"))
            tensors[1].mul_(2.0)


def test_folded_weights_are_computed_once_and_forgotten(monkeypatch):
    packed = importlib.import_module("fastgen.ops.packed_weights")
    fold, folds = module._fold, []
    monkeypatch.setattr(module, "_fold", lambda *args: folds.append("") or fold(*args))
    monkeypatch.setattr(module, "is_native_better", lambda *_: False)
    monkeypatch.setattr(cpu, "_served", {})
    case, before = CASES["k3s1p1"], len(packed._computed)
    tensors = case.tensors()
    for batch in (1, 2):
        fused(case, [tensors[0][:batch], *tensors[1:]])
    assert (len(folds), len(packed._computed)) == (1, before + 1)
    del tensors
    assert len(packed._computed) == before


def test_calls_like_earlier_ones_are_not_checked_again(native, monkeypatch):
    case = CASES["k3s1p1"]
    x, weight, *rest = case.tensors()
    expected = fused(case, [x, weight, *rest], "relu")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_check", None)
        assert torch.equal(fused(case, [x, weight, *rest], "relu"), expected)
        weight.mul_(2)
        changed = fused(case, [x, weight, *rest], "relu")
    torch.testing.assert_close(changed, plain(case, [x, weight, *rest], "relu"), rtol=1e-4, atol=1e-4)
    for other in ([x[:, 1:], weight, *rest], [x, weight.double(), *rest]):
        with pytest.raises((ValueError, TypeError), match=r"input must have|must have the dtype"):
            fused(case, other, "relu")


def test_kernels_of_one_element_keep_the_layout(monkeypatch):
    monkeypatch.setattr(cpu, "_served", {})
    monkeypatch.setattr(module, "is_native_better", lambda *_: False)
    case = CASES["k1"]
    x, *rest = case.tensors()
    for layout in (torch.contiguous_format, torch.channels_last):
        output = fused(case, [x.contiguous(memory_format=layout), *rest], "relu")
        assert output.is_contiguous(memory_format=layout)
        torch.testing.assert_close(output, plain(case, [x, *rest], "relu"), rtol=1e-4, atol=1e-4)


# Cin / groups, Cout, kernel, groups, height and width, dtype: does the native kernel compute it, by two threads?
CHOICES = {
    "middle": ((256, 256, 3, 1, 8, torch.float32), True),
    "double": ((256, 256, 3, 1, 8, torch.float64), True),
    "bfloat16": ((256, 256, 3, 1, 8, torch.bfloat16), True),
    "bfloat16, odd": ((255, 256, 3, 1, 8, torch.bfloat16), False),
    "bfloat16, 1x1": ((256, 256, 1, 1, 24, torch.bfloat16), False),
    "bfloat16, first layer": ((4, 64, 7, 1, 24, torch.bfloat16), False),
    "half": ((256, 256, 3, 1, 8, torch.half), False),
    "1x1": ((256, 256, 1, 1, 24, torch.float32), False),
    "small 1x1": ((256, 256, 1, 1, 22, torch.float32), True),
    "groups of 1x1": ((64, 64, 1, 2, 8, torch.float32), False),
    "first layer": ((3, 64, 7, 1, 24, torch.float32), False),
    "small first layer": ((3, 64, 7, 1, 20, torch.float32), True),
    "last layer": ((64, 3, 7, 1, 8, torch.float32), True),
    "few channels": ((3, 3, 3, 1, 400, torch.float32), True),
    "depthwise": ((1, 64, 3, 64, 8, torch.float32), True),
    "depthwise, bfloat16": ((1, 64, 3, 64, 8, torch.bfloat16), False),
    "two of each channel": ((1, 64, 3, 32, 8, torch.float32), False),
    "groups": ((64, 128, 3, 2, 8, torch.float32), True),
}


@pytest.mark.parametrize(("sizes", "native"), CHOICES.values(), ids=CHOICES.keys())
def test_who_computes_it(sizes, native, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert who_computes(sizes, monkeypatch) == ("_native" if native else "_folded")


@pytest.mark.parametrize(("stride", "dtype"), [(1, torch.float32), (2, torch.float32), (1, torch.bfloat16)])
def test_kernels_of_one_element_by_one_thread(stride, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    native = (stride, dtype) == (1, torch.float32)
    found = who_computes((256, 256, 1, 1, 48, dtype), monkeypatch, stride=stride)
    assert found == ("_native" if native else "_folded")


def who_computes(sizes, monkeypatch, **options):
    inputs, outputs, kernel, groups, size, dtype = sizes
    used = []
    monkeypatch.setattr(cpu, "has_fast_bfloat16", lambda: True)
    for name in ("_native", "_folded"):
        monkeypatch.setattr(module, name, lambda *_, name=name: lambda *_: used.append(name))
    monkeypatch.setattr(cpu, "_served", {})
    x = torch.ones(1, inputs * groups, size, size, dtype=dtype)
    ops.conv2d_bn_act(x, torch.ones(outputs, inputs, kernel, kernel, dtype=dtype), groups=groups, **options)
    return "".join(used)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("inputs", [1, 3, 4, 9])
@pytest.mark.parametrize("kernel", [1, 3])
def test_bfloat16_where_pytorch_has_none(inputs, groups, kernel, layout, monkeypatch):
    """Natively, whatever the shape; odd channels, which the kernels do not take, get one of zeros, but in groups."""
    monkeypatch.setattr(cpu, "has_fast_bfloat16", lambda: False)
    monkeypatch.setattr(cpu, "_served", {})
    folds = []
    fold = module._folded
    monkeypatch.setattr(module, "_folded", lambda *args: folds.append(args) or fold(*args))
    case = Case((2, inputs * groups, 6, 7), 12, (kernel, kernel), {"groups": groups, "padding": kernel // 2})
    x, weight, *rest = [tensor.bfloat16() for tensor in case.tensors()]
    x = x.contiguous(memory_format=layout)
    for _ in range(2):
        for _ in range(2):
            expected = plain(case, [tensor.double() for tensor in (x, weight, *rest)], "relu")
            actual = fused(case, [x, weight, *rest], "relu")
            torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-2)
        weight.mul_(-1.5)
    assert bool(folds) == (groups > 1 and inputs % 2 == 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_depthwise_bfloat16_where_pytorch_has_none(norm, layout, monkeypatch):
    """In float32, rounded once; PyTorch takes some sixty times as long."""
    monkeypatch.setattr(cpu, "has_fast_bfloat16", lambda: False)
    monkeypatch.setattr(cpu, "_served", {})
    monkeypatch.setattr(module, "_folded", None)
    case = CASES["depthwise"]
    x, weight, *rest = [None if t is None else t.bfloat16() for t in case.tensors(norm=norm)]
    x = LAYOUTS[layout](x.float()).bfloat16()
    for _ in range(2):
        expected = plain(case, doubles([x, weight, *rest]), "silu")
        actual = fused(case, [x, weight, *rest], "silu")
        assert actual.dtype is torch.bfloat16 and actual.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-6)
        weight.mul_(-1.5)


# Gradients, transforms, registration


@pytest.mark.parametrize("name", ["k4s2p1", "same, even kernel", "groups"])
def test_gradients_of_any_order(name):
    case = CASES[name]
    tensors = [t.requires_grad_() if i not in (3, 4) else t for i, t in enumerate(case.tensors(torch.float64))]
    x = tensors[0]
    first = torch.autograd.grad(fused(case, tensors, "tanh").square().sum(), x, create_graph=True)[0]
    expected = torch.autograd.grad(plain(case, tensors, "tanh").square().sum(), x, create_graph=True)[0]
    torch.testing.assert_close(first, expected)
    second = torch.autograd.grad(first.square().sum(), tensors[1])[0]
    torch.testing.assert_close(second, torch.autograd.grad(expected.square().sum(), tensors[1])[0])


def test_transforms():
    case = CASES["k3s1p1"]
    tensors = case.tensors(torch.float64)

    def function(f):
        return lambda x: f(case, [x, *tensors[1:]], "tanh")

    x = torch.stack([tensors[0], -tensors[0]])
    assert_same = torch.testing.assert_close
    assert_same(torch.func.vmap(function(fused))(x), torch.func.vmap(function(plain))(x))
    assert_same(torch.func.jvp(function(fused), (x[0],), (x[1],)), torch.func.jvp(function(plain), (x[0],), (x[1],)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], x[1])
        tangents = [torch.autograd.forward_ad.unpack_dual(function(f)(dual)).tangent for f in (fused, plain)]
        assert_same(tangents[0], tangents[1])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend, native):
    for activation, norm in [("none", False), ("leaky_relu", True)]:
        tensors = CASES["k3s1p1"].tensors(norm=norm)
        with fastgen.backend(backend):
            opcheck(
                torch.ops.fastgen.conv2d_bn_act.default,
                (*tensors, [2, 2], [1, 1], 1, [1, 1], 1e-5, activation, 0.2),
            )


@torch.no_grad()
@pytest.mark.parametrize("name", ["k4s2p1", "same, even kernel"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(name, dynamic, native):
    case = CASES[name]

    def function(x, *rest):
        return fused(case, [x * 2.0, *rest], "elu").sigmoid()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        tensors = case._replace(shape=(batch, *case.shape[1:])).tensors()
        torch.testing.assert_close(compiled(*tensors), function(*tensors))


def test_modes_see_the_operator():
    case = CASES["k4s2p1"]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in case.tensors()]
        assert fused(case, fakes).shape == (3, 33, 3, 4)


@pytest.mark.parametrize("name", ["k3s1p1", "k4 of 4x4", "last layer k7", "several items", "dilation, stride"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_bfloat16_is_as_accurate_as_pytorch(name, norm):
    case = CASES[name]
    tensors = [None if tensor is None else tensor.bfloat16() for tensor in case.tensors(norm=norm)]
    truth = plain(case, doubles(tensors), "relu")
    ours, theirs = (f(case, tensors, "relu") for f in (fused, plain))
    assert ours.dtype == torch.bfloat16
    assert_as_accurate(ours.double(), theirs.double(), truth)


def test_autocast():
    case = CASES["k4s2p1"]
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(case, case.tensors(), "relu").dtype == torch.bfloat16


def arguments(**changes):
    return {"input": torch.ones(2, 4, 5, 6), "weight": torch.ones(6, 4, 3, 3), **changes}


ones = torch.ones(6)
ERRORS = {
    "input a list": ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
    "input 3-d": ({"input": torch.ones(4, 5, 6)}, ValueError, r"input must be \[N, Cin, H, W\].*got \[4, 5, 6\]"),
    "channels": ({"input": torch.ones(2, 3, 5, 6)}, ValueError, "input must have 4 channels.*got 3"),
    "weight 3-d": ({"weight": torch.ones(6, 4, 3)}, ValueError, r"weight must be \[Cout, Cin / groups, kh, kw\]"),
    "weight dtype": ({"weight": torch.ones(6, 4, 3, 3).double()}, TypeError, "torch.float32, got torch.float64"),
    "bias": ({"bias": torch.ones(5)}, ValueError, r"bias must be \[6\], got \[5\]"),
    "one statistic": ({"running_mean": ones}, ValueError, "running_mean and running_var must be given together"),
    "no statistics": ({"bn_weight": ones}, ValueError, "without running_mean and running_var"),
    "groups": ({"groups": 4}, ValueError, "groups must divide the 6 output channels, got 4"),
    "stride": ({"stride": 0}, ValueError, r"stride must be at least 1, got \(0, 0\)"),
    "dilation of three": ({"dilation": (1, 1, 1)}, ValueError, "dilation must be an integer or two"),
    "padding": ({"padding": -1}, ValueError, "padding must be at least 0"),
    "padding name": ({"padding": "full"}, ValueError, "padding must be 'same', 'valid', an integer or two, got 'full'"),
    "same, stride": ({"padding": "same", "stride": 2}, ValueError, r"padding 'same' needs stride 1, got \(2, 2\)"),
    "no output": ({"dilation": 3}, ValueError, "output would be -1 x 0: the kernel is larger"),
    "activation": ({"activation": "mish"}, ValueError, "activation must be one of none, relu.*; got 'mish'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        ops.conv2d_bn_act(**arguments(**changes))
