"""What the outputs of a network may be: logits in several orders, log-probabilities, but no probabilities."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.sampling import Bernoulli, Categorical, LogisticMixture, Sampler, UnsupportedModel, audit, naive_sample

from .networks import LEVELS, make


class Ends(nn.Module):
    """Three colours in sequence, and whatever is done to their logits [N, 3 * LEVELS, H, W]."""

    def __init__(self, end: Callable[[Tensor], Tensor], name: str = "colours") -> None:
        super().__init__()
        self.network, *_ = make(name, 5, 4)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.network(x))


def levels_first(logits: Tensor) -> Tensor:
    """[N, LEVELS, 3, H, W], as F.cross_entropy takes them."""
    return logits.unflatten(1, (3, LEVELS)).transpose(1, 2)


def levels_last(logits: Tensor) -> Tensor:
    """Log-probabilities of [N, H, W, 3, LEVELS], flattened to channels again."""
    last = logits.unflatten(1, (3, LEVELS)).permute(0, 3, 4, 1, 2)
    return F.log_softmax(last, dim=-1).flatten(3).permute(0, 3, 1, 2)


def one_by_one(logits: Tensor) -> Tensor:
    """A head for each colour."""
    return torch.stack([F.log_softmax(part, dim=1) for part in logits.chunk(3, dim=1)], dim=2)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "end",
    [
        levels_first,
        levels_last,
        one_by_one,
        lambda x: F.log_softmax(levels_first(x), dim=1),
        lambda x: torch.cat([F.log_softmax(x[:, :LEVELS], 1), x[:, LEVELS:]], 1),
        lambda x: torch.cat([F.log_softmax(F.pad(part, (1, 0)), 1)[..., 1:] for part in x.chunk(3, 1)], 1),
    ],
    ids=["levels first", "levels last", "one by one", "log-probabilities", "of one colour", "cropped"],
)
def test_orders_of_logits(end: Callable, backend: str) -> None:
    network, given = Ends(end).eval(), {"image_shape": (3, 5, 4), "head": Categorical(LEVELS)}
    images = Sampler(network, **given, backend=backend).sample(4, seed=2)
    assert torch.equal(images, Sampler(network.network, **given).sample(4, seed=2))
    assert torch.equal(images, naive_sample(network, 4, **given, seed=2))
    assert audit(network, images, **given, seed=2).ok


class Returns(nn.Module):
    """Logits [N, 3 * LEVELS, H, W] beside other things, which the sampler has no use for."""

    def __init__(self, returned: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.network, *_ = make("colours", 5, 4)
        self.returned = returned

    def forward(self, x: Tensor) -> object:
        return self.returned(self.network(x), x)


Pair = collections.namedtuple("Pair", ["logits", "loss"])


@dataclass
class Output:
    logits: Tensor | None
    hidden: tuple


class ModelOutput(collections.OrderedDict):
    """Hugging Face's: a mapping whose entries are attributes, too."""

    def __init__(self, **entries: object) -> None:
        super().__init__(entries)
        self.__dict__.update(entries)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "returned",
    [
        lambda y, x: (y, None),
        lambda y, x: [x.mean(1), y],
        lambda y, x: (y, (y, [y])),
        lambda y, x: (torch.tensor(0.5), {"kept": y}, levels_first(y), y[:, 1:]),
        lambda y, x: Pair(y, torch.zeros(())),
        lambda y, x: (y,),
        lambda y, x: {"hidden": y + 1, "logits": y},
        lambda y, x: ModelOutput(loss=None, logits=levels_first(y), hidden_states=(y, x)),
        lambda y, x: MappingProxyType({"logits": y}),
        lambda y, x: Output(y, (y, y)),
    ],
    ids=["no loss", "second", "caches", "levels first", "named", "alone", "keys", "output", "mapping", "dataclass"],
)
def test_logits_beside_other_things(returned: Callable, backend: str) -> None:
    network, given = Returns(returned).eval(), {"image_shape": (3, 5, 4), "head": Categorical(LEVELS)}
    images = Sampler(network, **given, backend=backend).sample(4, seed=2)
    assert torch.equal(images, Sampler(network.network, **given).sample(4, seed=2))
    assert torch.equal(images, naive_sample(network, 4, **given, seed=2))
    report = audit(network, images, **given, seed=2)
    assert report.ok and report == audit(network.network, images, **given, seed=2)
    assert not audit(network, (images + 1) % LEVELS, **given, seed=2).ok  # in float64, too


def test_logits_of_a_single_colour_in_a_tuple() -> None:
    """Images of one channel: [N, levels, 1, H, W] and [N, levels, H, W] both are logits."""
    logits = nn.Sequential(nn.ZeroPad2d((0, 0, 1, -1)), nn.Conv2d(1, LEVELS, 1))
    for returned in (lambda y: (y, None), lambda y: (None, y.unsqueeze(2))):
        network = nn.Module()
        network.logits, network.forward = logits, lambda x, returned=returned: returned(logits(x))
        given = {"image_shape": (1, 5, 4), "head": Categorical(LEVELS)}
        images = Sampler(network, **given).sample(4)
        assert torch.equal(images, Sampler(logits, **given).sample(4))
        assert audit(network, images, **given).ok


SHAPES = r"must be a tensor \[{n}, 15, 5, 4\] or \[{n}, 5, 3, 5, 4\], got "


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda y, x: (x, None), r"tuple \(\[{n}, 3, 5, 4\], NoneType\) with none of that shape"),
        (lambda y, x: [y, y], r"list \(\[{n}, 15, 5, 4\], \[{n}, 15, 5, 4\]\) with 2 of that shape"),
        (lambda y, x: {"scores": y, 1: x}, "dict of scores, 1, without logits"),
        (lambda y, x: {}, "dict"),
        (lambda y, x: ModelOutput(logits=(y,)), "ModelOutput whose logits are a tuple"),
        (lambda y, x: Output(None, (y,)), "Output whose logits are a NoneType"),
        (lambda y, x: Output, "type"),
        (lambda y, x: None, "NoneType"),
        (lambda y, x: (), "tuple"),
    ],
    ids=["none", "two", "other names", "no names", "nested", "no logits", "class", "nothing", "empty"],
)
def test_no_or_several_logits_are_refused(returned: Callable, got: str) -> None:
    network, given = Returns(returned).eval(), {"image_shape": (3, 5, 4), "head": Categorical(LEVELS)}
    text = SHAPES + got + ": wrap the model so that it returns its logits"
    images = torch.zeros(3, 3, 5, 4, dtype=torch.uint8)
    for n, run in (
        (2, lambda: Sampler(network, **given)),
        (1, lambda: naive_sample(network, 1, **given)),
        (3, lambda: audit(network, images, **given)),
    ):
        with pytest.raises(UnsupportedModel, match=text.replace("{n}", str(n))):
            run()


def test_log_softmax_with_temperature() -> None:
    network, given = Ends(levels_last).eval(), {"image_shape": (3, 5, 4), "head": Categorical(LEVELS)}
    assert torch.equal(
        Sampler(network, **given).sample(4, temperature=0.6), naive_sample(network, 4, **given, temperature=0.6)
    )


@pytest.mark.parametrize(
    ("end", "named"),
    [
        (lambda x: F.log_softmax(x, dim=1), "a log-softmax over anything but the levels is no output for Cat"),
        (lambda x: F.log_softmax(x.unflatten(1, (LEVELS, 3)), dim=1).flatten(1, 2), "over anything but the levels"),
        (lambda x: F.log_softmax(x, dim=3), "over anything but the levels"),
        (lambda x: 2 * F.log_softmax(levels_first(x), dim=1), "a log-softmax that is not the last layer"),
        (
            lambda x: F.softmax(levels_first(x), dim=1),
            "_softmax.default .as the last layer leave it out: heads take logits",
        ),
        (lambda x: levels_first(x).transpose(1, 2), r"got shape \(2, 3, 5, 5, 4\)"),
    ],
    ids=["all channels", "other order", "columns", "doubled", "probabilities", "5-D in another order"],
)
def test_other_outputs_are_refused(end: Callable, named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        Sampler(Ends(end).eval(), (3, 5, 4), Categorical(LEVELS))


def test_log_softmax_is_for_categorical() -> None:
    network = nn.Sequential(nn.ZeroPad2d((0, 0, 1, -1)), nn.Conv2d(1, 6, 1), nn.LogSoftmax(1))
    with pytest.raises(
        UnsupportedModel, match=r"module '2': a log-softmax over anything but the levels is no output for Log"
    ):
        Sampler(network, (1, 5, 4), LogisticMixture(2))


@pytest.mark.parametrize("sigmoid", [nn.Sigmoid(), nn.Sequential(nn.Identity(), nn.Sigmoid())], ids=["plain", "nested"])
def test_probabilities_are_no_logits_of_bernoulli(sigmoid: nn.Module) -> None:
    logits = nn.Sequential(nn.ZeroPad2d((0, 0, 1, -1)), nn.Conv2d(1, 1, 1))
    given = {"image_shape": (1, 5, 4), "head": Bernoulli()}
    assert torch.equal(Sampler(logits, **given).sample(9), naive_sample(logits, 9, **given))
    with pytest.raises(UnsupportedModel, match=r"module '1.*': a sigmoid as the last layer is no output for Bernoulli"):
        Sampler(nn.Sequential(logits, sigmoid), **given)
