"""Adversarial training: it learns with every loss, survives any interruption bit for bit, and stops on NaN."""

from __future__ import annotations

import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastgen import checkpoint, losses, models, training
from fastgen.training import LOSSES, GANConfig
from fastgen.training.batches import batch_indices
from fastgen.training.gan import DIGITS
from fastgen.training.gan.state import GANState

STEPS = 7
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES)


def dataset(count=22, size=4):
    """Dark images of class 0 and bright ones of class 1, with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    noise = torch.randint(-20, 20, (count, 1, size, size), generator=generator)
    return SimpleNamespace(images=(60 + 130 * labels[:, None, None, None] + noise).to(torch.uint8), labels=labels)


def build(loss="non-saturating", name="gan", **options):
    torch.manual_seed(0)
    sizes = {
        "gan": {"image_shape": (1, 4, 4), "num_filters": 16},
        "dcgan": {"image_shape": (1, 16, 16), "num_filters": 4},
    }
    own = LOSSES[loss].model.get(name, {})
    return models.get(name)(**{"latent_dim": 3, "num_classes": 2, **sizes[name], **own, **options})


def config(loss="non-saturating", **options):
    return GANConfig.of(loss, **{"max_steps": STEPS, "batch_size": 5, "log_every": 3, **options})


def run(out, loss="non-saturating", model=None, resume=False, sample_grid=None, **options):
    return training.train_gan(
        build(loss) if model is None else model,
        dataset(),
        config(loss, **options),
        out=out,
        resume=resume,
        progress=False,
        sample_grid=sample_grid,
    )


def interrupt(model, path):
    """As a sample grid: Ctrl-C at that step."""
    signal.raise_signal(signal.SIGINT)


def read_log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_tensors(path, other):
    tensors, expected = checkpoint.read(path)[0], checkpoint.read(other)[0]
    assert tensors.keys() == expected.keys()
    assert [key for key in tensors if not torch.equal(tensors[key], expected[key])] == []


@EVERY_LOSS
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, loss):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, loss)
    for step in (1, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            run(parts, loss, sample_grid=interrupt, sample_every=step, resume=step > 1)
        assert checkpoint.read(parts / "checkpoint.safetensors")[1]["training"]["step"] == step
    result = run(parts, loss, resume=True)
    assert result.steps == STEPS
    for name in ("checkpoint.safetensors", "model.safetensors"):
        assert_same_tensors(parts / name, whole / name)
    assert [line["step"] for line in read_log(parts)] == [line["step"] for line in read_log(whole)] == [3, 6, 7]
    assert read_log(parts)[-1] == read_log(whole)[-1]


def test_dcgan_with_batch_norm_and_dropout_of_gan_resume(tmp_path):
    data = dataset(size=16)
    for name in ("dcgan", "gan"):
        options = {"image_shape": (1, 16, 16)}
        for folder in ("whole", "parts"):
            out = tmp_path / name / folder
            if folder == "parts":
                with pytest.raises(KeyboardInterrupt):
                    training.train_gan(
                        build(name=name, **options), data, config(sample_every=2), out=out, progress=False,
                        sample_grid=interrupt,
                    )  # fmt: skip
            resume = folder == "parts"
            training.train_gan(build(name=name, **options), data, config(), out=out, resume=resume, progress=False)
        assert_same_tensors(*(tmp_path / name / folder / "checkpoint.safetensors" for folder in ("whole", "parts")))


@pytest.mark.parametrize("loss", ["non-saturating", "least-squares", "wgan-gp", "hinge", "began"])
def test_it_learns(loss):
    """Dark images of class 0, bright ones of class 1."""
    rates = {"began": 2e-3, "wgan-gp": 2e-3}
    options = {"max_steps": 250, "batch_size": 22, "learning_rate": rates.get(loss, 5e-3), "ema_decay": 0.9}
    result = run(None, loss, build(loss, num_filters=32, **({"dropout": 0.0} if loss != "began" else {})), **options)
    if loss == "began":
        assert abs(result.model.sample(64).float().mean() - 125) < 35
        return
    means = [result.model.sample(16, labels=label).float().mean() for label in (0, 1)]
    assert abs(means[0] - 60) < 35 and abs(means[1] - 190) < 35, means


def test_what_is_written(tmp_path):
    pictures = []
    folder = tmp_path / "deep" / "er"
    result = run(
        folder,
        "wgan-gp",
        sample_grid=lambda model, path: pictures.append((model.generator.training, path.name)),
        sample_every=3,
    )
    assert sorted(os.listdir(folder)) == ["checkpoint.safetensors", "curves.png", "log.jsonl", "model.safetensors"]
    assert pictures == [(False, f"samples-{step:06d}.png") for step in (3, 6, 7)]
    figures = {"step", "loss_discriminator", "loss_generator", "score_real", "score_fake", "penalty"}
    assert [set(line) for line in read_log(folder)] == [figures] * 3
    assert min(Image.open(folder / "curves.png").size) > 300
    assert not result.model.training
    expected = result.model.state_dict()
    for name in ("checkpoint.safetensors", "model.safetensors"):
        loaded = checkpoint.load(folder / name).state_dict()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_scores_go_to_the_log_and_the_curves(tmp_path):
    seen = []

    def score(model):
        seen.append(model.generator.training)
        return {"frechet_distance": 10.0 - len(seen), "inception_score": float(len(seen))}

    options = {"out": tmp_path, "progress": False, "score": score}
    training.train_gan(build(), dataset(), config(sample_every=2), **options)
    assert seen == [False] * 4
    lines = [(line["step"], line["frechet_distance"]) for line in read_log(tmp_path) if "frechet_distance" in line]
    assert lines == [(2, 9.0), (4, 8.0), (6, 7.0), (7, 6.0)]
    assert Image.open(tmp_path / "curves.png").size[1] > 700  # two more panels


def test_scoring_changes_nothing_else(tmp_path):
    for name, score in (("with", lambda model: {"figure": float(torch.rand(()))}), ("without", None)):
        training.train_gan(
            build(), dataset(), config(sample_every=2), out=tmp_path / name, progress=False, score=score
        )  # fmt: skip
    assert_same_tensors(*(tmp_path / name / "model.safetensors" for name in ("with", "without")))


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(None, sample_every=1).checkpoint is None
    assert os.listdir(tmp_path) == []


@EVERY_LOSS
def test_each_network_moves_in_its_own_step(loss):
    model, data = build(loss).train(), dataset()
    state = GANState(model, config(loss))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def moved():
        return {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}

    labels = None if loss == "began" else data.labels[:5]
    _, scores = state.update_discriminator(data.images[:5], labels)
    assert moved() == {"discriminator"}
    before |= {name: p.clone() for name, p in model.named_parameters() if name.startswith("discriminator")}
    state.update_generator(scores, labels)
    assert moved() == {"generator"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_one_step_by_hand():
    """The discriminator's and the generator's step of the plain loss, with optimisers of their own."""
    data, options = dataset(), config(learning_rate=0.01)
    model, twin = build(dropout=0.0).train(), build(dropout=0.0).train()
    state = GANState(model, options)
    torch.manual_seed(1)
    _, scores = state.update_discriminator(data.images[:5], data.labels[:5])
    state.update_generator(scores, data.labels[:5])

    torch.manual_seed(1)
    loss, x, y = losses.NonSaturatingLoss(), twin.encode(data.images[:5]), data.labels[:5]
    critic = twin.discriminator
    for parts, compute in (
        (critic, lambda z: loss.discriminator(critic(x, y), critic(twin(z, y).detach(), y))),
        (twin.generator, lambda z: loss.generator(critic(twin(z, y), y))),
    ):
        optimizer = torch.optim.Adam(parts.parameters(), lr=0.01, betas=(0.5, 0.999))
        optimizer.zero_grad()
        compute(torch.randn(5, 3)).backward()
        optimizer.step()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_the_average_is_of_the_generator_with_its_statistics():
    model = build(name="dcgan").train()
    state, data = GANState(model, config(ema_decay=0.6)), dataset(size=16)
    expected = {name: tensor.clone().double() for name, tensor in model.generator.state_dict().items()}
    for step in range(4):
        _, scores = state.update_discriminator(data.images[:5], data.labels[:5])
        state.update_generator(scores, data.labels[:5])
        decay = min(0.6, (1 + step) / (10 + step))
        for name, tensor in model.generator.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
    for name, tensor in state.averaged.generator.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=1e-5, atol=1e-6)
    assert state.averaged.discriminator is model.discriminator
    assert not state.averaged.generator.training


def test_samples_of_the_average_follow_it():
    """No weights of an earlier step are served, and sampling in between changes nothing."""
    data, states = dataset(size=16), [GANState(build(name="dcgan").train(), config(ema_decay=0.5)) for _ in range(2)]
    for step in range(3):
        for state in states:
            torch.manual_seed(step)
            _, scores = state.update_discriminator(data.images[:5], data.labels[:5])
            state.update_generator(scores, data.labels[:5])
        images = [m.sample(3, labels=1) for m in (states[0].averaged, states[0].networks)]
        for model, drawn in zip((states[1].averaged, states[1].networks), images, strict=True):
            fresh = build(name="dcgan")
            fresh.load_state_dict(model.state_dict())
            assert torch.equal(fresh.sample(3, labels=1), drawn)
    pairs = zip(states[0].averaged.state_dict().values(), states[1].averaged.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_critic_takes_its_steps_on_batches_of_their_own(monkeypatch):
    seen = []
    update = GANState.update_discriminator

    def look(state, images, labels):
        seen.append(images)
        return update(state, images, labels)

    monkeypatch.setattr(GANState, "update_discriminator", look)
    run(None, critic_steps=3, max_steps=2)
    data = dataset()
    assert len(seen) == 6
    assert all(torch.equal(x, data.images[batch_indices(i, 22, 5, 0)]) for i, x in enumerate(seen))


def test_wgan_clips_and_began_balances(tmp_path):
    model = build("wgan")
    run(None, "wgan", model)
    assert max(parameter.abs().max() for parameter in model.discriminator.parameters()) <= 0.01
    run(tmp_path, "began")
    tensors, _ = checkpoint.read(tmp_path / "checkpoint.safetensors")
    assert {"k", "convergence"} <= set(read_log(tmp_path)[0])
    assert 0 < tensors["training/loss/k"] == read_log(tmp_path)[-1]["k"]


def test_options_of_the_loss(tmp_path):
    run(tmp_path, "began", loss_options={"lambda_k": 0.5, "gamma": 1.0}, max_steps=2)
    assert read_log(tmp_path)[-1]["k"] > 0.02
    with pytest.raises(ValueError, match="cannot resume: loss_options was"):
        run(tmp_path, "began", resume=True)


def test_unlabelled_data():
    data = SimpleNamespace(images=dataset().images, labels=None)
    model = build(num_classes=None)
    assert training.train_gan(model, data, config(), progress=False).steps == STEPS
    with pytest.raises(ValueError, match="conditional on 2 classes, the data have no labels"):
        training.train_gan(build(), data, config())


def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    model = build()

    def spoil(average, path):
        model.generator.layers[0].bias.data[0] = math.nan

    with pytest.raises(RuntimeError, match=r"training stopped at step 5 \(last checkpoint: step 4\): .*nan"):
        run(tmp_path, model=model, sample_grid=spoil, sample_every=5, checkpoint_every=2)
    assert checkpoint.read(tmp_path / "checkpoint.safetensors")[1]["training"]["step"] == 4
    checkpoint.load(tmp_path / "checkpoint.safetensors")


def test_the_callers_random_numbers_are_left_alone():
    model = build()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    run(None, model=model)
    assert torch.equal(torch.rand(1), expected)


def test_refusals(tmp_path):
    run(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="cannot resume: loss was non-saturating, this run has hinge"):
        run(tmp_path, "hinge", resume=True)
    with pytest.raises(ValueError, match="cannot resume: critic_steps was 1, this run has 2"):
        run(tmp_path, resume=True, critic_steps=2)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors exists"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss": "mean"}, "loss: expected one of non-saturating, minimax, .*, got 'mean'"),
        ({"critic_steps": 0}, "critic_steps: expected an integer of at least 1, got 0"),
        ({"loss_options": {"gamma": 1.0}}, "loss_options: hinge does not take {'gamma': 1.0}"),
        ({"loss": "began", "loss_options": {"gamma": 2.0}}, "gamma: expected a number in 0..1, got 2.0"),
        ({"log_every": 1.5}, "log_every: expected an integer of at least 1, got 1.5"),
        ({"beta1": 1.0}, "beta1: expected a number of at least 0 and below 1, got 1.0"),
        ({"max_steps": None}, "GANConfig: expected max_steps, max_seconds or both, got neither"),
    ],
    ids=str,
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        GANConfig.of(**{"loss": "hinge", "max_steps": 1, **options})


@EVERY_LOSS
def test_recipes_are_valid(loss):
    made = GANConfig.of(loss, max_steps=1)
    assert isinstance(made.make_loss(), losses.AdversarialLoss)
    GANConfig.of(loss, **DIGITS | LOSSES[loss].digits)
    assert all(getattr(made, name) == value for name, value in LOSSES[loss].training.items())
    for name in LOSSES[loss].model:
        assert isinstance(build(loss, name), models.AdversarialModel)
