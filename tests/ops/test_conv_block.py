"""What lies between a call and its kernel, for every operation: tensors whose sign is still to be changed."""

from __future__ import annotations

import pytest
import torch

from fastgen import ops
from fastgen.ops.conv_sequence import conv_transpose2d_bn_act_sequence
from fastgen.ops.conv_transpose2d_bn_act_cpu import Options

PLAIN = Options((1, 1), (0, 0), (0, 0), 1, (1, 1), False, 1e-5, "elu", 0.7)


def norm(channels):
    return (torch.randn(channels), torch.randn(channels), torch.rand(channels) + 0.5, *torch.randn(2, channels))


def conv2d(*tensors):
    return ops.conv2d_bn_act(*tensors, padding=1, activation="leaky_relu")


def sequence(x, *tensors):
    return conv_transpose2d_bn_act_sequence(x, tensors, (PLAIN, PLAIN))


def masked(*tensors):
    return ops.masked_conv2d(*tensors, mask_type="B")


def likelihood(params):
    return ops.logistic_mixture_nll(params, torch.arange(24, dtype=torch.uint8).reshape(2, 1, 3, 4), levels=30)


def latents(mu, logvar):
    return torch.cat([result.flatten() for result in ops.reparameterize(mu, logvar, seed=1, num_samples=2)])


def calls():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, small, kernel = torch.randn(2, 10, 3, 4), torch.randn(2, 4, 3, 4), torch.randn(10, 10, 3, 3)
        return {
            "masked_conv2d": (masked, (x, kernel, torch.randn(10))),
            "conv2d_bn_act": (conv2d, (x, kernel, *norm(10))),
            "conv2d_bn_act, folded": (conv2d, (small, torch.randn(10, 4, 3, 3), *norm(10))),
            "conv_transpose2d_bn_act": (ops.conv_transpose2d_bn_act, (x, kernel, *norm(10))),
            "sequence": (sequence, (x, kernel, *norm(10), kernel.flip(0), *norm(10))),
            "logistic_mixture_nll": (likelihood, (torch.randn(2, 6, 3, 4),)),
            "reparameterize": (latents, (torch.randn(5, 3), torch.randn(5, 3))),
        }


CALLS = calls()


def lazy(tensor):
    """The same values: the memory holds them with the other sign."""
    result = torch._neg_view(-tensor)
    assert result.is_neg() and torch.equal(result, tensor)
    return result


@pytest.mark.parametrize(("function", "tensors"), CALLS.values(), ids=CALLS.keys())
def test_signs_still_to_be_changed(function, tensors):
    expected = function(*tensors)
    for i in range(len(tensors)):
        given = [lazy(tensor) if i == j else tensor for j, tensor in enumerate(tensors)]
        torch.testing.assert_close(function(*given), expected)


@pytest.mark.parametrize(("function", "tensors"), CALLS.values(), ids=CALLS.keys())
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


def test_imaginary_parts():
    x = torch.fft.fft2(torch.randn(2, 10, 4, 4)).conj().imag
    assert x.is_neg()
    weight = torch.randn(10, 10, 3, 3)
    for function in (masked, conv2d, ops.conv_transpose2d_bn_act):
        torch.testing.assert_close(function(x, weight), function(x.clone(), weight))
