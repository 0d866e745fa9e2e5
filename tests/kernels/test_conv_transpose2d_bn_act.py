"""The Triton kernels of `conv_transpose2d_bn_act` against the reference in float64: inference, training, backward."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fastgen import backends, ops
from fastgen.kernels import conv_transpose2d_bn_act as kernel
from fastgen.ops.conv_training import backward_reference, saving_reference
from tests.ops.test_conv_transpose2d_bn_act import ACTIVATIONS, CASES, EXTREMES, Case

NAMES = [
    "one of all", "k4s2p1", "k3s2p1op1", "k4s1p0 of 1x1", "stride above kernel", "sides differ", "padding crops",
    "kernel larger than image", "deep",
]  # fmt: skip
cases = pytest.mark.parametrize("case", [CASES[name] for name in NAMES], ids=NAMES)
SMALL = CASES["k3s2p1op1"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def options(case, training=False, activation="none"):
    both = {
        name: case.options.get(name, default)
        for name, default in (("stride", 1), ("padding", 0), ("output_padding", 0))
    }
    pairs = [list(v) if isinstance(v, tuple) else [v, v] for v in both.values()]
    return (*pairs, 1, [1, 1], training, 1e-5, activation, {"elu": 1.7, "leaky_relu": -0.3}.get(activation, 0.01))


def moved(tensors, device=None, dtype=None):
    return [None if tensor is None else tensor.to(device=device, dtype=dtype) for tensor in tensors]


def close(actual, exact, units=16):
    """Relative to the largest number; sums and epilogues are float32."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    scale = max(1.0, exact.abs().max().item())
    tolerance = units * max(torch.finfo(actual.dtype).eps / 8, torch.finfo(torch.float32).eps)
    assert ((actual.cpu().double() - exact.cpu()).abs().max() / scale).item() <= tolerance


@cases
def test_inference(case, device):
    tensors = case.tensors()
    actual = kernel.forward(*moved(tensors, device), *options(case, activation="relu"))
    assert actual.is_contiguous(memory_format=torch.channels_last)
    close(actual, saving_reference(True, *moved(tensors, dtype=torch.double), *options(case, activation="relu"))[0])


@DTYPES
@activations
def test_activations(activation, dtype, device):
    tensors = moved(SMALL.tensors(), dtype=dtype)
    actual = kernel.forward(*moved(tensors, device), *options(SMALL, activation=activation))
    assert actual.dtype == dtype
    close(
        actual, saving_reference(True, *moved(tensors, dtype=torch.double), *options(SMALL, activation=activation))[0]
    )


@activations
def test_nan_stays_nan(activation, device):
    tensors = SMALL.tensors()
    tensors[0][0, 1, 1, 0] = torch.nan
    for training in (False, True):
        rest = options(SMALL, training, activation)
        actual = kernel.saving(*moved(tensors, device), *rest)[0].cpu()
        assert torch.equal(actual.isnan(), saving_reference(True, *tensors, *rest)[0].isnan())
    inferred = kernel.forward(*moved(tensors, device), *options(SMALL, activation=activation)).cpu()
    assert torch.equal(
        inferred.isnan(), saving_reference(True, *tensors, *options(SMALL, activation=activation))[0].isnan()
    )
    assert 0 < inferred.isnan().sum() < inferred.numel()


@activations
def test_extremes(activation, device):
    x, weight = EXTREMES.view(-1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    rest = options(Case(tuple(x.shape), 1, (1, 1)), activation=activation)
    actual = kernel.forward(x.to(device), weight.to(device), *[None] * 5, *rest).cpu()
    torch.testing.assert_close(actual, ACTIVATIONS[activation](x.double()).float(), equal_nan=True)


# kernel, stride, padding, output padding, input size, channels: few of them are computed in one pass over the image
FEW = {
    "k4s2p1": ([4, 4], [2, 2], [1, 1], [0, 0], (5, 3), 3),
    "k5s2p2op1": ([5, 5], [2, 2], [2, 2], [1, 1], (4, 3), 1),
    "k3s2p0 of one row": ([3, 3], [2, 2], [0, 0], [0, 0], (1, 5), 2),
    "stride above kernel": ([2, 3], [3, 4], [0, 1], [0, 2], (3, 2), 1),
    "sides differ": ([4, 2], [2, 1], [1, 0], [0, 0], (3, 4), 5),
    "padding above the kernel": ([2, 2], [2, 2], [2, 3], [1, 0], (6, 7), 1),
    "one position": ([4, 3], [1, 2], [1, 0], [0, 1], (1, 1), 2),
}


@DTYPES
@pytest.mark.parametrize("case", FEW.values(), ids=FEW)
def test_few_channels(case, dtype, device):
    kernel_size, *geometry, size, channels = case
    x, weight = torch.randn(2, 7, *size).to(dtype), torch.randn(7, channels, *kernel_size).to(dtype)
    vectors = [*torch.randn(2, channels).to(dtype), *torch.rand(3, channels).to(dtype)]
    rest = (*geometry, 1, [1, 1], False, 1e-5, "leaky_relu", -0.3)
    actual = kernel.forward(*moved((x, weight, *vectors), device), *rest)
    close(actual, saving_reference(True, *moved((x, weight, *vectors), dtype=torch.double), *rest)[0])


@pytest.mark.parametrize("channels", [3, 40])
def test_weights_in_channels_last_and_large_tensors(channels, device, monkeypatch):
    x, weight = torch.randn(2, 5, 4, 3, device=device), torch.randn(5, channels, 4, 4, device=device)
    rest = ([2, 2], [1, 1], [0, 0], 1, [1, 1], False, 1e-5, "relu", 0.0)
    expected = kernel.forward(x, weight, *[None] * 5, *rest)
    channels_last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(kernel.forward(x, channels_last, *[None] * 5, *rest), expected)
    monkeypatch.setattr("fastgen.kernels.tap_gemm._SMALL", 0)
    assert torch.equal(kernel.forward(x, channels_last, *[None] * 5, *rest), expected)


@pytest.mark.parametrize("missing", [(2,), (2, 3, 4, 5, 6), (5,), (6,), (3, 4, 5, 6)], ids=str)
def test_what_may_be_missing(missing, device):
    tensors = [None if i in missing else tensor for i, tensor in enumerate(SMALL.tensors())]
    actual = kernel.forward(*moved(tensors, device), *options(SMALL, activation="tanh"))
    close(actual, saving_reference(True, *moved(tensors, dtype=torch.double), *options(SMALL, activation="tanh"))[0])


def backward(tensors, saved, grad, rest, needs):
    x, weight, _, _, _, gamma, beta = tensors
    return (grad, x, weight, gamma, beta, *saved[1:], *rest, needs)


def check_training(case, rest, device, tensors, dtype=torch.float32):
    """Forward with what is saved, then backward of the same saved tensors."""
    tensors = moved(tensors, dtype=dtype)
    saved = kernel.saving(*moved(tensors, device), *rest)
    exact = saving_reference(True, *moved(tensors, dtype=torch.double), *rest)
    for actual, expected in zip(saved, exact, strict=True):
        close(actual, expected)
    grad = torch.randn(exact[0].shape).to(dtype)
    doubles = moved(tensors, dtype=torch.double)
    exact_saved = moved(saved, "cpu", torch.double)  # so that signs at 0 are the same
    expected = backward_reference(True, *backward(doubles, exact_saved, grad.double(), rest, [True, True]))
    actual = kernel.backward(*backward(moved(tensors, device), saved, grad.to(device), rest, [True, True]))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        close(ours, theirs, 64)


@cases
def test_training(case, device):
    if case is CASES["one of all"]:
        pytest.skip("training needs more than one value per channel")
    check_training(case, options(case, True, "leaky_relu"), device, case.tensors())


@activations
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
def test_training_activations(activation, norm, device):
    check_training(SMALL, options(SMALL, norm == "batch", activation), device, SMALL.tensors(norm=norm != "none"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_in_lower_precisions(dtype, device):
    check_training(SMALL, options(SMALL, True, "relu"), device, SMALL.tensors(), dtype)


def test_statistics_of_a_far_away_channel_keep_their_digits(device):
    x, weight, bias, *norm = SMALL.tensors()
    tensors = [x, weight, bias + 1000, *norm]
    _, _, _, var = kernel.saving(*moved(tensors, device), *options(SMALL, True))
    exact = saving_reference(True, *moved(tensors, dtype=torch.double), *options(SMALL, True))[3]
    torch.testing.assert_close(var.cpu().double(), exact, rtol=1e-4, atol=0)


def test_only_the_gradients_that_are_needed(device):
    tensors, rest = moved(SMALL.tensors(), device), options(SMALL, True, "relu")
    saved = kernel.saving(*tensors, *rest)
    grad = torch.randn_like(saved[0])
    both = kernel.backward(*backward(tensors, saved, grad, rest, [True, True]))
    for i, needs in ((0, [True, False]), (1, [False, True])):
        one = kernel.backward(*backward(tensors, saved, grad, rest, needs))
        assert torch.equal(one[i], both[i]) and one[1 - i].numel() == 0


def test_empty_batch(device):
    tensors = moved(SMALL.tensors(), device)
    tensors[0] = tensors[0][:0]
    rest = options(SMALL, activation="relu")
    saved = kernel.saving(*tensors, *rest)
    assert saved[0].shape == kernel.forward(*tensors, *rest).shape == (0, 12, 10, 8)
    grads = kernel.backward(*backward(tensors, saved, saved[0], rest, [True, True]))
    assert grads[0].shape == tensors[0].shape and not any(grad.any() for grad in grads[1:])


def test_groups_and_dilation_are_for_others(device):
    for name, reason in (("groups", "one group"), ("dilation", "no dilation")):
        case = CASES[name]
        args = [*options(case)]
        args[3:5] = [case.groups, list(case.options.get("dilation", (1, 1)))]
        tensors = moved(case.tensors(), device)
        assert reason in backends.reasons("conv_transpose2d_bn_act", *tensors, *args)["triton"]


@pytest.mark.parametrize("training", [False, True])
def test_as_a_backend(training, device, triton_backend):
    geometry = {"stride": 2, "padding": 1, "output_padding": 1}
    tensors = moved(SMALL.tensors(), device)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [tensor.detach().to(dtype, copy=True) for tensor in tensors]
        wanted = [leaves[i].requires_grad_() for i in (0, 1, 2, 5, 6)]
        function = ops.conv_transpose2d_bn_act
        if dtype == torch.float64:
            with pytest.raises(RuntimeError, match=r"got torch\.float64"):
                function(*leaves, **geometry)
            function = reference
        out = function(*leaves, **geometry, training=training, activation="relu")
        grads = torch.autograd.grad((out * out.detach()).sum(), wanted)
        results.append([out.detach(), *grads, *leaves[3:5]])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected.detach(), 64)


def reference(*args, **kwargs):
    import fastgen

    with fastgen.backend("reference"):
        return ops.conv_transpose2d_bn_act(*args, **kwargs)


def test_opcheck(device, triton_backend):
    tensors, rest = moved(SMALL.tensors(), device), options(SMALL, True, "relu")
    operators = torch.ops.fastgen
    opcheck(operators.conv_transpose2d_bn_act.default, (*tensors, *options(SMALL, False, "relu")))
    opcheck(operators.conv_transpose2d_bn_act_saving.default, (*tensors, *rest))
    saved = kernel.saving(*tensors, *rest)
    args = backward(tensors, saved, torch.randn_like(saved[0]), rest, [True, True])
    opcheck(operators.conv_transpose2d_bn_act_backward.default, args)
