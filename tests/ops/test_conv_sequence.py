"""Fused blocks in one call: the bits of the blocks one by one, whatever changes between calls."""

from __future__ import annotations

import gc
import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F

import fastgen
from fastgen import ops
from fastgen.ops import conv_cpu as cpu
from fastgen.ops.conv_cpu import Options
from fastgen.ops.conv_sequence import conv_bn_act_sequence
from tests.instruction_sets import ISAS, chosen

module = importlib.import_module("fastgen.ops.known_convs")
conv2d_module = importlib.import_module("fastgen.ops.conv2d_bn_act")  # the package has the function of this name

PLAIN = Options((1, 1), (0, 0), (0, 0), 1, (1, 1), False, 1e-5, "none", 0.0)
UP = PLAIN._replace(stride=(2, 2), padding=(1, 1))
SAME = PLAIN._replace(padding=(1, 1))
GROUPS = SAME._replace(groups=2)  # of few channels: PyTorch computes it where the convolution is ordinary
# Channels from block to block, kernels, options, and where the convolutions are not all transposed, which ones are.
NETWORKS = {
    "dcgan": ([10, 32, 18, 3], [4, 4, 4], [PLAIN._replace(activation="relu"), UP, UP._replace(activation="tanh")]),
    "minimal filtering": ([32, 32, 16], [4, 4], [UP._replace(activation="elu", parameter=0.7)] * 2),
    "groups": ([6, 12, 8], [3, 3], [UP._replace(groups=3, output_padding=(1, 0)), PLAIN._replace(dilation=(2, 1))]),
    "growing": ([2, 4, 64, 2, 6], [3, 2, 3, 1], [UP, UP._replace(activation="leaky_relu", parameter=0.3), UP, PLAIN]),
    "encoder": (
        [10, 32, 18, 4],
        [4, 3, 1],
        [UP._replace(padding=(2, 2)), SAME, PLAIN._replace(dilation=(2, 2))],
        "000",
    ),
    "autoencoder": ([10, 34, 40, 6], [3, 4, 3], [SAME._replace(activation="silu"), UP, SAME], "010"),
}
PARTS = {  # and what computes the parts
    "first by PyTorch": ([10, 12, 8], [3, 3], [GROUPS, SAME], "00", [False, True]),
    "last by PyTorch": ([10, 12, 8], [3, 3], [SAME, GROUPS._replace(activation="tanh")], "00", [True, False]),
    "all by PyTorch": ([10, 12, 8], [3, 3], [GROUPS, GROUPS], "00", [False, False]),
    "some by PyTorch": ([10, 12, 8, 6, 6], [3, 3, 4, 3], [SAME, GROUPS, UP, SAME], "0010", [True, False, True]),
}


class Network:
    def __init__(self, name, dtype=torch.float32):
        widths, kernels, blocks, *kinds = {**NETWORKS, **PARTS}[name]
        kinds = [kind == "1" for kind in kinds[0]] if kinds else [True] * len(blocks)
        self.blocks = tuple((kind, tuple(block)) for kind, block in zip(kinds, blocks, strict=True))
        self.inputs, self.dtype, self.tensors = widths[0], dtype, []
        for i, (width, out) in enumerate(itertools.pairwise(widths)):
            channels = (width, out // blocks[i].groups) if kinds[i] else (out, width // blocks[i].groups)
            weight = torch.randn(*channels, kernels[i], kernels[i], dtype=dtype) / 8
            norm = [torch.randn(out, dtype=dtype), torch.rand(out, dtype=dtype) + 0.5, *torch.randn(2, out).to(dtype)]
            self.tensors += [
                weight,
                torch.randn(out, dtype=dtype) if i else None,
                *(norm if i % 2 == 0 else [None] * 4),
            ]

    def input(self, batch=3, height=3, width=2):
        return torch.randn(batch, self.inputs, height, width, dtype=self.dtype)

    def __call__(self, x, contiguous=False):
        return conv_bn_act_sequence(x, self.tensors, self.blocks, contiguous=contiguous)

    def one_by_one(self, x):
        for i, (transposed, block) in enumerate(self.blocks):
            o = Options(*block)
            function, extra = ops.conv2d_bn_act, {}
            if transposed:
                function, extra = ops.conv_transpose2d_bn_act, {"output_padding": o.output_padding}
            x = function(
                x, *self.tensors[6 * i : 6 * i + 6], stride=o.stride, padding=o.padding, groups=o.groups,
                dilation=o.dilation, eps=o.eps, activation=o.activation, negative_slope=o.parameter,
                alpha=o.parameter, **extra,
            )  # fmt: skip
        return x

    def set_first(self, options):
        self.blocks = ((self.blocks[0][0], tuple(options)), *self.blocks[1:])

    def check(self, x):
        expected, actual = self.one_by_one(x), self(x)
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()

    def kept(self):
        sizes = module._kept.get(id(self.tensors[0]), {}).values()
        return [sequence for of_one_kind in sizes for sequence in of_one_kind.values()]


def native_part(sequence):
    (part,) = sequence.parts
    return part


@pytest.fixture
def calls(monkeypatch):
    """What native calls returned."""
    results = []
    call = module._Known.__call__
    monkeypatch.setattr(module._Known, "__call__", lambda *args: results.append(call(*args)) or results[-1])
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_bits_are_those_of_the_blocks(name, dtype, calls):
    network = Network(name, dtype)
    for batch in (3, 1, 40):
        x = network.input(batch)
        for _ in range(3):
            network.check(x)
    assert len(calls) == 8 and None not in calls  # all but the first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_parts_that_pytorch_computes(name, dtype, calls, monkeypatch):
    monkeypatch.setattr(cpu, "has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(cpu, "_served", {})
    network = Network(name, dtype)
    for contiguous in (False, True):
        for batch in (3, 1):
            x = network.input(batch)
            for _ in range(3):
                expected = network.one_by_one(x)
                assert torch.equal(network(x, contiguous), expected)
    assert len(calls) == 8 and None not in calls
    for sequence in network.kept():
        assert [isinstance(part, module._Native) for part in sequence.parts] == PARTS[name][-1]
    x = network.input()
    for tensor in (network.tensors[0], network.tensors[6]):
        network(x)
        tensor.data.mul_(2.0)  # past the version counter
        assert torch.equal(network(x), network.one_by_one(x))


def test_another_size_may_be_for_pytorch(monkeypatch, calls):
    network = Network("encoder")
    network.check(network.input(1, 3, 2))
    monkeypatch.setattr(cpu, "_served", {})
    for where in (module, conv2d_module):
        monkeypatch.setattr(where, "is_native_better", lambda dtype, input, weight, options: input[2] < 12)
    network.check(network.input(1, 4, 4))
    assert len(calls) == 1
    network.check(network.input(1, 20, 4))
    network.check(network.input(1, 20, 4))
    assert len(calls) == 2 and None not in calls
    natives = [[isinstance(part, module._Native) for part in sequence.parts] for sequence in network.kept()]
    assert natives == [[True], [True], [False, True]]


def test_channels_last_weights(calls):
    network = Network("encoder")
    for i in (0, 6, 12):
        network.tensors[i] = network.tensors[i].contiguous(memory_format=torch.channels_last)
    x = network.input(2, 5, 4)
    network.check(x)
    network.check(x)
    assert len(calls) == 1 and calls[0] is not None


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_come_back(name, calls):
    """What is kept of the first weights serves them again: nobody has packed others in its place."""
    network = Network(name)
    x, weight = network.input(), network.tensors[0]
    network(x)
    expected, first = network(x), weight.data
    for _ in range(2):
        weight.data = torch.randn_like(first)
        network.one_by_one(x)
        weight.data = first
        assert torch.equal(network(x), expected)
    assert calls[0] is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["dense", "every other image", "one image many times"])
def test_large_batches_run_in_groups(dtype, layout, calls):
    network = Network("dcgan", dtype)
    batch = 24000 // dtype.itemsize  # more than 8 MB between two blocks, twice
    x = {
        "dense": lambda: network.input(batch),
        "every other image": lambda: network.input(2 * batch)[::2],
        "one image many times": lambda: network.input(1).expand(batch, -1, -1, -1),
    }[layout]()
    for contiguous in (False, True):
        network(x[:1], contiguous)
        assert torch.equal(network(x, contiguous), network.one_by_one(x))
    assert len(calls) == 2
    native, scratch = native_part(network.kept()[-1]).native, native_part(network.kept()[-1]).scratch
    assert native.scratch_size(10 * batch, x.stride()) < 1.5 * scratch


@pytest.mark.parametrize("name", NETWORKS)
def test_threads_and_instruction_sets(name, calls):
    network = Network(name)
    x = network.input(7)
    for isa in ISAS:
        with chosen(isa):
            for threads in (1, 3):
                torch.set_num_threads(threads)
                network.check(x)
                network.check(x)
    assert len(calls) == 2 * len(ISAS) and None not in calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_contiguous_results(name, dtype, calls):
    network = Network(name, dtype)
    for batch, height, width in ((1, 3, 2), (5, 3, 2), (2, 7, 9)):
        x = network.input(batch, height, width)
        for _ in range(3):
            result = network(x, contiguous=True)
            assert result.is_contiguous() and torch.equal(result, network(x))
    assert len(calls) == 16 and None not in calls
    x.requires_grad_()
    assert network(x, contiguous=True).is_contiguous()


def test_layouts_and_sizes(calls):
    network = Network("dcgan")
    for x in (
        network.input(),
        network.input().contiguous(memory_format=torch.channels_last),
        network.input(6)[::2],
        network.input().transpose(2, 3),
        network.input(1).expand(4, -1, -1, -1),
        network.input(2, 5, 4),
    ):
        network.check(x)
        network.check(x)
    assert len(calls) == 11 and None not in calls
    assert network(network.input(0)).shape == (0, 3, 24, 20)


@pytest.mark.parametrize("name", ["minimal filtering", "growing"])
def test_other_sizes_may_need_other_packs(name, calls):
    network = Network(name)
    network.check(network.input())
    before = native_part(network.kept()[0]).packs
    for height, width in ((2, 2), (17, 19), (2, 9)):
        network.check(network.input(2, height, width))
    assert len(calls) == 3 and None not in calls
    packs = [native_part(sequence).packs for sequence in network.kept()[1:]]
    assert any(pack is not old for of_size in packs for pack, old in zip(of_size, before, strict=True))


def test_encoders_of_sizes_that_do_not_fit(calls):
    network = Network("encoder")
    network.set_first(PLAIN)
    network(network.input(1, 4, 4))
    for height, width in ((3, 4), (4, 2)):
        with pytest.raises(ValueError, match="larger than the padded input"):
            network(network.input(1, height, width))
    network.check(network.input(1, 5, 4))
    assert len(calls) == 1


def test_sizes_that_do_not_fit():
    network = Network("growing")
    network.set_first(UP._replace(padding=(2, 2)))
    network(network.input(1, 3, 3))
    with pytest.raises(ValueError, match="padding"):
        network(network.input(1, 1, 1))
    with pytest.raises(ValueError, match="channels"):
        network(torch.randn(1, 3, 3, 2))
    with pytest.raises(ValueError, match="N, Cin, H, W"):
        network(torch.randn(3, 2, 2))
    network.check(network.input(1, 4, 4))


def _replace(network):
    network.tensors[6] = torch.randn_like(network.tensors[6])


def _replace_statistics(network):
    network.tensors[2] = torch.randn_like(network.tensors[2])


def _move_statistics(network):
    network.tensors[2].data = torch.randn(2 * len(network.tensors[2]))[::2]


CHANGES = {
    "in place": lambda network: network.tensors[6].mul_(2.0),
    "first in place": lambda network: network.tensors[0].mul_(2.0),
    "one element": lambda network: network.tensors[6].view(-1)[50].add_(100.0),
    "past the version counter": lambda network: network.tensors[6].data.mul_(2.0),
    "other data": lambda network: network.tensors.__getitem__(6).set_(torch.randn_like(network.tensors[6])),
    "other strides": lambda network: setattr(
        network.tensors[6], "data", network.tensors[6].data.flip(2).transpose(2, 3)
    ),
    "another weight": _replace,
    "statistics in place": lambda network: network.tensors[2].data.add_(1.0),
    "other statistics": _replace_statistics,
    "statistics with gaps": _move_statistics,
    "no more bias": lambda network: network.tensors.__setitem__(7, None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_are_noticed(change):
    network = Network("dcgan")
    x = network.input()
    before = network(x)
    assert torch.equal(network(x), before)
    for _ in range(2):
        change(network)
        network.check(x)
        network.check(x)
    assert not torch.equal(network(x), before)


@pytest.mark.parametrize("which", [0, 6])
def test_threads_notice_changes(which):
    network = Network("dcgan")
    network.tensors[0], network.tensors[6] = torch.randn(10, 32, 90, 90) / 8, torch.randn(32, 18, 40, 40) / 8
    x = network.input(1, 1, 1)
    torch.set_num_threads(2)
    before = network(x)
    assert torch.equal(network(x), before)
    network.tensors[which].data.mul_(2.0)  # past the version counter
    network.check(x)
    assert not torch.equal(network(x), before)


def test_a_change_is_noticed_at_another_size(calls):
    network = Network("dcgan")
    for height in (1, 2):
        network(network.input(1, height))
    network.tensors[6].mul_(2.0)
    for height in (3, 4, 5):
        network.check(network.input(1, height))
    assert len(network.kept()) == 3 and len(calls) == 3 and None not in calls


@pytest.mark.parametrize(("old", "new"), [(16, 48), (128, 16)])
def test_other_weights_at_another_size(old, new):
    """Nothing of the old weights' plans may be used for weights of another shape: their packs would be kept."""
    network = Network("growing")
    network.blocks = ((True, tuple(UP._replace(activation="none"))),) * 2
    first = torch.randn(16, 64, 4, 4) / 8
    heads = [[first, *[None] * 5, torch.randn(64, out, 4, 4) / 8, *[None] * 5] for out in (old, new)]
    for height, head in ((16, 0), (1, 1), (1, 1), (16, 1), (1, 0)):
        network.tensors = heads[head]
        x = torch.randn(1, 16, height, height)
        actual, expected = network(x), x.double()  # before the blocks themselves pack
        for i in (0, 6):
            expected = F.conv_transpose2d(expected, network.tensors[i].double(), stride=2, padding=1)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_what_noticed_a_change_is_made_again(calls):
    network = Network("dcgan")
    xs = network.input(), network.input(5)
    for x in xs * 2:
        network(x)
    first = network.kept()
    network.tensors[6].mul_(2.0)
    for x in xs * 2:
        network.check(x)
    second = network.kept()
    assert len(first) == len(second) == 2 and not set(map(id, first)) & set(map(id, second))
    assert [call is None for call in calls] == [False] * 3 + [True] + [False] * 3


@pytest.mark.parametrize("transposed", [False, True], ids=["ordinary", "transposed"])
def test_single_operations_of_parameters_are_known(transposed, calls):
    """Other weights may be computed anew for each call, and nothing is kept of them."""
    function = ops.conv_transpose2d_bn_act if transposed else ops.conv2d_bn_act
    plain = F.conv_transpose2d if transposed else F.conv2d
    x, weight, bias = torch.randn(2, 10, 4, 5), torch.randn(10, 10, 3, 3), torch.randn(10)
    parameter = torch.nn.Parameter(weight.clone(), requires_grad=False)
    for given, known in ((weight, 0), (parameter, 1)):
        for factor in (1.0, 2.0):
            given.mul_(factor)
            for _ in range(3):
                expected = plain(x.double(), given.double(), bias.double(), 2, 1).relu()
                actual = function(x, given, bias, stride=2, padding=1, activation="relu")
                torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
        assert len(calls) - calls.count(None) == 4 * known  # but the first of either values
    parameter.requires_grad_()
    assert function(x, parameter, bias).grad_fn is not None


def test_it_is_forgotten_with_the_first_weight():
    gc.collect()
    before = len(module._kept)
    network = Network("dcgan")
    network(network.input())
    assert len(module._kept) == before + 1
    del network
    gc.collect()
    assert len(module._kept) == before


def test_few_sizes_are_kept(monkeypatch):
    monkeypatch.setattr(module, "_MAX_KEPT", 2)
    network = Network("dcgan")
    for height in (1, 2, 3):
        network.check(network.input(1, height))
    assert len(network.kept()) == 1


def test_gradients(calls):
    network = Network("dcgan")
    x = network.input().requires_grad_()
    network(x.detach())
    weight = network.tensors[6].requires_grad_()
    expected = torch.autograd.grad(network.one_by_one(x).square().sum(), (x, weight))
    actual = torch.autograd.grad(network(x).square().sum(), (x, weight))
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert not calls
    with torch.no_grad():
        network.check(x)
        network.check(x)
    assert len(calls) == 2


def test_where_others_watch(calls):
    """Transforms, autocast, compilation, and tensors without a version counter go the long way."""
    network = Network("dcgan")
    x = network.input()
    expected = network(x)
    torch.testing.assert_close(torch.func.vmap(network)(x[None])[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(x).dtype is torch.bfloat16
    with fastgen.backend("reference"):
        torch.testing.assert_close(network(x), expected)
    assert not calls
    with torch.inference_mode():
        other = Network("dcgan")
        for _ in range(3):
            other.check(other.input())
    assert not calls and not other.kept()


def test_errors_are_those_of_the_blocks():
    network = Network("dcgan")
    network(network.input())
    network.tensors[2].data = network.tensors[2].double()
    with pytest.raises(TypeError, match="dtype"):
        network(network.input())
    network.tensors[2].data = network.tensors[2].float()
    network(network.input())
    with pytest.raises(ValueError, match="channels"):
        network(torch.randn(1, 11, 3, 2))
    with pytest.raises(TypeError, match="dtype"):
        network(network.input().double())
