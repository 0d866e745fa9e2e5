"""What the tracer must not get wrong: writes in place, labels that are written into tensors, constants in any layout,
and the user's defaults; and what it must refuse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.sampling import Categorical, Sampler, UnsupportedModel, audit, naive_sample
from fastgen.sampling.precision import PRECISIONS, weights_in

from .networks import LEVELS

HEIGHT, WIDTH, CLASSES = 5, 4, 5
SIZES = [(HEIGHT, WIDTH), (1, 5), (5, 1), (1, 1)]


class Causal(nn.Module):
    """Features of the rows above and of the pixels to the left; `mix` changes them, `out` reads them."""

    def __init__(self, mix: Callable, height: int, width: int):
        super().__init__()
        self.above = nn.Conv2d(1, 6, (2, 3))
        self.left = nn.Conv2d(1, 6, (1, 2))
        self.out = nn.Conv2d(6, LEVELS, 1)
        self.embedding = nn.Embedding(CLASSES, 6)
        self.channels = nn.Parameter(torch.randn(6))
        self.places = nn.Parameter(torch.randn(6, height, width))
        self.mix = mix

    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        above = self.above(F.pad(x, (1, 1, 2, 0))[:, :, :-1])
        left = self.left(F.pad(x, (2, 0))[..., :-1])
        return self.out(torch.tanh(self.mix(self, above + left, *labels)))


def filled(net: Causal, h: Tensor) -> Tensor:
    """A sum that begins with a parameter."""
    out = net.channels.view(1, 6, 1, 1).expand_as(h).clone()
    out += h
    return out


def accumulated(net: Causal, h: Tensor) -> Tensor:
    out = torch.zeros(h.shape)
    for part in (h, torch.relu(h)):
        out += part
    return out


def scaled_ones(net: Causal, h: Tensor) -> Tensor:
    return torch.full(h.shape, 0.7).mul_(h)


def added_whole_numbers(net: Causal, h: Tensor) -> Tensor:
    place = torch.arange(h[0, 0].numel()).view(1, 1, *h.shape[2:]).expand(len(h), -1, -1, -1)
    return torch.cat([h[:, 1:], place], dim=1) * 0.2


def picked(net: Causal, h: Tensor) -> Tensor:
    return h[:, torch.tensor([5, 3, 1, 0, 2, 4])]


def clamped_by_tensor(net: Causal, h: Tensor) -> Tensor:
    return torch.clamp(h, min=torch.tensor(-0.5), max=net.channels.view(6, 1, 1))


def places(net: Causal, h: Tensor) -> Tensor:
    return net.places + h * net.places[0]


def places_last(net: Causal, h: Tensor) -> Tensor:
    return (net.places.permute(1, 2, 0) * (h.permute(0, 2, 3, 1) + net.channels)).permute(0, 3, 1, 2)


def sequence(net: Causal, h: Tensor) -> Tensor:
    tokens = h.flatten(2).transpose(1, 2) + net.places.flatten(1).t()
    return tokens.transpose(1, 2).view(h.shape)


def product(net: Causal, h: Tensor) -> Tensor:
    return h + torch.einsum("nchw,cd->ndhw", h[:, :5], net.embedding.weight)


def dead_then_shifted_up(net: Causal, h: Tensor) -> Tensor:
    """Nothing here depends on the image, so nothing is too late."""
    dead = F.conv2d(h, torch.zeros(6, 6, 3, 3), net.channels, padding=1)
    return h + F.pad(torch.tanh(dead), (0, 0, 0, 2))[:, :, 2:]


def two_rows_above(net: Causal, h: Tensor) -> Tensor:
    """Parameters that are known long before they are drawn from."""
    return F.pad(torch.tanh(h), (0, 0, 2, 0))[:, :, :-2]


def seen_below(net: Causal, h: Tensor) -> Tensor:
    """A plane that reaches below the image, read again from above."""
    tall = torch.tanh(F.conv2d(F.pad(h, (0, 0, 4, 4)), net.places.new_full((6, 6, 3, 1), 0.1), net.channels))
    return tall[:, :, : h.shape[2]] + F.pad(tall[:, :, 6:], (0, 0, 4, 0))[:, :, : h.shape[2]]


def compared(net: Causal, h: Tensor) -> Tensor:
    inside = (h > -0.3) * (h <= 0.5)
    return h * inside + (h >= net.channels.view(6, 1, 1)).float() - (h < 0) * 0.2 + (h.abs() != h).float() * (h == h)


def powers(net: Causal, h: Tensor) -> Tensor:
    return 0.1 * h**3 - (h.abs() + 1) ** -2 + (h * h + 1) ** 0.5 + 0.01 * h.square().pow(2)


def pieces(net: Causal, h: Tensor) -> Tensor:
    h = F.threshold(torch.addcmul(h, h, net.channels.view(6, 1, 1), value=0.5), -0.2, 0.3)
    return F.hardtanh(torch.lerp(h, torch.tanh(h), 0.3), -1.2, 0.9).clamp_min(-1).clamp_max(0.8)


def padded_with_numbers(net: Causal, h: Tensor) -> Tensor:
    """A channel of ones, and a border of halves."""
    wider = F.pad(h[:, :5], (0, 0, 0, 0, 0, 1), value=1.0)
    return wider + F.pad(torch.tanh(h), (1, 0, 1, 0), value=0.5)[:, :, :-1, :-1]


def overlapping(net: Causal, h: Tensor) -> Tensor:
    """Two views of one tensor; what is added to one, parts of the other hold, too."""
    tall = F.pad(h, (0, 0, 1, 0)) * 1.5
    whole, shifted = tall[:, :, 1:], tall[:, :, :-1]
    whole += torch.tanh(h)
    return whole + shifted * 0.5


def layer_norm(net: Causal, h: Tensor) -> Tensor:
    last = h.permute(0, 2, 3, 1)
    h = F.layer_norm(last, (6,), net.channels, net.channels.flip(0)) - F.layer_norm(last * 3, (6,), eps=1e-2)
    return h.permute(0, 3, 1, 2)


def layer_norm_of_tokens(net: Causal, h: Tensor) -> Tensor:
    return F.layer_norm(h.flatten(2).transpose(1, 2), (6,), net.channels).transpose(1, 2).reshape(h.shape)


def layer_norm_of_rows(net: Causal, h: Tensor) -> Tensor:
    rows = h.permute(0, 2, 3, 1).reshape(-1, 6)
    return F.layer_norm(rows, (6,), None, net.channels).view(len(h), *h.shape[2:], 6).permute(0, 3, 1, 2)


def layer_norm_by_hand(net: Causal, h: Tensor) -> Tensor:
    mean = h.mean(1, keepdim=True)
    return (h - mean) / torch.sqrt((h - mean).pow(2).mean(1, keepdim=True) + 1e-6)


def other_norms(net: Causal, h: Tensor) -> Tensor:
    pixel = h / torch.sqrt(torch.mean(h**2, dim=1, keepdim=True) + 1e-8)
    return pixel + F.normalize(h, dim=1) + F.normalize(h, p=1, dim=1) + h / (1 + h.abs().sum(1, keepdim=True))


def rms_norms(net: Causal, h: Tensor) -> Tensor:
    """Of all channels, and of heads, whose means are channels of one plane."""
    last = h.permute(0, 2, 3, 1)
    of_all = F.rms_norm(last, (6,), net.channels) + last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + 1e-5)
    heads = of_all.unflatten(-1, (2, 3))
    normed = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + 1e-5)
    return normed.flatten(-2).permute(0, 3, 1, 2)


def gates(net: Causal, h: Tensor) -> Tensor:
    """One channel for all, of different kinds: of a product, which is read by itself, too, and shifted; of places; of
    an input; of a mask.
    """
    score = F.conv2d(h, net.channels.view(1, 6, 1, 1))
    above = F.pad(torch.sigmoid(score), (0, 0, 1, 0))[:, :, :-1]
    h = h * torch.sigmoid(score) + above * net.channels.view(6, 1, 1) + F.conv2d(score, net.channels.view(6, 1, 1, 1))
    h = h * torch.exp(score * net.places[:1] - h[:, 2:3].abs()) * h[:, :1] + torch.cat(
        [score, h[:, :2], above, above, score], 1
    )
    return torch.cat([h[:, :4] * (torch.arange(h.shape[3]) % 2), score, torch.tanh(score)], 1)


def locally_masked(net: Causal, h: Tensor) -> Tensor:
    """F.unfold, a mask for each position, which may know of the border, and a product."""
    mask = F.unfold(torch.ones(1, 1, *h.shape[2:]), 3, padding=1)
    mask[:, 5:] = 0
    x = F.unfold(torch.tanh(h), 3, padding=1)
    first = (x.view(-1, 9, x.shape[2]) * mask).view(x.shape)
    out = torch.sin(torch.arange(324.0)).view(6, 54).matmul(first).view(h.shape)
    x = F.unfold(F.pad(out[:, :1], (1, 1, 1, 0)), (2, 3))
    x = net.embedding.weight.matmul(x * torch.tensor([1.0, 1, 1, 1, 1, 0]).view(1, 6, 1).expand(1, -1, x.shape[2]))
    return out + F.pad(x, (0, 0, 0, 1)).view(h.shape)


def masked_anyhow(net: Causal, h: Tensor) -> Tensor:
    """Each position sees other neighbours, none of them those that come after it."""
    positions = h[0, 0].numel()
    mask = (torch.sin(7.0 * torch.arange(9 * positions)) < 0.5).float().view(1, 9, positions)
    mask[:, 5:] = 0
    x = F.unfold(h, 3, padding=1)
    x = (x.view(-1, 9, positions) * mask).view(x.shape)
    return torch.sin(torch.arange(324.0)).view(6, 54).matmul(x).view(h.shape)


def unfolded_and_folded(net: Causal, h: Tensor) -> Tensor:
    x = F.unfold(F.pad(h, (4, 0, 2, 0)), (2, 3), dilation=2)
    x = torch.einsum("ij,bjk->bik", torch.cos(torch.arange(216.0)).view(6, 36), x)
    return F.fold(x, h.shape[2:], (1, 1))


def gated_by_a_layer(net: Causal, h: Tensor) -> Tensor:
    """A single channel of more multiplications than a layer takes, where it is worth no copies."""
    score = F.conv2d(F.pad(h, (4, 0, 1, 0)), net.channels.view(1, 6, 1, 1).expand(-1, -1, 2, 5))
    return h * torch.sigmoid(score) - score


def variances(net: Causal, h: Tensor) -> Tensor:
    last = h.permute(0, 2, 3, 1)
    found = [last.var(-1), last.var(-1, unbiased=False), last.std(-1), *torch.var_mean(last, -1), last.sum(-1)]
    return h * torch.tanh(torch.stack(found, dim=1))


def frozen_on_tokens(net: Causal, h: Tensor) -> Tensor:
    """Weights without gradients, which matmul expands over the batch."""
    weight = net.embedding.weight.detach()
    tokens = F.linear(h.flatten(2).transpose(1, 2), weight, net.channels[:5].detach())
    last = (tokens @ weight).transpose(1, 2).reshape(h.shape).permute(0, 2, 3, 1)
    return h + F.linear(last @ weight.t(), weight.t()).permute(0, 3, 1, 2)


def attention(net: Causal, h: Tensor) -> Tensor:
    """Its keys are [N, 1, channels, positions] on the way, which look like rows and columns."""
    tokens = h.flatten(2).transpose(1, 2).unsqueeze(1)
    found = F.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=True)
    return found.transpose(2, 3).reshape(h.shape)


PLAIN = [
    filled,
    accumulated,
    scaled_ones,
    added_whole_numbers,
    picked,
    clamped_by_tensor,
    places,
    places_last,
    sequence,
    product,
    dead_then_shifted_up,
    two_rows_above,
    seen_below,
    compared,
    powers,
    pieces,
    padded_with_numbers,
    overlapping,
    layer_norm,
    layer_norm_of_tokens,
    layer_norm_of_rows,
    layer_norm_by_hand,
    other_norms,
    rms_norms,
    gates,
    gated_by_a_layer,
    locally_masked,
    masked_anyhow,
    unfolded_and_folded,
    variances,
    frozen_on_tokens,
    attention,
]


def one_hot(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    return h + (F.one_hot(labels, CLASSES).float() @ net.embedding.weight)[:, :, None, None]


def scattered(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    row = torch.zeros(len(labels), CLASSES)
    row[torch.arange(len(labels)), labels] = 1
    return h + (row @ net.embedding.weight)[:, :, None, None]


def summed_in_place(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    bias = net.channels.expand(len(labels), -1).clone()
    bias[:, 2:] += net.embedding(labels)[:, 2:]
    return h * bias[:, :, None, None]


def changed_after_use(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    bias = net.embedding(labels)[:, :, None, None]
    h = h + bias
    bias *= 3
    return h * bias


def added_to(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    out = net.embedding(labels)[:, :, None, None].repeat(1, 1, *h.shape[2:])
    out += h
    return out


def channels_last(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    return (h.permute(0, 2, 3, 1) + net.embedding(labels)[:, None, None]).permute(0, 3, 1, 2)


LABELLED = [one_hot, scattered, summed_in_place, changed_after_use, added_to, channels_last]


def make(mix: Callable, height: int = HEIGHT, width: int = WIDTH) -> tuple[nn.Module, dict]:
    """(network with weights large enough to matter, what it needs to be sampled)."""
    torch.manual_seed(1)
    network = Causal(mix, height, width).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.7)
    num_classes = CLASSES if mix in LABELLED else None
    return network, {"image_shape": (1, height, width), "head": Categorical(LEVELS), "num_classes": num_classes}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("mix", [*PLAIN, *LABELLED], ids=lambda f: f.__name__)
def test_equals_naive_loop(mix: Callable, size: tuple[int, int], backend: str) -> None:
    network, given = make(mix, *size)
    labels = torch.tensor([3, 0, 4, 4, 1, 2, 3]) if mix in LABELLED else None
    expected = naive_sample(network, 7, **given, labels=labels)
    sampler = Sampler(network, **given, backend=backend)
    for _ in range(2):  # nothing is left behind by the first time
        assert torch.equal(sampler.sample(7, labels=labels), expected)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("mix", [layer_norm, other_norms, rms_norms, gates, frozen_on_tokens], ids=lambda f: f.__name__)
def test_rounded_weights(mix: Callable, precision: str) -> None:
    """The ones that channels are summed with are no weights of the network."""
    network, given = make(mix)
    images = Sampler(network, **given, precision=precision).sample(200)
    with weights_in(precision):
        assert torch.equal(images, naive_sample(network, 200, **given))
    assert audit(network, images, **given, precision=precision).ok


@pytest.mark.parametrize("mix", LABELLED, ids=lambda f: f.__name__)
def test_weights_are_taken_at_construction(mix: Callable) -> None:
    network, given = make(mix)
    sampler = Sampler(network, **given)
    expected = sampler.sample(7, labels=2)
    with torch.no_grad():
        for p in network.parameters():
            p.neg_()
    assert torch.equal(sampler.sample(7, labels=2), expected)
    assert not torch.equal(Sampler(network, **given).sample(7, labels=2), expected)


@contextlib.contextmanager
def default_float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mix", [seen_below, changed_after_use], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "surroundings",
    [
        default_float64,
        lambda: torch.device("meta"),
        torch.inference_mode,
        torch.enable_grad,
    ],
    ids=["float64 by default", "other default device", "inference mode", "gradients"],
)
def test_surroundings_do_not_matter(surroundings: Callable, mix: Callable) -> None:
    network, given = make(mix)
    labels = 1 if mix in LABELLED else None
    expected = naive_sample(network, 3, **given, labels=labels)
    with surroundings():
        sampler = Sampler(network, **given)
        images = sampler.sample(3, labels=labels)
        assert torch.equal(images, expected) and images.device.type == "cpu"
        assert torch.equal(naive_sample(network, 3, **given, labels=labels), expected)


@pytest.mark.parametrize("mix", [variances, compared, other_norms, gates, powers], ids=lambda f: f.__name__)
def test_composite_operators_in_inference_mode(mix: Callable) -> None:
    """There they come undecomposed."""
    network, given = make(mix)
    for precision in ("fp32", "int8"):
        with torch.inference_mode():
            images = Sampler(network, **given, precision=precision).sample(300)
        assert audit(network, images, **given, precision=precision).ok


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("mix", [seen_below, one_hot, layer_norm], ids=lambda f: f.__name__)
def test_autocast_does_not_matter(mix: Callable, backend: str) -> None:
    network, given = make(mix)
    options = {"labels": torch.arange(200) % CLASSES if mix in LABELLED else None}
    expected = naive_sample(network, 200, **given, **options)  # so many that rounded weights would show
    changed = (expected + 1) % LEVELS
    sampler, report = Sampler(network, **given, backend=backend), audit(network, changed, **given, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Sampler(network, **given, backend=backend).sample(200, **options), expected)
        assert torch.equal(sampler.sample(200, **options), expected)
        assert torch.equal(naive_sample(network, 200, **given, **options), expected)
        assert audit(network, changed, **given, **options) == report


def test_drawing_leaves_the_default_dtype_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of the process: other threads would see another one."""
    network, given = make(one_hot)
    sampler = Sampler(network, **given)
    with default_float64():
        monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: pytest.fail(f"set to {dtype}"))
        images = sampler.sample(3, labels=1)
        monkeypatch.undo()
    assert torch.equal(images, sampler.sample(3, labels=1))


def by_first_label(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    return h * net.channels[int(labels[0])]


def by_any_label(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    return h * 0 if (labels == 3).any() else h


def by_largest_label(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    return h if labels.max() < 2 else h * 0


def by_equal_labels(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    return h if torch.equal(labels, labels.flip(0)) else h * 0


def by_list_of_labels(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([h[i] * k for i, k in enumerate(labels.tolist())])


def by_numpy(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    return h + torch.from_numpy(np.eye(CLASSES, dtype=np.float32)[labels.cpu().numpy()]).mean(1)[:, None, None, None]


def by_count_of_labels(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    return h * len((labels == 3).nonzero())


def by_number_of_labels(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    return h * len(labels[labels == 3])


def one_hot_of_unknown_size(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    return h + F.one_hot(labels).float().mean(1)[:, None, None, None]


def picked_by_label(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([h * k for k in range(CLASSES)], dim=1)[torch.arange(len(h)), labels]


def filled_by_label(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    h = h.clone()
    return h.fill_(labels[0] * 0.5)


@pytest.mark.parametrize(
    ("mix", "named"),
    [
        (by_first_label, r"module '\(top level\)': .*reads the values of the labels"),
        (by_any_label, "reads the values of the labels"),
        (by_largest_label, "reads the values of the labels"),
        (by_equal_labels, "reads the values of the labels .*equal"),
        (by_list_of_labels, "reads the values of the labels .*tolist"),
        (by_numpy, "reads the values of the labels .*numpy"),
        (by_count_of_labels, "reads the values of the labels .*nonzero"),
        (by_number_of_labels, "reads the values of the labels .*index"),
        (one_hot_of_unknown_size, "F.one_hot without num_classes"),
        (picked_by_label, "aten.index.Tensor with an index that depends on the image, the labels or the condition"),
        (filled_by_label, "fill_.Tensor with a number that depends on the image, the labels or the condition"),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode], ids=["", "inference mode"])
def test_choices_by_label_are_refused(mix: Callable, named: str, mode: Callable) -> None:
    """They would stay as they were for the labels of the trace."""
    network, given = make(mix)
    with mode(), pytest.raises(UnsupportedModel, match=named):
        Sampler(network, **{**given, "num_classes": CLASSES})


def written_partly(net: Causal, h: Tensor, labels: Tensor) -> Tensor:
    out = net.embedding(labels)[:, :, None, None].repeat(1, 1, *h.shape[2:])
    out[:, :, 1:] += h[:, :, 1:]
    return out


@pytest.mark.parametrize(
    ("mix", "named"),
    [
        (lambda net, h: h + torch.randn(6, 1, 1), "a network that is random .*randn"),
        (lambda net, h: F.dropout(h, 0.5, training=True), "a network that is random .*bernoulli"),
        (
            lambda net, h: h**9,
            r"aten.pow.Tensor_Scalar with an exponent other than 0.5, 1, \.\.\., 8 and their negatives",
        ),
        (lambda net, h: 2**h, "aten.pow.Scalar with an exponent other than"),
        (
            lambda net, h: torch.where(h > 0, h, -h),
            "with a mask that depends on the image, the labels or the condition",
        ),
        (lambda net, h: h - h.mean((1, 2), keepdim=True), "aten.mean.dim over more than the channels"),
        (lambda net, h: F.layer_norm(h, h.shape[1:]), "aten.native_layer_norm.default over more than the channels"),
        (
            lambda net, h: torch.softmax(h, 1),
            r"_softmax.default \(as the last layer leave it out: heads take logits",
        ),
        (
            lambda net, h: F.fold(F.unfold(h, (1, 2)), h.shape[2:], (1, 2)),
            r"col2im.default \(F.fold\) of windows larger than a pixel",
        ),
        (
            lambda net, h: torch.stack([F.unfold(part, 1).view(h[0].shape) for part in h]),
            r"im2col.default \(F.unfold\) of",
        ),
        (lambda net, h: torch.div(h, 2, rounding_mode="floor"), "with rounding mode 'floor'"),
        (lambda net, h: F.softplus(h, threshold=1), "aten.softplus.default with threshold 1"),
        (lambda net, h: h + (h > 0).long().to(torch.int8).bool(), "from torch.int64 to torch.int8"),
        (lambda net, h: h + (h > 0).long().bool(), "from torch.int64 to torch.bool"),
        (
            lambda net, h: F.interpolate(h, scale_factor=(1, 3.2))[..., ::3],
            "upsampling by a scale factor that the sizes do not have",
        ),
        (lambda net, h: h * h.sum().item(), "aten.sum"),
        (lambda net, h: torch.from_numpy(h.numpy() + 1), r"reads the values of the image \(Tensor.numpy\)"),
        (
            lambda net, h: h + net.channels.gather(0, h.flatten().long()[:1]),
            "conversion of the image from torch.float32 to torch.int64",
        ),
        (written_partly, "writing the image into a part of a tensor that depends on the labels"),
    ],
    ids=[
        "noise",
        "dropout",
        "ninth",
        "power",
        "where",
        "mean",
        "layer norm",
        "softmax",
        "fold",
        "single",
        "rounding",
        "softplus",
        "int8",
        "bool",
        "upsampling",
        "item",
        "numpy",
        "index",
        "partly",
    ],
)
def test_refused_by_name(mix: Callable, named: str) -> None:
    network, given = make(mix)
    given["num_classes"] = CLASSES if mix is written_partly else None
    with pytest.raises(UnsupportedModel, match=named):
        Sampler(network, **given)


def test_error_in_forward_leaves_nothing_behind() -> None:
    def fail(net: Causal, h: Tensor) -> Tensor:
        raise KeyError("inside")

    network, given = make(fail)
    network.train()
    message = r"'\(top level\)' of Causal, which was given torch.float32 of shape \(2, 1, 5, 4\), raised KeyError: 'ins"
    for function, error, text in (
        (Sampler, UnsupportedModel, message),
        (lambda *a, **k: naive_sample(*a, 1, **k), KeyError, "inside"),
    ):
        with pytest.raises(error, match=text):
            function(network, **given)
        assert all(m.training for m in network.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize("mix", [layer_norm_by_hand, other_norms, rms_norms], ids=lambda f: f.__name__)
def test_what_one_channel_gives_to_many_is_one_program(mix: Callable) -> None:
    network, given = make(mix)
    steps = Sampler(network, **given).plan.steps
    assert all(step.width >= 3 or len(step.program) == 1 for step in steps)  # sums of two heads
    assert max(len(step.program) for step in steps) < 40


def test_unfold_is_planned_like_a_convolution() -> None:
    """The windows of a channel lie next to each other; a tap has those of all channels at one offset."""
    weight = torch.sin(torch.arange(324.0)).view(6, 6, 3, 3)
    mask = torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0, 0])

    def unfolded(net: Causal, h: Tensor) -> Tensor:
        x = F.unfold(h, 3, padding=1).view(-1, 9, h[0, 0].numel())
        x = (x * mask.view(1, 9, 1).expand(-1, -1, x.shape[2])).view(len(h), 54, -1)
        return weight.view(6, 54).matmul(x).view(h.shape)

    def convolved(net: Causal, h: Tensor) -> Tensor:
        return F.conv2d(h, weight * mask.view(3, 3), padding=1)

    plans = []
    for mix in (unfolded, convolved):
        network, given = make(mix)
        plans.append(Sampler(network, **given).plan)
    taps = [sorted((s.stage, s.width, t.dy, t.dx, t.count) for s in plan.steps for t in s.taps) for plan in plans]
    assert taps[0] == taps[1] and plans[0].flops == plans[1].flops


class Wide(nn.Module):
    """Sums over more channels than are packed together, of rows above and of pixels on the left, and a convolution
    whose channels are all the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.above, self.left = nn.Conv2d(1, channels, (1, 3)), nn.Conv2d(1, channels, (1, 2))
        self.weight = nn.Parameter(torch.randn(1, channels, 1, 3) / channels**0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.out = nn.Conv2d(channels, LEVELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        above = torch.tanh(self.above(F.pad(x, (1, 1, 1, 0))[:, :, :-1]))
        same = F.conv2d(F.pad(above, (1, 1)), self.weight.expand(above.shape[1], -1, -1, -1))
        above, left = (
            norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for norm, h in zip(self.norms, (above, self.left(F.pad(x, (2, 0))[..., :-1])), strict=True)
        )
        return self.out(torch.tanh(above + left + same))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("channels", [40, 64])
def test_products_of_equal_columns(channels: int, precision: str) -> None:
    """The CPU keeps one panel of them."""
    torch.manual_seed(0)
    network, given = Wide(channels).eval(), {"image_shape": (1, 4, 6), "head": Categorical(LEVELS)}
    sampler = Sampler(network, **given, precision=precision, backend="cpu")
    assert any(equal for *_, equal, _ in sampler._executor._tables.steps)
    images = sampler.sample(20)
    assert len(images.unique()) == LEVELS
    with weights_in(precision):
        assert torch.equal(images, naive_sample(network, 20, **given))
    assert torch.equal(sampler.sample(1, start=3), images[3:4])
