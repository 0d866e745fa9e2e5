"""The schedule's proof against brute force, and what it says of networks that see too much."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import models
from fastgen.sampling import Categorical, NotCausal, Sampler, UnsupportedModel
from fastgen.sampling.graph import Ref
from fastgen.sampling.schedule import Stage, key, schedule, unkey
from fastgen.sampling.subject import evaluating, make_subject
from fastgen.sampling.trace import trace

from .networks import LEVELS, NETWORKS, MaskedInPlace, make


def latest_dependence(
    module: nn.Module, shape: tuple[int, int, int], labels: Tensor | None
) -> dict[tuple[int, int], int]:
    """By perturbing every image element: (output channel, flat pixel) -> largest raster index of an element that
    changes it.
    """
    channels, height, width = shape
    x = torch.randn(1, *shape, dtype=torch.float64)
    args = () if labels is None else (labels[:1],)
    latest: dict[tuple[int, int], int] = {}
    base = module(x, *args)
    for pixel in range(height * width):
        for c in range(channels):
            moved = x.clone()
            moved[0, c, pixel // width, pixel % width] += 0.37
            for channel, at in (module(moved, *args)[0] != base[0]).flatten(1).nonzero().tolist():
                latest[channel, at] = pixel * channels + c
    return latest


@pytest.mark.parametrize("name", NETWORKS)
def test_reach_against_perturbation(name: str) -> None:
    """The reach is never earlier than a true dependence, and where the image has room for it, it is attained."""
    height, width = 6, 7
    network, channels, num_classes = make(name, height, width)
    labels = torch.arange(2) if num_classes else None
    subject = make_subject(network, (channels, height, width), Categorical(LEVELS), num_classes)
    with evaluating(subject.module):
        graph, _ = trace(subject, torch.randn(2, channels, height, width), labels)
    output = graph.output
    assert isinstance(output, Ref)
    groups = Categorical(LEVELS).groups(channels)
    reach = schedule(graph, groups).reach
    keys = [
        int(reach[p][c]) + key(int(dy), int(dx), 0)
        for p, c, dy, dx in zip(output.plane, output.channel, output.dy, output.dx, strict=True)
    ]
    with evaluating(network.double()):
        latest = latest_dependence(network, (channels, height, width), labels)
    attained = set()
    for (channel, pixel), element in latest.items():
        y, x = divmod(element // channels, width)
        true = key(y - pixel // width, x - pixel % width, element % channels)
        assert true <= keys[channel]
        if true == keys[channel]:
            attained.add(channel)
    assert attained == set(range(len(keys)))


def test_keys_are_ordered_like_tuples() -> None:
    tuples = [(dy, dx, c) for dy in (-3, -1, 0, 2) for dx in (-40, -1, 0, 5) for c in (0, 2)]
    assert [key(*t) for t in tuples] == sorted(key(*t) for t in tuples)
    for t in tuples:
        assert tuple(int(v[0]) for v in unkey(torch.tensor([key(*t)]).numpy())) == t


class Leaky(nn.Module):
    """Two masked layers; each can be spoilt."""

    def __init__(self, first: str = "A", second_kernel: nn.Module | None = None):
        super().__init__()
        self.first = MaskedInPlace(first, 1, 4, 3, padding=1)
        self.second = second_kernel or MaskedInPlace("B", 4, 4, 3, padding=1)
        self.out = nn.Conv2d(4, LEVELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.second(F.relu(self.first(x)))))


@pytest.mark.parametrize(
    ("module", "culprit", "where"),
    [
        (Leaky("B"), "first", "(y+0, x+0)"),
        (Leaky("A", nn.Conv2d(4, 4, 3, padding=1)), "second", "(y+1, x+0)"),
        (Leaky("A", nn.Conv2d(4, 4, (1, 5), padding=(0, 2))), "second", "(y+0, x+1)"),
    ],
    ids=["type B first", "unmasked layer", "sees right"],
)
def test_leak_is_refused_by_name(module: nn.Module, culprit: str, where: str) -> None:
    with pytest.raises(NotCausal) as error:
        Sampler(module, (1, 6, 6), Categorical(LEVELS))
    assert f"module '{culprit}'" in str(error.value) and where in str(error.value)
    assert "first -> second -> out" in str(error.value)


def test_leak_in_a_model_without_submodules() -> None:
    with pytest.raises(NotCausal, match=r"module '\(top level\)' makes the model see what it predicts"):
        Sampler(nn.Conv2d(1, LEVELS, 1), (1, 3, 3), Categorical(LEVELS))


def test_leak_between_colours() -> None:
    model = models.PixelCNN(image_shape=(3, 4, 4), levels=4, num_filters=6, num_blocks=1, num_features=6)
    model.output = nn.Conv2d(6, 12, 1)  # no mask: red sees blue
    with pytest.raises(NotCausal, match=r"colour 0 at pixel \(y, x\) depend on colour [12] at \(y\+0, x\+0\)"):
        Sampler(model)


def test_leak_by_the_order_of_the_output_is_told_so() -> None:
    """A network that is causal, and whose levels and colours are read the other way round."""
    network, *_ = make("colours", 5, 4)
    given = {"image_shape": (3, 5, 4), "head": Categorical(LEVELS)}
    levels_outermost = nn.Sequential(network, nn.Unflatten(1, (3, LEVELS)), Transposed())
    flat = nn.Sequential(levels_outermost, nn.Flatten(1, 2))
    text = r"causal with its channels read as levels before colours: return y\.unflatten\(1, \(5, 3\)\)$"
    with pytest.raises(NotCausal, match=text):
        Sampler(flat, **given)
    expected = Sampler(network, **given).sample(3)
    assert torch.equal(Sampler(nn.Sequential(flat, nn.Unflatten(1, (LEVELS, 3))), **given).sample(3), expected)

    viewed = nn.Sequential(network, nn.Unflatten(1, (LEVELS, 3)))  # of channels with the colours outermost
    with pytest.raises(NotCausal, match=r"read as colours before levels: return y\.flatten\(1, 2\)$"):
        Sampler(viewed, **given)
    assert torch.equal(Sampler(nn.Sequential(viewed, nn.Flatten(1, 2)), **given).sample(3), expected)

    leak = nn.Sequential(network, nn.Conv2d(15, 15, 3, padding=1))
    with pytest.raises(NotCausal, match=r"the layers between: .*$") as error:
        Sampler(leak, **given)
    assert "read as" not in str(error.value)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_masked_away_weights_do_not_count() -> None:
    """Causality is a matter of the weights: a full convolution with the right zeros is causal."""
    module = Leaky("A", nn.Conv2d(4, 4, 3, padding=1))
    with torch.no_grad():
        module.second.weight[:, :, 2] = 0
        module.second.weight[:, :, 1, 2] = 0
    Sampler(module, (1, 5, 5), Categorical(LEVELS))


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.MaxPool2d(3, 1, 1), "max_pool2d"),
        (nn.Softmax(dim=1), "softmax"),
        (nn.Upsample(scale_factor=1, mode="bilinear"), "upsample"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "reflection_pad2d"),
        (nn.ConvTranspose2d(4, 4, 2, stride=2), "upsamples beyond"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else v,
)
def test_unsupported_operator_is_named(layer: nn.Module, named: str) -> None:
    module = Leaky("A", layer)
    with pytest.raises(UnsupportedModel, match=named) as error:
        Sampler(module, (1, 6, 6), Categorical(LEVELS))
    assert "'second'" in str(error.value)


def test_output_of_the_wrong_shape() -> None:
    with pytest.raises(UnsupportedModel, match="height and width"):
        Sampler(nn.Conv2d(1, LEVELS, 3), (1, 6, 6), Categorical(LEVELS))
    strided = nn.Conv2d(1, LEVELS, 3, stride=2, padding=4)  # every second pixel, in an image's size
    with pytest.raises(UnsupportedModel, match="output is not made of shifted windows"):
        Sampler(strided, (1, 6, 6), Categorical(LEVELS))


def test_stages() -> None:
    """Rows above: once per row. The current row: pixel by pixel, without the taps that the row stage can do."""
    model = models.GatedPixelCNN(image_shape=(1, 8, 8), levels=4, num_filters=8, num_blocks=3)
    plan = Sampler(model).plan
    vertical = [s for s in plan.steps if s.name.endswith("vertical")]
    assert vertical and all(s.stage == Stage.ROW for s in vertical)
    assert all(t.dy == 0 for s in plan.steps if s.stage == Stage.PIXEL for t in s.taps)
    positions = 8 * 8
    dense = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)) * positions * 2
    assert plan.flops < dense  # masked taps are not multiplied


def test_colour_ranks() -> None:
    """Each rank computes its own channels once."""
    model = models.PixelCNN(image_shape=(3, 4, 4), levels=4, num_filters=6, num_blocks=1, num_features=6)
    plan = Sampler(model).plan
    for rank in range(3):
        outputs = {s.out: s.width for s in plan.pixel_steps(rank)}
        assert outputs and max(outputs.values()) <= 4
    computed = set()
    for step in plan.steps:
        for store in step.stores:
            channels = {(store.plane, c) for c in range(store.channel, store.channel + step.width)}
            assert not channels & computed
            computed |= channels
