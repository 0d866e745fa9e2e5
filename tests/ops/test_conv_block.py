"""What lies between a call and its kernel, for every operation: signs still to be changed, `torch.func`."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._device import _device_constructors

import fastgen
from fastgen import models, ops
from fastgen.ops.conv_cpu import Options
from fastgen.ops.conv_sequence import conv_bn_act_sequence

IMAGES = torch.arange(24, dtype=torch.uint8).reshape(2, 1, 3, 4)
PLAIN = Options((1, 1), (0, 0), (0, 0), 1, (1, 1), False, 1e-5, "elu", 0.7)


def norm(channels):
    return (torch.randn(channels), torch.randn(channels), torch.rand(channels) + 0.5, *torch.randn(2, channels))


def conv2d(*tensors):
    return ops.conv2d_bn_act(*tensors, padding=1, activation="leaky_relu")


def groups(*tensors):
    return ops.conv2d_bn_act(*tensors, padding=1, groups=2, activation="leaky_relu")


def group_norm(*tensors):
    return ops.group_norm_act(tensors[0], 5, *tensors[1:], activation="silu")


def sequence(x, *tensors):
    return conv_bn_act_sequence(x, tensors, ((True, PLAIN), (False, PLAIN)))


def masked(*tensors):
    return ops.masked_conv2d(*tensors, mask_type="B")


def likelihood(params):
    return ops.logistic_mixture_nll(params, IMAGES, levels=30)


def latents(mu, logvar):
    return torch.cat([result.flatten() for result in ops.reparameterize(mu, logvar, seed=1, num_samples=2)])


def calls():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, kernel = torch.randn(2, 10, 3, 4), torch.randn(10, 10, 3, 3)
        return {
            "masked_conv2d": (masked, (x, kernel, torch.randn(10))),
            "conv2d_bn_act": (conv2d, (x, kernel, *norm(10))),
            "group_norm_act": (group_norm, (x, *torch.randn(2, 10))),
            "upfirdn2d": (ops.upfirdn2d, (x, torch.randn(2, 3))),
            "conv2d_bn_act, folded": (groups, (x, torch.randn(10, 5, 3, 3), *norm(10))),
            "conv_transpose2d_bn_act": (ops.conv_transpose2d_bn_act, (x, kernel, *norm(10))),
            "sequence": (sequence, (x, kernel, *norm(10), kernel.flip(0), *norm(10))),
            "logistic_mixture_nll": (likelihood, (torch.randn(2, 6, 3, 4),)),
            "reparameterize": (latents, (torch.randn(5, 3), torch.randn(5, 3))),
        }


CALLS = calls()
every_call = pytest.mark.parametrize(("function", "tensors"), CALLS.values(), ids=CALLS.keys())


def lazy(tensor):
    """The same values: the memory holds them with the other sign."""
    result = torch._neg_view(-tensor)
    assert result.is_neg() and torch.equal(result, tensor)
    return result


@every_call
def test_signs_still_to_be_changed(function, tensors):
    expected = function(*tensors)
    for i in range(len(tensors)):
        given = [lazy(tensor) if i == j else tensor for j, tensor in enumerate(tensors)]
        torch.testing.assert_close(function(*given), expected)


@every_call
def test_gradients_of_signs_still_to_be_changed(function, tensors):
    def gradients(changed, grad):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:2]]
        output = function(*[lazy(leaf) if changed else leaf for leaf in leaves], *tensors[2:])
        output.backward(grad)
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    grad = torch.randn_like(function(*tensors))
    expected = gradients(False, grad)
    torch.testing.assert_close(gradients(True, grad), expected)
    torch.testing.assert_close(gradients(False, lazy(grad)), expected)


@pytest.fixture
def unpoisoned(monkeypatch):
    """Default devices know PyTorch's own `torch.empty` alone."""
    monkeypatch.setattr(torch, "empty", torch.empty.__wrapped__)
    _device_constructors.cache_clear()
    yield
    _device_constructors.cache_clear()


@every_call
def test_defaults_of_the_user(function, tensors, unpoisoned):
    leaf = tensors[0].detach().requires_grad_()
    expected = function(leaf, *tensors[1:])
    expected.sum().backward()
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, "meta")):
        again = tensors[0].detach().requires_grad_()
        other = [tensors[1].clone(), *tensors[2:]] if len(tensors) > 1 else []  # not packed yet
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                actual = function(again, *other)
                actual.sum().backward()
                with torch.no_grad():
                    inferred = function(again, *other)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close([actual, again.grad, inferred], [expected, leaf.grad, expected])


def test_random_numbers_and_defaults_of_the_user(unpoisoned):
    position, expected = torch.arange(3), ops.normal(3, (5,), seed=1)
    uniforms = ops.philox.uniform(1, 0, position, 2)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            numbers = [ops.normal(3, (5,), seed=1), ops.philox.uniform(1, 0, position, 2)]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(numbers, [expected, uniforms], rtol=0, atol=0)


def test_imaginary_parts():
    x = torch.fft.fft2(torch.randn(2, 10, 4, 4)).conj().imag
    assert x.is_neg()
    weight = torch.randn(10, 10, 3, 3)
    for function in (masked, conv2d, ops.conv_transpose2d_bn_act):
        torch.testing.assert_close(function(x, weight), function(x.clone(), weight))


@every_call
def test_transforms(function, tensors):
    point, *rest = [tensor.double() for tensor in tensors]
    direction = torch.randn_like(point)
    output, vjp = torch.autograd.functional.vjp(
        lambda x: function(x, *rest), point, torch.ones_like(function(*tensors))
    )
    gradient = vjp.double()

    def summed(x):
        return function(x, *rest).sum()

    assert_close = torch.testing.assert_close
    assert_close(torch.func.grad(summed)(point), gradient)
    assert_close(torch.func.vmap(summed)(torch.stack([point, point])), output.sum().expand(2))
    assert_close(torch.func.vmap(torch.func.grad(summed))(torch.stack([point, point])), torch.stack([gradient] * 2))
    expected = (gradient * direction).sum()
    assert_close(torch.func.jvp(summed, (point,), (direction,))[1], expected)
    with forward_ad.dual_level():
        assert_close(forward_ad.unpack_dual(summed(forward_ad.make_dual(point, direction))).tangent, expected)


@every_call
def test_compiled_transforms(function, tensors):
    torch._dynamo.reset()  # all of these are one code object, which may be compiled a few times

    def summed(x):
        return function(x, *tensors[1:]).sum()

    compiled = torch.compile(torch.func.grad(summed), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tensors[0]), torch.func.grad(summed)(tensors[0]))


def test_second_derivatives_by_transforms():
    (params,) = CALLS["logistic_mixture_nll"][1]
    with fastgen.backend("reference"):
        expected = torch.autograd.functional.hessian(lambda x: likelihood(x).sum(), params)
    torch.testing.assert_close(torch.func.hessian(lambda x: likelihood(x).sum())(params), expected)


def test_transforms_of_images_still_check_the_levels():
    images = torch.arange(24, dtype=torch.uint8).reshape(2, 1, 1, 3, 4)
    params = torch.randn(2, 1, 6, 3, 4)

    def batched(levels):
        return torch.func.vmap(lambda p, x: ops.logistic_mixture_nll(p, x, levels=levels))(params, images)

    torch.testing.assert_close(batched(24)[:, 0], ops.logistic_mixture_nll(params[:, 0], images[:, 0], levels=24))
    with pytest.raises(ValueError, match=r"levels in 0\.\.22, got 23"):
        batched(23)


def test_transforms_of_a_model():
    model = models.PixelCNN(image_shape=(1, 5, 4), num_filters=4, num_blocks=1, levels=4)
    images = torch.randint(4, (3, 1, 5, 4), dtype=torch.uint8)
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return -torch.func.functional_call(model, parameters, (model.head.encode(image[None]),)).logsumexp(1).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        torch.testing.assert_close([gradient[i] for gradient in each.values()], list(expected))


def test_random_numbers_within_transforms():
    sample = torch.arange(5)

    def both(x, sample):
        numbers = ops.normal(2, (3,), seed=3, start=1) * x.sum()
        return numbers, ops.philox.uniform(7, 0, 0, sample)

    expected = both(torch.ones(2), sample)
    torch.testing.assert_close(torch.func.vmap(both)(torch.ones(1, 2), sample[None]), tuple(e[None] for e in expected))
    gradient = torch.func.grad(lambda x: both(x, sample)[0].sum())(torch.ones(2))
    torch.testing.assert_close(gradient, expected[0].sum().div(2).expand(2))
