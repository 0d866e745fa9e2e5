"""Classifier-free guidance: the draws are those of a network that computes the guided logits by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen import models
from fastgen.sampling import Bernoulli, Categorical, LogisticMixture, Sampler, audit, naive_sample

from .networks import LEVELS
from .test_key_masks import ATTEND, GIVEN, TEXTS, TOKENS, network

CLASSES, NOTHING = 4, 3
LABELS = torch.tensor([0, 1, 2, 0, 3])
SCALES = [2.5, 0.0, -1.0]


class Guided(nn.Module):
    """As people write it, of two passes."""

    def __init__(self, net: nn.Module, scale: float, null: Tensor):
        super().__init__()
        self.net, self.scale, self.null = net, scale, null

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        null = self.net(x, self.null.expand(given.shape))
        return null + self.scale * (self.net(x, given) - null)


def labelled(image_shape: tuple[int, int, int] = (2, 4, 3)) -> nn.Module:
    torch.manual_seed(1)
    model = models.GatedPixelCNN(
        image_shape=image_shape, levels=LEVELS, num_filters=6, num_blocks=2, num_classes=CLASSES
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


class Binary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = labelled(image_shape=(1, 4, 3))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.net(x, labels)[:, :1]


class Forbidding(nn.Module):
    """Level 1; 2 of nothing; 3 of a label."""

    def __init__(self) -> None:
        super().__init__()
        self.net = labelled()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        level, label = torch.arange(2 * LEVELS).view(1, -1, 1, 1) % LEVELS, labels.view(-1, 1, 1, 1)
        forbidden = (level == 1) | ((level == 2) & (label == NOTHING)) | ((level == 3) & (label == 0))
        return self.net(x, labels) + torch.where(forbidden, -torch.inf, 0.0)


def guided(model: nn.Module, scale: float) -> tuple[nn.Module, dict[str, Any]]:
    given = {"image_shape": model.image_shape, "head": model.head, "num_classes": CLASSES}
    return Guided(model, scale, torch.tensor(NOTHING)), given


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_labels(scale: float, backend: str) -> None:
    model = labelled()
    options = {"labels": LABELS, "guidance_scale": scale, "null_labels": NOTHING, "seed": 2, "temperature": 0.8}
    images = Sampler(model, backend=backend).sample(5, **options)
    by_itself, given = guided(model, scale)
    assert torch.equal(images, naive_sample(by_itself, 5, labels=LABELS, seed=2, temperature=0.8, **given))
    assert torch.equal(images, naive_sample(model, 5, **options))
    assert audit(model, images, **options).ok
    assert not audit(model, images, **{**options, "guidance_scale": scale + 4}).ok
    assert not torch.equal(images, Sampler(model).sample(5, labels=LABELS, seed=2, temperature=0.8))


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.9}])
def test_truncation_is_of_guided_logits(options: dict[str, Any]) -> None:
    model = labelled()
    by_itself, given = guided(model, 3.0)
    expected = naive_sample(by_itself, 5, labels=LABELS, **options, **given)
    options |= {"labels": LABELS, "guidance_scale": 3.0, "null_labels": NOTHING}
    assert torch.equal(Sampler(model, backend="cpu").sample(5, **options), expected)
    assert audit(model, expected, **options).ok


def test_bernoulli() -> None:
    given = {"image_shape": (1, 4, 3), "head": Bernoulli(), "num_classes": CLASSES}
    options = {"labels": LABELS, "guidance_scale": 3.0, "null_labels": torch.tensor([3, 3, 0, 0, 1])}
    expected = naive_sample(Binary(), 5, **given, **options)
    for backend in ("reference", "cpu"):
        assert torch.equal(Sampler(Binary(), **given, backend=backend).sample(5, **options), expected)


def test_completion() -> None:
    """Both streams have the known pixels."""
    model, mask = labelled(), torch.rand(5, 4, 3) < 0.5
    known = torch.randint(LEVELS, (5, 2, 4, 3), dtype=torch.uint8)
    options = {"labels": LABELS, "guidance_scale": 2.0, "null_labels": NOTHING, "mask": mask}
    images = Sampler(model).sample(5, known=known, **options)
    assert torch.equal(images, naive_sample(model, 5, known=known, **options))
    assert torch.equal(images[mask[:, None].expand(images.shape)], known[mask[:, None].expand(images.shape)])
    assert audit(model, images, **options).ok


@pytest.mark.parametrize("attend", ["fill", "fused", "together", "decoder"])
def test_texts(attend: str) -> None:
    """A text of nothing but padding; where attention needs some, of another word."""
    net = network(ATTEND[attend])
    null = torch.zeros(TOKENS, dtype=torch.int64) if attend in ("fill", "fused") else torch.full((TOKENS,), 3)
    options = {"condition": TEXTS, "guidance_scale": 1.7, "seed": 4}
    expected = naive_sample(net, 4, **GIVEN, **options, null_condition=null[None])
    assert torch.equal(expected, naive_sample(Guided(net, 1.7, null), 4, **GIVEN, condition=TEXTS, seed=4))
    for backend in ("reference", "cpu"):
        sampler = Sampler(net, **GIVEN, condition=TEXTS[2], backend=backend)
        assert torch.equal(sampler.sample(4, **options, null_condition=null), expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("max_batch", [1, 2, 5, None])
def test_batches_and_threads_do_not_matter(threads: int, max_batch: int | None) -> None:
    model = labelled()
    options = {"guidance_scale": 2.0, "null_labels": NOTHING, "seed": 6}
    expected = Sampler(model, backend="cpu").sample(5, labels=LABELS, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sampler = Sampler(model, backend="cpu", max_batch=max_batch)
        assert torch.equal(sampler.sample(5, labels=LABELS, **options), expected)
        assert torch.equal(sampler.sample(2, labels=LABELS[3:], start=3, **options), expected[3:])
    finally:
        torch.set_num_threads(before)


def test_levels_that_are_forbidden() -> None:
    """By both, by nothing alone, and by a label: differences of infinities are not numbers."""

    given = {"image_shape": (2, 4, 3), "head": Categorical(LEVELS), "num_classes": CLASSES}
    options = {"labels": LABELS, "guidance_scale": 2.0, "null_labels": NOTHING}
    expected = naive_sample(Forbidding(), 5, **given, **options)
    assert not (expected == 1).any() and not (expected == 2).any()
    assert not (expected[LABELS == 0] == 3).any() and (expected[LABELS != 0] == 3).any()
    for backend in ("reference", "cpu"):
        assert torch.equal(Sampler(Forbidding(), **given, backend=backend).sample(5, **options), expected)


def test_scale_of_one_is_none() -> None:
    model = labelled()
    sampler = Sampler(model)
    expected = sampler.sample(5, labels=LABELS)
    assert torch.equal(sampler.sample(5, labels=LABELS, guidance_scale=1, null_labels=NOTHING), expected)


def mixture() -> nn.Module:
    return models.PixelCNNpp(image_shape=(3, 4, 4), num_filters=4, num_blocks=1, num_classes=CLASSES)


WRONG: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "no null": (labelled, {"guidance_scale": 2.0}, ValueError, "needs null_labels or a null_condition"),
    "text": (
        labelled,
        {"guidance_scale": "2", "null_labels": 3},
        TypeError,
        "guidance_scale must be a number, got str",
    ),
    "infinite": (
        labelled,
        {"guidance_scale": torch.inf, "null_labels": 3},
        ValueError,
        "guidance_scale must be finite",
    ),
    "no class": (labelled, {"guidance_scale": 2.0, "null_labels": 4}, ValueError, r"labels must be in 0\.\.3, got 4"),
    "condition": (
        labelled,
        {"guidance_scale": 2.0, "null_condition": torch.zeros(3)},
        ValueError,
        "null_condition must be nothing, as the Sampler's example is, got a tensor",
    ),
    "mixture": (mixture, {"guidance_scale": 2.0, "null_labels": 3}, ValueError, "whose parameters are not logits"),
}


@pytest.mark.parametrize(("build", "options", "error", "text"), WRONG.values(), ids=WRONG)
def test_bad_arguments(build: Callable, options: dict[str, Any], error: type[Exception], text: str) -> None:
    sampler = Sampler(build())
    with pytest.raises(error, match=text):
        sampler.sample(5, labels=LABELS, **options)
    assert isinstance(sampler.plan.head, LogisticMixture | Categorical)
