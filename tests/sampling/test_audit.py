"""The audit passes what it must and catches what it must."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from fastgen import models
from fastgen.nn import MaskedConv2d
from fastgen.sampling import Categorical, LogisticMixture, Sampler, audit, naive_sample
from fastgen.sampling.uniforms import image_uniforms

MODEL = models.GatedPixelCNN(image_shape=(1, 5, 4), levels=4, num_filters=4, num_blocks=2)


def test_catches_one_changed_pixel() -> None:
    images = Sampler(MODEL).sample(8, seed=3)
    assert audit(MODEL, images, seed=3).ok
    images[5, 0, 2, 1] = (images[5, 0, 2, 1] + 2) % 4
    report = audit(MODEL, images, seed=3)
    assert not report.ok and report.mismatches >= 1 and report.max_margin > 1e-3


def test_catches_wrong_seed_start_and_temperature() -> None:
    images = Sampler(MODEL).sample(8, seed=3, start=2)
    assert audit(MODEL, images, seed=3, start=2).ok
    for wrong in ({"seed": 4, "start": 2}, {"seed": 3, "start": 3}, {"seed": 3, "start": 2, "temperature": 0.5}):
        assert not audit(MODEL, images, **wrong).ok


def test_tie_is_told_from_mismatch() -> None:
    """A uniform that lies a float32 rounding from a boundary is a tie; one that lies further off is not."""
    images = Sampler(MODEL).sample(1, seed=0)
    with torch.no_grad():
        cdf = MODEL.head.cdf(MODEL(MODEL.head.encode(images)))
    exact = {"seed": 0}

    def count(shift: float) -> tuple[int, int]:
        level = int(images[0, 0, 4, 3])
        boundary = cdf[0, 0, min(level, 2), 4, 3]
        wrong = images.clone()
        wrong[0, 0, 4, 3] = min(level, 2)
        uniforms = image_uniforms(0, 0, 1, (1, 5, 4))
        uniforms[0, 0, 4, 3] = boundary + shift
        margin = MODEL.head.margins(cdf, wrong, uniforms)
        return int((margin[0, 0, 4, 3] > 1e-5).item()), int((margin[0, 0, 4, 3] > 0).item())

    assert count(1e-2) == (1, 1)
    assert count(-1e-6)[0] == 0
    assert audit(MODEL, images, **exact).ties == 0


def test_margin_by_hand() -> None:
    cdf = torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64).view(1, 1, 3, 1, 1)

    def margin(level: int, u: float) -> float:
        images = torch.full((1, 1, 1, 1), level)
        return Categorical(3).margins(cdf, images, torch.full((1, 1, 1, 1), u, dtype=torch.float64)).item()

    assert margin(1, 0.5) == 0 and margin(0, 0.1) == 0 and margin(2, 0.99) == 0
    assert abs(margin(1, 0.15) - 0.05) < 1e-12 and abs(margin(1, 0.9) - 0.2) < 1e-12
    assert margin(0, 0.2) == 0 and 0 < margin(1, 0.2) < 1e-300


class MakesFloat32(nn.Module):
    """Tensors of its own dtype in the forward pass, which the audit runs in float64, too."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(1, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape, dtype=torch.float32)
        h[:, :, 1:] = x[:, :, :-1]
        return self.out(h)


def test_module_that_makes_float32() -> None:
    given = {"image_shape": (1, 3, 3), "head": Categorical(3)}
    module = MakesFloat32()
    images = Sampler(module, **given).sample(4)
    images[1, 0, 1, 1] = (images[1, 0, 1, 1] + 1) % 3
    assert not audit(module, images, **given).ok


@pytest.mark.parametrize("head", [Categorical(3), LogisticMixture(1, 3)], ids=["categorical", "mixture"])
def test_a_network_that_gives_nan_proves_nothing(head: Categorical | LogisticMixture) -> None:
    given = {"image_shape": (1, 3, 3), "head": head}
    module, images = nn.Conv2d(1, head.num_params(1), 1), torch.zeros(3, 1, 3, 3, dtype=torch.uint8)
    module.register_forward_hook(lambda module, args, y: y.index_fill(2, torch.tensor([1]), torch.nan))
    with pytest.raises(RuntimeError, match=r"gives NaN for row 1, column 0 of images\[0\]"):
        audit(module, images, **given)
    with pytest.raises(RuntimeError, match="gives NaN for row 1, column 0"):
        naive_sample(module, 1, **given)
    mask = torch.ones(3, 3, 3, dtype=torch.bool)
    audit(module, images, **given, mask=mask)
    mask[2, 1, 2] = False
    with pytest.raises(RuntimeError, match=r"gives NaN for row 1, column 2 of images\[2\]"):
        audit(module, images, **given, mask=mask)


def test_a_module_that_cannot_be_copied() -> None:
    given = {"image_shape": (1, 3, 3), "head": Categorical(3)}
    module = MakesFloat32()
    module.lock = threading.Lock()
    images = Sampler(module, **given).sample(4)
    assert audit(module, images, **given).ok
    images[1, 0, 1, 1] = (images[1, 0, 1, 1] + 1) % 3
    with pytest.raises(TypeError, match=r"1 images are not what the network draws, .* cannot be made: cannot pickle"):
        audit(module, images, **given)


class WholePixels(nn.Module):
    """A causal network for heads that draw the colours of a pixel together."""

    def __init__(self, channels: int, components: int, levels: int) -> None:
        super().__init__()
        self.image_shape, self.head = (channels, 4, 3), LogisticMixture(components, levels)
        self.first = MaskedConv2d(channels, 8, 3, mask_type="A")
        self.last = nn.Conv2d(8, self.head.num_params(channels), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logistic_mixture(channels: int, temperature: float) -> None:
    """Images of the naive loop pass; one changed colour does not."""
    given = {"seed": 7, "start": 5, "temperature": temperature}
    model = WholePixels(channels, components=3, levels=9)
    images = naive_sample(model, 6, **given)
    report = audit(model, images, **given)
    assert report.ok and report.elements == 6 * 4 * 3
    for colour in range(channels):
        changed = images.clone()
        changed[4, colour, 3, 2] = (changed[4, colour, 3, 2] + 4) % 9
        report = audit(model, changed, **given)
        assert report.mismatches == 1 and report.max_margin > 1e-3
    assert not audit(model, images, seed=8, start=5, temperature=temperature).ok
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[3, 2] = True
    report = audit(model, changed, mask=mask, **given)
    assert report.ok and report.elements == 6 * (4 * 3 - 1)
