"""Variational autoencoders: bounds against quadrature and closed forms, images as a function of seed and index."""

from __future__ import annotations

import math

import pytest
import torch

import fastgen
from fastgen import losses, models, ops
from fastgen.models.chunks import CHUNK
from fastgen.models.vae import likelihoods

SMALL = {"image_shape": (1, 8, 8), "levels": 5, "num_filters": 8, "latent_dim": 3}
KINDS = {
    "perceptron": ("vae", {}),
    "two layers": ("vae", {"num_blocks": 2, "likelihood": "bernoulli"}),
    "convolutional": ("vae", {"architecture": "convolutional"}),
    "odd": ("vae", {"image_shape": (3, 12, 20), "architecture": "convolutional", "likelihood": "gaussian"}),
    "labels": ("conditional_vae", {"num_classes": 4}),
    "labels, convolutional": ("conditional_vae", {"num_classes": 4, "architecture": "convolutional"}),
    "grey": ("conditional_vae", {"image_shape": (3, 8, 8), "condition": "grey"}),
    "half": ("conditional_vae", {"condition": "left", "architecture": "convolutional", "num_classes": 2}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind="perceptron", **options):
    name, own = KINDS[kind]
    torch.manual_seed(0)
    model = models.get(name)(**{**SMALL, **own, **options})
    torch.nn.init.normal_(model.to_latent.bias, std=0.3)
    return model.eval()


def images_for(model, n=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.levels, (n, *model.image_shape), generator=generator, dtype=torch.uint8)


def labels_for(model, n=6):
    return None if model.num_classes is None else torch.arange(n) % model.num_classes


def conditions(model, n=6):
    given = {} if model.num_classes is None else {"labels": labels_for(model, n)}
    return given if model.condition is None else {**given, "condition": images_for(model, n)}


@kinds
def test_shapes_and_gradients(kind):
    model = build(kind).train()
    images, labels = images_for(model), labels_for(model)
    bound = model.elbo(images, labels, num_samples=2)
    assert bound.shape == (6,) and torch.isfinite(bound).all()
    bound.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    mu, logvar = model.encode(images, labels)
    assert mu.shape == logvar.shape == (6, 3)
    assert model.decode(mu, **conditions(model)).shape == (6, model.likelihood.channels, *model.image_shape[1:])
    reconstructed = model.reconstruct(images, labels)
    assert reconstructed.shape == images.shape and reconstructed.dtype == torch.uint8
    assert model.training


@kinds
def test_a_sample_depends_on_seed_index_and_conditions_alone(kind):
    model, n = build(kind), CHUNK + 5
    given = conditions(model, n)
    every = model.sample(n, seed=3, **given)
    assert int(every.max()) < model.levels
    for start, count in ((0, 1), (n - 1, 1), (CHUNK - 2, 4), (5, 0)):
        part = {name: value[start : start + count] for name, value in given.items()}
        assert torch.equal(model.sample(count, seed=3, start=start, **part), every[start : start + count])
    assert torch.equal(model.render(model.latents(n, seed=3), **given), every)
    assert not torch.equal(model.sample(n, seed=4, **given), every)


@kinds
def test_checkpoints_give_the_same_model(kind, tmp_path):
    model = build(kind)
    fastgen.save(model, tmp_path / "m.safetensors")
    loaded = fastgen.load(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    given = images_for(model), labels_for(model)
    assert torch.equal(loaded.elbo(*given, seed=1), model.elbo(*given, seed=1))
    assert not torch.equal(model.elbo(*given), model.elbo(*given))  # the noise of a training


def test_elbo_by_hand():
    model = build()
    images = images_for(model)
    mu, logvar = model.encode(images)
    z, kl = ops.reparameterize(mu, logvar, seed=5, start=7, num_samples=3)
    nll = torch.stack([losses.discretized_logistic_nll(model.decode(one), images, levels=5) for one in z])
    torch.testing.assert_close(model.elbo(images, num_samples=3, seed=5, start=7), -nll.mean(0) - kl)
    torch.testing.assert_close(model.elbo(images, num_samples=3, seed=5, start=7, beta=4.0), -nll.mean(0) - 4 * kl)


@pytest.fixture(scope="module")
def one_dimensional():
    """A model of one latent, and log p(x) by quadrature."""
    model = build(latent_dim=1).double()
    torch.nn.init.normal_(model.decoder.layers[0][0].weight, std=2.0)
    images = images_for(model)
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    prior = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    with torch.no_grad():
        params = model.decode(z[:, None])
        rows = [-model.likelihood.nll(params, image.expand(len(z), -1, -1, -1)) for image in images]
    exact = torch.stack([torch.logsumexp(row + prior, 0) for row in rows]) + math.log(float(z[1] - z[0]))
    return model, images, exact


def test_importance_weighted_bound_rises_to_the_likelihood(one_dimensional):
    model, images, exact = one_dimensional
    elbo = torch.stack([model.elbo(images, seed=s) for s in range(150)]).detach()
    error = elbo.std(0) / math.sqrt(len(elbo))
    bounds = [elbo.mean(0)]
    for count, repeats in ((1, 150), (8, 60), (64, 20), (4000, 2)):
        bounds.append(torch.stack([model.log_prob(images, num_samples=count, seed=s) for s in range(repeats)]).mean(0))
    torch.testing.assert_close(bounds[1], bounds[0], rtol=0, atol=8 * float(error.max()))  # one sample: the ELBO
    assert all((later > earlier - 4 * error).all() for earlier, later in zip(bounds, bounds[1:], strict=False))
    assert bounds[-1].mean() > bounds[0].mean() + 3 * error.mean()
    torch.testing.assert_close(bounds[-1], exact, rtol=0, atol=0.05)
    assert (bounds[0] < exact).all()


def test_importance_weighted_bound_does_not_depend_on_chunks_or_batches(monkeypatch):
    model = build()
    images = images_for(model)
    whole = model.log_prob(images, num_samples=37, seed=2, start=3)
    parts = [model.log_prob(images[i : i + 2], num_samples=37, seed=2, start=3 + i) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole)
    monkeypatch.setattr("fastgen.models.vae.vae.MAX_DECODED", 12)
    torch.testing.assert_close(model.log_prob(images, num_samples=37, seed=2, start=3), whole)
    for batch_size in (64, 4):
        torch.testing.assert_close(
            torch.tensor(fastgen.bits_per_dim(model, images, batch_size=batch_size)),
            -model.log_prob(images).mean() / (64 * math.log(2)),
        )


def test_nan_is_no_likelihood():
    model = build()
    torch.nn.init.constant_(model.to_latent.bias, math.nan)
    with pytest.raises(RuntimeError, match="the likelihood of an image is NaN"):
        fastgen.bits_per_dim(model, images_for(model))


def test_divergence_by_dimension_and_active_units():
    model = build()
    images = images_for(model, 50)
    _, kl = model.elbo_terms(images)
    torch.testing.assert_close(model.kl_per_dimension(images).sum(), kl.mean())
    with torch.no_grad():
        model.to_latent.weight[1] = 0.0  # the mean of latent 1 is the same for all images
        model.to_latent.weight[0] *= 10
    active = model.active_units(images)
    assert active[0] and not active[1]
    with pytest.raises(ValueError, match="needs at least 2, got 1"):
        model.active_units(images[:1])


def test_half_of_the_image_that_is_not_given_is_not_seen():
    model = build("half")
    images, labels = images_for(model), labels_for(model)
    other = images.clone()
    other[:, :, ~model.given_pixels()] = 0
    z = torch.randn(6, 3)
    assert torch.equal(model.decode(z, labels, images), model.decode(z, labels, other))
    other[:, :, 0, 0] = (other[:, :, 0, 0] + 1) % 5
    assert not torch.equal(model.decode(z, labels, images), model.decode(z, labels, other))


def test_grey_is_the_mean_of_the_colours():
    model = build("grey")
    images, z = images_for(model), torch.randn(6, 3)
    assert torch.equal(model.decode(z, condition=images), model.decode(z, condition=images.flip(1)))


def test_accelerated_decoder():
    model = build("convolutional")
    fast = fastgen.accelerate(model)
    z = torch.randn(4, 3)
    torch.testing.assert_close(fast.decode(z), model.decode(z), rtol=1e-4, atol=1e-5)


# Likelihoods


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["bernoulli", "logistic", "categorical"])
def test_probabilities_of_all_images_of_one_element_add_up(name, channels):
    levels = 2 if name == "bernoulli" else 4
    kind = likelihoods.make(name, channels, levels, None)
    torch.manual_seed(0)
    params = torch.randn(1, kind.channels, 1, 1, dtype=torch.float64)
    every = torch.cartesian_prod(*[torch.arange(levels)] * channels).reshape(-1, channels, 1, 1).to(torch.uint8)
    probs = torch.exp(-kind.nll(params.expand(len(every), -1, -1, -1), every))
    assert probs.sum().item() == pytest.approx(1)
    mean = kind.mean(params)
    assert mean.shape == (1, channels, 1, 1)
    if name != "logistic":  # its mean is that of the distribution before it is cut into levels
        expected = (probs[:, None, None, None] * every).sum(0) / (levels - 1)
        torch.testing.assert_close(mean[0], expected)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_gaussian_against_torch_distributions(scale):
    kind = likelihoods.make("gaussian", 3, 9, scale)
    params = torch.randn(5, kind.channels, 4, 2, dtype=torch.float64)
    images = torch.randint(9, (5, 3, 4, 2), dtype=torch.uint8)
    deviation = scale or torch.exp(params[:, 3:].clamp(min=-math.log(16)))
    normal = torch.distributions.Normal(params[:, :3], deviation)
    torch.testing.assert_close(kind.nll(params, images), -normal.log_prob(images / 8).flatten(1).sum(1))
    assert torch.equal(kind.mean(params), params[:, :3])


def test_bernoulli_stays_finite():
    logits = torch.tensor([[1e4, -1e4, 50.0]], requires_grad=True)
    value = losses.bernoulli_nll(logits, torch.tensor([[0.0, 1.0, 0.5]]))
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(logits.grad).all()


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": (2, 8, 8)}, "image_shape: expected"),
        ({"image_shape": (1, 9, 8), "architecture": "convolutional"}, "even sizes of at least 8, got 9x8"),
        ({"levels": 1}, "levels: expected an integer in 2..256"),
        ({"latent_dim": 0}, "latent_dim: expected an integer of at least 1"),
        ({"num_blocks": 1.5}, "num_blocks: expected an integer"),
        ({"architecture": "recurrent"}, "architecture: expected one of perceptron, convolutional"),
        ({"likelihood": "poisson"}, "likelihood: expected one of bernoulli"),
        ({"scale": 0.1}, "scale: expected None"),
        ({"likelihood": "gaussian", "scale": 0}, "scale: expected None, or a number above 0"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        models.VAE(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("kind", "call", "error", "message"),
    [
        ("perceptron", lambda m: m.elbo(images_for(m).float()), TypeError, "tensor of uint8 levels, got torch.float32"),
        ("perceptron", lambda m: m.encode(images_for(m)[:, :, :4]), ValueError, r"expected shape \[N, 1, 8, 8\]"),
        ("perceptron", lambda m: m.encode(images_for(m) + 4), ValueError, "expected levels in 0..4"),
        ("perceptron", lambda m: m.sample(2, labels=1), ValueError, "no classes"),
        ("perceptron", lambda m: m.decode(torch.zeros(2, 4)), ValueError, r"z: expected shape \[N, 3\], got \[2, 4\]"),
        ("perceptron", lambda m: m.log_prob(images_for(m), num_samples=0), ValueError, "num_samples: expected"),
        ("perceptron", lambda m: m.render(torch.full((1, 3), math.nan)), RuntimeError, "NaN or infinity"),
        ("labels", lambda m: m.sample(2), ValueError, "conditional"),
        ("labels", lambda m: m.sample(2, labels=4), ValueError, "labels must be in 0..3"),
        ("labels", lambda m: m.sample(1, labels=1, condition=images_for(m, 1)), ValueError, "labels alone"),
        ("grey", lambda m: m.sample(2), ValueError, "condition: expected images, of which the model is given 'grey'"),
        ("grey", lambda m: m.sample(2, condition=images_for(m, 1)), ValueError, "condition: expected 2 images, got 1"),
    ],
)
def test_bad_calls(kind, call, error, message):
    with pytest.raises(error, match=message):
        call(build(kind))


def test_a_conditional_model_needs_a_condition():
    with pytest.raises(ValueError, match="expected at least one of them"):
        models.ConditionalVAE(**SMALL)
    with pytest.raises(ValueError, match="condition: expected None or one of grey"):
        models.ConditionalVAE(**SMALL, condition="middle")
