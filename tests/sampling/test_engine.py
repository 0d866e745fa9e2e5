"""The compiled sampler draws what the naive loop draws, for networks that nobody wrote for it and for the package's own
models.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from fastgen import models
from fastgen.sampling import Bernoulli, Categorical, Sampler, audit, naive_sample
from fastgen.sampling.executors import cpu
from tests.instruction_sets import ISAS, chosen

from .networks import LEVELS, NETWORKS, make

SIZES = [(5, 6), (7, 3), (1, 7), (4, 1), (1, 1)]
MODELS = {
    "pixelcnn": lambda: models.PixelCNN(image_shape=(1, 5, 7), levels=4, num_filters=6, num_blocks=2, num_features=8),
    "pixelcnn rgb": lambda: models.PixelCNN(
        image_shape=(3, 4, 3), levels=5, num_filters=7, num_blocks=2, num_features=9
    ),
    "pixelcnn binary": lambda: models.PixelCNN(
        image_shape=(1, 6, 5), levels=2, head="bernoulli", num_filters=4, num_blocks=1, num_features=4
    ),
    "gated": lambda: models.GatedPixelCNN(image_shape=(1, 7, 5), levels=4, num_filters=6, num_blocks=3),
    "gated rgb": lambda: models.GatedPixelCNN(image_shape=(3, 3, 5), levels=3, num_filters=8, num_blocks=2),
    "gated labels": lambda: models.GatedPixelCNN(
        image_shape=(1, 4, 6), levels=17, num_filters=6, num_blocks=2, num_classes=3
    ),
    "gated rgb labels": lambda: models.GatedPixelCNN(
        image_shape=(3, 4, 3), levels=256, num_filters=6, num_blocks=2, num_classes=10, kernel_size=3
    ),
    "five channels": lambda: models.PixelCNN(
        image_shape=(5, 3, 3), levels=3, num_filters=10, num_blocks=1, num_features=10
    ),
}


def make_model(name: str) -> tuple[torch.nn.Module, torch.Tensor | None]:
    """(a model with weights large enough that mistakes show, labels for six samples or None)."""
    torch.manual_seed(3)
    model = MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    labels = None if model.num_classes is None else torch.arange(6) % model.num_classes
    return model, labels


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", NETWORKS)
def test_foreign_network_equals_naive_loop(name: str, size: tuple[int, int], backend: str) -> None:
    network, channels, num_classes = make(name, *size)
    given = {"image_shape": (channels, *size), "head": Categorical(LEVELS), "num_classes": num_classes}
    labels = torch.arange(3) % num_classes if num_classes else None
    images = Sampler(network, **given, backend=backend).sample(3, seed=5, labels=labels)
    assert torch.equal(images, naive_sample(network, 3, **given, seed=5, labels=labels))
    assert audit(network, images, **given, seed=5, labels=labels).ok


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", MODELS)
def test_model_equals_naive_loop(name: str, backend: str) -> None:
    model, labels = make_model(name)
    images = Sampler(model, backend=backend).sample(6, seed=2**63 + 1, start=5, labels=labels)
    assert torch.equal(images, naive_sample(model, 6, seed=2**63 + 1, start=5, labels=labels))
    assert len(images.unique()) > 1
    report = audit(model, images, seed=2**63 + 1, start=5, labels=labels)
    assert report.ok and report.elements == images.numel()


@pytest.mark.parametrize("name", ["gated labels", "pixelcnn rgb", "gated rgb"])
def test_known_pixels_and_temperature(name: str) -> None:
    model, labels = make_model(name)
    known = torch.randint(model.levels, (6, *model.image_shape)).to(torch.uint8)
    mask = torch.rand(6, *model.image_shape[1:]) < 0.4
    options = {"seed": 1, "labels": labels, "temperature": 0.6, "known": known, "mask": mask}
    images = Sampler(model).sample(6, **options)
    assert torch.equal(images, naive_sample(model, 6, **options))
    given = mask.unsqueeze(1).expand_as(known)
    assert torch.equal(images[given], known[given])
    del options["known"]
    report = audit(model, images, **options)
    assert report.ok and report.elements == int((~given).sum())


def test_one_known_image_for_all_samples() -> None:
    model, _ = make_model("gated")
    known = torch.randint(model.levels, model.image_shape).to(torch.uint8)
    mask = torch.zeros(model.image_shape[1:], dtype=torch.bool)
    mask[:3] = True
    images = Sampler(model).sample(4, known=known, mask=mask)
    assert torch.equal(images[:, :, :3], known[:, :3].expand(4, -1, -1, -1))
    assert len(images.unique(dim=0)) > 1


@pytest.mark.parametrize("name", ["gated labels", "pixelcnn rgb"])
@pytest.mark.parametrize("needed", [1, 4, 1000], ids=["groups", "groups of four", "one team"])
def test_sample_depends_on_seed_and_index_alone(name: str, needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.sampling.executors.cpu.SAMPLES_PER_THREAD", ((1 << 60, needed),))
    monkeypatch.setattr("fastgen.sampling.executors.cpu.TEAM_STEP_SECONDS", 0)  # however small the steps
    monkeypatch.setattr("fastgen.sampling.executors.cpu.processors", lambda: 8)  # however few there are
    model, _ = make_model(name)
    n = 23
    labels = None if model.num_classes is None else torch.arange(n) % model.num_classes

    def draw(threads: int, max_batch: int, start: int = 0, count: int = n) -> torch.Tensor:
        torch.set_num_threads(threads)
        part = None if labels is None else labels[start : start + count]
        return Sampler(model, max_batch=max_batch).sample(count, seed=9, start=start, labels=part)

    whole = draw(threads=1, max_batch=n)
    for threads, max_batch in [(1, 1), (2, 7), (2, 1), (3, 23), (5, 4)]:
        assert torch.equal(draw(threads, max_batch), whole), (threads, max_batch)
    assert torch.equal(draw(2, 5, start=11, count=6), whole[11:17])
    assert not torch.equal(whole, Sampler(model).sample(n, seed=10, labels=labels))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no way to have fewer processors than threads")
@pytest.mark.parametrize("count", [1, 5])
def test_a_team_that_cannot_keep_together(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three threads on one processor part within a pixel, at any barrier: no sample changes, and one thread goes on."""
    monkeypatch.setattr("fastgen.sampling.executors.cpu.SAMPLES_PER_THREAD", ((1 << 60, 1000),))
    monkeypatch.setattr("fastgen.sampling.executors.cpu.TEAM_STEP_SECONDS", 0)
    monkeypatch.setattr("fastgen.sampling.executors.cpu.processors", lambda: 3)
    torch.manual_seed(1)
    model = models.PixelCNN(image_shape=(3, 16, 16), num_filters=12, num_blocks=3).eval()
    expected = Sampler(model, backend="cpu").sample(count, seed=2)
    sampler, allowed = Sampler(model, backend="cpu"), os.sched_getaffinity(0)
    torch.set_num_threads(3)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        images = sampler.sample(count, seed=2)
    finally:
        os.sched_setaffinity(0, allowed)
    assert torch.equal(images, expected)
    assert sampler._executor._alone_until > 0
    assert not sampler._executor._teams.choose((count, 1, 3), first=True)  # nor is it tried again at once


def test_the_faster_way_is_taken_until_both_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trials, now = cpu.Trials(), [100.0]
    monkeypatch.setattr(cpu.time, "monotonic", lambda: now[0])
    assert not trials.choose("one", first=False) and trials.choose("other", first=True)
    trials.took("one", False, 2.0)
    assert trials.choose("one", first=False)
    trials.took("one", True, 3.0)
    assert not trials.choose("one", first=False) and not trials.choose("one", first=True)
    trials.took("one", False, 4.0)
    assert trials.choose("one", first=False)
    now[0] += cpu.TRIAL_SECONDS
    assert not trials.choose("one", first=False)
    trials.took("one", False, 1.0)
    assert trials.choose("one", first=False)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    model, labels = make_model("gated rgb labels")
    expected = naive_sample(model, 6, seed=4, labels=labels)
    with chosen(isa):
        assert torch.equal(Sampler(model, backend="cpu").sample(6, seed=4, labels=labels), expected)


def test_large_batch_crosses_tiles() -> None:
    model, _ = make_model("pixelcnn rgb")
    torch.set_num_threads(2)
    images = Sampler(model, max_batch=50).sample(50, seed=1)
    assert torch.equal(images[37:], naive_sample(model, 13, seed=1, start=37))


def test_wide_layers_cross_tiles() -> None:
    torch.manual_seed(0)
    model = models.GatedPixelCNN(image_shape=(1, 3, 4), levels=256, num_filters=150, num_blocks=2)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(Sampler(model).sample(3), naive_sample(model, 3))


def test_distribution_by_enumeration() -> None:
    """20,000 samples of 2x2 binary images against the exact probabilities of all 16: chi-square with 15 degrees of
    freedom.
    """
    torch.manual_seed(1)
    model = models.GatedPixelCNN(image_shape=(1, 2, 2), levels=2, head="bernoulli", num_filters=5, num_blocks=2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    every = torch.tensor([[(i >> b) & 1 for b in range(4)] for i in range(16)], dtype=torch.uint8).view(16, 1, 2, 2)
    with torch.no_grad():
        probability = model.log_prob(every).double().exp()
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-5)
    n = 20_000
    images = Sampler(model).sample(n, seed=0).flatten(1).long()
    counts = torch.bincount((images << torch.arange(4)).sum(1), minlength=16).double()
    chi_square = ((counts - n * probability) ** 2 / (n * probability)).sum().item()
    assert chi_square < 37.7  # exceeded by one right sampler in a thousand


def test_temperature_sharpens() -> None:
    model, _ = make_model("gated")
    sampler = Sampler(model)
    with torch.no_grad():
        cold = model.log_prob(sampler.sample(32, temperature=0.25)).mean()
        warm = model.log_prob(sampler.sample(32, temperature=1.0)).mean()
    assert cold > warm + 1


def test_model_is_left_as_it_was() -> None:
    network, _, _ = make("in-place masks", 4, 4)
    network.train()
    network.norm.eval()
    state = {k: v.clone() for k, v in network.state_dict().items()}
    Sampler(network, (1, 4, 4), Categorical(LEVELS)).sample(2)
    assert network.training and network.drop.training and not network.norm.training
    masked = {"a.weight", "b.weight"}  # the network masks these itself, at every call
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items() if k not in masked)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_empty_batch() -> None:
    model, _ = make_model("pixelcnn rgb")
    for images in (Sampler(model).sample(0), naive_sample(model, 0)):
        assert images.shape == (0, 3, 4, 3) and images.dtype == torch.uint8
    assert audit(model, images).ok


def test_head_of_one_logit_with_other_range() -> None:
    network, _, _ = make("shifts", 3, 4)
    network.mix = torch.nn.Conv2d(16, 1, 1)
    given = {"image_shape": (1, 3, 4), "head": Bernoulli(input_range=(-1.0, 1.0))}
    assert torch.equal(Sampler(network, **given).sample(9), naive_sample(network, 9, **given))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_in_several_calls_of_the_executor(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = models.GatedPixelCNN(image_shape=(1, 11, 3), levels=5, num_filters=4, num_blocks=2, kernel_size=3)
    sampler = Sampler(model, backend="cpu")
    expected = sampler.sample(3)  # in one
    rows: list[int] = []
    executor = sampler._executor
    run = executor.sample
    monkeypatch.setattr("fastgen.sampling.executors.cpu.CHUNK_SECONDS", 1e-12)
    monkeypatch.setattr(executor, "sample", lambda batch: run(replace(batch, on_rows=rows.append)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(sampler.sample(3), expected)
    finally:
        torch.set_num_threads(before)
    assert len(rows) == cpu.CHUNKS and sum(rows) == 11


def test_progress_bar_counts_rows(capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = make_model("pixelcnn")
    Sampler(model, max_batch=2).sample(5, progress=True)
    assert "15/15" in capsys.readouterr().err  # three batches of five rows
