"""Bad input to the sampling functions: what is said, and that it is said."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen import _memory, backends, models
from fastgen.sampling import Bernoulli, Categorical, LogisticMixture, Sampler, audit, naive_sample
from fastgen.sampling.executors.reference import ReferenceExecutor

MODEL = models.PixelCNN(image_shape=(1, 3, 4), levels=4, num_filters=2, num_blocks=1, num_features=2)
LABELLED = models.GatedPixelCNN(image_shape=(1, 3, 4), levels=4, num_filters=2, num_blocks=1, num_classes=5)
IMAGES = torch.zeros(2, 1, 3, 4, dtype=torch.uint8)
MASK = torch.ones(3, 4, dtype=torch.bool)

SAMPLE = [
    ({"n": -1}, ValueError, "n must be in 0.."),
    ({"n": 2.0}, TypeError, "n must be an integer, got float"),
    ({"n": True}, TypeError, "n must be an integer, got bool"),
    ({"n": np.bool_(True)}, TypeError, "n must be an integer, got bool"),
    ({"seed": np.float32(1)}, TypeError, "seed must be an integer, got float32"),
    ({"start": torch.tensor(1.5)}, TypeError, "start must be an integer, got Tensor"),
    ({"seed": np.int64(-1)}, ValueError, "seed must be in 0..18446744073709551615, got -1"),
    ({"seed": -1}, ValueError, "seed must be in 0..18446744073709551615, got -1"),
    ({"seed": 2**64}, ValueError, "seed"),
    ({"start": -3}, ValueError, "start"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ({"temperature": float("nan")}, ValueError, "temperature"),
    ({"temperature": np.float32("inf")}, ValueError, "temperature must be positive and finite, got inf"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
    ({"labels": torch.tensor([0, 1])}, ValueError, "the model has no classes"),
    ({"known": IMAGES}, ValueError, "known and mask go together"),
    ({"mask": MASK}, ValueError, "known and mask go together"),
    ({"known": IMAGES.float(), "mask": MASK}, TypeError, "known: expected a tensor of uint8 levels, got torch.float32"),
    ({"known": IMAGES[:1], "mask": MASK}, ValueError, "known: expected 2 images, got 1"),
    ({"known": IMAGES + 4, "mask": MASK}, ValueError, "known: expected levels in 0..3, got 4..4"),
    ({"known": IMAGES, "mask": MASK.float()}, TypeError, "mask must be a bool tensor, got torch.float32"),
    ({"known": IMAGES, "mask": MASK.T}, ValueError, "mask must have shape"),
]
LABELS = [
    (None, ValueError, "the model is conditional: labels"),
    (torch.tensor([0.0, 1.0]), TypeError, "labels must be integers, got torch.float32"),
    (torch.tensor([0, 1, 2]), ValueError, r"labels must have shape \(2,\), got \(3,\)"),
    (torch.tensor([0, 5]), ValueError, "labels must be in 0..4, got 0..5"),
    (-1, ValueError, "labels must be in 0..4"),
    ("cat", TypeError, "labels must be an integer or a tensor of 2 integers, got 'cat'"),
]


@pytest.mark.parametrize("function", ["sampler", "naive"])
@pytest.mark.parametrize(
    ("options", "error", "message"), SAMPLE, ids=lambda v: str(sorted(v)) if isinstance(v, dict) else ""
)
def test_sample(options: dict, error: type[Exception], message: str, function: str) -> None:
    options = {"n": 2, **options}
    with pytest.raises(error, match=message):
        (Sampler(MODEL).sample if function == "sampler" else functools.partial(naive_sample, MODEL))(**options)


@pytest.mark.parametrize(
    ("labels", "error", "message"), LABELS, ids=["missing", "float", "shape", "range", "negative", "text"]
)
def test_labels(labels: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Sampler(LABELLED).sample(2, labels=labels)
    with pytest.raises(error, match=message):
        audit(LABELLED, IMAGES, labels=labels)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model",), TypeError, "model must be a torch.nn.Module, got str"),
        ((torch.nn.Conv2d(1, 4, 1),), ValueError, r"image_shape must be \(C, H, W\)"),
        ((torch.nn.Conv2d(1, 4, 1), (1, 0, 4)), ValueError, "image_shape"),
        ((torch.nn.Conv2d(1, 4, 1), (4,)), ValueError, r"image_shape must be \(C, H, W\) or \(H, W\) .*, got \(4,\)"),
        ((torch.nn.Conv2d(1, 4, 1), 28), ValueError, r"image_shape must be \(C, H, W\) .*, got 28"),
        ((torch.nn.Conv2d(1, 4, 1), (257, 3, 4)), ValueError, "image_shape must have at most 256 channels, got 257"),
        ((torch.nn.Conv2d(1, 4, 1), (1, 3, 4)), TypeError, "head must be a fastgen.sampling.heads.Head"),
        ((MODEL, (1, 3, 4), Categorical(5)), ValueError, "4 output channels"),
    ],
    ids=[
        "no module",
        "no shape",
        "bad shape",
        "row",
        "number as shape",
        "too many channels",
        "no head",
        "head of another size",
    ],
)
def test_sampler(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Sampler(*arguments)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True, "ten"])
def test_num_classes(num_classes: object) -> None:
    with pytest.raises(ValueError, match="num_classes must be a positive integer or None"):
        Sampler(MODEL, num_classes=num_classes)


@pytest.mark.parametrize("max_batch", [0, -1, 1.5, True])
def test_max_batch(max_batch: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"max_batch must be (an integer, got|in 1\.\.2147483647, got)"):
        Sampler(MODEL, max_batch=max_batch)


def test_batches_fit_the_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(_memory, "_CONTAINER_LIMITS", (str(tmp_path / "missing"), str(limit)))
    limit.write_text("max\n")
    assert _memory.total_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fitting = Sampler(MODEL).max_batch
    limit.write_text("4096\n")
    assert _memory.total_memory() == 4096 and Sampler(MODEL).max_batch == 1 < fitting
    limit.write_text(f"{4 * 7 * Sampler(MODEL).sample_bytes}\n")
    assert Sampler(MODEL).max_batch == 7  # in a quarter of it


def test_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which lets Triton's kernels run on the CPU
    with pytest.raises(ValueError, match="backend"):
        Sampler(MODEL, backend="tpu")
    with pytest.raises(RuntimeError, match="triton"):
        Sampler(MODEL, backend="triton")


def test_enclosing_backend_is_heard() -> None:
    with backends.backend("reference"):
        assert isinstance(Sampler(MODEL)._executor, ReferenceExecutor)
        assert not isinstance(Sampler(MODEL, backend="cpu")._executor, ReferenceExecutor)


def test_model_without_values() -> None:
    with pytest.raises(ValueError, match="model is on the meta device"):
        Sampler(copy.deepcopy(MODEL).to("meta"))


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-3, 1e300])
def test_extreme_temperature(temperature: float) -> None:
    expected = naive_sample(MODEL, 4, temperature=temperature)
    assert torch.equal(Sampler(MODEL).sample(4, temperature=temperature), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = models.PixelCNN(image_shape=(1, 3, 4), levels=4, num_filters=2, num_blocks=1, num_features=2)
    with torch.no_grad():
        model.features.weight[1, 2] = value
    with pytest.raises(ValueError, match="weights of module 'features' are not finite"):
        Sampler(model)


@pytest.mark.parametrize("model", [MODEL, LABELLED], ids=["one layer after the other", "gates"])
def test_model_that_is_not_a_number(model: torch.nn.Module) -> None:
    """Not taken for one whose masks are open."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"weights of module .* are not finite"):
        Sampler(model)


def test_codes_embedded_as_not_a_number() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(4, 1), torch.nn.Flatten(3), MODEL)
    with torch.no_grad():
        model[0].weight[2] = float("nan")
    with pytest.raises(ValueError, match="weights of module '0' are not finite"):
        Sampler(model, (1, 3, 4), Categorical(4, input_range=None))


def test_embedding_that_is_not_a_number() -> None:
    model = copy.deepcopy(LABELLED)
    with torch.no_grad():
        model.layers[0].label_bias.weight[3] = float("nan")
    sampler = Sampler(model)
    assert sampler.sample(2, labels=1).shape == (2, 1, 3, 4)
    with pytest.raises(ValueError, match="NaN of the labels"):
        sampler.sample(2, labels=3)


def test_constant_that_is_not_a_number() -> None:
    module = torch.nn.Sequential(MODEL, torch.nn.BatchNorm2d(4))
    module[1].running_mean[2] = float("nan")
    with pytest.raises(ValueError, match="a constant of module '1' holds NaN"):
        Sampler(module, (1, 3, 4), Categorical(4))


def test_audit_images() -> None:
    with pytest.raises(TypeError, match="images: expected a tensor of uint8 levels"):
        audit(MODEL, IMAGES.float())
    with pytest.raises(ValueError, match="images: expected shape"):
        audit(MODEL, IMAGES[:, :, :2])


@pytest.mark.parametrize("levels", [1, 65537, 2.0, True])
def test_head_levels(levels: object) -> None:
    with pytest.raises(ValueError, match=r"levels must be an integer in 2\.\.65536"):
        Categorical(levels)
    with pytest.raises(ValueError, match=r"levels must be an integer in 2\.\.256"):
        LogisticMixture(3, 1 if levels == 1 else 257)


def test_levels_beyond_bytes() -> None:
    """More than 256 levels: images are int64, in and out."""
    model = models.PixelCNN(image_shape=(1, 3, 4), levels=4, num_filters=2, num_blocks=1, num_features=2)
    model.output = torch.nn.Conv2d(2, 300, 1)
    given = {"image_shape": (1, 3, 4), "head": Categorical(300)}
    images = Sampler(model, **given).sample(2)
    assert images.dtype == torch.int64 and torch.equal(images, naive_sample(model, 2, **given))
    with pytest.raises(TypeError, match=r"known: expected a tensor of int64 levels, got torch\.uint8"):
        Sampler(model, **given).sample(2, known=IMAGES, mask=MASK)
    with pytest.raises(ValueError, match=r"known: expected levels in 0\.\.299, got .*300"):
        Sampler(model, **given).sample(2, known=IMAGES.long() + 300, mask=MASK)


def test_numbers_of_numpy() -> None:
    options = {"seed": np.uint64(2**63), "start": np.int32(3), "temperature": np.float32(0.5)}
    expected = naive_sample(MODEL, 2, seed=2**63, start=3, temperature=0.5)
    sampler = Sampler(MODEL)
    assert torch.equal(sampler.sample(np.int64(2), **options), expected)
    assert torch.equal(naive_sample(MODEL, np.int64(2), **options), expected)
    assert torch.equal(sampler.sample(torch.tensor(2), **options), expected)
    assert audit(MODEL, expected, **options).ok


def test_labels_as_one_number() -> None:
    sampler = Sampler(LABELLED)
    assert torch.equal(sampler.sample(3, labels=2), sampler.sample(3, labels=torch.tensor([2, 2, 2])))


def test_head_reprs_tell_them_apart() -> None:
    assert "Categorical(levels=7" in repr(Categorical(7)) and "Bernoulli" in repr(Bernoulli())
