"""Draws of the likeliest levels: the definition by loops, executors against the naive loop, the audit, frequencies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import models
from fastgen.sampling import Bernoulli, Categorical, LogisticMixture, Sampler, audit, naive_sample
from fastgen.sampling.truncation import EVERY_LEVEL, make_truncation

MODEL = models.GatedPixelCNN(image_shape=(1, 5, 4), levels=300, embedding_dim=6, num_filters=8, num_blocks=2)
with torch.no_grad():
    for weight in MODEL.parameters():
        weight.mul_(3)
OPTIONS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 299, "temperature": 0.4},
    {"top_k": 1000},
    {"top_p": 0.001},
    {"top_p": 0.6},
    {"top_p": 0.97, "temperature": 2.0},
    {"top_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def by_loops(p: list[float], top_k: int | None, top_p: float | None) -> list[bool]:
    """Which of some probabilities are kept."""
    kept = [True] * len(p)
    if top_k is not None:
        least = sorted(p, reverse=True)[min(top_k, len(p)) - 1]
        kept = [value >= least for value in p]
    if top_p is not None:
        total, sum_, least = sum(v for v, keep in zip(p, kept, strict=True) if keep), 0.0, 0.0
        for least in sorted((v for v, keep in zip(p, kept, strict=True) if keep), reverse=True):
            sum_ += least
            if sum_ >= top_p * total:
                break
        kept = [keep and value >= least for value, keep in zip(p, kept, strict=True)]
    return kept


@pytest.mark.parametrize("top_k", [None, 1, 2, 5, 8, 9])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.3712, 0.8973, 1.0])
def test_definition(top_k: int | None, top_p: float | None) -> None:
    """Quarters, of which several are alike."""
    weights = torch.randint(1, 9, (50, 2, 8, 3), dtype=torch.float64)
    p = weights / weights.sum(2, keepdim=True)
    found = make_truncation(top_k, top_p).of(p) if make_truncation(top_k, top_p) else p
    torch.testing.assert_close(found.sum(2), torch.ones_like(found[:, :, 0]))
    for n in range(50):
        for c in range(2):
            for x in range(3):
                kept = by_loops(weights[n, c, :, x].tolist(), top_k, top_p)
                assert (found[n, c, :, x] > 0).tolist() == kept
                ratio = found[n, c, :, x][kept] / p[n, c, :, x][kept]
                torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@every_option
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equals_naive_loop(options: dict, backend: str) -> None:
    sampler = Sampler(MODEL, backend=backend, max_batch=3)
    images = sampler.sample(7, seed=3, **options)
    assert torch.equal(images, naive_sample(MODEL, 7, seed=3, **options))
    assert torch.equal(images[4:], sampler.sample(3, seed=3, start=4, **options))
    assert audit(MODEL, images, seed=3, **options).ok


def logits_of(images: Tensor) -> Tensor:
    with torch.no_grad():
        return MODEL(MODEL.head.encode(images))


def test_what_is_drawn_is_among_the_likeliest() -> None:
    sampler = Sampler(MODEL)
    for top_k in (1, 4):
        images = sampler.sample(40, top_k=top_k)
        rank = (logits_of(images) > logits_of(images).gather(1, images)).sum(1)
        assert rank.max() == top_k - 1
    assert torch.equal(sampler.sample(3, top_k=1), sampler.sample(3, seed=9, top_k=1))
    images = sampler.sample(40, top_p=0.5)
    p = logits_of(images).double().softmax(1)
    likelier = torch.where(p > p.gather(1, images), p, 0.0).sum(1)
    assert likelier.max() < 0.5


def test_the_audit_tells_other_truncations() -> None:
    images = Sampler(MODEL).sample(8, seed=1, top_k=50, top_p=0.9)
    assert audit(MODEL, images, seed=1, top_k=50, top_p=0.9).ok
    for wrong in ({}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 50, "top_p": 0.9, "temperature": 0.9}):
        assert not audit(MODEL, images, seed=1, **wrong).ok


class Same(nn.Module):
    """The same logits for every pixel."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.view(1, -1, 1, 1) + 0 * F.pad(x, (0, 0, 1, -1))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_frequencies(backend: str) -> None:
    p = torch.tensor([0.05, 0.3, 0.1, 0.3, 0.25])
    sampler = Sampler(Same(p.log()), (1, 20, 20), Categorical(5), backend=backend)
    for options, kept in (
        ({"top_k": 1}, [1, 3]),  # both are the likeliest
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_p": 0.55}, [1, 3]),
        ({"top_p": 0.86}, [1, 2, 3, 4]),
        ({"top_k": 3, "top_p": 0.9}, [1, 3, 4]),
        ({"top_p": 0.5, "top_k": 4}, [1, 3]),
    ):
        counts = torch.bincount(sampler.sample(10, **options).flatten().long(), minlength=5)
        expected = torch.zeros(5)
        expected[kept] = p[kept] / p[kept].sum()
        error = (expected * (1 - expected) / 4000).sqrt()
        assert ((counts / 4000 - expected).abs() <= 4.5 * error).all(), options


def test_ties_that_rounding_decides() -> None:
    """Logits that differ by less than an executor may err: the audit takes either."""
    logits = torch.zeros(6)
    logits[2] = 1e-6
    given = {"image_shape": (1, 8, 8), "head": Categorical(6)}
    images = Sampler(Same(logits), **given).sample(4)  # of all six: as if all were alike
    report = audit(Same(logits), images, **given, top_k=1)
    assert report.ok and report.ties > 0
    logits[2] = 1e-3
    assert not audit(Same(logits), images, **given, top_k=1).ok


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k must be in 1..2147483647, got 0"),
        ({"top_k": 1.0}, TypeError, "top_k must be an integer, got float"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.01}, ValueError, "top_p must be above 0 and at most 1, got 1.01"),
        ({"top_p": float("nan")}, ValueError, "top_p must be above 0"),
        ({"top_p": "all"}, TypeError, "top_p must be a number, got str"),
    ],
    ids=str,
)
def test_arguments(options: dict, error: type[Exception], message: str) -> None:
    for draw in (Sampler(MODEL).sample, lambda n, **given: naive_sample(MODEL, n, **given)):
        with pytest.raises(error, match=message):
            draw(1, **options)


@pytest.mark.parametrize("head", [Bernoulli(), LogisticMixture(2, 5)], ids=repr)
def test_heads_without_a_choice(head: Bernoulli | LogisticMixture) -> None:
    module, given = nn.Conv2d(1, head.num_params(1), 1), {"image_shape": (1, 2, 2), "head": head}
    nn.init.zeros_(module.weight)
    with pytest.raises(ValueError, match="top_k and top_p are for Categorical heads"):
        Sampler(module, **given).sample(1, top_k=1)
    assert torch.equal(Sampler(module, **given).sample(2, top_p=1.0), naive_sample(module, 2, **given))


def test_head() -> None:
    head = Categorical(3)
    kept = head.keeping(make_truncation(1, None))
    assert head.truncation is EVERY_LEVEL and kept.truncation.top_k == 1
    params = torch.tensor([0.0, 2.0, 1.0]).view(1, 3, 1, 1)
    assert head.cdf(params)[0, 0, 0].item() > 0
    assert kept.cdf(params).flatten().tolist() == [0.0, 1.0, 1.0]
    levels = torch.tensor([1]).view(1, 1, 1, 1)
    assert torch.equal(kept.log_prob(params, levels), head.log_prob(params, levels))
