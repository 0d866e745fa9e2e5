"""GAN and DCGAN: shapes, published layers, labels, and images that depend on seed and index alone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import fastgen
from fastgen import Sampler, bits_per_dim, checkpoint, losses, models, ops
from fastgen.models.chunks import CHUNK
from fastgen.models.gan.base import with_labels
from fastgen.models.gan.gan import Maxout

SMALL = {
    "gan": ("gan", {"image_shape": (3, 5, 4), "num_filters": 13}),
    "gan-conditional": ("gan", {"image_shape": (1, 5, 4), "num_filters": 13, "num_classes": 3, "levels": 17}),
    "gan-autoencoder": ("gan", {"image_shape": (1, 5, 4), "num_filters": 13, "discriminator": "autoencoder"}),
    "dcgan": ("dcgan", {"image_shape": (3, 16, 16), "num_filters": 5}),
    "dcgan-conditional": ("dcgan", {"image_shape": (1, 32, 32), "num_filters": 3, "num_classes": 3}),
    "dcgan-layer": ("dcgan", {"image_shape": (3, 16, 16), "num_filters": 5, "norm": "layer", "levels": 2}),
    "dcgan-autoencoder": (
        "dcgan",
        {"image_shape": (1, 16, 16), "num_filters": 3, "discriminator": "autoencoder"},
    ),
}
KINDS = pytest.mark.parametrize("kind", SMALL)


def build(kind="dcgan", **options):
    """A small model whose BatchNorm has statistics of its own, and whose weights are large enough to make pictures."""
    torch.manual_seed(0)
    name, arguments = SMALL[kind]
    model = models.get(name)(**{"latent_dim": 7, **arguments, **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.ConvTranspose2d):
            module.weight.data.mul_(10)
    return model.eval()


def labels_of(model, n, start=0):
    return None if model.num_classes is None else torch.arange(start, start + n) % model.num_classes


@KINDS
def test_shapes_and_ranges(kind):
    model = build(kind)
    labels = labels_of(model, 4)
    x = model(model.latents(4), labels)
    assert x.shape == (4, *model.image_shape)
    assert x.abs().max() <= 1
    scores = model.discriminator(x, labels)
    assert scores.shape == (4,)
    images = model.sample(4, labels=labels)
    assert images.dtype == torch.uint8 and images.shape == x.shape
    assert int(images.max()) < model.levels
    assert (images.int() - model.decode(x).int()).abs().max() <= 1  # the batch was another
    assert len({tuple(image.flatten().tolist()) for image in images}) == 4


@KINDS
def test_an_image_depends_on_seed_and_index_alone(kind):
    model = build(kind)
    count = 2 * CHUNK + 3
    images = model.sample(count, seed=5, labels=labels_of(model, count))
    for n, start in ((1, 0), (1, 17), (3, 14), (CHUNK, 1), (19, CHUNK)):
        part = model.sample(n, seed=5, start=start, labels=labels_of(model, n, start))
        assert torch.equal(part, images[start : start + n]), (n, start)
    assert not torch.equal(model.sample(2, seed=6, labels=labels_of(model, 2)), images[:2])
    assert torch.equal(model.render(model.latents(count, seed=5), labels_of(model, count)), images)


def test_the_generator_sees_chunks_of_one_size_in_eval_mode():
    """What makes the promise hold for kernels that round differently for another batch."""
    model, seen = build().train(), []

    def look(module, inputs):
        seen.append((len(inputs[0]), module.training, torch.is_grad_enabled()))

    model.generator.register_forward_pre_hook(look)
    model.sample(3, start=CHUNK - 1)
    model.render(torch.zeros(CHUNK + 1, 7))
    assert seen == [(CHUNK, False, False)] * 4
    assert model.generator.training


def test_sample_i_has_one_place_in_its_chunk():
    model, seen = build(), []
    model.generator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.sample(3, seed=1, start=CHUNK - 1)
    latents = model.latents(CHUNK + 2, seed=1)
    assert torch.equal(torch.cat(seen)[: CHUNK + 2], latents)


def test_labels_change_images_and_scores():
    for kind in ("gan-conditional", "dcgan-conditional"):
        model = build(kind)
        images = [model.sample(2, labels=label) for label in range(3)]
        assert not torch.equal(images[0], images[1])
        assert torch.equal(model.sample(2, labels=torch.tensor([2, 0]))[0], images[2][0])
        x = model.encode(images[0])
        assert not torch.equal(*(model.discriminator(x, torch.full((2,), label)) for label in (0, 1)))


def test_one_hot_labels_beside_the_inputs():
    """Mirza & Osindero: the first layers of both networks read [input, one-hot]."""
    model = build("dcgan-conditional")
    assert model.generator.blocks[0][0].weight.shape[0] == 7 + 3
    assert model.discriminator.blocks[0][0].weight.shape[1] == 1 + 3
    z = torch.randn(2, 7)
    by_hand = model.generator.blocks(torch.cat((z, torch.eye(3)[[2, 0]]), 1)[:, :, None, None])
    assert torch.equal(model.generator(z, torch.tensor([2, 0])), by_hand)


def test_levels_round_trip_and_clamp():
    model = build("gan-conditional")  # 17 levels
    images = torch.randint(17, (4, 1, 5, 4), dtype=torch.uint8)
    x = model.encode(images)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(model.decode(x), images)
    assert model.decode(torch.tensor([-9.0, -1.0, 0.01, 1.0, 9.0])).tolist() == [0, 0, 8, 16, 16]


@pytest.mark.parametrize(("size", "widths"), [(16, [256, 128]), (32, [512, 256, 128]), (64, [1024, 512, 256, 128])])
def test_published_dcgan(size, widths):
    """Figure 1 and the guidelines of section 3."""
    with torch.device("meta"):
        model = models.DCGAN(image_shape=(3, size, size))
    up = [m for m in model.generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [m.in_channels for m in up] == [100, *widths]
    assert [m.out_channels for m in up] == [*widths, 3]
    assert {m.kernel_size for m in up} == {(4, 4)} and {m.stride for m in up[1:]} == {(2, 2)}
    kinds = [[type(m).__name__ for m in block] for block in model.generator.blocks]
    assert kinds == [["ConvTranspose2d", "BatchNorm2d", "ReLU"]] * len(widths) + [["ConvTranspose2d", "Tanh"]]
    kinds = [[type(m).__name__ for m in block] for block in list(model.discriminator.blocks)[:-1]]
    assert kinds == [["Conv2d", "LeakyReLU"]] + [["Conv2d", "BatchNorm2d", "LeakyReLU"]] * (len(widths) - 1)
    assert {m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}


def plain_blocks(model):
    """The generator's blocks as one writes them in PyTorch, with the same weights."""
    blocks = nn.Sequential(*(nn.Sequential(*copy.deepcopy(list(block))) for block in model.generator.blocks))
    blocks.load_state_dict(model.generator.blocks.state_dict())
    return blocks


@pytest.mark.parametrize("kind", ["dcgan", "dcgan-conditional"])
def test_the_generator_is_fused_and_equal_to_plain_modules(kind, monkeypatch):
    model, calls = build(kind), []
    fused = ops.conv_transpose2d_bn_act
    monkeypatch.setattr(ops, "conv_transpose2d_bn_act", lambda *args, **more: calls.append(1) or fused(*args, **more))
    plain = plain_blocks(model)
    assert plain.state_dict().keys() == model.generator.blocks.state_dict().keys()
    z, labels = model.latents(CHUNK, seed=3), labels_of(model, CHUNK)
    x = plain(with_labels(z, labels, model.num_classes)[:, :, None, None])
    images = model.sample(CHUNK, seed=3, labels=labels)
    assert len(calls) == len(plain)
    assert (images.int() - model.decode(x).int()).abs().max() <= 1
    model.generator.blocks.load_state_dict({name: 0.5 * t for name, t in plain.state_dict().items()})
    plain.load_state_dict(model.generator.blocks.state_dict())
    x = plain(with_labels(z, labels, model.num_classes)[:, :, None, None])
    torch.testing.assert_close(model(z, labels), x, rtol=1e-5, atol=1e-5)


def test_a_training_step_of_the_generator_is_that_of_plain_modules():
    model = build().double().train()
    plain = plain_blocks(model)
    z = model.latents(6).double()
    for x in (model(z), plain(z[:, :, None, None])):
        x.pow(3).sum().backward()
    for (name, ours), theirs in zip(model.generator.blocks.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for ours, theirs in zip(model.generator.blocks.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_images_of_dcgan_do_not_depend_on_threads():
    model, images = build(), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            images.append(model.sample(CHUNK + 1, seed=2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_gradient_penalty_through_fused_blocks():
    """Second derivatives of an autoencoder's error, and of the generator's images, are those of plain PyTorch."""
    results = []
    for backend in ("cpu", "reference"):
        with fastgen.backend(backend):
            model = build("dcgan-autoencoder").double().train()
            z = model.latents(4).double()
            torch.manual_seed(0)
            real = torch.rand(4, 1, 16, 16, dtype=torch.float64)
            losses.gradient_penalty(model.discriminator, real, model(z)).backward()
            results.append([p.grad for p in model.parameters()])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-9)


def test_dcgan_starts_from_narrow_normal_weights():
    model = models.DCGAN(image_shape=(3, 32, 32), num_filters=32)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.weight.numel() > 1000:
            assert abs(module.weight.mean()) < 0.003
            assert 0.018 < module.weight.std() < 0.022


def test_an_autoencoder_hands_its_signal_on():
    """At the start the code has about the size of the image, whatever the depth."""
    model = models.DCGAN(image_shape=(3, 64, 64), num_filters=8, discriminator="autoencoder", norm="none")
    code = model.discriminator.encoder(torch.randn(4, 3, 64, 64))
    assert 0.3 < code.std() < 3
    assert 0.1 < model.discriminator.decoder(torch.randn(4, 100, 1, 1)).std() < 1


def test_published_gan():
    with torch.device("meta"):
        model = models.GAN()
    sizes = [tuple(m.weight.shape) for m in model.generator.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(1200, 100), (1200, 1200), (784, 1200)]
    sizes = [tuple(m.linear.weight.shape) for m in model.discriminator.modules() if isinstance(m, Maxout)]
    assert sizes == [(240 * 5, 784), (240 * 5, 240)]


def test_maxout():
    layer = Maxout(3, 4)
    x = torch.randn(2, 3)
    pieces = (x @ layer.linear.weight.T + layer.linear.bias).reshape(2, 4, 5)
    torch.testing.assert_close(layer(x), pieces.max(dim=2).values)


@pytest.mark.parametrize("kind", ["gan-autoencoder", "dcgan-autoencoder"])
def test_an_autoencoder_scores_by_its_error(kind):
    model = build(kind)
    x = torch.rand(3, *model.image_shape) * 2 - 1
    reconstructed = model.discriminator.reconstruct(x)
    assert reconstructed.shape == x.shape
    expected = torch.stack([(a - b).abs().mean() for a, b in zip(x, reconstructed, strict=True)])
    torch.testing.assert_close(model.discriminator(x), expected)


def test_scores_of_an_image_do_not_depend_on_others_without_batch_norm():
    model = build("dcgan-layer").train()
    x = torch.rand(4, *model.image_shape)
    torch.testing.assert_close(model.discriminator(x)[:1], model.discriminator(x[:1]))


@KINDS
def test_checkpoints(kind, tmp_path):
    model = build(kind)
    checkpoint.save(model, tmp_path / "m.safetensors")
    loaded = checkpoint.load(tmp_path / "m.safetensors")
    assert type(loaded) is type(model) and loaded.config == model.config == json.loads(json.dumps(model.config))
    images = checkpoint.sample(tmp_path / "m.safetensors", 3, seed=2, start=1)
    assert torch.equal(images, model.sample(3, seed=2, start=1, labels=labels_of(model, 3, 1)))


@pytest.mark.parametrize("n", [0, 1])
def test_small_batches(n):
    for kind in ("gan", "dcgan-conditional"):
        model = build(kind)
        assert model.sample(n, labels=labels_of(model, n), start=3).shape == (n, *model.image_shape)
        assert model.render(torch.zeros(n, 7), labels_of(model, n)).shape == (n, *model.image_shape)


def test_double_precision():
    model = build().double()
    images = model.sample(3)
    assert model(model.latents(3).double()).dtype == torch.float64
    assert (images.int() - build().sample(3).int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda: build(image_shape=(3, 16)), r"image_shape: expected \(channels, height, width\), got \(3, 16\)"),
        (lambda: build(image_shape=(3, 24, 24)), "expected squares of 16, 32, 64, ... pixels a side, got 24x24"),
        (lambda: build(image_shape=(3, 8, 8)), "got 8x8"),
        (lambda: build(image_shape=(3, 16, 32)), "got 16x32"),
        (lambda: build(num_filters=0), "num_filters: expected an integer of at least 1, got 0"),
        (lambda: build(latent_dim=2.5), "latent_dim: expected an integer of at least 1, got 2.5"),
        (lambda: build(levels=257), r"levels: expected an integer in 2..256, got 257"),
        (lambda: build(num_classes=0), "num_classes: expected an integer of at least 1, got 0"),
        (lambda: build(norm="instance"), "norm: expected one of batch, layer, none, got 'instance'"),
        (lambda: build(discriminator="u-net"), "discriminator: expected one of score, autoencoder, got 'u-net'"),
        (lambda: build("gan-autoencoder", num_classes=2), "num_classes: expected None with an autoencoder"),
        (lambda: build("gan", dropout=1), "dropout: expected a number of at least 0 and below 1, got 1"),
        (lambda: build().sample(-1), r"n must be in 0"),
        (lambda: build().sample(1, seed=-1), r"seed must be in 0"),
        (lambda: build().sample(1, labels=0), "labels were given, but the model has no classes"),
        (lambda: build("dcgan-conditional").sample(1), "the model is conditional"),
        (lambda: build("dcgan-conditional").sample(2, labels=3), r"labels must be in 0..2, got 3"),
        (lambda: build("dcgan-conditional")(torch.zeros(2, 7)), "labels: expected class labels with num_classes=3"),
        (lambda: build().render(torch.zeros(2, 8)), r"z: expected shape \[N, 7\], got \[2, 8\]"),
        (lambda: build().encode(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), "images: expected shape"),
        (lambda: build("dcgan-layer").encode(torch.full((1, 3, 16, 16), 2).byte()), "levels in 0..1, got 2..2"),
    ],
    ids=range(21),
)
def test_bad_values(act, text):
    with pytest.raises(ValueError, match=text):
        act()


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda: build().sample(1.5), "n must be an integer, got float"),
        (lambda: build().sample(1, start="0"), "start must be an integer, got str"),
        (lambda: build().render(torch.zeros(2, 7).long()), "z: expected a floating point tensor, got torch.int64"),
        (lambda: build().encode(torch.zeros(2, 3, 16, 16)), "images: expected a tensor of uint8 levels"),
        (lambda: Sampler(build()), "head must be"),
        (lambda: bits_per_dim(build(), torch.zeros(1, 3, 16, 16).byte()), "one with a likelihood .*, got DCGAN"),
    ],
    ids=range(6),
)
def test_bad_types(act, text):
    with pytest.raises(TypeError, match=text):
        act()


def test_weights_that_are_not_finite_are_noticed():
    model = build()
    model.generator.blocks[0][0].weight.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="hold NaN or infinity"):
        model.sample(1)
