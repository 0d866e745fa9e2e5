"""Training of convolutions of both kinds: plain PyTorch in float64, in all cases of inference and some more."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastgen
from fastgen import backends, ops
from fastgen.ops import conv_cpu as cpu
from tests.instruction_sets import ISAS, chosen
from tests.ops import test_conv2d_bn_act as ordinary
from tests.ops import test_conv_transpose2d_bn_act as transposed
from tests.ops.test_conv_transpose2d_bn_act import (
    ACTIVATIONS,
    LAYOUTS,
    all_activations,
    all_threads,  # noqa: F401
    assert_as_accurate,
    doubles,
    rms,
)

KINDS = {
    "ordinary": (ordinary.Case, F.conv2d, ops.conv2d_bn_act),
    "transposed": (transposed.Case, F.conv_transpose2d, ops.conv_transpose2d_bn_act),
}
# The gradient of the weights by minimal filtering; as of a transposed convolution.
MINIMAL = {
    "two taps, tiles of all kinds": ((8, 32, 8, 7), 33, (4, 4), {"stride": 2, "padding": 1}),
    "three taps, tiles stick out": ((9, 33, 9, 5), 32, (3, 3), {"padding": 1}),
    "three taps in steps of two": ((4, 32, 9, 12), 32, (6, 6), {"stride": 2, "padding": 2}),
    "steps differ": ((5, 35, 16, 7), 32, (2, 4), {"stride": (1, 2), "padding": (0, 1)}),
    "cropped": ((9, 32, 9, 9), 32, (3, 3), {"padding": (0, 2)}),
    "several blocks": ((60, 32, 9, 9), 48, (3, 3), {"padding": 1}),
    "several strips": ((16, 512, 4, 4), 264, (4, 4), {"stride": 2, "padding": 1}),
    "several strips of several blocks": ((36, 400, 8, 8), 200, (4, 4), {"stride": 2, "padding": 1}),
}


def minimal_case(kind, name):
    """What has this gradient: of an ordinary convolution the output is what the input of a transposed one is."""
    shape, out, kernel, options = MINIMAL[name]
    if kind == "transposed":
        return transposed.Case(shape, out, kernel, options)
    n, channels, *size = shape
    pairs = [ordinary.make_pair(key, options.get(key, key == "stride")) for key in ("stride", "padding")]
    size = [(y - 1) * s - 2 * p + k for y, s, p, k in zip(size, *pairs, kernel, strict=True)]
    return ordinary.Case((n, out, *size), channels, kernel, options)


CASES = {
    f"{kind}, {name}": case
    for kind, module in (("ordinary", ordinary), ("transposed", transposed))
    for name, case in module.CASES.items()
}
SMALL = {"ordinary": ordinary.CASES["k4s2p1 odd"], "transposed": transposed.CASES["k3s2p1op1"]}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
kinds = pytest.mark.parametrize("kind", KINDS)
minimal_cases = pytest.mark.parametrize("name", MINIMAL)
training_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
norms = pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])


def kind_of(case):
    return next(entry for entry in KINDS.values() if type(case) is entry[0])


def plain(case, tensors, activation="none", training=False):
    """The definition, in the dtype of the tensors."""
    x, weight, bias, mean, var, bn_weight, bn_bias = tensors
    output = kind_of(case)[1](x, weight, bias, **case.options)
    if mean is not None:
        output = F.batch_norm(output, mean, var, bn_weight, bn_bias, training, 0.1, 0.8)
    return ACTIVATIONS[activation](output)


def native(case, tensors, activation="none", **more):
    more = {"negative_slope": -0.3, "alpha": 1.7, "eps": 0.8, **more}
    with fastgen.backend("cpu"):
        return kind_of(case)[2](*tensors, **case.options, activation=activation, **more)


def leaves_of(tensors):
    """The tensors with their own storage; those that are trained want a gradient."""
    copies = [None if tensor is None else tensor.detach().clone() for tensor in tensors]
    trained = [copies[i].requires_grad_() for i in (0, 1, 2, 5, 6) if copies[i] is not None]
    return copies, trained


def run(function, case, tensors, activation, training, grad):
    """Output, running statistics and gradients."""
    copies, trained = leaves_of(tensors)
    output = function(case, copies, activation, training=training)
    grads = torch.autograd.grad(output, trained, grad.to(output.dtype))
    statistics = [tensor for tensor in copies[3:5] if tensor is not None]
    return [output.detach(), *statistics, *grads]


def grad_for(case, tensors):
    return torch.randn_like(plain(case, doubles(tensors)))


def trainable(case, training):
    return not training or plain(case, case.tensors())[:, 0].numel() > 1


def assert_training_is_accurate(case, training):
    tensors = case.tensors()
    args = (tensors, "leaky_relu", training, grad := grad_for(case, tensors))
    truths = run(plain, case, doubles(tensors), "leaky_relu", training, grad)
    # What is left to PyTorch gets channels-last tensors, with which oneDNN errs more on some processors.
    channels_last = [*map(LAYOUTS["channels_last"], tensors[:2]), *tensors[2:]]
    peers = [run(plain, case, some, *args[1:]) for some in (tensors, channels_last)]
    for ours, truth, *theirs in zip(run(native, case, *args), truths, *peers, strict=True):
        worst = max(theirs, key=lambda tensor: rms(tensor - truth))
        if rms(truth) < 1e-10:  # the gradient of a bias ahead of batch statistics
            assert rms(ours) <= rms(worst)
        else:
            assert_as_accurate(ours, worst, truth, list(truth.shape))


def assert_training_is_exact(case, isa, training):
    tensors = case.tensors(torch.float64)
    grad = grad_for(case, tensors)
    with chosen(isa):
        actual = run(native, case, tensors, "elu", training, grad)
    for ours, truth in zip(actual, run(plain, case, tensors, "elu", training, grad), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@all_cases
@training_modes
def test_float32_is_as_accurate_as_pytorch(case, training):
    if trainable(case, training):
        assert_training_is_accurate(case, training)


@all_cases
@training_modes
@pytest.mark.parametrize("isa", ISAS)
def test_float64_on_every_instruction_set(case, isa, training):
    if trainable(case, training):
        assert_training_is_exact(case, isa, training)


@kinds
@minimal_cases
def test_minimal_filtering(kind, name):
    case = minimal_case(kind, name)
    x, weight, *_ = case.tensors()
    args = [ordinary.make_pair(key, case.options.get(key, key == "stride")) for key in ("stride", "padding")]
    options = cpu.Options(*args, (0, 0), 1, (1, 1), False, 0.0, "none", 0.0)
    block = cpu.Block.of(kind == "transposed", x.shape, x.dtype, weight, options)
    assert block.weight_shape().minimal
    assert_training_is_accurate(case, training=False)
    for isa in ISAS:
        if math.prod(weight.shape) < 1e5:
            assert_training_is_exact(case, isa, training=False)


def test_direct_weight_gradients():
    """Of few channels, of few pixels, of a kernel that its steps do not divide, with groups or dilation."""
    sizes = {"in": (16, 16), "out": (32, 32), "kernel": (4, 4), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    for channels, change in (
        ((31, 64), {}),
        ((64, 31), {}),
        ((64, 64), {"in": (2, 16), "out": (4, 32)}),
        ((64, 64), {"kernel": (3, 3)}),
        ((64, 64), {"kernel": (3, 4), "stride": (1, 2)}),
        ((64, 64), {"dilation": (2, 1)}),
    ):
        shape = backends.native_cpu().WeightGradientShape(8, 1, 1, channels, *{**sizes, **change}.values())
        assert not shape.minimal, change
    assert not backends.native_cpu().WeightGradientShape(8, 1, 2, (64, 64), *sizes.values()).minimal
    assert backends.native_cpu().WeightGradientShape(8, 1, 1, (64, 64), *sizes.values()).minimal


@all_activations
@training_modes
@kinds
@norms
def test_gradients_of_activations(activation, training, norm, kind):
    case = SMALL[kind]
    tensors = case.tensors(torch.float64, norm=norm)
    grad = grad_for(case, tensors)
    actual = run(native, case, tensors, activation, training, grad)
    for ours, truth in zip(actual, run(plain, case, tensors, activation, training, grad), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


def test_relu_keeps_its_output_alone():
    """And so nobody may write to it, as behind PyTorch's own; behind others they may."""
    for activation, kept in (("relu", True), ("leaky_relu", False), ("tanh", False)):
        copies, trained = leaves_of(SMALL["ordinary"].tensors(torch.float64, norm=False))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            output = native(SMALL["ordinary"], copies, activation)
        assert any(x.data_ptr() == output.data_ptr() for x in saved) == kept
        assert sum(x.shape == output.shape for x in saved) == 1
        output = native(SMALL["ordinary"], copies, activation)
        if kept:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(output.add_(1.0).sum(), trained)
        else:
            expected = torch.autograd.grad(plain(SMALL["ordinary"], copies, activation).sum(), trained)
            for ours, truth in zip(torch.autograd.grad(output.add_(1.0).sum(), trained), expected, strict=True):
                torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@kinds
@norms
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "tanh"])
def test_saved_tensors_may_come_back_in_another_layout(kind, norm, activation):
    case = SMALL[kind]
    copies, trained = leaves_of(case.tensors(torch.float64, norm=norm))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x
    ):
        output = native(case, copies, activation)
    expected = torch.autograd.grad(plain(case, copies, activation).square().sum(), trained)
    for ours, truth in zip(torch.autograd.grad(output.square().sum(), trained), expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@training_modes
@pytest.mark.parametrize("name", ["small", "groups", "dilation, stride"])
@kinds
@norms
@pytest.mark.parametrize("activation", ["tanh", "silu", "gelu"])
def test_gradcheck(name, activation, training, norm, kind):
    case = SMALL[kind] if name == "small" else CASES[f"{kind}, {name}"]
    copies, trained = leaves_of(case.tensors(torch.float64, norm=norm))

    def function(*_):
        fresh = [copies[0], copies[1], copies[2], *(t if t is None else t.clone() for t in copies[3:5]), *copies[5:]]
        return native(case, fresh, activation, training=training)

    assert torch.autograd.gradcheck(function, trained, fast_mode=True)


@kinds
def test_statistics_far_from_zero(kind):
    case = CASES[f"{kind}, several items"]
    tensors = case.tensors()
    tensors[2] += 1000.0
    truth = run(plain, case, doubles(tensors), "none", True, grad := grad_for(case, tensors))
    ours, theirs = (run(function, case, tensors, "none", True, grad) for function in (native, plain))
    for index in range(3):
        assert_as_accurate(ours[index], theirs[index], truth[index], index)


BITS = [
    *("ordinary, k4s2p1", "ordinary, last layer k3", "ordinary, several items", "ordinary, groups"),
    *("transposed, k4s2p1", "transposed, last layer", "transposed, several items", "transposed, groups"),
]
BITS_MINIMAL = [(kind, name) for kind in KINDS for name in ("two taps, tiles of all kinds", "several blocks")]


@pytest.mark.parametrize("case", [*map(CASES.get, BITS), *(minimal_case(*i) for i in BITS_MINIMAL)], ids=str)
def test_bits_do_not_depend_on_threads_or_layout(case, all_threads):  # noqa: F811
    tensors = case.tensors()
    grad = grad_for(case, tensors)
    one = run(native, case, tensors, "tanh", True, grad)
    for threads in (2, 3, 19):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(native, case, tensors, "tanh", True, grad), one)), threads
    torch.set_num_threads(1)
    for arrange in LAYOUTS.values():
        arranged = [arrange(tensors[0]), *tensors[1:]]
        assert all(map(torch.equal, run(native, case, arranged, "tanh", True, arrange(grad.float())), one))


@pytest.mark.parametrize("needs", [*itertools.product((False, True), repeat=5)], ids=str)
@kinds
def test_only_the_gradients_asked_for(needs, kind):
    tensors = SMALL[kind].tensors()
    leaves = [tensors[i] for i in (0, 1, 2, 5, 6)]
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    output = native(SMALL[kind], tensors, training=True)
    assert output.requires_grad == any(needs)
    if any(needs):
        output.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needs)


@kinds
def test_training_without_running_statistics(kind):
    case = SMALL[kind]
    tensors = case.tensors(torch.float64)
    tensors[3] = tensors[4] = None
    expected = plain(case, [*tensors[:3], None, None, None, None])
    expected = F.batch_norm(expected, None, None, *tensors[5:], True, eps=0.8)
    torch.testing.assert_close(native(case, tensors, training=True), expected)


@kinds
def test_inference_with_gradients_gives_nearly_the_same(kind):
    case = SMALL[kind]
    tensors = case.tensors(torch.float64)
    expected = native(case, tensors, "elu")
    torch.testing.assert_close(native(case, leaves_of(tensors)[0], "elu").detach(), expected, rtol=1e-12, atol=1e-12)


@training_modes
@norms
@kinds
@pytest.mark.parametrize("name", ["small", "groups"])
@pytest.mark.parametrize("activation", ["tanh", "leaky_relu", "none"])
def test_second_derivatives(name, norm, training, kind, activation):
    """As a gradient penalty takes them: of the norm of a gradient, with respect to all that is trained."""
    case = SMALL[kind] if name == "small" else CASES[f"{kind}, {name}"]
    tensors, results = case.tensors(torch.float64, norm=norm), []
    for function in (native, plain):
        copies, trained = leaves_of(tensors)
        output = function(case, copies, activation, training=training)
        grads = torch.autograd.grad(output.pow(3).sum(), trained, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        second = torch.autograd.grad(penalty, trained)
        results.append([output, *grads, *second])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-8)


# Registration


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@norms
@kinds
@pytest.mark.parametrize("activation", ["none", "leaky_relu", "elu"])
def test_opcheck(backend, norm, activation, kind):
    name = f"{kind_of(SMALL[kind])[2].__name__}_"
    saving, backward = (getattr(torch.ops.fastgen, name + what) for what in ("saving", "backward"))
    extra = [1, 1] if kind == "transposed" else [0, 0]
    with fastgen.backend(backend):
        for training in (False, norm):
            args = (*SMALL[kind].tensors(norm=norm), [2, 2], [1, 1], extra, 1, [1, 1], training, 1e-5, activation, 0.2)
            opcheck(saving.default, args)
            output, conv, mean, var = saving(*args)
            conv = output if not conv.numel() and activation != "none" else conv
            backward_args = (torch.randn_like(output), args[0], args[1], args[5], args[6], conv, mean, var, *args[7:])
            for needs in ([True, True], [False, True]):
                opcheck(backward.default, (*backward_args, needs))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@training_modes
@pytest.mark.parametrize("case", [minimal_case("ordinary", "cropped"), SMALL["transposed"]], ids=[*KINDS])
def test_compiles_as_one_graph(dynamic, training, case, monkeypatch):
    monkeypatch.setattr(sys.modules["fastgen.ops.conv2d_bn_act"], "_LEAST_WORK", 0)
    operation = kind_of(case)[2]
    torch._dynamo.reset()  # what was compiled for other parameters counts against a limit

    def function(case, tensors, activation, training):
        x, *rest = tensors
        output = operation(x * 2.0, *rest, **case.options, activation=activation, training=training, eps=0.8)
        return output.sigmoid()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for height in (6, 7):
        sized = case._replace(shape=(*case.shape[:2], height, 6))
        tensors = sized.tensors()
        grad = grad_for(sized, tensors)
        actual = run(compiled, sized, tensors, "relu", training, grad)
        assert all(map(torch.equal, actual, run(function, sized, tensors, "relu", training, grad)))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_compiled_code_may_write_to_the_result(activation, monkeypatch):
    """What was saved is not what is written to then."""
    monkeypatch.setattr(sys.modules["fastgen.ops.conv2d_bn_act"], "_LEAST_WORK", 0)
    torch._dynamo.reset()
    case = minimal_case("ordinary", "cropped")
    copies, trained = leaves_of(case.tensors(norm=False))

    def function(*tensors):
        return ops.conv2d_bn_act(*tensors, **case.options, activation=activation, negative_slope=-0.3).neg_()

    actual = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(*copies).sum(), trained)
    expected = torch.autograd.grad(plain(case, copies, activation).neg().sum(), trained)
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@kinds
def test_traced_by_jit_it_is_plain_pytorch(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["fastgen.ops.conv2d_bn_act"], "_LEAST_WORK", 0)
    layer = (fastgen.nn.ConvBNAct if kind == "ordinary" else fastgen.nn.ConvTransposeBNAct)(32, 32, 4, 2, 1).eval()
    x = torch.randn(2, 32, 8, 8)
    torch.jit.trace(layer, x).save(tmp_path / "traced.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(x), layer(x), rtol=1e-4, atol=1e-4)


@training_modes
@kinds
def test_meta_tensors(training, kind):
    case = minimal_case(kind, "cropped")
    tensors = [tensor.to("meta") for tensor in case.tensors()]
    tensors[1].requires_grad_()
    output = kind_of(case)[2](*tensors, **case.options, training=training)
    assert output.shape == plain(case, case.tensors()).shape and output.requires_grad


def test_operators_check_their_arguments():
    args = (*SMALL["ordinary"].tensors(), [2, 2], [1, 1], [1, 0], 1, [1, 1], True, 1e-5, "relu", 0.2)
    with pytest.raises(ValueError, match=r"output_padding must be 0, got \[1, 0\]"):
        torch.ops.fastgen.conv2d_bn_act_saving(*args)
    args = (*args[:9], [0, 0], *args[10:])
    saved = torch.ops.fastgen.conv2d_bn_act_saving(*args)
    rest = (args[0], args[1], args[5], args[6], *saved[1:], *args[7:], [True, True])
    with pytest.raises(ValueError, match=r"grad must be \[3, 33, 3, 4\], got \[1, 33, 3, 4\]"):
        torch.ops.fastgen.conv2d_bn_act_backward(saved[0][:1], *rest)


# Who trains an ordinary convolution: Cin / groups, Cout, kernel, stride, groups, dtype.
CHOICES = {
    "middle": ((64, 64, 3, 1, 1, torch.float32), True),
    "double": ((32, 32, 4, 2, 1, torch.float64), True),
    "last layer": ((32, 3, 3, 1, 1, torch.float32), True),
    "first layer": ((3, 64, 4, 2, 1, torch.float32), False),
    "few channels": ((16, 64, 3, 1, 1, torch.float32), False),
    "k3s2": ((64, 64, 3, 2, 1, torch.float32), False),
    "k5": ((64, 64, 5, 1, 1, torch.float32), False),
    "1x1": ((64, 64, 1, 1, 1, torch.float32), False),
    "groups": ((64, 64, 3, 1, 2, torch.float32), False),
    "bfloat16": ((64, 64, 3, 1, 1, torch.bfloat16), False),
}


@pytest.mark.parametrize(("sizes", "native"), CHOICES.values(), ids=CHOICES.keys())
def test_who_trains_an_ordinary_convolution(sizes, native, monkeypatch):
    inputs, outputs, kernel, stride, groups, dtype = sizes
    weight = torch.ones(outputs, inputs, kernel, kernel, dtype=dtype, requires_grad=True)
    x = torch.ones(1, inputs * groups, 8, 8, dtype=dtype)
    for least, enough in ((8 * 8 * outputs * inputs * kernel**2 + 1, False), (0, True)):
        monkeypatch.setattr(sys.modules["fastgen.ops.conv2d_bn_act"], "_LEAST_WORK", least)
        output = ops.conv2d_bn_act(x, weight, stride=stride, groups=groups)
        assert (type(output.grad_fn).__name__ == "_BlockBackward") == (native and enough)
