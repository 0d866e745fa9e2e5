"""What transformers over tokens do between attention: shifted tokens of texts and images, gates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.sampling import NotCausal, Sampler, audit, naive_sample

from .attention_networks import CODES
from .networks import LEVELS


class Network(nn.Module):
    """A text in front of the image's codes, as DALL-E has it, and a layer of attention; mix(net, h) is between them,
    of tokens [N, text + pixels, 8].
    """

    def __init__(self, mix: Callable, text: int, size: tuple[int, int]):
        super().__init__()
        self.mix, self.text, self.size = mix, text, size
        count = text + size[0] * size[1]
        self.words, self.codes, self.position = (
            nn.Embedding(4, 8),
            nn.Embedding(LEVELS, 8),
            nn.Parameter(torch.randn(count, 8)),
        )
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
        self.cell, self.out = nn.GRUCell(8, 8), nn.Linear(8, LEVELS)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = torch.cat([self.words(text), self.codes(x.flatten(1))], 1) + self.position
        h = self.mix(self, h[:, :-1])
        h = self.layer(h, nn.Transformer.generate_square_subsequent_mask(h.shape[1]))
        h = self.mix(self, h)
        return self.out(h[:, self.text - 1 :]).transpose(1, 2).unflatten(2, self.size)


def shifted(above: int = 1, left: int = 1) -> Callable:
    """dalle-pytorch: channels of the token before in the text; of the pixels above and to the left in the image."""

    def mix(net: Network, h: Tensor) -> Tensor:
        text, image = h[:, : net.text], F.pad(h[:, net.text :], (0, 0, 0, 1)).unflatten(1, net.size)
        moved, kept = text.chunk(2, dim=-1)
        text = torch.cat([F.pad(moved, (0, 0, 1, -1)), kept], -1)
        top, side, *rest = image.chunk(4, dim=-1)
        top, side = F.pad(top, (0, 0, 0, 0, above, -above)), F.pad(side, (0, 0, left, -left))
        return torch.cat([text, torch.cat([top, side, *rest], -1).flatten(1, 2)[:, :-1]], 1)

    return mix


def from_before(net: Network, h: Tensor) -> Tensor:
    """x-transformers: half of the channels of a token are those of the one before."""
    moved, kept = h.chunk(2, dim=-1)
    return torch.cat([F.pad(moved, (0, 0, 1, -1)), kept], -1)


def gated(net: Network, h: Tensor) -> Tensor:
    """GTrXL: a GRU cell in place of a residual sum."""
    update = torch.tanh(h)
    return net.cell(update.flatten(0, 1), h.flatten(0, 1)).view(h.shape)


def in_chunks(net: Network, h: Tensor) -> Tensor:
    """As PyTorch's own layers split: not in views."""
    a, b = torch.unsafe_chunk(h, 2, -1)
    c, d, e = torch.unsafe_split_with_sizes(h, (3, 1, 4), -1)
    return torch.cat([a * torch.sigmoid(b), c + d, e[..., :1]], -1)


MIXES = {
    "shifted": shifted(),
    "from before": from_before,
    "gated": gated,
    "in chunks": in_chunks,
}


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 6)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("text", [1, 4])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_equals_naive_loop(mix: Callable, text: int, size: tuple[int, int]) -> None:
    torch.manual_seed(5)
    net = Network(mix, text, size).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.6)
    given, condition = {"image_shape": size, "head": CODES}, torch.randint(4, (2, text))
    expected = naive_sample(net, 2, **given, condition=condition)
    for backend in ("reference", "cpu"):
        sampler = Sampler(net, **given, condition=condition[0], backend=backend)
        assert torch.equal(sampler.sample(2, condition=condition), expected)
    assert audit(net, expected, **given, condition=condition).ok
    assert not audit(net, (expected + 1) % LEVELS, **given, condition=condition).ok


@pytest.mark.parametrize("mix", [shifted(), from_before], ids=["shifted", "from before"])
def test_no_channel_is_a_program(mix: Callable) -> None:
    net = Network(mix, 4, (3, 4)).eval()
    plan = Sampler(net, (3, 4), CODES, condition=torch.randint(4, (4,)), backend="reference").plan
    assert all(step.width > 1 for step in plan.steps)


@pytest.mark.parametrize("mix", [shifted(above=-1), shifted(left=-1)], ids=["below", "right"])
@pytest.mark.parametrize("text", [1, 4])
def test_shifts_the_other_way_are_refused(mix: Callable, text: int) -> None:
    net = Network(mix, text, (3, 4)).eval()
    with pytest.raises(NotCausal):
        Sampler(net, (3, 4), CODES, condition=torch.randint(4, (text,)))
