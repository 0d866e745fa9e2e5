"""The autoencoder with discrete latents and priors over its codes, against enumeration of all codes and of all maps."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import fastgen
from fastgen import models
from fastgen.metrics import two_stages_bits_per_dim
from fastgen.models.chunks import CHUNK
from fastgen.sampling import naive_sample
from fastgen.sampling.precision import weights_in

SMALL = {"image_shape": (1, 8, 8), "levels": 5, "num_codes": 3, "latent_dim": 4, "num_filters": 8, "num_blocks": 1}
KINDS = {
    "plain": {},
    "colours": {"image_shape": (3, 8, 16), "likelihood": "gaussian", "num_codes": 300},
    "gradients": {"decay": None, "downsampling": 8, "likelihood": "categorical"},
    "one halving": {"image_shape": (1, 4, 6), "downsampling": 2, "num_blocks": 2, "likelihood": "bernoulli"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind="plain", **options):
    torch.manual_seed(0)
    model = models.VQVAE(**{**SMALL, **KINDS[kind], **options})
    model.initialize(images_for(model, 12))
    return model.eval()


def images_for(model, n=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.levels, (n, *model.image_shape), generator=generator, dtype=torch.uint8)


def prior_for(model, name="gated_pixelcnn", **options):
    torch.manual_seed(0)
    small = {"num_filters": 6, "num_blocks": 2, "embedding_dim": 4, "head": "categorical"}
    if name == "pixelsnail":
        small |= {"num_layers": 1, "key_dim": 2, "value_dim": 4}
    elif name == "image_gpt":
        small["num_heads"] = 2
    prior = models.get(name)(image_shape=(1, *model.code_shape), levels=model.num_codes, **small | options)
    for parameter in prior.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return prior.eval()


@kinds
def test_shapes_and_gradients(kind):
    model = build(kind).train()
    images = images_for(model)
    nats, codes, loss = model.terms(images)
    (loss - nats.mean()).backward()
    assert nats.shape == (6,) and loss.shape == () and codes.shape == (6, *model.code_shape)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    model.eval()
    codes = model.encode(images)
    assert codes.shape == (6, 1, *model.code_shape) and int(codes.max()) < model.num_codes
    assert codes.dtype == model.code_dtype == (torch.int64 if kind == "colours" else torch.uint8)
    assert model.decode(codes).shape == (6, model.likelihood.channels, *model.image_shape[1:])
    reconstructed = model.reconstruct(images)
    assert reconstructed.shape == images.shape and reconstructed.dtype == torch.uint8
    assert torch.equal(reconstructed, model.render(codes))


def test_terms_by_hand():
    model = build()
    images = images_for(model)
    x = images.float() / 2 - 1
    first, second = model.encoder.down
    x = F.conv2d(F.relu(F.conv2d(x, first.weight, first.bias, 2, 1)), second.weight, second.bias, 2, 1)
    block, last = model.encoder.blocks[0], model.encoder.last
    inner = F.relu(F.conv2d(F.relu(x), block.conv.weight, block.conv.bias, padding=1))
    x = F.conv2d(F.relu(x + F.conv2d(inner, block.point.weight, block.point.bias)), last.weight, last.bias)
    distances = (x.movedim(1, -1)[..., None, :] - model.quantizer.codebook).square().sum(-1)
    codes = distances.argmin(-1)
    assert torch.equal(model.encode(images)[:, 0].long(), codes)
    chosen = model.quantizer.codebook[codes].movedim(-1, 1)
    terms = model.terms(images)
    torch.testing.assert_close(terms.log_likelihood, -model.likelihood.nll(model.decoder(chosen), images))
    torch.testing.assert_close(terms.loss, 0.25 * (x - chosen).square().mean())
    torch.testing.assert_close(model.log_likelihood(images), terms.log_likelihood)
    torch.testing.assert_close(model.log_likelihood(images, codes[:, None]), terms.log_likelihood)
    torch.testing.assert_close(model.log_prob(images), terms.log_likelihood - 4 * math.log(3))


def test_the_bound_is_one_by_enumeration_of_all_codes():
    model = build()
    images = images_for(model)
    prior = prior_for(model)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)), dtype=torch.uint8).view(-1, 1, 2, 2)
    with torch.no_grad():
        params = model.decode(every)
        nats = torch.stack([-model.likelihood.nll(params, image.expand(81, -1, -1, -1)) for image in images])
        uniform = torch.logsumexp(nats - 4 * math.log(3), 1)
        weighted = torch.logsumexp(nats + prior.log_prob(every), 1)
        assert (model.log_prob(images) <= uniform).all()
        codes = model.encode(images)
        assert (model.log_likelihood(images) + prior.log_prob(codes) <= weighted).all()
        own = (nats - 4 * math.log(3))[range(6), (every == codes[:, None]).flatten(2).all(2).nonzero()[:, 1]]
        torch.testing.assert_close(model.log_prob(images), own)


def test_perplexity_counts_codes_in_use():
    model = build()
    images = images_for(model, 40)
    share = torch.bincount(model.encode(images).flatten().long(), minlength=3).double() / 160
    expected = math.exp(-sum(float(p) * math.log(p) for p in share if p > 0))
    assert model.perplexity(images) == pytest.approx(expected)
    model.quantizer.codebook[1:] = 1e6
    assert model.perplexity(images) == pytest.approx(1.0)


@kinds
def test_an_image_depends_on_its_codes_alone(kind):
    model = build(kind)
    codes = torch.randint(model.num_codes, (CHUNK + 5, 1, *model.code_shape))
    every = model.render(codes)
    for part in (slice(0, 1), slice(CHUNK - 2, CHUNK + 2), slice(3, 3)):
        assert torch.equal(model.render(codes[part].int()), every[part])
    assert torch.equal(model.render(codes.flip(0)), every.flip(0))


@kinds
def test_checkpoints_give_the_same_model(kind, tmp_path):
    model = build(kind)
    fastgen.save(model, tmp_path / "m.safetensors")
    loaded = fastgen.load(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    assert torch.equal(loaded.log_prob(images_for(model)), model.log_prob(images_for(model)))


@pytest.mark.parametrize("name", ["gated_pixelcnn", "pixelsnail", "image_gpt"])
@pytest.mark.parametrize("options", [{}, {"num_classes": 2}], ids=["", "classes"])
def test_a_prior_is_a_distribution_over_codes_and_is_drawn_from(name, options, tmp_path):
    model = build()
    prior = prior_for(model, name, **options)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)), dtype=torch.uint8).view(-1, 1, 2, 2)
    labels = {"labels": torch.ones(81, dtype=torch.int64)} if options else {}
    with torch.no_grad():
        nats = prior.log_prob(every, **labels)
    assert float(nats.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(nats.std()) > 0.01
    given = {"labels": torch.arange(9) % 2} if options else {}
    codes = fastgen.Sampler(prior).sample(9, seed=4, **given)
    assert torch.equal(codes, naive_sample(prior, 9, seed=4, **given))
    assert fastgen.audit(prior, codes, seed=4, **given).ok
    assert torch.equal(fastgen.sample(prior, 9, seed=4, vqvae=model), model.render(codes))
    fastgen.save(model, tmp_path / "m.safetensors")
    fastgen.save(prior, tmp_path / "p.safetensors")
    again = fastgen.sample(tmp_path / "p.safetensors", 9, seed=4, vqvae=tmp_path / "m.safetensors")
    assert torch.equal(again, model.render(codes))


def test_a_prior_of_more_codes_than_a_byte_holds():
    model = build("colours")
    prior = prior_for(model)
    codes = model.encode(images_for(model))
    assert prior.log_prob(codes).shape == (6,)
    drawn = fastgen.Sampler(prior).sample(5, seed=1)
    assert drawn.dtype == torch.int64 and torch.equal(drawn, naive_sample(prior, 5, seed=1))
    with pytest.raises(ValueError, match=r"images: expected levels in 0..299, got -1..299"):
        prior.log_prob(torch.tensor([-1, 299] * 4).view(1, 1, 2, 4))
    with pytest.raises(TypeError, match=r"images: expected a tensor of int64 levels, got torch\.uint8"):
        prior.log_prob(codes.byte())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_codes": 1}, r"num_codes: expected an integer in 2..65536, got 1"),
        ({"num_codes": 65537}, r"num_codes: expected an integer in 2..65536, got 65537"),
        ({"downsampling": 3}, "downsampling: expected a power of two of at least 2, got 3"),
        ({"downsampling": 1}, "downsampling: expected a power of two of at least 2, got 1"),
        ({"image_shape": (1, 8, 10)}, "image_shape: expected multiples of downsampling=4, got 8x10"),
        ({"image_shape": (2, 8, 8)}, "image_shape: expected 1 or 3 channels, got 2"),
        ({"likelihood": "laplace"}, "likelihood: expected one of bernoulli"),
        ({"latent_dim": 0}, "latent_dim: expected an integer of at least 1, got 0"),
        ({"decay": 2}, "decay: expected a finite number"),
    ],
    ids=str,
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        models.VQVAE(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"image_shape": (3, 2, 2)}, r"image_shape: expected one channel with embedding_dim=4, got \(3, 2, 2\)"),
        ({"levels": 65537}, r"levels: expected an integer in 2..65536, got 65537"),
        ({"embedding_dim": 0}, "embedding_dim: expected an integer of at least 1, got 0"),
        ({"head": "bernoulli"}, "head: expected \"categorical\" with embedding_dim, got 'bernoulli'"),
    ],
    ids=str,
)
def test_bad_options_of_priors(options, text):
    with pytest.raises(ValueError, match=text):
        models.GatedPixelCNN(**{"image_shape": (1, 2, 2), "levels": 3, "embedding_dim": 4, **options})


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: m.log_prob(images_for(m).float()), TypeError, "images: expected a tensor of uint8 levels"),
        (lambda m: m.encode(images_for(m)[:, :, :4]), ValueError, r"images: expected shape \[N, 1, 8, 8\]"),
        (lambda m: m.render(torch.zeros(2, 1, 2, 2)), TypeError, "codes: expected a tensor of uint8, int32 or int64"),
        (lambda m: m.render([0]), TypeError, "codes: expected a tensor of uint8, int32 or int64, got list"),
        (lambda m: m.render(torch.zeros(2, 2, 2).long()), ValueError, r"codes: expected shape \[N, 1, 2, 2\]"),
        (lambda m: m.decode(torch.full((2, 1, 2, 2), 3)), ValueError, r"codes: expected levels in 0..2, got 3..3"),
        (lambda m: m.perplexity(images_for(m)[:0]), ValueError, "images: a perplexity needs at least one"),
        (lambda m: m.log_prob(images_for(m), torch.zeros(6)), ValueError, "labels: expected None"),
        (lambda m: m.reconstruct(images_for(m), torch.zeros(6)), ValueError, "labels: expected None"),
        (lambda m: fastgen.sample(m, 2), ValueError, "model: codes of a vqvae are drawn by a prior over them"),
        (lambda m: fastgen.sample(prior_for(m), 2, vqvae=prior_for(m)), ValueError, "vqvae: expected a models.VQVAE"),
        (
            lambda m: fastgen.sample(prior_for(build("colours")), 2, vqvae=m),
            ValueError,
            r"model: expected a prior over the 3 codes of the vqvae, \[2, 2\] an image, got a GatedPixelCNN of 300",
        ),
        (
            lambda m: fastgen.sample(models.PixelCNN(image_shape=(3, 2, 2), levels=3, num_filters=6), 2, vqvae=m),
            ValueError,
            r"\[2, 2\] an image, got a PixelCNN of 3 levels and image_shape \(3, 2, 2\)",
        ),
        (lambda m: fastgen.Sampler(m), TypeError, "head must be"),
    ],
    ids=range(14),
)
def test_bad_calls(call, error, text):
    with pytest.raises(error, match=text):
        call(build())


def test_weights_that_are_not_finite():
    model = build()
    torch.nn.init.constant_(model.decoder.first.bias, math.nan)
    with pytest.raises(RuntimeError, match="the decoded images hold NaN or infinity"):
        model.render(torch.zeros(2, 1, 2, 2, dtype=torch.uint8))
    model = build()
    torch.nn.init.constant_(model.encoder.last.bias, math.nan)
    for call in (model.encode, model.log_prob, model.perplexity, model.reconstruct):
        with pytest.raises(RuntimeError, match="the encoder's features hold NaN or infinity"):
            call(images_for(model))


def test_the_bound_of_two_stages_is_of_the_same_codes_in_every_precision():
    model, labels = build("plain", num_filters=24), torch.arange(64) % 2
    prior = prior_for(model, num_classes=2)
    images = images_for(model, 64)
    both, of_codes = two_stages_bits_per_dim(model, prior, images, labels)
    codes = model.encode(images)
    with torch.no_grad():
        nats = prior.log_prob(codes, labels)
        expected = model.log_likelihood(images) + nats
    assert both == pytest.approx(-float(expected.mean()) / (64 * math.log(2)), abs=1e-5)
    assert of_codes == pytest.approx(-float(nats.mean()) / (64 * math.log(2)), abs=1e-5)
    both, of_codes = two_stages_bits_per_dim(model, prior, images, labels, precision="bf16")
    with torch.no_grad(), weights_in("bf16"):
        rounded = model.encode(images)
        assert not torch.equal(rounded, codes)
        expected = model.log_likelihood(images, rounded) + prior.log_prob(rounded, labels)
    assert both == pytest.approx(-float(expected.mean()) / (64 * math.log(2)), abs=1e-5)


def test_codes_of_another_model_are_not_rendered(tmp_path):
    model = build()
    other = build(num_filters=9)
    assert model.fingerprint() == copy.deepcopy(model).fingerprint() != other.fingerprint()
    prior = prior_for(model)
    prior.codes_of = model.fingerprint()
    fastgen.save(prior, tmp_path / "p.safetensors")
    assert fastgen.load(tmp_path / "p.safetensors").codes_of == model.fingerprint()
    fastgen.sample(tmp_path / "p.safetensors", 1, vqvae=model)
    with pytest.raises(ValueError, match=f"model: a prior over the codes of another vqvae, .*{model.fingerprint()}"):
        fastgen.sample(tmp_path / "p.safetensors", 1, vqvae=other)
