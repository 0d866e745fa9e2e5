"""Networks that read a tensor for each sample besides the image: latents, feature maps, codes of a coarser level."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.models import GatedPixelCNN
from fastgen.sampling import Categorical, Sampler, UnsupportedModel, audit, naive_sample
from fastgen.sampling.precision import weights_in
from fastgen.sampling.trace import Tape

from .networks import LEVELS

HEIGHT, WIDTH, CODES, CLASSES = 6, 4, 7, 3


class Network(nn.Module):
    """Features of the rows above and of the pixels to the left; `mix` joins them with the condition."""

    def __init__(self, mix: Callable):
        super().__init__()
        self.above = nn.Conv2d(1, 6, (2, 3))
        self.left = nn.Conv2d(1, 6, (1, 2))
        self.vector = nn.Linear(33, 12)
        self.tokens = nn.Linear(17, 6)
        self.spatial = nn.Conv2d(17, 6, 3, padding=1)
        self.pixels = nn.Conv2d(6, 6, 1)
        self.joined = nn.Conv2d(23, 6, 1)
        self.codes = nn.Embedding(CODES, 6)
        self.between = nn.Conv2d(6, 6, 3, padding=1)
        self.labels = nn.Embedding(CLASSES, 6)
        self.out = nn.Conv2d(6, LEVELS, 1)
        self.mix = mix

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        above = self.above(F.pad(x, (1, 1, 2, 0))[:, :, :-1])
        left = self.left(F.pad(x, (2, 0))[..., :-1])
        return self.out(self.mix(self, above + left, *given))


def gated(net: Network, h: Tensor, z: Tensor) -> Tensor:
    """Bias and gate by a vector, as in the Gated PixelCNN."""
    bias, gate = net.vector(z)[:, :, None, None].chunk(2, dim=1)
    return torch.tanh(h + bias) * torch.sigmoid(h + gate)


def as_channels(net: Network, h: Tensor, z: Tensor) -> Tensor:
    """A vector at every position, as input channels of a convolution."""
    return net.joined(torch.cat([torch.tanh(h), z[:, :17, None, None].expand(-1, -1, *h.shape[2:])], dim=1))


def scaled(net: Network, h: Tensor, z: Tensor) -> Tensor:
    """A number for each sample."""
    return torch.tanh(h * z.view(-1, 1, 1, 1))


def added(net: Network, h: Tensor, low: Tensor) -> Tensor:
    """Features of an image of half the size, which need not be causal."""
    return torch.tanh(h + net.pixels(net.spatial(F.interpolate(low, scale_factor=2, mode="bilinear"))))


def concatenated(net: Network, h: Tensor, low: Tensor) -> Tensor:
    return torch.relu(net.joined(torch.cat([h, F.interpolate(low, scale_factor=2)], dim=1)))


def over_tokens(net: Network, h: Tensor, low: Tensor) -> Tensor:
    """A 1x1 layer as a product of positions and channels, added to features with the channels last."""
    tokens = net.tokens(F.interpolate(low, scale_factor=2).flatten(2).transpose(1, 2))
    return torch.tanh((h.flatten(2).transpose(1, 2) + tokens).transpose(1, 2).reshape(h.shape))


def prior(net: Network, h: Tensor, top: Tensor) -> Tensor:
    """The bottom prior of a VQ-VAE-2: codes of the top level, embedded and upsampled."""
    top = F.relu(net.between(net.codes(top).permute(0, 3, 1, 2)))
    return torch.tanh(h + net.between(F.interpolate(top, scale_factor=2, mode="nearest")))


def one_hot(net: Network, h: Tensor, top: Tensor) -> Tensor:
    features = F.one_hot(top, CODES).to(h.dtype) @ net.codes.weight
    return torch.tanh(h + F.interpolate(features.permute(0, 3, 1, 2), scale_factor=2))


def both(net: Network, h: Tensor, labels: Tensor, z: Tensor) -> Tensor:
    return gated(net, h + net.labels(labels)[:, :, None, None], z)


def both_together(net: Network, h: Tensor, labels: Tensor, low: Tensor) -> Tensor:
    """Labels change what is made of the condition."""
    return added(net, h, low * net.labels(labels)[:, :1, None, None])


def vectors(n: int) -> Tensor:
    return torch.randn(n, 33)


def maps(n: int) -> Tensor:
    return torch.randn(n, 17, HEIGHT // 2, WIDTH // 2)


def codes(n: int) -> Tensor:
    return torch.randint(CODES, (n, HEIGHT // 2, WIDTH // 2))


# how the condition is used -> conditions of n samples
MIXES = {
    gated: vectors,
    as_channels: vectors,
    scaled: lambda n: torch.rand(n) * 3,
    added: maps,
    concatenated: maps,
    over_tokens: maps,
    prior: codes,
    one_hot: codes,
    both: vectors,
    both_together: maps,
}
every_mix = pytest.mark.parametrize("mix", MIXES, ids=lambda f: f.__name__)


def make(mix: Callable, n: int = 7) -> tuple[nn.Module, dict, dict]:
    """(network with weights large enough to matter, what it needs to be sampled, labels and conditions of n samples)"""
    torch.manual_seed(2)
    network = Network(mix).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2)
    labelled = mix in (both, both_together)
    given = {
        "image_shape": (1, HEIGHT, WIDTH),
        "head": Categorical(LEVELS),
        "num_classes": CLASSES if labelled else None,
    }
    inputs = {"condition": MIXES[mix](n), "labels": torch.arange(n) % CLASSES if labelled else None}
    return network, given, inputs


def example(mix: Callable) -> Tensor:
    """Not one of those that are sampled."""
    return MIXES[mix](1)[0]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@every_mix
def test_equals_naive_loop(mix: Callable, backend: str) -> None:
    network, given, inputs = make(mix)
    sampler = Sampler(network, **given, condition=example(mix), backend=backend)
    expected = naive_sample(network, 7, **given, **inputs, seed=3)
    for _ in range(2):  # nothing is left behind by the first time
        assert torch.equal(sampler.sample(7, **inputs, seed=3), expected)
    assert audit(network, expected, **given, **inputs, seed=3).ok


@every_mix
def test_condition_matters(mix: Callable) -> None:
    """To the images, and to the audit, which looks twice, in float64, at what does not agree."""
    network, given, inputs = make(mix, 16)
    sampler = Sampler(network, **given, condition=example(mix))
    images, others = sampler.sample(16, **inputs), {**inputs, "condition": inputs["condition"].flip(0)}
    assert not torch.equal(sampler.sample(16, **others), images)
    assert not audit(network, images, **given, **others).ok
    images[3, 0, 2, 1] = (images[3, 0, 2, 1] + 2) % LEVELS
    assert not audit(network, images, **given, **inputs).ok


@every_mix
def test_samples_do_not_depend_on_the_batch(mix: Callable) -> None:
    network, given, inputs = make(mix, 11)
    inputs = {name: t for name, t in inputs.items() if t is not None}
    whole = Sampler(network, **given, condition=example(mix)).sample(11, **inputs)
    for max_batch in (1, 4):
        sampler = Sampler(network, **given, condition=example(mix), max_batch=max_batch)
        assert torch.equal(sampler.sample(11, **inputs), whole)
        part = {name: t[5:9] for name, t in inputs.items()}
        assert torch.equal(sampler.sample(4, start=5, **part), whole[5:9])


@every_mix
def test_one_condition_for_all(mix: Callable) -> None:
    network, given, inputs = make(mix)
    one = inputs["condition"][2]
    inputs["condition"] = torch.stack([one] * 7)
    sampler = Sampler(network, **given, condition=example(mix))
    images = sampler.sample(7, **inputs)
    for same in (one, one[None]):
        assert torch.equal(sampler.sample(7, **{**inputs, "condition": same}), images)
    inputs["condition"] = one[None]
    assert torch.equal(naive_sample(network, 7, **given, **inputs), images)
    assert audit(network, images, **given, **inputs).ok


@every_mix
def test_bits_do_not_depend_on_other_samples_or_threads(mix: Callable) -> None:
    """What is made of labels and condition: images would show it once in a million."""
    network, given, inputs = make(mix, 40)
    sampler = Sampler(network, **given, condition=example(mix))
    before = torch.get_num_threads()

    def planes(samples: Tensor, threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        made: list[Tensor] = []
        execute = sampler._executor.sample
        sampler._executor.sample = lambda batch: made.extend(batch.conditions) or execute(batch)
        sampler.sample(len(samples), **{name: t if t is None else t[samples] for name, t in inputs.items()})
        sampler._executor.sample = execute
        assert torch.get_num_threads() == threads
        return made

    try:
        expected = planes(torch.arange(40), 1)
        for samples, threads in ((torch.arange(40).flip(0), 2), (torch.tensor([7]), 3), (torch.tensor([9, 7]), 1)):
            for found, wanted in zip(planes(samples, threads), expected, strict=True):
                assert torch.equal(found, wanted[samples])
    finally:
        torch.set_num_threads(before)


def test_equal_samples_are_replayed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, given, inputs = make(both, 8)
    sampler = Sampler(network, **given, condition=example(both))
    replayed = []
    run = Tape._replay_sample
    monkeypatch.setattr(Tape, "_replay_sample", lambda *args: replayed.append(1) or run(*args))

    def count(**inputs: Tensor | int) -> int:
        replayed.clear()
        sampler.sample(8, **inputs)
        return len(replayed)

    one, labels = inputs["condition"][0], inputs["labels"]
    assert count(labels=1, condition=one) == 1
    assert count(labels=labels, condition=one) == 3
    assert count(labels=labels, condition=inputs["condition"]) == 8
    halves = torch.stack([one, one, one, one, -one, -one, -one, -one])
    assert count(labels=1, condition=halves) == 2
    assert count(labels=1, condition=torch.stack([one * 0, one * -0.0] * 4)) == 2  # 1 / 0 and 1 / -0 differ


def test_labels_are_replayed_once_for_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = GatedPixelCNN(image_shape=(1, 4, 3), levels=5, num_filters=4, num_blocks=2, kernel_size=3, num_classes=4)
    replayed = []
    run = Tape._replay_sample
    monkeypatch.setattr(Tape, "_replay_sample", lambda *args: replayed.append(1) or run(*args))
    calls = [torch.tensor([2, 0, 2]), torch.tensor([3, 3, 1]), torch.tensor([2, 0, 3])]
    for room, new in ((1 << 20, [2, 2, 0]), (0, [2, 2, 2])):  # bytes: for all, and for the last call alone
        monkeypatch.setattr("fastgen.sampling.sampler.MAX_KNOWN_BYTES", room)
        sampler = Sampler(model)
        for labels, expected in zip(calls, new, strict=True):
            replayed.clear()
            images = sampler.sample(3, seed=5, labels=labels)
            assert len(replayed) == expected
            assert torch.equal(images, naive_sample(model, 3, seed=5, labels=labels))


def test_single_number_for_a_single_sample() -> None:
    network, given, _ = make(both)
    network.mix = lambda net, h, labels, z: scaled(net, h + net.labels(labels)[:, :, None, None], z)
    sampler = Sampler(network, **given, condition=torch.ones(1))
    images = sampler.sample(3, labels=1, condition=torch.tensor([1.5]))
    for i in range(3):
        for same in (torch.tensor([1.5]), torch.tensor([[1.5]]), torch.full((2, 2), 1.5)[0, :1].expand(1, 1)):
            assert torch.equal(sampler.sample(1, start=i, labels=1, condition=same), images[i : i + 1])
    assert torch.equal(naive_sample(network, 3, **given, labels=1, condition=torch.full((1, 1), 1.5)), images)


def test_model_that_ignores_its_condition() -> None:
    network, given, _ = make(gated)
    network.mix = lambda net, h, z: h
    images = Sampler(network, **given, condition=torch.zeros(2)).sample(3, condition=torch.ones(3, 2))
    assert torch.equal(images, naive_sample(network, 3, **given, condition=torch.ones(1, 2)))


@pytest.mark.parametrize("mix", [gated, added, both], ids=lambda f: f.__name__)
def test_weights_are_taken_at_construction(mix: Callable) -> None:
    network, given, inputs = make(mix)
    sampler = Sampler(network, **given, condition=example(mix))
    expected = sampler.sample(7, **inputs)
    with torch.no_grad():
        for p in network.parameters():
            p.neg_()
    assert torch.equal(sampler.sample(7, **inputs), expected)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("mix", [gated, added, prior, both_together], ids=lambda f: f.__name__)
def test_rounded_weights(mix: Callable, precision: str) -> None:
    """Those between the condition and the features, too."""
    network, given, inputs = make(mix, 32)
    images = Sampler(network, **given, condition=example(mix), precision=precision).sample(32, **inputs)
    with weights_in(precision):
        assert torch.equal(naive_sample(network, 32, **given, **inputs), images)
    assert audit(network, images, **given, **inputs, precision=precision).ok


@pytest.mark.parametrize("mix", [gated, added, prior], ids=lambda f: f.__name__)
def test_dtype_is_that_of_the_module(mix: Callable) -> None:
    network, given, inputs = make(mix)
    expected = Sampler(network, **given, condition=example(mix)).sample(7, **inputs)
    if inputs["condition"].is_floating_point():
        wider = inputs["condition"].double()
        sampler = Sampler(network, **given, condition=example(mix).half())
        assert torch.equal(sampler.sample(7, condition=wider), expected)
        assert torch.equal(naive_sample(network, 7, **given, condition=wider), expected)
    network.double()
    assert torch.equal(Sampler(network, **given, condition=example(mix)).sample(7, **inputs), expected)
    assert torch.equal(naive_sample(network, 7, **given, **inputs), expected)
    assert audit(network, expected, **given, **inputs).ok


def written_into(net: Network, h: Tensor, z: Tensor) -> Tensor:
    z.mul_(2).add_(1)
    return gated(net, h, z)


def test_model_that_writes_into_its_condition() -> None:
    network, given, inputs = make(gated)
    network.mix = written_into
    one, condition = example(gated), inputs["condition"]
    kept = one.clone(), condition.clone()
    images = Sampler(network, **given, condition=one).sample(7, condition=condition)
    assert torch.equal(naive_sample(network, 7, **given, condition=condition), images)
    assert audit(network, images, **given, condition=condition).ok
    assert torch.equal(one, kept[0]) and torch.equal(condition, kept[1])


def test_example_that_is_a_weight_of_the_model() -> None:
    network, given, inputs = make(gated)
    expected = Sampler(network, **given, condition=example(gated)).sample(7, **inputs)
    sampler = Sampler(network, **given, condition=network.vector.weight[0])
    assert torch.equal(sampler.sample(7, **inputs), expected)


def test_completion_of_known_pixels() -> None:
    network, given, inputs = make(prior)
    known = torch.randint(LEVELS, (7, 1, HEIGHT, WIDTH), dtype=torch.uint8)
    options = {"known": known, "mask": torch.rand(7, HEIGHT, WIDTH) < 0.5, "temperature": 0.7, "start": 3}
    images = Sampler(network, **given, condition=example(prior)).sample(7, **inputs, **options)
    assert torch.equal(naive_sample(network, 7, **given, **inputs, **options), images)


class Hourglass(nn.Module):
    """Super-resolution: the upsampled small image is an input channel of a strided level."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(18, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 6, 4, stride=2, padding=1)
        self.left = nn.Conv2d(1, 6, (1, 2))
        self.out = nn.Conv2d(6, LEVELS, 1)

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        h = torch.cat([F.pad(x, (0, 0, 4, 0))[:, :, :-4], F.interpolate(low, scale_factor=2)], dim=1)
        return self.out(torch.tanh(self.up(torch.tanh(self.down(h))) + self.left(F.pad(x, (2, 0))[..., :-1])))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_strided_level(backend: str) -> None:
    torch.manual_seed(0)
    network, given = Hourglass(), {"image_shape": (1, HEIGHT, WIDTH), "head": Categorical(LEVELS)}
    condition = maps(5)
    images = Sampler(network, **given, condition=condition[0], backend=backend).sample(5, condition=condition)
    assert torch.equal(naive_sample(network, 5, **given, condition=condition), images)


def by_value(net: Network, h: Tensor, z: Tensor) -> Tensor:
    return h * float(z[0, 0])


def by_sign(net: Network, h: Tensor, z: Tensor) -> Tensor:
    return h * 0 if (z > 1).any() else h


def by_list(net: Network, h: Tensor, z: Tensor) -> Tensor:
    return h * z.tolist()[0][0]


def by_selection(net: Network, h: Tensor, z: Tensor) -> Tensor:
    return h * len(z[z > 0])


def masked(net: Network, h: Tensor, z: Tensor) -> Tensor:
    return torch.where(z[:, :6, None, None] > 0, h, -h)


def random(net: Network, h: Tensor, z: Tensor) -> Tensor:
    return gated(net, h, z + torch.randn_like(z))


def transposed(net: Network, h: Tensor, z: Tensor) -> Tensor:
    return h + z.mean(0)[:6, None, None]


def failing(net: Network, h: Tensor, z: Tensor) -> Tensor:
    return h + net.tokens(z[:, :3])


@pytest.mark.parametrize(
    ("mix", "named"),
    [
        (by_value, "reads the values of the condition"),
        (by_sign, "reads the values of the condition"),
        (by_list, r"reads the values of the condition \(Tensor.tolist"),
        (by_selection, "reads the values of the condition .*index"),
        (masked, "with a mask that depends on the image, the labels or the condition"),
        (random, "a network that is random"),
        (transposed, "that depends on the condition and whose first dimension is not the batch"),
        (failing, r"of shape \(2, 1, 6, 4\) and a condition of shape \(2, 33\), raised RuntimeError"),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_refused_by_name(mix: Callable, named: str) -> None:
    network, given, _ = make(gated)
    network.mix = mix
    with pytest.raises(UnsupportedModel, match=named):
        Sampler(network, **given, condition=example(gated))


def test_names_both_where_there_are_both() -> None:
    network, given, _ = make(both)
    network.mix = lambda net, h, labels, z: by_value(net, h, z)
    with pytest.raises(UnsupportedModel, match="reads the values of the labels or the condition"):
        Sampler(network, **given, condition=example(both))


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        (None, ValueError, r"the model is conditional: a condition of shape \(2, 33\) is needed"),
        ([0.0] * 33, TypeError, r"condition\[0\] must be a tensor, got float"),
        (torch.zeros(2, 33, dtype=torch.int64), TypeError, "a tensor of floats, as .*example is, got torch.int64"),
        (
            torch.zeros(3, 33),
            ValueError,
            r"condition must have shape \(2, 33\), or \(33,\) for all samples, got \(3, 33\)",
        ),
        (torch.zeros(2, 32), ValueError, r"condition must have shape \(2, 33\), .*, got \(2, 32\)"),
        (torch.full((2, 33), float("nan")), ValueError, "condition must not hold NaN"),
        (torch.full((2, 33), float("inf")), ValueError, "the model makes NaN of the condition"),
    ],
    ids=["missing", "list", "integers", "number", "shape", "NaN", "infinite"],
)
def test_bad_conditions(condition: object, error: type[Exception], message: str) -> None:
    network, given, _ = make(gated)
    with pytest.raises(error, match=message):
        Sampler(network, **given, condition=torch.zeros(33)).sample(2, condition=condition)


def test_bad_codes() -> None:
    network, given, inputs = make(prior, 2)
    sampler = Sampler(network, **given, condition=example(prior))
    with pytest.raises(TypeError, match=r"a tensor of torch.int64, as the Sampler's example is, got torch.int32"):
        sampler.sample(2, condition=inputs["condition"].int())
    with pytest.raises(ValueError, match="the model raised IndexError for the condition: index out of range"):
        sampler.sample(2, condition=inputs["condition"] + CODES)


@pytest.mark.parametrize("run", [naive_sample, audit], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        ("z", TypeError, "condition must be a tensor, got str"),
        (
            torch.zeros(33),
            ValueError,
            r"condition must have shape \(2, \.\.\.\), or \(1, \.\.\.\) for all samples, got \(33,\)",
        ),
        (torch.full((2, 33), float("nan")), ValueError, "condition must not hold NaN"),
    ],
    ids=["text", "shape", "NaN"],
)
def test_bad_conditions_without_example(run: Callable, condition: object, error: type[Exception], message: str) -> None:
    network, given, _ = make(gated)
    images = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.uint8)
    with pytest.raises(error, match=message):
        run(network, images if run is audit else 2, **given, condition=condition)


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        (1.5, TypeError, "condition must be a tensor, got float"),
        (torch.zeros(0), ValueError, r"condition must not be empty, got shape \(0,\)"),
        (torch.full((33,), float("nan")), ValueError, "condition must not hold NaN"),
    ],
    ids=["number", "empty", "NaN"],
)
def test_bad_examples(condition: object, error: type[Exception], message: str) -> None:
    network, given, _ = make(gated)
    with pytest.raises(error, match=message):
        Sampler(network, **given, condition=condition)


def test_condition_for_a_sampler_without_one() -> None:
    network, given, inputs = make(gated)
    network.mix = lambda net, h: h
    sampler = Sampler(network, **given)
    with pytest.raises(
        ValueError, match=r"no example of it to the Sampler: Sampler\(model, \.\.\., condition=example\)"
    ):
        sampler.sample(7, **inputs)
    assert sampler.sample(0).shape == (0, 1, HEIGHT, WIDTH)
