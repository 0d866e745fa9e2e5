"""Bits per dimension of networks that have no likelihood of their own, by their heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import models
from fastgen.sampling import Bernoulli, Categorical, LogisticMixture, NextToken

from .sampling.test_next_token import GPT

CODES = Categorical(5, input_range=None)


class Prior(nn.Module):
    """Codes [N, H, W], labels [N] and a condition [N, 5, H, W] -> logits [N, 5, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.classes = nn.Embedding(5, 5), nn.Embedding(3, 5)

    def forward(self, codes: Tensor, labels: Tensor, condition: Tensor) -> Tensor:
        left = F.pad(self.embedding(codes), (0, 0, 1, -1)).permute(0, 3, 1, 2)
        return left + self.classes(labels)[:, :, None, None] + condition


def test_a_network_with_labels_and_a_condition() -> None:
    torch.manual_seed(0)
    net, codes, labels = Prior(), torch.randint(5, (7, 1, 3, 4), dtype=torch.uint8), torch.randint(3, (7,))
    condition = torch.randn(7, 5, 3, 4)
    given = {"image_shape": (3, 4), "head": CODES, "num_classes": 3, "condition": condition}
    bits = [fastgen.bits_per_dim(net, codes, labels, **given, batch_size=size) for size in (2, 64)]
    with torch.no_grad():
        nats = F.cross_entropy(net(codes[:, 0].long(), labels, condition), codes[:, 0].long())
    assert bits[0] == pytest.approx(nats.item() / math.log(2)) and bits[1] == pytest.approx(bits[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_likelihood_of_a_model_is_the_same_by_its_head(precision: str) -> None:
    model = models.GatedPixelCNN(image_shape=(2, 3, 4), levels=6, num_filters=4, num_blocks=1, num_classes=3)
    images, labels = torch.randint(6, (3, 2, 3, 4), dtype=torch.uint8), torch.tensor([2, 0, 1])
    own = fastgen.bits_per_dim(model, images, labels, precision=precision)
    assert fastgen.bits_per_dim(model, images, labels, head=model.head, precision=precision) == pytest.approx(own)


@pytest.mark.parametrize(("head", "channels"), [(Bernoulli(), 2), (LogisticMixture(3), 3), (LogisticMixture(2), 1)])
def test_every_head(head: Any, channels: int) -> None:
    images = torch.randint(head.levels, (2, channels, 3, 4), dtype=torch.uint8)
    net = nn.Conv2d(channels, head.num_params(channels), 1)
    with torch.no_grad():
        nats = -head.log_prob(net(head.encode(images)), images).sum() / images.numel()
    bits = fastgen.bits_per_dim(net, images, image_shape=(channels, 3, 4), head=head)
    assert bits == pytest.approx(nats.item() / math.log(2))


def test_a_language_model() -> None:
    torch.manual_seed(0)
    net = NextToken(GPT(), image_shape=(2, 3), levels=7, start=16)
    codes = torch.randint(7, (3, 1, 2, 3), dtype=torch.uint8)
    tokens = torch.cat([torch.full((3, 1), 16), codes.flatten(1)], 1)
    with torch.no_grad():
        nats = F.cross_entropy(net.model(tokens)[:, :-1, :7].transpose(1, 2), codes.flatten(1).long())
    assert fastgen.bits_per_dim(net, codes) == pytest.approx(nats.item() / math.log(2))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"head": None},
            TypeError,
            r"expected one with a likelihood \(log_prob\), or a network and its head, got Prior",
        ),
        ({"image_shape": (4, 4)}, ValueError, "images"),
        (
            {"condition": torch.zeros(2, 5, 3, 4)},
            ValueError,
            r"condition must have shape \(7, ...\), .* got \(2, 5, 3, 4\)",
        ),
        ({"num_classes": 2}, ValueError, "labels"),
        ({"batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"image_shape": (3, 4), "head": CODES, "num_classes": 3, "condition": torch.zeros(7, 5, 3, 4)} | changed
    with pytest.raises(error, match=message):
        fastgen.bits_per_dim(Prior(), torch.zeros(7, 1, 3, 4, dtype=torch.uint8), torch.full((7,), 2), **given)
