"""What transformers over tokens do between attention: shifted tokens of texts and images, gates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.sampling import NotCausal, Sampler, audit, naive_sample
from fastgen.sampling.subject import private

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


class TokenFirst(nn.Module):
    """PyTorch's own encoder layer as it comes: tokens in the first dimension, norms behind the sums. `start` makes the
    first token and what is added to all of them: of labels, [count, N, 8] and [count or 1, N or 1, 8].
    """

    def __init__(self, start: Callable, size: tuple[int, int], position: str):
        super().__init__()
        self.start, self.size, self.where = start, size, position
        self.codes, self.first, self.labels = nn.Embedding(LEVELS, 8), nn.Parameter(torch.randn(8)), nn.Embedding(4, 8)
        self.position = nn.Parameter(torch.randn(size[0] * size[1], 1, 8))
        self.layer, self.out = nn.TransformerEncoderLayer(8, 2, 12), nn.Linear(8, LEVELS)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.codes(x.flatten(1).t())
        h = h + self.position if self.where == "before the shift" else h
        first, everywhere = self.start(self, labels)
        h = torch.cat([first, h[:-1]]) + everywhere
        h = h + self.position if self.where == "after" else h
        h = self.layer(h, nn.Transformer.generate_square_subsequent_mask(len(h)))
        return self.out(h).permute(1, 2, 0).unflatten(2, self.size)


STARTS: dict[str, Callable] = {
    "label first": lambda net, labels: (net.labels(labels)[None], 0),
    "label everywhere": lambda net, labels: (net.first.expand(1, len(labels), 8), net.labels(labels)[None]),
    "label of each token": lambda net, labels: (
        net.first.expand(1, len(labels), 8),
        net.labels(labels)[None].expand(net.size[0] * net.size[1], -1, -1),
    ),
}


@pytest.mark.parametrize("size", [(3, 4), (1, 5)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("position", ["before the shift", "after", "nowhere"])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_token_first_equals_naive_loop(start: Callable, position: str, size: tuple[int, int]) -> None:
    torch.manual_seed(5)
    net = TokenFirst(start, size, position).eval()
    with torch.no_grad():
        net.out.weight *= 4
    given, labels = {"image_shape": size, "head": CODES, "num_classes": 4}, torch.tensor([1, 3, 0])
    expected = naive_sample(net, 3, **given, labels=labels)
    assert torch.equal(Sampler(net, **given, backend="cpu").sample(3, labels=labels), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_is_computed_as_in_training() -> None:
    """PyTorch's encoder would make zeros of it, but in eval mode alone."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 8), nn.Conv2d(8, LEVELS, 1)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 1)

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            mean = self.encoder(self.words(text), src_key_padding_mask=text == 0).mean(1)
            return self.out(mean[:, :, None, None] + F.pad(x.unsqueeze(1), (1, -1)))

    torch.manual_seed(5)
    net, text = Text(), torch.tensor([[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0]])
    given = {"image_shape": (2, 3), "head": CODES}
    expected = naive_sample(net, 3, **given, condition=text)
    assert torch.equal(Sampler(net, **given, condition=text[1]).sample(3, condition=text), expected)
    codes = expected[:, 0].long()
    with torch.no_grad():
        trained = net.train()(codes, text)
        torch.testing.assert_close(private(net).eval()(codes, text), trained)
        assert not torch.allclose(net.eval()(codes, text), trained, atol=1e-2)
