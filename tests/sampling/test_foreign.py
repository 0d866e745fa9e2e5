"""Whole models in the styles of others, through the sampler: a prior over the codes of a VQ-VAE, the common PyTorch
port of PixelCNN++, an hourglass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.sampling import Categorical, LogisticMixture, NotCausal, Sampler, UnsupportedModel, audit, naive_sample

from ..models.port_pixelcnnpp import NEW_NORM, OLD_NORM, PortPixelCNNpp
from .networks import LEVELS, MaskedInPlace

CODES, CLASSES = 512, 10


class GatedLayer(nn.Module):
    """Vertical and horizontal stacks; the first layer blanks what it must not see in its weights, at each call."""

    def __init__(self, first: bool, dim: int, kernel: int) -> None:
        super().__init__()
        self.first = first
        self.class_cond = nn.Embedding(CLASSES, 2 * dim)
        self.vertical = nn.Conv2d(dim, 2 * dim, (kernel // 2 + 1, kernel), padding=(kernel // 2, kernel // 2))
        self.horizontal = nn.Conv2d(dim, 2 * dim, (1, kernel // 2 + 1), padding=(0, kernel // 2))
        self.between = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.residual = nn.Conv2d(dim, dim, 1)

    @staticmethod
    def gate(x: Tensor) -> Tensor:
        x, y = x.chunk(2, dim=1)
        return torch.tanh(x) * torch.sigmoid(y)

    def forward(self, x_v: Tensor, x_h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:
            self.vertical.weight.data[:, :, -1].zero_()
            self.horizontal.weight.data[:, :, :, -1].zero_()
        bias = self.class_cond(labels)[:, :, None, None]
        h_v = self.vertical(x_v)[:, :, : x_v.size(-2), :]
        h_h = self.horizontal(x_h)[:, :, :, : x_h.size(-1)]
        out = self.gate(self.between(h_v) + h_h + bias)
        out = self.residual(out)
        return self.gate(h_v + bias), out if self.first else out + x_h


class Prior(nn.Module):
    """Codes [N, H, W] and labels [N] -> logits [N, CODES, H, W]."""

    def __init__(self, dim: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CODES, dim)
        self.layers = nn.ModuleList(GatedLayer(i == 0, dim, 7 if i == 0 else 3) for i in range(layers))
        self.output_conv = nn.Sequential(nn.Conv2d(dim, 32, 1), nn.ReLU(True), nn.Conv2d(32, CODES, 1))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        shape = (*x.size(), -1)
        x = self.embedding(x.view(-1)).view(shape).permute(0, 3, 1, 2)
        x_v, x_h = x, x
        for layer in self.layers:
            x_v, x_h = layer(x_v, x_h, labels)
        return self.output_conv(x_h)


class OneChannel(nn.Module):
    """What the sampler needs of it: codes [N, 1, H, W]."""

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.prior(x[:, 0], labels)


class Hourglass(nn.Module):
    """Masked convolutions at full resolution; two levels below, which see rows that are finished and come back by
    nearest upsampling and by a transposed convolution, joined by concatenation; BatchNorm in front of each level.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = MaskedInPlace("A", 3, 8, 5, padding=2)
        self.down1 = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 10, 3, stride=2, padding=1), nn.ELU())
        self.down2 = nn.Sequential(nn.BatchNorm2d(10), nn.Conv2d(10, 12, 4, stride=2, padding=1), nn.GELU())
        self.up2 = nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(12, 10, 4, stride=2, padding=1))
        self.up1 = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(20, 8, (1, 3), padding=(0, 1)), nn.SiLU())
        self.last = MaskedInPlace("B", 16, 12, 3, padding=1)
        self.out = nn.Linear(12, 3 * LEVELS)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        padded = F.pad(h, (0, -h.shape[3] % 4, 8, -h.shape[2] % 4))[:, :, : h.shape[2] + -h.shape[2] % 4]
        half = self.down1(padded)
        up = self.up1(torch.cat([half, self.up2(self.down2(half))], dim=1))
        h = torch.cat([h, up[:, :, : h.shape[2], : h.shape[3]]], dim=1)
        return self.out(F.relu(self.last(h)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def strengthened(network: nn.Module, factor: float = 1.4) -> nn.Module:
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(factor)
    return network.eval()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("size", [(6, 5), (1, 8), (7, 1)], ids=lambda s: "x".join(map(str, s)))
def test_prior_over_codes(size: tuple[int, int], backend: str) -> None:
    network = OneChannel(strengthened(Prior()))
    head = Categorical(CODES, input_range=None)
    given = {"image_shape": (1, *size), "head": head, "num_classes": CLASSES}
    labels = torch.tensor([9, 0, 3])
    codes = Sampler(network, **given, backend=backend).sample(3, labels=labels)
    assert codes.dtype == torch.int64 and len(codes.unique()) > 4
    assert torch.equal(codes, naive_sample(network, 3, **given, labels=labels))
    assert audit(network, codes, **given, labels=labels).ok


def test_prior_with_known_codes() -> None:
    network = OneChannel(strengthened(Prior()))
    given = {
        "image_shape": (1, 6, 5),
        "head": Categorical(CODES, input_range=None),
        "num_classes": CLASSES,
    }
    known, mask = torch.randint(CODES, (4, 1, 6, 5)), torch.rand(4, 6, 5) < 0.5
    options = {"labels": 7, "known": known, "mask": mask, "temperature": 0.7, "seed": 3}
    codes = Sampler(network, **given).sample(4, **options)
    assert torch.equal(codes, naive_sample(network, 4, **given, **options))
    assert torch.equal(codes[mask.unsqueeze(1)], known[mask.unsqueeze(1)])


def test_prior_embeds_too_few_codes() -> None:
    given = {"image_shape": (1, 4, 4), "head": Categorical(CODES + 1, input_range=None), "num_classes": CLASSES}
    network = OneChannel(Prior())
    network.prior.output_conv[2] = nn.Conv2d(32, CODES + 1, 1)
    with pytest.raises(ValueError, match=r"module 'prior\.embedding' embeds 512 levels; .* has 513"):
        Sampler(network, **given)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_prior_that_reads_no_channels(backend: str) -> None:
    """An image shape (H, W): the network reads [N, H, W]."""
    network = strengthened(Prior())
    given = {"image_shape": (4, 5), "head": Categorical(CODES, input_range=None), "num_classes": CLASSES}
    options = {"labels": torch.tensor([9, 0, 3]), "known": torch.full((1, 4, 5), 7), "mask": torch.eye(4, 5) > 0}
    codes = Sampler(network, **given, backend=backend).sample(3, **options)
    assert codes.shape == (3, 1, 4, 5) and torch.equal(codes, naive_sample(network, 3, **given, **options))
    assert audit(network, codes, **given, labels=options["labels"], mask=options["mask"]).ok
    with_channels = Sampler(OneChannel(network), **{**given, "image_shape": (1, 4, 5)})
    assert torch.equal(with_channels.sample(3, **options), codes)


def test_prior_with_another_shape_is_told_so() -> None:
    given = {"image_shape": (1, 4, 5), "head": Categorical(CODES, input_range=None), "num_classes": CLASSES}
    message = r"module '.*' of Prior, which was given torch.int64 of shape \(2, 1, 4, 5\), raised RuntimeError"
    with pytest.raises(UnsupportedModel, match=message):
        Sampler(Prior(), **given)


READINGS = {
    "one_hot": lambda net, x: F.one_hot(x, net.levels).float(),
    "one_hot by keyword": lambda net, x: F.one_hot(x, num_classes=net.levels).to(torch.float32),
    "scatter": lambda net, x: torch.zeros(*x.shape, net.levels).scatter(-1, x.unsqueeze(-1), 0.7),
    "scatter_": lambda net, x: (
        torch.zeros(len(x), net.levels, *x.shape[1:]).scatter_(1, x.unsqueeze(1), 1.0).permute(0, 2, 3, 1)
    ),
    "compared": lambda net, x: (x.unsqueeze(-1) == torch.arange(net.levels)).float(),
    "identity[x]": lambda net, x: torch.eye(net.levels)[x],
    "table[x]": lambda net, x: torch.cat([net.table[x], net.brightness[x].unsqueeze(-1)], dim=-1),
    "index_select": lambda net, x: net.table.index_select(0, x.flatten()).view(*x.shape, -1),
    "cube[x]": lambda net, x: net.table.view(net.levels, 2, -1)[x].flatten(3),
}


class Reads(nn.Module):
    """Codes, looked up in one of many ways."""

    def __init__(self, how: str, levels: int = 7) -> None:
        super().__init__()
        self.how, self.levels = how, levels
        self.table = nn.Parameter(torch.randn(levels, 6))
        self.register_buffer("brightness", torch.linspace(-1, 1, levels))
        width = READINGS[how](self, torch.zeros(1, 1, 1, dtype=torch.int64)).shape[-1]
        self.first = MaskedInPlace("A", width, 8, 3, padding=1)
        self.out = nn.Conv2d(8, levels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = READINGS[self.how](self, x.squeeze(1))
        return self.out(torch.tanh(self.first(x.permute(0, 3, 1, 2))))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("how", READINGS)
def test_codes_are_looked_up(how: str, backend: str) -> None:
    network = strengthened(Reads(how), 2.0)
    given = {"image_shape": (5, 4), "head": Categorical(7, input_range=None)}
    codes = Sampler(network, **given, backend=backend).sample(5, seed=1)
    assert len(codes.unique()) == 7 and torch.equal(codes, naive_sample(network, 5, **given, seed=1))


@pytest.mark.parametrize(
    ("reading", "named"),
    [
        (lambda net, x: F.one_hot(x), "F.one_hot without num_classes"),
        (lambda net, x: net.table.gather(0, x.view(-1, 1)).view(*x.shape, 1), "aten.gather.default with an index that"),
        (
            lambda net, x: net.table.t()[:, x].permute(1, 2, 3, 0),
            "aten.index.Tensor with an index that depends on the image",
        ),
        (lambda net, x: net.table[x * 2 % 7], "aten.remainder"),
        (
            lambda net, x: torch.ones(len(x), 7, *x.shape[1:]).scatter(1, x.unsqueeze(1), 2.0).permute(0, 2, 3, 1),
            "aten.scatter.value of anything but a number into zeros at levels of the image",
        ),
        (lambda net, x: torch.eye(7)[x.tolist()], r"reads the values of the image \(Tensor.tolist\)"),
    ],
    ids=["one_hot", "gather", "columns", "arithmetic", "scatter", "list"],
)
def test_other_look_ups_are_refused(reading: Callable, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Reads("table[x]").eval()
    monkeypatch.setitem(READINGS, "table[x]", reading)
    with pytest.raises(UnsupportedModel, match=named):
        Sampler(network, (5, 4), Categorical(7, input_range=None))


@pytest.mark.parametrize("norm", [OLD_NORM, NEW_NORM], ids=["old norm", "new norm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_port_of_pixelcnnpp(channels: int, norm: object) -> None:
    network = strengthened(PortPixelCNNpp(1, 5, 3, channels, norm))
    given = {"image_shape": (channels, 8, 4), "head": LogisticMixture(3)}
    images = Sampler(network, **given, backend="cpu").sample(3, seed=1)
    assert torch.equal(images, naive_sample(network, 3, **given, seed=1))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("size", [(9, 6), (1, 7), (5, 1)], ids=lambda s: "x".join(map(str, s)))
def test_hourglass(size: tuple[int, int], backend: str) -> None:
    network = strengthened(Hourglass())
    given = {"image_shape": (3, *size), "head": Categorical(LEVELS)}
    images = Sampler(network, **given, backend=backend).sample(3, seed=6)
    assert torch.equal(images, naive_sample(network, 3, **given, seed=6))


def test_hourglass_of_an_odd_size() -> None:
    network = strengthened(Hourglass())
    given = {"image_shape": (3, 17, 23), "head": Categorical(LEVELS)}
    images = Sampler(network, **given).sample(9)
    assert audit(network, images, **given).ok
    for threads, max_batch in [(2, 9), (3, 4), (2, 1)]:
        torch.set_num_threads(threads)
        assert torch.equal(Sampler(network, **given, max_batch=max_batch).sample(9), images)


@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [("down1", "down1.1"), ("up2", "up2"), ("up1", "up1.1"), ("first", "first")],
    ids=lambda s: s,
)
def test_hourglass_that_leaks_is_refused_by_name(spoil: str, culprit: str) -> None:
    """One layer that looks further than its padding allows for."""
    network = Hourglass()
    layers = {
        "down1": nn.Sequential(network.down1[0], nn.Conv2d(8, 10, 19, stride=2, padding=9)),
        "up2": nn.ConvTranspose2d(12, 10, 24, stride=2, padding=11),
        "up1": nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(20, 8, (21, 1), padding=(10, 0))),
        "first": MaskedInPlace("B", 3, 8, 5, padding=2),
    }
    setattr(network, spoil, layers[spoil])
    with pytest.raises(NotCausal, match="makes the model see what it predicts") as error:
        Sampler(network, (3, 24, 24), Categorical(LEVELS))
    assert f"module '{culprit}'" in str(error.value), str(error.value)


class Pooled(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = MaskedInPlace("A", 1, 4, 3, padding=1)
        self.level = nn.Sequential(nn.Conv2d(4, 4, 2, stride=2), layer, nn.Upsample(scale_factor=2))
        self.out = nn.Conv2d(4, LEVELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.level(F.pad(self.first(x), (0, 0, 2, 0))[:, :, :-2]))


@pytest.mark.parametrize(
    ("layer", "operator"),
    [
        (nn.MaxPool2d(1), "max_pool2d"),
        (nn.Softmax(1), "_softmax"),
        (nn.GroupNorm(1, 4), "group_norm"),
        (nn.Upsample(scale_factor=2, mode="bilinear"), "upsample_bilinear2d"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_unsupported_operator_at_a_level_is_named(layer: nn.Module, operator: str) -> None:
    with pytest.raises(UnsupportedModel) as error:
        Sampler(Pooled(layer), (1, 8, 8), Categorical(LEVELS))
    text = str(error.value)
    assert "module 'level.1'" in text and operator in text and len(text) < 240


def test_weights_stay_as_the_network_leaves_them() -> None:
    """Blanked by its own forward, and by nothing else."""
    network = OneChannel(Prior())
    expected = copy.deepcopy(network)
    given = {"image_shape": (1, 3, 3), "head": Categorical(CODES, input_range=None), "num_classes": CLASSES}
    Sampler(network, **given).sample(1, labels=0)
    expected(torch.zeros(1, 1, 3, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    for name, value in network.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
