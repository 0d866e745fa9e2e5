"""The suites: what they call useful work, counted by brute force, and that their quick cases run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bench import __main__ as command
from bench import (
    code_prior,
    concat_elu,
    conv2d_bn_act,
    conv_transpose2d_bn_act,
    crowded,
    decoder,
    encoder,
    gated_unit,
    generator,
    group_norm_act,
    logistic_mixture_nll,
    masked_conv2d,
    nearest_code,
    reparameterize,
    sampling,
    shifted_conv2d,
    stylegan2,
    training,
    upfirdn2d,
    vae,
    vqvae,
)
from bench.harness import gate, rows

SUITES = [
    code_prior,
    concat_elu,
    conv2d_bn_act,
    conv_transpose2d_bn_act,
    crowded,
    decoder,
    encoder,
    gated_unit,
    generator,
    group_norm_act,
    logistic_mixture_nll,
    masked_conv2d,
    nearest_code,
    reparameterize,
    sampling,
    shifted_conv2d,
    stylegan2,
    training,
    upfirdn2d,
    vae,
    vqvae,
]


def test_products_of_an_autoencoder_by_counting():
    model = vqvae.make({"image_shape": (1, 8, 8), "num_filters": 3, "latent_dim": 2, "num_codes": 7, "num_blocks": 1})
    block = 4 * (9 * 3 * 3 + 3 * 3)  # of four positions
    encoder = 16 * 16 * 1 * 3 + 4 * 16 * 3 * 3 + block + 4 * 3 * 2
    decoder = 4 * 9 * 2 * 3 + block + 4 * 16 * 3 * 3 + 16 * 16 * 3 * model.likelihood.channels
    twin = vqvae.plain(model, torch.contiguous_format)
    assert vqvae.count_products(twin, vqvae.images_for(model, 1)) == (encoder + 4 * 7 * 2, decoder)


def test_the_peer_of_an_autoencoder_is_the_same_network():
    model = vqvae.make({"image_shape": (1, 8, 8), "num_filters": 4, "latent_dim": 2})
    twin, images = vqvae.plain(model, torch.channels_last), vqvae.images_for(model, 5)
    codes = vqvae.encode(model, images)[:, 0].long()
    assert torch.equal(vqvae.encode(twin, images), codes)
    torch.testing.assert_close(vqvae.decode(twin, codes), vqvae.decode(model, codes))
    for network in (model, twin):
        vqvae.step(network, torch.optim.Adam(network.parameters(), lr=1e-3), images)
    for (name, mine), (_, its) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("side", "kernel", "left"), [(4, (2, 3), 1), (1, (3, 5), 2), (5, (2, 2), 1), (3, (1, 4), 0)])
def test_useful_flops_of_windows_by_counting(side, kernel, left):
    size = shifted_conv2d.Size(2, 3, 5, side, kernel, left)
    inside = sum(
        y - dy >= 0 and 0 <= x + dx - left < side
        for y in range(side)
        for x in range(side)
        for dy in range(kernel[0])
        for dx in range(kernel[1])
    )
    assert shifted_conv2d.useful_flops(size) == 2 * 2 * 3 * 5 * inside


@pytest.mark.parametrize(("height", "width", "kernel"), [(4, 5, 3), (1, 1, 3), (3, 2, 7), (6, 6, 1)])
def test_useful_flops_by_counting(height, width, kernel):
    """One multiply-add per output, open weight and input that exists."""
    mask = torch.rand(3, 2, kernel, kernel, generator=torch.Generator().manual_seed(0)) < 0.5
    products, half = 0, kernel // 2
    for y in range(height):
        for x in range(width):
            for ky in range(kernel):
                for kx in range(kernel):
                    if 0 <= y + ky - half < height and 0 <= x + kx - half < width:
                        products += int(mask[:, :, ky, kx].sum())
    assert masked_conv2d.useful_flops(mask, 5, height, width) == 2 * 5 * products


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(4, 2, 1), (3, 1, 1), (3, 2, 1), (4, 1, 0)])
def test_useful_flops_of_convolutions_by_counting(kernel, stride, padding):
    config = conv_transpose2d_bn_act.Config(kernel, stride, padding, transposed=False)
    layer = conv_transpose2d_bn_act.Layer(2, 3, 5, 7)
    out = torch.nn.Conv2d(1, 1, kernel, stride, padding)(torch.ones(1, 1, 7, 7)).shape[2]
    assert config.out_size(7) == out
    inside = sum(0 <= y * stride - padding + k < 7 for y in range(out) for k in range(kernel))
    assert conv_transpose2d_bn_act.useful_flops(config, layer) == 2 * 2 * 3 * 5 * inside**2


@pytest.mark.parametrize("suite", SUITES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("quick", [True, False])
def test_case_names_are_unique(suite, quick):
    names = [case.name for case in suite.cases(quick)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("suite", [suite.__name__.removeprefix("bench.") for suite in SUITES])
def test_quick_run(suite, tmp_path, monkeypatch, capsys):
    """The whole path but the tests of the operation, which run beside this one."""
    monkeypatch.setattr(gate, "run_tests", lambda paths, checkout: None)
    threads = torch.get_num_threads()
    try:
        assert command.main([suite, "--quick", "--threads", "1", "--results", str(tmp_path)]) == 0, (
            capsys.readouterr().err
        )
    finally:
        torch.set_num_threads(threads)
    found = rows.read(tmp_path / f"{suite}-quick.jsonl")
    assert "fastgen" in {row["provider"] for row in found}
    for row in found:
        rows.check(row)
        assert row["flops"] > 0
        assert (row["provider"] == "fastgen") <= bool(row["speedup"])


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_steps_of_a_code_prior_are_its_forward_pass(masked):
    """The loops that keep keys and values are given what they need, and no more."""
    torch.manual_seed(0)
    prior = code_prior.Prior(side=3, width=16, heads=2, layers=2, codes=5).eval()
    codes = torch.randint(5, (4, 3, 3))
    expected = prior(codes).flatten(2).softmax(1)
    caches = [(torch.zeros(4, 2, 9, 8), torch.zeros(4, 2, 9, 8)) for _ in prior.blocks]
    x = prior.start.weight.expand(4, 1, -1)
    for t in range(9):
        place = (torch.tensor([t]), torch.arange(9)[None] <= t) if masked else (t, None)
        odds = prior.step(x, prior.position[:, t : t + 1], caches, *place).softmax(1)
        torch.testing.assert_close(odds, expected[:, :, t])
        x = prior.embedding(codes.flatten(1)[:, t : t + 1])


def test_flops_of_generators():
    """DCGAN-64 has 0.181 GFLOP without padding; of other sizes, every pair of positions by brute force."""
    network = generator.make(generator.DCGAN)
    assert round(generator.flops(network, network.inputs(1)) / 1e9, 3) == 0.181
    network = generator.make(generator.DCGAN, 1, 2)
    total, sizes = 0, (2, 3)
    for part in network.blocks:
        conv, per_axis = part[0], []
        outs = [(size - 1) * conv.stride[0] - 2 * conv.padding[0] + 4 for size in sizes]
        for size, out in zip(sizes, outs, strict=True):
            at = [y * conv.stride[0] - conv.padding[0] + k for y in range(size) for k in range(4)]
            per_axis.append(sum(0 <= y < out for y in at))
        total += 2 * conv.in_channels * conv.out_channels * per_axis[0] * per_axis[1]
        sizes = outs
    assert generator.flops(network, network.inputs(1, 2, 3)) == total


def test_sizes_differ():
    assert len(set(generator.sizes_of(200))) == 200


def test_folded_networks_are_the_same():
    networks = [(kind, (2,)) for kind in generator.GENERATORS.values()]
    for kind, sizes in networks + [(kind, sizes) for kind, sizes, _ in encoder.NETWORKS.values()]:
        network = generator.make(kind, *sizes).double()
        inputs = [x.double() for x in network.inputs(2)]
        torch.testing.assert_close(generator.fold(network)(*inputs), network(*inputs))


class _CountsProducts(TorchFunctionMode):
    """Of convolutions by the definition: ones convolved with ones count the pairs of an input and an output."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (F.conv2d, F.conv_transpose2d) and args[1].shape[1] > 1:  # no filters
            x, weight = args[:2]
            groups = kwargs.pop("groups")
            with torch._C.DisableTorchFunction():
                pairs = function(
                    torch.ones(1, 1, *x.shape[2:]), torch.ones(1, 1, *weight.shape[2:]), *args[2:], **kwargs
                )
                samples = groups * (weight.shape[0] // groups) * weight.shape[1]
                self.products += samples * int(pairs.sum())
            kwargs["groups"] = groups
        return function(*args, **kwargs)


@torch.no_grad()
def test_products_of_stylegan2_by_counting():
    network = generator.make(stylegan2.StyleGAN2, 16, 4, 32)
    inputs, counts = network.inputs(3), _CountsProducts()
    with counts:
        image = network(*inputs)
    assert image.shape == (3, 3, 16, 16)
    assert network.flops(3) == 2 * counts.products


@torch.no_grad()
def test_stylegan2_with_one_weight_is_the_same():
    network = generator.make(stylegan2.StyleGAN2, 16, 4, 32).double()
    w = network.inputs(2)[0].double()
    for format in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(stylegan2.one_weight(network, format)(w), network(w))
