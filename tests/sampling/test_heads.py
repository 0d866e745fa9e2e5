"""Heads against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen.sampling import Bernoulli, Categorical

HEADS = [Categorical(2), Categorical(5), Categorical(256), Bernoulli()]


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_probabilities(head: Categorical) -> None:
    """log_prob is the log of the steps of the cumulative distribution, which ends at one."""
    params = torch.randn(2, 3 * head.params_per_channel, 2, 2, dtype=torch.float64)
    cdf = head.cdf(params)
    assert cdf.shape == (2, 3, head.levels, 2, 2) and (cdf[:, :, -1] == 1).all()
    steps = torch.diff(cdf, dim=2, prepend=torch.zeros_like(cdf[:, :, :1]))
    for level in (0, 1, head.levels - 1):
        images = torch.full((2, 3, 2, 2), level)
        torch.testing.assert_close(head.log_prob(params, images).exp(), steps[:, :, level], rtol=1e-9, atol=1e-12)


def test_closed_forms() -> None:
    logits = torch.tensor([0.3, -1.2, 2.0])
    expected = logits.double().softmax(0)
    got = Categorical(3).log_prob(logits.view(1, 3, 1, 1), torch.tensor([2]).view(1, 1, 1, 1))
    assert got.item() == pytest.approx(math.log(expected[2]), rel=1e-6)
    got = Bernoulli().log_prob(torch.tensor(0.7).view(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    assert got.item() == pytest.approx(-math.log1p(math.exp(-0.7)), rel=1e-6)


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_draw_inverts_the_distribution(head: Categorical) -> None:
    params = torch.randn(1, head.params_per_channel, 1, 1, dtype=torch.float64)
    cdf = head.cdf(params)[0, 0, :, 0, 0]
    for level in range(min(head.levels, 6)):
        low = cdf[level - 1].item() if level else 0.0
        middle = torch.full((1, 1, 1, 1), (low + cdf[level].item()) / 2, dtype=torch.float64)
        assert head.draw(params, middle).item() == level


def test_extreme_logits() -> None:
    head = Categorical(4)
    params = torch.tensor([-1e30, 1e30, 0.0, -1e30]).view(1, 4, 1, 1)
    for u in (1e-7, 0.5, 1 - 1e-7):
        assert head.draw(params, torch.full((1, 1, 1, 1), u)).item() == 1


def test_encoding_spans_the_range() -> None:
    assert Categorical(3).encoding().tolist() == [-1.0, 0.0, 1.0]
    assert Categorical(256, input_range=(0.0, 1.0)).encoding()[255].item() == 1.0
    assert Bernoulli().encode(torch.tensor([[1, 0]], dtype=torch.uint8)).tolist() == [[1.0, 0.0]]
