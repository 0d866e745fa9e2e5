"""Weights in fewer bits: what is sampled is exactly the model with rounded weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fastgen
from fastgen import models
from fastgen.cli import shared
from fastgen.sampling import Categorical, Sampler, naive_sample
from fastgen.sampling.executors.tables import PACKINGS
from fastgen.sampling.plan import Plan
from fastgen.sampling.precision import PRECISIONS, powers, rounded, weights_in
from fastgen.sampling.schedule import Stage

from . import networks, test_levels, test_recurrent
from .attention_models import MODELS
from .test_attention import built, sampler_of

ROUNDED = [p for p in PRECISIONS if p != "fp32"]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    net = models.PixelCNNpp(image_shape=(3, 5, 4), levels=16, num_filters=7, num_blocks=1, num_mixtures=2)
    net.initialize(torch.randint(16, (16, 3, 5, 4), dtype=torch.uint8))
    return net.eval()


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_samples_are_those_of_rounded_weights(model: torch.nn.Module, backend: str, precision: str) -> None:
    drawn = Sampler(model, precision=precision, backend=backend).sample(5, seed=3)
    with weights_in(precision):
        assert torch.equal(drawn, naive_sample(model, 5, seed=3))


@pytest.mark.parametrize("precision", ROUNDED)
def test_audit_knows_the_precision(model: torch.nn.Module, precision: str) -> None:
    drawn = Sampler(model, precision=precision).sample(64)
    assert not torch.equal(drawn, Sampler(model).sample(64))
    for other in PRECISIONS:
        assert fastgen.audit(model, drawn, precision=other).ok == (other == precision)


@pytest.mark.parametrize("precision", ROUNDED)
def test_bits_per_dim_of_rounded_weights(model: torch.nn.Module, precision: str) -> None:
    images = Sampler(model).sample(8)
    plain = fastgen.bits_per_dim(model, images)
    of_rounded = fastgen.bits_per_dim(model, images, precision=precision)
    assert of_rounded == pytest.approx(plain, abs=0.02) and of_rounded != plain


def test_weights_take_fewer_bytes(model: torch.nn.Module) -> None:
    samplers = {p: Sampler(model, precision=p, backend="cpu") for p in PRECISIONS}
    fp32, bf16, int8 = (samplers[p].plan.weight_bytes for p in PRECISIONS)
    assert fp32 == 2 * bf16 == 4 * int8
    fp32, bf16, int8 = (samplers[p].weight_bytes for p in PRECISIONS)
    assert fp32 > bf16 > int8


def test_unknown_precision(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="precision must be 'fp32', 'bf16' or 'int8', got 'int4'"):
        Sampler(model, precision="int4")


def test_the_command_line_knows_all() -> None:
    assert str(PRECISIONS).replace("'", '"') in inspect.getsource(shared.add_precision)


def test_powers_are_the_least() -> None:
    largest = torch.cat(
        [torch.rand(1000) * 10.0 ** torch.randint(-25, 30, (1000,)), torch.tensor([127, 127.1, 63.5, 3e38])]
    )
    found = powers(largest)
    assert (torch.frexp(found)[0] == 0.5).all()
    assert (largest <= 127 * found.double()).all() and (largest > 127 * found.double() / 2).all()
    assert powers(torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.parametrize("columns", [(0,), (1,), (0, 2)])
def test_integers_of_each_column(columns: tuple[int, ...]) -> None:
    weight = torch.randn(5, 6, 7) * torch.rand(5, 6, 7).pow(4)
    found = rounded(weight, "int8", columns)
    largest = weight.abs().amax([d for d in range(3) if d not in columns], keepdim=True)
    integers = found / powers(largest)
    assert torch.equal(integers, integers.round()) and integers.abs().max() <= 127
    assert ((found - weight).abs() <= powers(largest) / 2).all()
    assert torch.equal(rounded(found, "int8", columns), found) and torch.equal(found.bfloat16().float(), found)
    half = (weight / 9000).half()  # whose powers would be subnormal
    assert torch.equal(rounded(half, "int8", columns), rounded(half.float(), "int8", columns).half())


def packings(plan: Plan, sampler: Sampler) -> list[str]:
    """Of the pixel steps with weights."""
    ordered = sorted(plan.steps, key=lambda s: (s.stage, s.rank))
    rows = zip(ordered, sampler._executor._tables.steps, strict=True)
    return [PACKINGS[row[-1]] for step, row in rows if step.stage == Stage.PIXEL and step.macs]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pixel_steps_read_what_was_asked_for(model: torch.nn.Module, precision: str) -> None:
    gated = models.GatedPixelCNN(image_shape=(1, 3, 4), levels=5, num_filters=8, num_blocks=2).eval()
    for module in (model, gated):
        sampler = Sampler(module, precision=precision, backend="cpu")
        found = packings(Sampler(module, precision=precision, backend="reference").plan, sampler)
        assert found and set(found) == {{"fp32": "floats", "bf16": "bfloat16", "int8": "int8"}[precision]}


def foreign(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    network, channels, num_classes = networks.make(name, 4, 5)
    given = {"image_shape": (channels, 4, 5), "head": Categorical(networks.LEVELS), "num_classes": num_classes}
    return network, given, {} if num_classes is None else {"labels": torch.arange(3) % num_classes}


def recurrent(layer: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    given = {"image_shape": (3, 4), **test_recurrent.GIVEN}
    return test_recurrent.make(test_recurrent.Tokens, layer), given, {}


def levels(run: Callable) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    return *test_levels.make(run, (7, 6)), {"labels": torch.tensor([2, 0, 1])}


def row_lstm() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    torch.manual_seed(0)
    model = models.PixelRNN(image_shape=(1, 3, 4), levels=5, num_filters=6, num_blocks=2, num_features=9).eval()
    return model, {"image_shape": model.image_shape, "head": model.head}, {}


OTHERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any], dict[str, Any]]]] = {
    **{name: lambda name=name: foreign(name) for name in networks.NETWORKS},
    **{layer: lambda layer=layer: recurrent(layer) for layer in ("two lstms", "gru")},
    **{run.__name__: lambda run=run: levels(run) for run in test_levels.CASES},
    "row lstm": row_lstm,
}


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
def test_other_networks(build: Callable, precision: str) -> None:
    network, given, options = build()
    drawn = Sampler(network, **given, precision=precision, backend="cpu").sample(3, **options)
    with weights_in(precision):
        assert torch.equal(drawn, naive_sample(network, 3, **given, **options))


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("name", ["rosinality conditional", "pixel gpt line", "adaptive", "shifted logits"])
def test_attention(name: str, precision: str) -> None:
    """Of layers that PyTorch would run as one operator; by matrices that are expanded over the batch."""
    network, given, options = built(MODELS[name])
    drawn = sampler_of(MODELS[name], network, given, precision=precision).sample(3, **options)
    with weights_in(precision):
        assert torch.equal(drawn, naive_sample(network, 3, **given, **options))


class Written(torch.nn.Module):
    """Attention of one head, as products of what depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(5, 15), torch.nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=2)
        return self.out(torch.softmax(q @ k.transpose(1, 2), 2) @ v)


@pytest.mark.parametrize(
    "network",
    [
        Written(),
        torch.nn.TransformerEncoderLayer(5, 1, 8, batch_first=True),
        torch.nn.LSTM(5, 6, num_layers=2, batch_first=True),
        torch.nn.GRU(5, 6, batch_first=True),
        torch.nn.Sequential(torch.nn.Unflatten(2, (1, 5)), torch.nn.Conv2d(7, 12, 1), fastgen.nn.RowLSTM(12, 4)),
    ],
    ids=lambda network: type(network).__name__,
)
@torch.no_grad()
def test_weights_alone_are_rounded(network: torch.nn.Module) -> None:
    """Not what attention multiplies, were it of one sample and one head; and those of recurrent layers are."""
    torch.manual_seed(0)
    x, rounded = torch.randn(1, 7, 5), copy.deepcopy(network.eval())
    for parameter in rounded.parameters():
        if parameter.dim() > 1:
            parameter.copy_(parameter.bfloat16())
    with weights_in("bf16"):
        found = network(x)
    for a, b, plain in zip(tree_leaves(found), tree_leaves(rounded(x)), tree_leaves(network(x)), strict=True):
        torch.testing.assert_close(a, b)
        assert (a - plain).abs().max() > 1e-5  # float32 alone differs by 1e-7
