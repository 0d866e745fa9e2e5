"""What only a GPU shows of the Triton kernels: graphs, streams, compiled code, and that tiles change no bit."""

from __future__ import annotations

import pytest
import torch

from fastgen import ops

pytestmark = pytest.mark.gpu


def masked(dtype: torch.dtype = torch.float32):
    x = torch.randn(3, 64, 9, 7, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(96, 64, 3, 3, device="cuda", dtype=dtype)
    return lambda: ops.masked_conv2d(x, weight, mask_type="B")


def block():
    x, weight = torch.randn(5, 32, 6, 7, device="cuda"), torch.randn(32, 48, 4, 4, device="cuda")
    norm = [torch.rand(48, device="cuda") + 0.5 for _ in range(4)]
    return lambda: ops.conv_transpose2d_bn_act(x, weight, None, *norm, stride=2, padding=1, activation="relu")


def latents():
    mu, logvar = torch.randn(2, 33, 70, device="cuda")
    return lambda: torch.cat([result.flatten() for result in ops.reparameterize(mu, logvar, seed=3)])


def nll():
    params, images = torch.randn(2, 100, 5, 7, device="cuda"), torch.randint(256, (2, 3, 5, 7), device="cuda").byte()
    return lambda: ops.logistic_mixture_nll(params, images)


def codes():
    x, codebook = torch.randn(3, 32, 6, 7, device="cuda"), torch.randn(70, 32, device="cuda")
    return lambda: ops.nearest_code(x, codebook)


def elu():
    x = torch.randn(2, 32, 5, 7, device="cuda", requires_grad=True)
    return lambda: torch.autograd.grad(ops.concat_elu(x, dropout=0.5, seed=3).square().sum(), x)[0]


def gate():
    x, residual = torch.randn(2, 64, 5, 7, device="cuda", requires_grad=True), torch.randn(2, 32, 5, 7, device="cuda")
    return lambda: torch.autograd.grad(ops.gated_unit(x, residual).square().sum(), x)[0]


OPERATORS = [masked, block, latents, nll, codes]


@pytest.mark.parametrize("make", [*OPERATORS, elu, gate])
def test_in_a_graph_on_another_stream(make):
    """No synchronisation and no launch on another stream: capturing would fail, replaying would give poison."""
    call = make()
    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(call(), expected)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, expected)


def test_a_graph_draws_anew_at_each_replay():
    x = torch.ones(1, 64, 4, 4, device="cuda")
    ops.concat_elu(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.concat_elu(x, dropout=0.5)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(y, first)


@pytest.mark.parametrize("make", OPERATORS)  # what the others are compiled to is PyTorch's
def test_compiled(make):
    call = make()
    assert torch.equal(torch.compile(call, fullgraph=True)(), call())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tile_gives_the_same_bits(dtype, monkeypatch):
    """Each compiled and launched, whatever was chosen and compiled before."""
    from fastgen.kernels import tap_gemm

    call, tuner = masked(dtype), tap_gemm._tap_gemm
    half = [*(tap_gemm._WIDE if tap_gemm.architecture() == 90 else []), *tap_gemm._HALF]  # as in `_configs`
    results = []
    for config in tap_gemm._FULL if dtype == torch.float32 else half:
        monkeypatch.setattr(tuner, "configs", lambda *_, config=config, **__: [config])
        monkeypatch.setattr(tuner, "chosen", {})
        monkeypatch.setattr(tuner, "compiled", {})
        results.append(call())
        assert list(tuner.chosen.values()) == [config.all_kwargs()]
    assert all(torch.equal(result, results[0]) for result in results)
