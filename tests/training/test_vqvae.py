"""Training of an autoencoder with discrete latents and of a prior: it learns, survives any interruption bit for bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import fastgen
from fastgen import checkpoint, models, training
from fastgen.training import TrainConfig
from fastgen.training.batches import batch
from fastgen.training.vae import vqvae
from tests.training.test_vae import dataset, interrupt, read_log

STEPS = 7


def build(**options):
    torch.manual_seed(0)
    small = {"image_shape": (1, 8, 8), "levels": 8, "num_codes": 6, "latent_dim": 3, "num_filters": 6, "num_blocks": 1}
    return models.VQVAE(**{**small, **options})


def run(out, model=None, resume=False, sample_grid=None, **options):
    model = build() if model is None else model
    config = TrainConfig(**{"max_steps": STEPS, "batch_size": 5, "learning_rate": 0.02, "validate_every": 3, **options})
    if not resume:
        training.initialize(model, dataset(), config)
    return training.train_vqvae(
        model, dataset(), dataset(8, 1), config, out=out, resume=resume, progress=False, sample_grid=sample_grid
    )


@pytest.mark.parametrize("options", [{"min_usage": 0.9}, {"decay": None}], ids=["averages", "gradients"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, build(**options))
    for step in (1, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            run(parts, build(**options), sample_grid=interrupt, sample_every=step, resume=step > 1)
    run(parts, build(**options), resume=True)
    tensors, expected = (checkpoint.read(folder / "checkpoint.safetensors")[0] for folder in (parts, whole))
    assert tensors.keys() == expected.keys()
    assert [key for key in tensors if not torch.equal(tensors[key], expected[key])] == []


def test_the_log_says_how_many_codes_are_in_use(tmp_path):
    result = run(tmp_path)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 7]
    for line in lines:
        assert line["log_likelihood"] < 0 <= line["quantizer_loss"]
        assert 1 <= line["perplexity"] <= 6 and 1 <= line["val_perplexity"] <= 6
    assert result.bits_per_dim == min(line["val_bits_per_dim"] for line in lines)
    loaded = fastgen.load(tmp_path / "model.safetensors")
    assert fastgen.bits_per_dim(loaded, dataset(8, 1).images) == pytest.approx(result.bits_per_dim, abs=1e-6)


def test_two_stages_learn():
    model = build(num_filters=12)
    train, val = dataset(64), dataset(16, 1)
    config = TrainConfig(max_steps=150, batch_size=16, learning_rate=0.01, ema_decay=0.9)
    training.initialize(model, train, config)
    before = fastgen.bits_per_dim(model, val.images)
    after = training.train_vqvae(model, train, val, config, progress=False).bits_per_dim
    assert after < before - 0.5 and after < 2.0  # the noise alone is one bit
    codes, val_codes = training.encoded(model, train), training.encoded(model, val)
    assert codes.image_shape == (1, 2, 2) and codes.levels == 6 and torch.equal(codes.labels, train.labels)
    assert torch.equal(codes.images, model.encode(train.images)) and len(codes.images.unique()) > 1
    prior = models.GatedPixelCNN(
        image_shape=codes.image_shape, levels=codes.levels, num_classes=2, embedding_dim=4, num_filters=8, num_blocks=2
    )
    config = TrainConfig(max_steps=80, batch_size=16, learning_rate=0.02, ema_decay=0.9)
    result = training.train(prior, codes, val_codes, config, progress=False)
    assert result.bits_per_dim < 0.8 * math.log2(6)
    drawn = fastgen.sample(prior, 40, vqvae=model)  # classes in turn: dark and bright
    assert drawn[::2].float().mean() < 2 and drawn[1::2].float().mean() > 4


def test_it_stops_where_the_loss_is_not_finite(tmp_path):
    model = build()
    config = TrainConfig(max_steps=3, batch_size=5)
    torch.nn.init.constant_(model.decoder.first.bias, math.nan)
    with pytest.raises(RuntimeError, match="bits/dim"):
        training.train_vqvae(model, dataset(), None, config, out=tmp_path, progress=False)
    assert not (tmp_path / "model.safetensors").exists()


def test_data_are_checked():
    with pytest.raises(ValueError, match="train_data: holds no images"):
        training.train_vqvae(build(), dataset(0), None, TrainConfig(max_steps=1))


def test_a_step_is_on_the_loss_of_the_paper():
    """Equation 3, each term for each element: gradients of the first step by hand."""
    model, data = build(), dataset(5)
    config = TrainConfig(max_steps=1, batch_size=5, learning_rate=1e-9, clip_norm=1e9)
    training.initialize(model, data, config)
    by_hand = copy.deepcopy(model)
    training.train_vqvae(model, data, None, config, progress=False)
    terms = by_hand.terms(data.images)
    ((terms.loss - terms.log_likelihood.mean() / 64) / math.log(2)).backward()
    for (name, parameter), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


def test_codes_are_averaged_like_the_weights():
    """Else the averaged encoder would meet codes that it does not know."""
    model, data = build(min_usage=0.9), dataset()
    config = TrainConfig(max_steps=20, batch_size=5, learning_rate=0.02, ema_decay=0.7)
    training.initialize(model, data, config)
    state = vqvae._State(model.train(), config)
    codes = model.quantizer.codebook.clone()
    for step in range(20):
        state.update(*batch(model, data, step, 5, 0))
        decay = min(0.7, (1 + step) / (10 + step))
        codes = decay * codes + (1 - decay) * model.quantizer.codebook
        torch.testing.assert_close(state.average.quantizer.codebook, codes)
    assert not torch.allclose(codes, model.quantizer.codebook, atol=1e-2)
    mean = state.average.quantizer  # what training of it goes on from
    torch.testing.assert_close(mean.sums / mean.counts[:, None], codes)


@pytest.mark.parametrize(
    ("function", "model"),
    [
        (training.train, build()),
        (training.train, models.VAE(image_shape=(1, 8, 8), num_filters=4)),
        (training.train_vae, build()),
        (training.train_vqvae, models.VAE(image_shape=(1, 8, 8), num_filters=4)),
    ],
    ids=range(4),
)
def test_models_that_another_function_trains_are_refused(function, model):
    config = training.VAEConfig(max_steps=1) if function is training.train_vae else TrainConfig(max_steps=1)
    with pytest.raises(TypeError, match="model: train"):
        function(model, dataset(), None, config, progress=False)


def test_what_is_not_encoded():
    with pytest.raises(TypeError, match="model: encoded takes a VQVAE, got a VAE"):
        training.encoded(models.VAE(image_shape=(1, 8, 8), num_filters=4), dataset())
    with pytest.raises(ValueError, match="data: holds no images"):
        training.encoded(build(), dataset(0))
