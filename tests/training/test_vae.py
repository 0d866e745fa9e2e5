"""Training of variational autoencoders: it learns, survives any interruption bit for bit, warms up, stops on NaN."""

from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import pytest
import torch

from fastgen import checkpoint, models, training
from fastgen.training import VAEConfig

STEPS = 7


def dataset(count=22, seed=0, channels=1):
    """Dark images of class 0 and bright ones of class 1, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    noise = torch.randint(2, (count, channels, 8, 8), generator=generator)
    return SimpleNamespace(images=(5 * labels[:, None, None, None] + noise).to(torch.uint8), labels=labels)


def build(name="vae", **options):
    torch.manual_seed(0)
    return models.get(name)(**{"image_shape": (1, 8, 8), "levels": 8, "num_filters": 4, "latent_dim": 2, **options})


def config(**options):
    return VAEConfig(**{"max_steps": STEPS, "batch_size": 5, "learning_rate": 0.02, "validate_every": 3, **options})


def run(out, model=None, resume=False, sample_grid=None, **options):
    return training.train_vae(
        build() if model is None else model, dataset(), dataset(8, 1), config(**options),
        out=out, resume=resume, progress=False, sample_grid=sample_grid,
    )  # fmt: skip


def interrupt(model, path):
    """As a sample grid: Ctrl-C at that step."""
    signal.raise_signal(signal.SIGINT)


def read_log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("architecture", ["perceptron", "convolutional"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, architecture):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, build(architecture=architecture), kl_warmup=0.6)
    for step in (1, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            run(
                parts, build(architecture=architecture), kl_warmup=0.6,
                sample_grid=interrupt, sample_every=step, resume=step > 1,
            )  # fmt: skip
    run(parts, build(architecture=architecture), kl_warmup=0.6, resume=True)
    tensors, expected = (checkpoint.read(folder / "checkpoint.safetensors")[0] for folder in (parts, whole))
    assert tensors.keys() == expected.keys()
    assert [key for key in tensors if not torch.equal(tensors[key], expected[key])] == []
    validations = [[{k: v for k, v in line.items() if "val" in k} for line in read_log(f)] for f in (parts, whole)]
    assert validations[0] == validations[1]  # means over steps begin anew


def test_the_log_has_both_terms_and_both_bounds(tmp_path):
    run(tmp_path, kl_warmup=0.5, beta=2.0)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 7]
    for line in lines:
        assert line["kl"] >= 0 > line["log_likelihood"]
        assert line["val_iwae_bits_per_dim"] <= line["val_elbo_bits_per_dim"] + 0.01
    assert [line["beta"] for line in lines][1:] == [pytest.approx((2 * 6 / 7 + 2 + 2) / 3), 2.0]


def test_it_learns_from_the_bound_and_uses_its_latents():
    model = build(num_filters=16)
    data = dataset(200)
    before = model.elbo(data.images).mean().item()
    result = training.train_vae(model, data, dataset(50, 1), config(max_steps=300, batch_size=50), progress=False)
    assert result.model is model and not model.training
    assert model.elbo(data.images).mean() > before + 40
    assert result.bits_per_dim < 1.3  # one bit of noise in each element
    assert model.kl_per_dimension(data.images).sum() > 0.5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vae", {"likelihood": "gaussian"}),
        ("conditional_vae", {"num_classes": 2, "likelihood": "bernoulli"}),
        ("conditional_vae", {"condition": "top", "architecture": "convolutional", "likelihood": "categorical"}),
    ],
    ids=str,
)
def test_every_kind_of_model_trains(name, options):
    model = build(name, **options)
    result = training.train_vae(model, dataset(), dataset(8, 1), config(num_samples=2), progress=False)
    assert result.steps == STEPS and result.checkpoint is None


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_warm_up_is_linear(warmup):
    weights = [config(max_steps=100, kl_warmup=warmup, beta=3.0).beta_at(step, 0.0) for step in (0, 10, 25, 99)]
    assert weights == pytest.approx([3, 3, 3, 3] if warmup == 0 else [0, 1.2, 3, 3])


def test_stops_on_nan_before_the_weights_are_touched(tmp_path):
    def poison(model, path):
        torch.nn.init.constant_(broken.to_latent.bias, float("nan"))

    broken = build()
    with pytest.raises(RuntimeError, match=r"stopped at step 2 .*nan bits/dim"):
        run(tmp_path, broken, sample_grid=poison, sample_every=2)
    assert torch.isfinite(broken.decoder.last.weight).all()


def test_options_that_make_another_run_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, sample_grid=interrupt, sample_every=2)
    with pytest.raises(ValueError, match=r"kl_warmup was 0\.1, this run has 0\.3"):
        run(tmp_path, resume=True, kl_warmup=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta: expected"),
        ({"kl_warmup": 1.0}, "kl_warmup: expected a number of at least 0 and below 1"),
        ({"num_samples": 0}, "num_samples: expected"),
        ({"iwae_samples": 1.5}, "iwae_samples: expected"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
