"""The fused block: plain PyTorch in float64, every option, layouts, threads, stale weights, gradients."""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen
from fastgen import backends, ops
from fastgen.ops import conv_cpu as cpu
from fastgen.ops.conv_block import pair as make_pair
from fastgen.ops.conv_sequence import conv_bn_act_sequence
from tests.instruction_sets import FUSED, ISAS, chosen

module = importlib.import_module("fastgen.ops.conv_transpose2d_bn_act")  # the package has the function of this name


class Case(NamedTuple):
    shape: tuple[int, int, int, int]  # N, Cin, H, W
    out: int
    kernel: tuple[int, int]
    options: Mapping[str, Any] = MappingProxyType({})

    @property
    def groups(self):
        return self.options.get("groups", 1)

    def tensors(self, dtype=torch.float32, bias=True, norm=True):
        """input, weight, bias, running_mean, running_var, bn_weight, bn_bias."""
        channels = self.shape[1]
        x = torch.randn(self.shape, dtype=dtype)
        weight = torch.randn(channels, self.out // self.groups, *self.kernel, dtype=dtype)
        vectors = [torch.randn(self.out, dtype=dtype) for _ in range(4)]
        var = torch.rand(self.out, dtype=dtype) + 0.5
        bias = vectors[0] if bias else None
        return [x, weight, bias, *((vectors[1], var, *vectors[2:]) if norm else (None,) * 4)]


CASES = {
    "one of all": Case((1, 1, 1, 1), 1, (1, 1)),
    "k3s1p1": Case((2, 5, 7, 11), 19, (3, 3), {"padding": 1}),
    "k4s2p1": Case((3, 17, 5, 6), 33, (4, 4), {"stride": 2, "padding": 1}),
    "k2s2": Case((2, 6, 3, 5), 20, (2, 2), {"stride": 2}),
    "k3s2p1op1": Case((2, 6, 5, 4), 12, (3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "k4s1p0 of 1x1": Case((5, 10, 1, 1), 24, (4, 4)),
    "k4s2p1 of 1x1": Case((3, 10, 1, 1), 24, (4, 4), {"stride": 2, "padding": 1}),
    "k5x3 of 1x1": Case((17, 10, 1, 1), 18, (5, 3), {"padding": (1, 0), "groups": 2}),
    "dilation of 1x1": Case((2, 6, 1, 1), 20, (3, 3), {"stride": 2, "dilation": 3, "padding": 2}),
    "k4s2p1 of 1x5": Case((2, 6, 1, 5), 20, (4, 4), {"stride": 2, "padding": 1}),
    "last layer": Case((2, 16, 9, 7), 3, (4, 4), {"stride": 2, "padding": 1}),
    "last layer k3s1": Case((2, 8, 9, 13), 3, (3, 3), {"padding": 1}),
    "one channel": Case((2, 4, 8, 8), 1, (5, 5), {"stride": 2, "padding": 2, "output_padding": 1}),
    "4x4 map": Case((9, 32, 4, 4), 64, (4, 4), {"stride": 2, "padding": 1}),
    "groups": Case((2, 12, 5, 6), 18, (3, 3), {"stride": 2, "groups": 3}),
    "depthwise": Case((2, 6, 5, 6), 6, (4, 4), {"stride": 2, "padding": 1, "groups": 6}),
    "dilation": Case((2, 4, 5, 6), 6, (3, 2), {"dilation": (2, 3), "padding": (1, 0)}),
    "dilation, stride": Case((2, 4, 5, 6), 6, (3, 3), {"dilation": (2, 3), "stride": (3, 2), "padding": 2}),
    "stride above kernel": Case((2, 4, 3, 4), 6, (2, 1), {"stride": (3, 4), "output_padding": (2, 3)}),
    "sides differ": Case((2, 4, 3, 7), 17, (4, 3), {"stride": (2, 1), "padding": (1, 0)}),
    "padding crops": Case((2, 4, 5, 5), 7, (3, 3), {"padding": 3}),
    "kernel larger than image": Case((2, 4, 2, 3), 5, (7, 9), {"stride": 2, "padding": 3}),
    "wide": Case((1, 3, 2, 130), 5, (4, 4), {"stride": 2, "padding": 1}),
    "several items": Case((5, 8, 24, 23), 18, (4, 4), {"stride": 2, "padding": 1}),
    "deep": Case((2, 150, 3, 3), 40, (3, 3), {"stride": 2}),
}
MINIMAL = {  # large enough for minimal filtering
    "minimal": Case((2, 50, 13, 17), 40, (4, 4), {"stride": 2, "padding": 1}),
    "minimal k3s1p1": Case((2, 33, 11, 12), 33, (3, 3), {"padding": 1}),
    "minimal k2s1": Case((1, 20, 16, 15), 30, (2, 2)),
    "minimal k3s2p1op1": Case((1, 24, 18, 16), 20, (3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "minimal k5s2": Case((1, 24, 15, 16), 20, (5, 5), {"stride": 2, "padding": 2, "output_padding": 1}),
    "minimal groups": Case((2, 40, 14, 19), 34, (4, 4), {"stride": 2, "padding": 1, "groups": 2}),
    "minimal dilation": Case((2, 32, 12, 13), 17, (3, 3), {"stride": 2, "dilation": 2}),
    "minimal, cropped": Case((2, 32, 16, 15), 17, (4, 4), {"stride": 2, "padding": 4}),
    "minimal, three lines": Case((2, 64, 3, 130), 64, (4, 4), {"stride": 2, "padding": 1}),
    "minimal, bands": Case((2, 16, 37, 41), 20, (4, 4), {"stride": 2, "padding": 1}),
    "minimal, many tiles": Case((9, 260, 8, 8), 24, (4, 4), {"stride": 2, "padding": 1}),
    "minimal, bands of k3s1": Case((2, 16, 37, 41), 20, (3, 3), {"padding": 1}),
}
OVERLAP = {  # few output channels
    "overlap": Case((3, 64, 12, 13), 3, (4, 4), {"stride": 2, "padding": 1}),
    "overlap, one channel": Case((2, 32, 14, 14), 1, (4, 4), {"stride": 2, "padding": 1}),
    "overlap k3s2p1op1": Case((2, 64, 9, 10), 2, (3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "overlap k5s3": Case((2, 40, 7, 8), 2, (5, 5), {"stride": 3, "padding": 2, "output_padding": (2, 0)}),
    "overlap k3s1": Case((2, 40, 9, 11), 3, (3, 3), {"padding": 1}),
    "overlap, sides differ": Case((2, 64, 6, 9), 1, (3, 6), {"stride": (1, 3), "padding": (0, 2)}),
    "overlap, runs of vectors": Case((2, 160, 8, 8), 5, (4, 4), {"stride": 2, "padding": 3}),
    "overlap, cropped": Case((2, 64, 8, 8), 2, (4, 4), {"stride": 2, "padding": 3}),
    "overlap, bands": Case((2, 48, 40, 41), 3, (4, 4), {"stride": 2, "padding": 1}),
    "overlap, narrow": Case((3, 64, 9, 1), 1, (4, 4), {"stride": 2, "padding": 1}),
}
PIXELS = {  # weights packed by kernel elements
    "pixels k4s1p0": Case((2, 10, 3, 5), 32, (4, 4)),
    "pixels k4s2p0": Case((2, 6, 3, 9), 48, (4, 4), {"stride": 2}),
    "pixels k2s2": Case((2, 6, 5, 1), 16, (2, 2), {"stride": 2}),
    "pixels, sides differ": Case((3, 6, 4, 2), 64, (3, 2), {"stride": (3, 1), "groups": 2}),
    "pixels, deep": Case((2, 150, 2, 3), 32, (2, 5)),
}
CASES |= MINIMAL | OVERLAP | PIXELS
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


def plain(case, tensors, activation="none", training=False, momentum=0.1):
    """The definition, in the dtype of the tensors."""
    x, weight, bias, mean, var, bn_weight, bn_bias = tensors
    output = F.conv_transpose2d(x, weight, bias, **case.options)
    if mean is not None:
        output = F.batch_norm(output, mean, var, bn_weight, bn_bias, training, momentum, 0.8)
    return ACTIVATIONS[activation](output)


def native(case, tensors, activation="none", **more):
    more = {"negative_slope": -0.3, "alpha": 1.7, "eps": 0.8, **more}
    with fastgen.backend("cpu"):
        return ops.conv_transpose2d_bn_act(*tensors, **case.options, activation=activation, **more)


def plan_of(case, dtype=torch.float32):
    x, weight, *_ = case.tensors(dtype)
    steps = {"stride": (1, 1), "padding": (0, 0), "output_padding": (0, 0), "dilation": (1, 1), "groups": 1}
    steps |= {key: value if key == "groups" else make_pair(key, value) for key, value in case.options.items()}
    names = ("stride", "padding", "output_padding", "groups", "dilation")
    block = cpu.Block.of(
        True, x.shape, dtype, weight, cpu.Options(*(steps[name] for name in names), False, 0.0, "none", 0.0)
    )
    return cpu.conv_plan(True, *block.geometry, dtype)


@pytest.fixture
def all_threads(monkeypatch):
    """However small the case. What is kept of earlier calls holds the threads that were worthwhile for them."""

    def forget():
        cpu._block.cache_clear()
        cpu._served.clear()

    forget()
    monkeypatch.setattr(backends.native_cpu(), "worthwhile_threads", lambda positions, weights, threads: threads)
    yield
    forget()


def doubles(tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def rms(tensor):
    return float(tensor.square().mean().sqrt())


def assert_as_accurate(ours, theirs, truth, what=""):
    # Of a handful of values, PyTorch's may all happen to be rounded well: allow a few units in the last place.
    floor = 2**-23 if truth.numel() >= 64 else 2**-20
    error, bound = rms(ours - truth), max(2 * rms(theirs - truth), floor * rms(truth))
    assert error <= bound, f"{what}: error {error:.2e}, plain PyTorch {rms(theirs - truth):.2e}"


@all_cases
def test_float32_is_as_accurate_as_pytorch(case):
    tensors = case.tensors()
    assert_as_accurate(native(case, tensors), plain(case, tensors), plain(case, doubles(tensors)))


@pytest.mark.parametrize("case", MINIMAL.values(), ids=MINIMAL.keys())
def test_minimal_filtering_is_chosen_by_the_image_alone(case):
    assert plan_of(case).minimal
    assert not plan_of(
        case._replace(shape=(64, *case.shape[1:2], 1, 1), options={**case.options, "padding": 0})
    ).minimal


def test_one_pixel_is_one_product():
    plan = plan_of(CASES["k4s1p0 of 1x1"])
    assert backends.native_cpu().conv_packed_size_float32(plan) == 10 * (24 * 16)


def test_taps_that_nobody_reads_are_not_packed():
    case = CASES["k4s2p1 of 1x1"]  # four of sixteen kernel elements meet the pixel
    assert backends.native_cpu().conv_packed_size_float32(plan_of(case)) == 10 * (24 * 4)


def test_small_maps_share_a_weight_but_not_its_packs():
    case = CASES["k4s2p1"]
    weight = case.tensors()[1]
    for height, width in ((1, 1), (1, 2), (2, 1), (5, 6), (2, 2), (1, 1), (1, 7)):
        x = torch.randn(2, case.shape[1], height, width)
        with fastgen.backend("cpu"):
            actual = ops.conv_transpose2d_bn_act(x, weight, **case.options)
        expected = F.conv_transpose2d(x.double(), weight.double(), **case.options)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["several items", "last layer", "minimal", "one channel"])
def test_sizes_share_packs(name):
    case = CASES[name]
    n, channels, height, width = case.shape
    larger = case._replace(shape=(n, channels, height + 5, width + 4))
    assert plan_of(larger).layout == plan_of(case).layout


@pytest.mark.parametrize("name", PIXELS)
def test_one_pixel_shares_the_packs_of_larger_maps(name, monkeypatch):
    packed = importlib.import_module("fastgen.ops.packed_weights")
    case, pack, packs = PIXELS[name], packed._pack, []
    monkeypatch.setattr(packed, "_pack", lambda *args: packs.append("") or pack(*args))
    weight = case.tensors()[1]
    for shape in (case.shape, (*case.shape[:2], 1, 1), (*case.shape[:2], 1, 4)):
        x = torch.randn(shape)
        with fastgen.backend("cpu"):
            actual = ops.conv_transpose2d_bn_act(x, weight, **case.options)
        expected = F.conv_transpose2d(x.double(), weight.double(), **case.options)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    assert len(packs) == 1


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((2, 6, 1, 1), 3, [{}, {"dilation": 2, "padding": 1}, {"padding": 1}]),
        ((2, 6, 1, 1), 5, [{"stride": 3, "padding": 1}, {"stride": 3, "padding": 2, "output_padding": 2}]),
        ((2, 4, 8, 8), 3, [{"padding": 1}, {"padding": 1, "groups": 2}, {"stride": 2}, {"stride": 2, "padding": 1}]),
        ((2, 20, 9, 9), 4, [{"stride": 2, "padding": 1}, {"stride": 2}, {"padding": 2}, {"stride": 3, "dilation": 2}]),
    ],
    ids=["one pixel", "one pixel, stride", "map", "larger map"],
)
@pytest.mark.parametrize("out", [1, 20])
def test_packs_belong_to_the_options(shape, kernel, options, out):
    weight = torch.randn(shape[1], out, kernel, kernel)
    x = torch.randn(shape)
    for option in options * 2:
        with fastgen.backend("cpu"):
            actual = ops.conv_transpose2d_bn_act(x, weight, **option)
        expected = F.conv_transpose2d(x.double(), weight.double(), **option)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OVERLAP)
def test_overlap_add_is_chosen_for_few_output_channels(name):
    assert plan_of(OVERLAP[name]).overlap_add
    assert not plan_of(OVERLAP[name]._replace(out=32)).overlap_add


def test_overlap_add_is_not_chosen_for_small_maps_of_many_channels():
    for side in (1, 2, 4):
        assert not plan_of(Case((1, 512, side, side), 512, (4, 4), {"stride": 2, "padding": 1})).overlap_add


def test_minimal_filtering_of_the_input_gradient():
    geometry = (1, (40, 48), (26, 34), (13, 17), (4, 4), (2, 2), (1, 1), (1, 1), torch.float32)
    assert cpu.conv_plan(False, *geometry).minimal


@all_activations
@pytest.mark.parametrize("name", ["k4s2p1", "last layer", "groups", "minimal", "overlap"])
def test_activations_are_as_accurate_as_pytorch(name, activation):
    case = CASES[name]
    tensors = case.tensors()
    truth = plain(case, doubles(tensors), activation)
    assert_as_accurate(native(case, tensors, activation), plain(case, tensors, activation), truth)


@all_cases
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-4)], ids=["f64", "f32"])
def test_every_instruction_set(case, isa, dtype, tolerance):
    tensors = case.tensors(dtype)
    with chosen(isa):
        actual = native(case, tensors, "elu")
    expected = plain(case, doubles(tensors), "elu")
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_without_parts(bias, norm):
    for name in ("k4s2p1", "last layer"):
        tensors = CASES[name].tensors(torch.float64, bias, norm)
        expected = plain(CASES[name], tensors, "leaky_relu")
        torch.testing.assert_close(native(CASES[name], tensors, "leaky_relu"), expected)


def test_norm_without_scale_and_shift():
    case = CASES["k4s2p1"]
    tensors = [*case.tensors(torch.float64)[:5], None, None]
    torch.testing.assert_close(native(case, tensors, "relu"), plain(case, tensors, "relu"))


@pytest.mark.parametrize("name", ["k4s2p1", "last layer", "dilation, stride", "groups", "wide", "overlap k5s3"])
def test_against_loops(name):
    case = CASES[name]
    x, weight, bias, *_ = tensors = case.tensors(torch.float64, norm=False)
    output = native(case, tensors)
    pair = {key: make_pair(key, value) for key, value in case.options.items() if key != "groups"}
    (sy, sx), (py, px) = pair.get("stride", (1, 1)), pair.get("padding", (0, 0))
    dy, dx = pair.get("dilation", (1, 1))
    expected = bias.view(1, -1, 1, 1).expand(output.shape).clone()
    out_part, in_part = case.out // case.groups, case.shape[1] // case.groups
    for iy, ix, ky, kx in itertools.product(*map(range, (*x.shape[2:], *case.kernel))):
        y, x_ = iy * sy - py + ky * dy, ix * sx - px + kx * dx
        if 0 <= y < output.shape[2] and 0 <= x_ < output.shape[3]:
            for g in range(case.groups):
                inputs = slice(g * in_part, (g + 1) * in_part)
                part = x[:, inputs, iy, ix] @ weight[inputs, :, ky, kx]
                expected[:, g * out_part : (g + 1) * out_part, y, x_] += part
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["k4s2p1", "last layer", "4x4 map", "deep", *MINIMAL, *OVERLAP])
def test_bits_are_the_same_on_every_fused_instruction_set(name):
    case = CASES[name]
    tensors, results = case.tensors(), []
    for isa in FUSED:
        with chosen(isa):
            results.append(native(case, tensors, "tanh"))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    "name", ["k4s2p1", "last layer", "4x4 map", "several items", "groups", "one of all", *MINIMAL, *OVERLAP, *PIXELS]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_threads(name, dtype, all_threads):
    case = CASES[name]
    tensors = case.tensors(dtype)
    one = native(case, tensors, "relu")
    for threads in (2, 3, 7, 19):
        torch.set_num_threads(threads)
        assert torch.equal(native(case, tensors, "relu"), one), threads


@pytest.mark.parametrize(
    "name", ["4x4 map", "several items", "last layer", "k4s1p0 of 1x1", *MINIMAL, *OVERLAP, *PIXELS]
)
def test_bits_do_not_depend_on_the_batch(name):
    case = CASES[name]
    x, *rest = case.tensors()
    output = native(case, [x, *rest], "relu")
    for n in range(case.shape[0]):
        assert torch.equal(native(case, [x[n : n + 1], *rest], "relu")[0], output[n])


# bfloat16

BFLOAT16 = {name: case for name, case in CASES.items() if case.shape[1] // case.groups % 2 == 0}


def bfloats(tensors):
    return [None if tensor is None else tensor.bfloat16() for tensor in tensors]


@pytest.mark.parametrize("name", BFLOAT16)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_bfloat16_is_as_accurate_as_pytorch(name, norm):
    case = BFLOAT16[name]
    tensors = bfloats(case.tensors(norm=norm))
    with fastgen.backend("cpu"):
        ours = ops.conv_transpose2d_bn_act(*tensors, **case.options, eps=0.8, activation="relu")
    theirs, truth = plain(case, tensors, "relu"), plain(case, doubles(tensors), "relu")
    assert ours.dtype == torch.bfloat16
    error, bound = rms(ours.double() - truth), 2 * rms(theirs.double() - truth)
    assert error <= bound, f"error {error:.2e}, plain PyTorch {bound / 2:.2e}"


@pytest.mark.parametrize(
    "name", ["4x4 map", "last layer", "k2s2", "groups", "minimal", "minimal, bands", "overlap", "overlap, bands"]
)
def test_bfloat16_bits_depend_on_the_sample_alone(name, all_threads):
    case = BFLOAT16[name]
    x, weight, *rest = bfloats(case.tensors())
    output = native(case, [x, weight, *rest], "tanh")
    for arrange in LAYOUTS.values():
        assert torch.equal(native(case, [arrange(x), arrange(weight), *rest], "tanh"), output)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for n in range(case.shape[0]):
            assert torch.equal(native(case, [x[n : n + 1], weight, *rest], "tanh")[0], output[n])
    for isa in FUSED:
        with chosen(isa):
            assert torch.equal(native(case, [x, weight, *rest], "tanh"), output), isa


def test_bfloat16_rounds_to_even_and_keeps_nan_and_infinity():
    values = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-14, -3.0e38, 3.4e38, float("inf"), float("nan"), -0.0]
    x = torch.zeros(1, 2, 1, len(values), dtype=torch.bfloat16)
    x[0, 0] = torch.tensor(values)
    # The sum of two values with one, each of which is a bfloat16, in float32.
    x[0, 1] = (torch.tensor(values) - x[0, 0, 0].float()).nan_to_num(0.0, 0.0, 0.0).bfloat16()
    weight = torch.ones(2, 1, 1, 1, dtype=torch.bfloat16)
    for isa in ISAS:
        with chosen(isa):
            with fastgen.backend("cpu"):
                output = ops.conv_transpose2d_bn_act(x, weight)
            torch.testing.assert_close(output[0, 0, 0], torch.tensor(values).bfloat16(), rtol=0, atol=0, equal_nan=True)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.stack((t, -t), dim=-1).flatten(3)[..., ::2],
    "channels sliced": lambda t: torch.cat((t, -t), dim=1).contiguous(memory_format=torch.channels_last)[
        :, : t.shape[1]
    ],
    "offset": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["k4s2p1", "last layer", "4x4 map", "several items", "groups", *MINIMAL, *OVERLAP])
def test_layouts_give_the_same_bits(name, layout):
    x, weight, *rest = CASES[name].tensors()
    expected = native(CASES[name], [x, weight, *rest], "relu")
    arrange = LAYOUTS[layout]
    actual = native(CASES[name], [arrange(x), arrange(weight), *rest], "relu")
    assert torch.equal(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_expanded_inputs():
    case = Case((3, 4, 5, 6), 6, (4, 4), {"stride": 2})
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64).expand(3, 4, 5, 6)
    weight = torch.randn(1, 6, 4, 4, dtype=torch.float64).expand(4, 6, 4, 4)
    vector = torch.ones(1, dtype=torch.float64).expand(6)
    tensors = [x, weight, *(vector,) * 5]
    torch.testing.assert_close(native(case, tensors), plain(case, tensors))


def test_nan_stays_nan():
    case = CASES["k2s2"]
    x, *rest = case.tensors()
    x[0, 0, 1, 2] = float("nan")
    for activation in ACTIVATIONS:
        output = native(case, [x, *rest], activation)
        assert output[0, :, 2:4, 4:6].isnan().all()
        assert output.isnan().sum() == 4 * case.out


EXTREMES = torch.tensor([-torch.inf, -1e30, -104.0, -89.0, -14.0, -1e-30, 0.0, 1e-30, 14.0, 89.0, 1e30, torch.inf])


@all_activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_of_extremes(activation, dtype):
    x, weight = EXTREMES.to(dtype).view(-1, 1, 1, 1), torch.ones(1, 1, 1, 1, dtype=dtype)
    case = Case(tuple(x.shape), 1, (1, 1))
    expected = ACTIVATIONS[activation](x.double()).to(dtype)
    torch.testing.assert_close(native(case, [x, weight, *[None] * 5], activation), expected, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_empty_batch(backend):
    case = Case((0, 4, 5, 6), 6, (4, 4), {"stride": 2})
    tensors = case.tensors()
    for tensor in tensors[:3]:
        tensor.requires_grad_()
    with fastgen.backend(backend):
        output = ops.conv_transpose2d_bn_act(*tensors, stride=2, activation="relu")
        output.sum().backward()
    assert output.shape == (0, 6, 12, 14)
    assert tensors[0].grad.shape == tensors[0].shape
    assert (tensors[1].grad == 0).all()
    assert (tensors[2].grad == 0).all()


# Shape of the input and padding; a kernel of 3x3 in steps of 1.
EMPTY = {
    "no rows": ((0, 4, 0, 5), 1),
    "no rows, some come out": ((0, 4, 0, 5), 0),
    "nothing comes out": ((2, 4, 2, 2), 2),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("shape", "padding"), EMPTY.values(), ids=EMPTY.keys())
def test_empty_images(shape, padding, backend):
    """Where PyTorch takes them."""
    x, weight, bias = torch.randn(shape), torch.randn(4, 3, 3, 3), torch.randn(3)
    expected = F.conv_transpose2d(x, weight, bias, padding=padding).shape
    with fastgen.backend(backend):
        for activation in ("none", "tanh"):
            inferred = ops.conv_transpose2d_bn_act(x, weight, bias, padding=padding, activation=activation)
            trained = ops.conv_transpose2d_bn_act(
                x, weight.requires_grad_(), bias.requires_grad_(), padding=padding, activation=activation
            )
            trained.sum().backward()
            assert inferred.shape == trained.shape == expected
            assert not weight.grad.any() and not bias.grad.any()
        running = torch.randn(3), torch.rand(3)
        kept = [tensor.clone() for tensor in running]
        ops.conv_transpose2d_bn_act(x, weight, bias, *running, padding=padding, training=True)
        assert all(torch.equal(*pair) for pair in zip(running, kept, strict=True))


def test_no_output_where_pytorch_refuses():
    with pytest.raises(ValueError, match="a convolution without output"):
        backends.native_cpu().ConvPlan(True, 1, (3, 2), (1, 1), (0, 0), (2, 2), (1, 1), (1, 1), (1, 1), True, "float32")
    x, weight = torch.randn(1, 3, 1, 1), torch.randn(3, 2, 2, 2)
    assert ops.conv_transpose2d_bn_act(torch.randn(1, 3, 3, 3), weight, padding=1).shape == (1, 2, 2, 2)
    for function in (ops.conv_transpose2d_bn_act, F.conv_transpose2d):
        with pytest.raises(RuntimeError, match="Output size is too small"):
            function(x, weight, padding=1)
    tensors, options = (weight, *[None] * 5), ((1, 1), (1, 1), (0, 0), 1, (1, 1), False, 1e-5, "none", 0.0)
    assert conv_bn_act_sequence(torch.randn(1, 3, 3, 3), tensors, ((True, options),)).shape == (1, 2, 2, 2)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        conv_bn_act_sequence(x, tensors, ((True, options),))


class Stale(NamedTuple):
    case: Case
    tensors: list[torch.Tensor]

    def check(self):
        with torch.no_grad():
            actual, expected = native(self.case, self.tensors), plain(self.case, doubles(self.tensors))
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def _optimiser_step(weight):
    weight.grad = torch.randn_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()


def _set_data(weight):
    weight.data = torch.randn_like(weight)


def _no_grad_edit(weight):
    with torch.no_grad():
        weight.view(-1)[50] += 100.0  # not in the fingerprint of a large weight: the version counter must tell


def _inference_mode_edit(weight):
    with torch.inference_mode():
        weight.mul_(3.0)


CHANGES = {
    "optimiser": _optimiser_step,
    "no_grad": _no_grad_edit,
    "inference mode": _inference_mode_edit,
    "data replaced": _set_data,
    "data in place": lambda weight: weight.data.mul_(2.0),
    "numpy": lambda weight: weight.detach().numpy().__imul__(2.0),
    "init": torch.nn.init.normal_,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("name", ["k4s2p1", "deep"])
def test_changed_weights_are_packed_again(name, change):
    case = CASES[name]
    tensors = case.tensors(norm=False)
    tensors[1] = torch.nn.Parameter(tensors[1])
    stale = Stale(case, tensors)
    stale.check()
    for _ in range(2):
        change(tensors[1])
        stale.check()


def test_changed_norm_is_used():
    case = CASES["k4s2p1"]
    stale = Stale(case, case.tensors())
    for tensor in [None, *stale.tensors[2:]]:
        if tensor is not None:
            tensor.data.add_(1.0)
        expected, actual = plain(case, doubles(stale.tensors)), native(case, stale.tensors)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_weights_are_packed_once_and_forgotten(monkeypatch):
    packed = importlib.import_module("fastgen.ops.packed_weights")
    packs = []
    pack = packed._pack
    monkeypatch.setattr(packed, "_pack", lambda *args: packs.append("") or pack(*args))
    case, before = CASES["k4s2p1"], len(packed._entries)
    tensors = case.tensors()
    for batch in (3, 1, 2):
        native(case, [tensors[0][:batch], *tensors[1:]])
    assert (len(packs), len(packed._entries)) == (1, before + 1)
    del tensors
    assert len(packed._entries) == before


@pytest.mark.parametrize("gradient", [False, True], ids=["no_grad", "grad"])
def test_groups_of_one_channel_are_left_to_pytorch(gradient):
    """Unless the backend is asked for."""
    case = CASES["depthwise"]
    tensors = case.tensors()
    tensors[1].requires_grad_(gradient)
    left, asked_for = ops.conv_transpose2d_bn_act(*tensors, **case.options, eps=0.8), native(case, tensors)
    assert torch.equal(left, plain(case, tensors))
    torch.testing.assert_close(asked_for, left, rtol=1e-4, atol=1e-4)
    assert left.is_contiguous() and asked_for.is_contiguous(memory_format=torch.channels_last)
    assert left.requires_grad == asked_for.requires_grad == gradient


def test_memory_of_packs_is_used_again():
    """By the pack of changed weights, of the same dtype, once the calls that borrowed the old one are over."""
    packed = importlib.import_module("fastgen.ops.packed_weights")
    weight = torch.nn.Parameter(CASES["minimal"].tensors()[1])

    def arguments():
        plan = cpu.conv_plan(True, 1, (50, 40), (13, 17), (26, 34), (4, 4), (2, 2), (1, 1), (1, 1), weight.dtype)
        return weight, plan, 1

    with packed.borrowed_weight(*arguments()) as first:
        before = first.clone()
        with packed.borrowed_weight(*arguments()) as same:
            assert same is first
    _no_grad_edit(weight)
    with packed.borrowed_weight(*arguments()) as second:
        assert second.data_ptr() == first.data_ptr() and not torch.equal(second, before)
        read = second.clone()
        _no_grad_edit(weight)
        with packed.borrowed_weight(*arguments()) as third:  # as in another thread
            assert third.data_ptr() != second.data_ptr() and torch.equal(second, read)
    kept = packed.packed_weight(*arguments())
    assert kept is third
    read = kept.clone()
    _no_grad_edit(weight)
    with packed.borrowed_weight(*arguments()) as fourth:
        assert fourth.data_ptr() != kept.data_ptr() and torch.equal(kept, read)
    weight.data = weight.data.double()
    with packed.borrowed_weight(*arguments()) as fifth:
        assert fifth.dtype == torch.float64


def test_modes_and_transforms_see_the_operator():
    class Names(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    case = CASES["k4s2p1"]
    tensors = case.tensors()
    with Names():
        output = native(case, tensors)
    assert "fastgen.conv_transpose2d_bn_act.default" in Names.seen
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in tensors]
        assert ops.conv_transpose2d_bn_act(*fakes, **case.options).shape == output.shape


def test_calls_like_earlier_ones_are_checked_all_the_same():
    case = CASES["k4s2p1"]
    tensors = case.tensors()

    def call(*changed, **options):
        return ops.conv_transpose2d_bn_act(*changed, **{**case.options, "eps": 0.8, **options})

    for _ in range(2):  # the second one goes straight
        torch.testing.assert_close(call(*tensors), plain(case, tensors), rtol=1e-4, atol=1e-4)
    assert cpu.served(True, tensors, ((2, 2), (1, 1), (0, 0), 1, (1, 1), False, 0.8, "none", 0.01)) is not None
    with pytest.raises(ValueError, match="bn_weight must be"):
        call(*tensors[:5], torch.ones(2), tensors[6])
    with pytest.raises(TypeError, match="bn_weight must have the dtype"):
        call(*tensors[:5], tensors[5].double(), tensors[6])
    with pytest.raises(ValueError, match="bn_bias must be on the device"):
        call(*tensors[:6], tensors[6].to("meta"))
    with pytest.raises(ValueError, match="activation must be"):
        call(*tensors, activation="softmax")
    with torch.autocast("cpu", torch.bfloat16):
        assert call(*tensors).dtype is torch.bfloat16
    with torch.device("meta"):  # where results would be made that no tensor asks for
        assert call(*tensors).device.type == "cpu"
    weight = tensors[1].requires_grad_()
    call(tensors[0], weight, *tensors[2:]).sum().backward()
    assert weight.grad is not None
    batched = torch.func.vmap(lambda x: call(x, weight.detach(), *tensors[2:]))(tensors[0][None])
    torch.testing.assert_close(batched[0], plain(case, tensors), rtol=1e-4, atol=1e-4)


def test_inference_tensors():
    case = CASES["k4s2p1"]
    with torch.inference_mode():
        tensors = case.tensors(torch.float64)
        for _ in range(2):
            torch.testing.assert_close(native(case, tensors, "relu"), plain(case, tensors, "relu"))
            tensors[1].mul_(2.0)


# Registration


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("activation", ["none", "leaky_relu"])
def test_opcheck(backend, norm, activation):
    tensors = CASES["k3s2p1op1"].tensors(norm=norm)
    args = (*tensors, [2, 2], [1, 1], [1, 1], 1, [1, 1], False, 1e-5, activation, 0.2)
    with fastgen.backend(backend):
        opcheck(torch.ops.fastgen.conv_transpose2d_bn_act.default, args)


def test_compiles_for_inference():
    case = CASES["k4s2p1"]

    def function(tensors):
        return ops.conv_transpose2d_bn_act(*tensors, **case.options, activation="tanh")

    tensors = case.tensors()
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(tensors), function(tensors))


@pytest.mark.parametrize("name", ["k3s2p1op1 training", "k4s2p1"])
def test_bfloat16_beyond_the_kernels_uses_the_reference(caplog, name):
    backends._logged.clear()
    training = name.endswith(" training")
    case = CASES[name.removesuffix(" training")]  # k4s2p1 has 17 input channels
    tensors = [tensor.bfloat16() for tensor in case.tensors()]
    with caplog.at_level(logging.WARNING, "fastgen"):
        output = ops.conv_transpose2d_bn_act(*tensors, **case.options, training=training)
    assert output.dtype == torch.bfloat16
    assert "takes inference alone, with an even number of input channels" in caplog.text
    with fastgen.backend("cpu"), pytest.raises(RuntimeError, match="takes inference alone"):
        ops.conv_transpose2d_bn_act(*tensors, **case.options, training=training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_autocast_uses_the_reference(training):
    case = CASES["k3s2p1op1"]
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.conv_transpose2d_bn_act(*case.tensors(), **case.options, training=training)
    assert output.dtype == torch.bfloat16


def arguments(**changes):
    given = {"input": torch.ones(2, 4, 5, 6), "weight": torch.ones(4, 6, 3, 3)}
    return {**given, **changes}


ones = torch.ones(6)
ERRORS = {
    "input a list": ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
    "input 3-d": ({"input": torch.ones(4, 5, 6)}, ValueError, r"input must be \[N, Cin, H, W\].*got \[4, 5, 6\]"),
    "empty image": ({"input": torch.ones(2, 4, 0, 6)}, ValueError, r"got \[2, 4, 0, 6\]"),
    "channels": ({"input": torch.ones(2, 3, 5, 6)}, ValueError, "input must have 4 channels.*got 3"),
    "weight 3-d": ({"weight": torch.ones(4, 6, 3)}, ValueError, r"weight must be \[Cin, Cout / groups, kh, kw\]"),
    "weight dtype": ({"weight": torch.ones(4, 6, 3, 3).double()}, TypeError, "torch.float32, got torch.float64"),
    "integers": ({k: v.int() for k, v in arguments().items()}, TypeError, "floating dtype, got torch.int32"),
    "device": ({"weight": torch.ones(4, 6, 3, 3, device="meta")}, ValueError, "weight must be on the device"),
    "bias": ({"bias": torch.ones(5)}, ValueError, r"bias must be \[6\], got \[5\]"),
    "bn_weight": ({"running_mean": ones, "running_var": ones, "bn_weight": torch.ones(1)}, ValueError, "bn_weight"),
    "one statistic": ({"running_mean": ones}, ValueError, "running_mean and running_var must be given together"),
    "no statistics": ({"bn_weight": ones}, ValueError, "without running_mean and running_var must be training"),
    "groups": ({"groups": 3}, ValueError, "groups must divide the 4 input channels, got 3"),
    "stride": ({"stride": 0}, ValueError, r"stride must be at least 1, got \(0, 0\)"),
    "stride of three": ({"stride": (1, 1, 1)}, ValueError, "stride must be an integer or two"),
    "padding": ({"padding": -1}, ValueError, "padding must be at least 0"),
    "no output": ({"padding": 4}, ValueError, "output would be -1 x 0: padding"),
    "output_padding": ({"output_padding": 1}, ValueError, "output_padding must be less than stride or dilation"),
    "activation": ({"activation": "mish"}, ValueError, "activation must be one of none, relu.*; got 'mish'"),
    "one value": (
        {"input": torch.ones(1, 4, 1, 1), "weight": torch.ones(4, 6, 1, 1), "bn_weight": ones, "training": True},
        ValueError,
        r"more than one value per channel, got an output of \[1, 6, 1, 1\]",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        ops.conv_transpose2d_bn_act(**arguments(**changes))


def test_operators_check_their_arguments():
    args = (*CASES["k3s2p1op1"].tensors(), [2, 2], [1, 1], [1, 1], 1, [1, 1], False, 1e-5, "relu", 0.2)
    with pytest.raises(ValueError, match="input must have 6 channels"):
        torch.ops.fastgen.conv_transpose2d_bn_act(args[0][:, :3], *args[1:])
    output, *saved = torch.ops.fastgen.conv_transpose2d_bn_act_saving(*args)
    with pytest.raises(ValueError, match="grad must be"):
        torch.ops.fastgen.conv_transpose2d_bn_act_backward(
            output[:, :, 1:], args[0], args[1], args[5], args[6], *saved, *args[7:], [True, True]
        )
