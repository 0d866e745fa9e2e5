"""Scores against closed forms, scipy, and repeated sampling."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from fastgen import scores
from fastgen.cli import main

pytest.importorskip("torchmetrics", reason="the extra 'scores' is not installed")


def whitened(n, d, seed=0):
    """Features [n, d] whose sample mean is 0 and whose sample covariance is the identity, exactly."""
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T


def test_frechet_distance_of_known_moments():
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    d = 5
    m, s1, s2 = torch.linspace(-1, 2, d), torch.linspace(0.5, 3, d), torch.linspace(2, 0.1, d)
    expected = float((m.double() ** 2).sum() + ((s1.double() - s2.double()) ** 2).sum())
    found = scores.frechet_distance(whitened(50, d) * s1 + m, whitened(40, d, 1) * s2)
    assert found.value == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_against_scipys_matrix_root():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 7)) @ rng.normal(size=(7, 7)), rng.normal(size=(45, 7)) @ rng.normal(size=(7, 7)) + 1
    a, b = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert scores.frechet_distance(torch.tensor(x), torch.tensor(y)).value == pytest.approx(expected, rel=1e-8)


def test_a_sample_is_at_no_distance_from_itself():
    x = whitened(30, 4)
    assert scores.frechet_distance(x, x).value == pytest.approx(0, abs=1e-9)


def test_inception_score_of_sure_predictions_is_the_number_of_classes():
    logits = 100.0 * torch.eye(6).repeat(10, 1)
    assert scores.inception_score(logits).value == pytest.approx(6)
    assert scores.inception_score(torch.zeros(20, 6)).value == pytest.approx(1)
    assert scores.inception_score(logits[:1].repeat(30, 1)).value == pytest.approx(1)


def test_inception_score_is_the_exponential_of_mutual_information():
    logits = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(1)
    expected = sum(float(row @ (row.log() - p.mean(0).log())) for row in p) / 40
    assert scores.inception_score(logits).value == pytest.approx(math.exp(expected))


def test_jackknife_of_the_inception_score_by_hand():
    logits = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    groups = [[0, 1, 2], [3, 4], [5, 6]]  # 7 in 3 parts
    left = [scores.inception_score(logits[[i for i in range(7) if i not in out]], splits=2).value for out in groups]
    found = scores.inception_score(logits, splits=3)
    assert found.error == pytest.approx(math.sqrt(2 / 3 * sum((x - sum(left) / 3) ** 2 for x in left)))
    assert found.bias == pytest.approx(2 * (sum(left) / 3 - found.value))


def test_error_and_bias_are_those_of_repeated_sampling():
    """200 pairs of samples of two normal distributions, whose distance is |m|^2 + sum (s1 - s2)^2."""
    generator = torch.Generator().manual_seed(0)
    d, truth = 4, 4 * 0.25 + 4 * 0.25

    def draw(n):
        return torch.randn(n, d, dtype=torch.float64, generator=generator)

    found = [scores.frechet_distance(draw(120), 1.5 * draw(150) + 0.5, splits=8) for _ in range(200)]
    values = torch.tensor([estimate.value for estimate in found])
    errors = torch.tensor([estimate.error for estimate in found])
    biases = torch.tensor([estimate.bias for estimate in found])
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.15)
    standard_error = float(values.std()) / math.sqrt(len(found))
    assert values.mean() - truth > 4 * standard_error  # it is biased
    assert abs((values - biases).mean() - truth) < 3 * standard_error


def test_the_callers_random_numbers_are_left_alone(recwarn):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    scores.inception_score(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(1), expected)
    assert not [w for w in recwarn if "torchmetrics" in str(w.filename)]


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (scores.Estimate(12.3456, 0.4, 0.0), "12.35 ± 0.40"),
        (scores.Estimate(8.97654, 0.0123, 0.0), "8.977 ± 0.012"),
        (scores.Estimate(1.0, 0.0, 0.0), "1.00 ± 0.00"),
    ],
)
def test_in_words(estimate, text):
    assert str(estimate) == text


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: scores.frechet_distance(x, x[:, :2]), ValueError, "real and fake: expected as many features"),
        (lambda x: scores.frechet_distance(x.int(), x), TypeError, "real: expected a floating point tensor .*int32"),
        (lambda x: scores.frechet_distance(x, x[0]), ValueError, r"fake: expected shape \[N, D\], got \[3\]"),
        (lambda x: scores.frechet_distance(x, x * math.nan), ValueError, "fake: expected finite values"),
        (lambda x: scores.inception_score(x[:0]), ValueError, r"logits: expected shape \[N, D\], got \[0, 3\]"),
        (lambda x: scores.inception_score(x, splits=20), ValueError, "splits: expected an integer in 2..19 .*got 20"),
        (lambda x: scores.inception_score(x, splits=1), ValueError, "splits: .*got 1"),
        (lambda x: scores.inception_score([1.0]), TypeError, "logits: .*got list"),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.zeros(20, 3))


def test_without_torchmetrics(monkeypatch, capsys):
    for name in ("torchmetrics", "torchmetrics.image", "torchmetrics.image.fid"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=r"scores need torchmetrics: pip install 'fastgen\[scores\]'"):
        scores.inception_score(torch.zeros(20, 3))
    with pytest.raises(RuntimeError, match="scores need torchmetrics"):  # now, not after the first steps of a training
        scores.scorer(None, torch.zeros(20, 1, 8, 8, dtype=torch.uint8), 17)
    assert main("score nothing.safetensors --data digits".split()) == 2  # before the model is looked for
    assert "scores need torchmetrics" in capsys.readouterr().err
