"""Masks of attention that depend on the condition, a text's padding above all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.sampling import Categorical, Sampler, UnsupportedModel, audit, naive_sample
from fastgen.sampling.plan import Plan

from .attention_networks import lower
from .networks import LEVELS

WORDS, TOKENS, DIM, HEADS = 9, 5, 8, 2
# Padded on the right, on the left, not at all, and in the middle.
TEXTS = torch.tensor([[3, 5, 1, 0, 0], [0, 0, 0, 4, 2], [8, 7, 6, 5, 4], [3, 0, 1, 0, 1]])
GIVEN = {"image_shape": (3, 4), "head": Categorical(LEVELS, input_range=None)}

Scores, Mask = Tensor, Tensor  # [N, heads, queries, keys], bool [N, keys]: True is padding


class Network(nn.Module):
    """Codes of an image that attend to a text, in the ways of `attend`."""

    def __init__(self, attend: Callable):
        super().__init__()
        self.codes, self.words = nn.Embedding(LEVELS, DIM), nn.Embedding(WORDS, DIM)
        self.start = nn.Parameter(torch.randn(1, 1, DIM))
        self.places, self.of_words = nn.Parameter(torch.randn(1, 12, DIM)), nn.Parameter(torch.randn(1, TOKENS, DIM))
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        layer = {"d_model": DIM, "nhead": HEADS, "dim_feedforward": 12, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), 2)
        self.tokens_first = nn.MultiheadAttention(DIM, HEADS)
        self.out = nn.Linear(DIM, LEVELS)
        self.attend = attend

    def forward(self, codes: Tensor, text: Tensor, padding: Tensor | None = None) -> Tensor:
        before = self.codes(codes.flatten(1))[:, :-1]
        x = torch.cat([self.start.expand(len(codes), -1, -1), before], 1) + self.places
        text = (text == 0 if padding is None else padding, self.words(text) + self.of_words)
        return self.out(self.attend(self, x, *text)).transpose(1, 2).unflatten(2, codes.shape[1:])


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def cross(mask: Callable[[Scores, Mask], Scores]) -> Callable:
    """Attention to the text, whose scores a mask changes before softmax."""

    def attend(net: Network, x: Tensor, padding: Tensor, text: Tensor) -> Tensor:
        q, k, v = heads(net.q(x)), heads(net.k(text)), heads(net.v(text))
        probabilities = mask(q @ k.mT / 2, padding).softmax(-1)
        return x + (probabilities @ v).transpose(1, 2).flatten(2)

    return attend


def of_heads(padding: Tensor) -> Tensor:
    return padding[:, None, None]


def together(mask: Callable[[Mask], Tensor]) -> Callable:
    """Text and codes in one sequence; a mask of the whole sequence."""

    def attend(net: Network, x: Tensor, padding: Tensor, text: Tensor) -> Tensor:
        x, padding = torch.cat([text, x], 1), F.pad(padding, (0, x.shape[1]))
        q, k, v = (heads(layer(x)) for layer in (net.q, net.k, net.v))
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask(padding)).transpose(1, 2).flatten(2)
        return x[:, text.shape[1] :]

    return attend


def together_in_steps(mask: Callable[[Mask], Tensor]) -> Callable:
    """The causal mask comes first, that of the padding after it."""

    def attend(net: Network, x: Tensor, padding: Tensor, text: Tensor) -> Tensor:
        x, padding = torch.cat([text, x], 1), F.pad(padding, (0, x.shape[1]))
        q, k, v = (heads(layer(x)) for layer in (net.q, net.k, net.v))
        scores = (q @ k.mT / 2).masked_fill(~lower(x.shape[1]), -1e9).masked_fill(mask(padding), -1e9)
        return (x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))[:, text.shape[1] :]

    return attend


def seen(padding: Tensor) -> Tensor:
    return of_heads(~padding) & lower(padding.shape[1])


def encoder(net: Network, x: Tensor, padding: Tensor, text: Tensor) -> Tensor:
    """As PyTorch's layers do it, behind a token that all see: what sees nothing would be NaN."""
    count = text.shape[1]
    x = torch.cat([net.of_words[:, :1].expand(len(x), -1, -1), text, x], 1)
    padding = F.pad(F.pad(padding, (1, 0)), (0, x.shape[1] - count - 1))
    return net.encoder(x, ~lower(x.shape[1]), src_key_padding_mask=padding)[:, count + 1 :]


def decoder(net: Network, x: Tensor, padding: Tensor, text: Tensor) -> Tensor:
    memory = net.encoder(text, src_key_padding_mask=padding)
    return net.decoder(x, memory, tgt_mask=~lower(x.shape[1]), memory_key_padding_mask=padding)


def fused(net: Network, x: Tensor, padding: Tensor, text: Tensor) -> Tensor:
    q, k, v = heads(net.q(x)), heads(net.k(text)), heads(net.v(text))
    return x + F.scaled_dot_product_attention(q, k, v, attn_mask=of_heads(~padding)).transpose(1, 2).flatten(2)


def multihead_cross(net: Network, x: Tensor, padding: Tensor, text: Tensor) -> Tensor:
    attention = net.decoder.layers[0].multihead_attn
    return x + attention(x, text, text, key_padding_mask=padding, need_weights=False)[0]


def multihead_with_weights(net: Network, x: Tensor, padding: Tensor, text: Tensor) -> Tensor:
    return x + net.decoder.layers[0].multihead_attn(x, text, text, key_padding_mask=padding)[0]


def multihead_tokens_first(net: Network, x: Tensor, padding: Tensor, text: Tensor) -> Tensor:
    attention, x, text = net.tokens_first, x.transpose(0, 1), text.transpose(0, 1)
    return (x + attention(x, text, text, key_padding_mask=padding)[0]).transpose(0, 1)


def one_head(net: Network, x: Tensor, padding: Tensor, text: Tensor) -> Tensor:
    scores = torch.bmm(net.q(x), net.k(text).mT).masked_fill(padding[:, None], -torch.inf)
    return x + scores.softmax(2) @ net.v(text)


def lowest(scores: Scores) -> float:
    return torch.finfo(scores.dtype).min


ATTEND = {
    "fill": cross(lambda s, p: s.masked_fill(of_heads(p), -1e9)),
    "fill with infinity": cross(lambda s, p: s.masked_fill(of_heads(p), -torch.inf)),
    "fill in place": cross(lambda s, p: s.masked_fill_(of_heads(p) | of_heads(p), -1e4)),
    "where": cross(lambda s, p: torch.where(of_heads(~p), s, lowest(s))),
    "where the other way": cross(lambda s, p: torch.where(of_heads(p), -torch.inf, s)),
    "add": cross(lambda s, p: s + of_heads(p) * -1e4),
    "add first": cross(lambda s, p: of_heads(p).float() * lowest(s) + s),
    "subtract": cross(lambda s, p: s - 1e6 * of_heads(p).float()),
    "add twice": cross(lambda s, p: s + of_heads(p) * -1e4 + torch.arange(TOKENS).neg() + of_heads(p) * lowest(s)),
    "fill again": cross(lambda s, p: s.masked_fill(of_heads(p), -1e9).masked_fill(torch.arange(TOKENS) == 4, -1e9)),
    "capped": cross(lambda s, p: (2 * torch.tanh(s / 2)).masked_fill(of_heads(p), -1e9)),
    "before it is scaled": cross(lambda s, p: s.masked_fill(of_heads(p), -1e9) / 2),
    "before it is scaled, floats": cross(lambda s, p: (s + of_heads(p) * -1e4) * 0.5 + of_heads(p) * -1e4),
    "bias": cross(lambda s, p: s + of_heads(p.float().cumsum(1))),
    "bias of a head": cross(lambda s, p: s + torch.tensor([1.0, -2.0]).view(2, 1, 1) + of_heads(p.float())),
    "of some queries": cross(lambda s, p: s.masked_fill(of_heads(p) & (torch.arange(12) % 2 == 0)[:, None], -1e9)),
    "bias of queries": cross(lambda s, p: s + of_heads(p.float()) * torch.linspace(-3, 3, 12)[:, None]),
    "written out": cross(
        lambda s, p: s.masked_fill(of_heads(p), -1e9) - s.masked_fill(of_heads(p), -1e9).amax(-1, True)
    ),
    "fused": fused,
    "multihead": multihead_cross,
    "multihead with weights": multihead_with_weights,
    "multihead, tokens first": multihead_tokens_first,
    "one head": one_head,
    "decoder": decoder,
    "encoder": encoder,
    "together": together(seen),
    "together, floats": together(lambda p: torch.zeros(1).masked_fill(~seen(p), -1e4)),
    "together, lowest": together(lambda p: (~seen(p)).float() * torch.finfo(torch.float32).min),
    "together, each sees itself": together(lambda p: seen(p) | torch.eye(p.shape[1], dtype=torch.bool)),
    "together, each sees itself, by numbers": together(  # as LlamaGen has it
        lambda p: (seen(p) * (1 - torch.eye(p.shape[1])) + torch.eye(p.shape[1])).bool()
    ),
    "together, causal apart": together_in_steps(lambda p: of_heads(p).expand(-1, HEADS, p.shape[1], -1).contiguous()),
    "together, causal apart, expanded": together_in_steps(of_heads),
    "together, causal first": together(
        lambda p: torch.zeros(p.shape[1], p.shape[1]).masked_fill(~lower(p.shape[1]), -1e9) + of_heads(p) * -1e9
    ),
}


def network(attend: Callable) -> nn.Module:
    torch.manual_seed(3)
    result = Network(attend).eval()
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.mul_(1.6)
    return result


def attention_of(plan: Plan) -> list:
    return [step.attention for step in plan.steps if step.attention is not None]


@pytest.mark.parametrize("example", [0, 2], ids=["padded", "whole"])
@pytest.mark.parametrize("attend", ATTEND.values(), ids=ATTEND)
def test_equals_naive_loop(attend: Callable, example: int) -> None:
    net = network(attend)
    expected = naive_sample(net, 4, **GIVEN, condition=TEXTS, seed=1)
    for backend in ("reference", "cpu"):
        sampler = Sampler(net, **GIVEN, condition=TEXTS[example], backend=backend)
        assert torch.equal(sampler.sample(4, condition=TEXTS, seed=1), expected)
    assert any(attention.of_keys is not None for attention in attention_of(sampler.plan))
    others = naive_sample(net, 4, **GIVEN, condition=TEXTS.clamp(min=1), seed=1)
    assert not torch.equal(others, expected)  # so that the mask matters


def twice(change: Callable[[Tensor, Tensor], object]) -> Callable:
    """Two layers whose masks are made alike, but for a change in between, of the mask or of what it is made of."""

    def attend(net: Network, x: Tensor, padding: Tensor, text: Tensor) -> Tensor:
        padding = padding.clone()
        mask = torch.zeros(len(x), 1, 1, TOKENS).masked_fill_(of_heads(padding), -1e9)
        for _ in range(2):
            again = torch.zeros(len(x), 1, 1, TOKENS).masked_fill_(of_heads(padding), -1e9)
            q, k, v = heads(net.q(x)), heads(net.k(text)), heads(net.v(text))
            x = x + ((q @ k.mT / 2 + mask + again).softmax(-1) @ v).transpose(1, 2).flatten(2)
            change(mask, padding)
        return x

    return attend


CHANGES = {
    "none": (lambda mask, padding: None, 1),
    "of the mask": (lambda mask, padding: mask[..., 1].fill_(-1e9), 2),
    "of a view": (lambda mask, padding: mask.view(-1, TOKENS)[:, :2].sub_(3.0), 2),
    "of the padding": (lambda mask, padding: padding[:, 0].logical_not_(), 2),
    "by the text": (lambda mask, padding: mask.squeeze(2)[:, 0].sub_(padding.flip(1).float()), 2),
}


@pytest.mark.parametrize(("change", "planes"), CHANGES.values(), ids=CHANGES)
def test_layers_share_masks_that_are_the_same(change: Callable, planes: int) -> None:
    net = network(twice(change))
    sampler = Sampler(net, **GIVEN, condition=TEXTS[2])
    assert torch.equal(sampler.sample(4, condition=TEXTS), naive_sample(net, 4, **GIVEN, condition=TEXTS))
    assert len({attention.of_keys.plane for attention in attention_of(sampler.plan)}) == planes


@pytest.mark.parametrize(
    ("attend", "each_query"),
    [("of some queries", True), ("together, each sees itself", True), ("fill", False), ("fused", False)],
)
def test_queries_have_masks_of_their_own_where_they_may_differ(attend: str, each_query: bool) -> None:
    for example in TEXTS:
        plan = Sampler(network(ATTEND[attend]), **GIVEN, condition=example).plan
        assert [attention.each_query for attention in attention_of(plan)] == [each_query]


@pytest.mark.parametrize("attend", ["fill", "where", "fused", "together, lowest", "together, each sees itself"])
def test_text_of_nothing(attend: str) -> None:
    """Queries see nothing of it, or everything alike, as PyTorch has it."""
    net, texts = network(ATTEND[attend]), TEXTS * torch.tensor([[0], [1], [0], [1]])
    expected = naive_sample(net, 4, **GIVEN, condition=texts, seed=1)
    for backend in ("reference", "cpu"):
        sampler = Sampler(net, **GIVEN, condition=TEXTS[2], backend=backend)
        assert torch.equal(sampler.sample(4, condition=texts, seed=1), expected)


def test_keys_of_a_text_are_not_copied() -> None:
    """They are made by the tape, in place."""
    plan = Sampler(network(ATTEND["fill"]), **GIVEN, condition=TEXTS[0]).plan
    (attention,) = attention_of(plan)
    kinds = [plan.planes[read.plane].kind for read in (attention.keys, attention.values, attention.of_keys)]
    assert kinds == ["condition"] * 3


FORMS = {
    "tuple": ((TEXTS, TEXTS == 0), (TEXTS[2], TEXTS[2] == 0)),
    "list": ([TEXTS, TEXTS == 0], (TEXTS[2], TEXTS[2] == 0)),
    "dict": ({"padding": TEXTS == 0, "text": TEXTS}, {"padding": TEXTS[0] == 0, "text": TEXTS[0]}),
    "dict in another order": ({"padding": TEXTS == 0, "text": TEXTS}, {"text": TEXTS[0], "padding": TEXTS[0] == 0}),
}


@pytest.mark.parametrize("attend", ["fill", "together", "decoder"])
@pytest.mark.parametrize(("condition", "example"), FORMS.values(), ids=FORMS)
def test_text_and_mask(attend: str, condition: object, example: object) -> None:
    net = network(ATTEND[attend])
    expected = naive_sample(net, 4, **GIVEN, condition=TEXTS, seed=1)
    sampler = Sampler(net, **GIVEN, condition=example)
    assert torch.equal(sampler.sample(4, condition=condition, seed=1), expected)
    assert torch.equal(naive_sample(net, 4, **GIVEN, condition=condition, seed=1), expected)
    assert audit(net, expected, **GIVEN, condition=condition, seed=1).ok


@pytest.mark.parametrize("max_batch", [1, 3])
def test_batches_do_not_matter(max_batch: int) -> None:
    net = network(ATTEND["together"])
    expected = Sampler(net, **GIVEN, condition=TEXTS[0]).sample(4, condition=TEXTS)
    sampler = Sampler(net, **GIVEN, condition=TEXTS[0], max_batch=max_batch)
    assert torch.equal(sampler.sample(4, condition=TEXTS), expected)
    assert torch.equal(sampler.sample(1, start=3, condition=TEXTS[3]), expected[3:])


REFUSED = {
    "before it is scaled by head": (
        cross(lambda s, p: s.masked_fill(of_heads(p), -1e4) * torch.tensor([0.5, 2.0]).view(2, 1, 1)),
        "to which something that depends on the condition was added",
    ),
    "before it is turned round": (
        cross(lambda s, p: -(s + of_heads(p) * 1e4)),
        "to which something that depends on the condition was added",
    ),
    "with a number that is no mask": (
        cross(lambda s, p: s.masked_fill(of_heads(p), 1.0)),
        "by a mask of the condition and a number that masks nothing",
    ),
    "of probabilities": (cross(lambda s, p: s.softmax(-1) * of_heads(~p)), "depends on the image, the labels or"),
    "of some heads": (
        cross(lambda s, p: s.masked_fill(of_heads(p) & torch.tensor([True, False]).view(2, 1, 1), -1e9)),
        "hides a key from some heads alone",
    ),
}


@pytest.mark.parametrize(("attend", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(attend: Callable, text: str) -> None:
    with pytest.raises(UnsupportedModel, match=text):
        Sampler(network(attend), **GIVEN, condition=TEXTS[0])


def test_condition_that_lets_positions_see_more() -> None:
    """It would not be causal: what the example shows is what was proved."""

    def ahead(net: Network, x: Tensor, padding: Tensor, text: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        mask = steps <= steps[:, None] + (text[:, :1, :1] > 1e3)
        q, k, v = heads(net.q(x)), heads(net.k(x)), heads(net.v(x))
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2).flatten(2)

    net = network(ahead)
    with torch.no_grad():
        net.words.weight[1] = 2e3
    sampler = Sampler(net, **GIVEN, condition=torch.full((TOKENS,), 2))
    sampler.sample(1, condition=torch.full((TOKENS,), 2))
    with pytest.raises(ValueError, match="lets positions see what the Sampler's example lets none see"):
        sampler.sample(2, condition=torch.tensor([[2] * TOKENS, [1] * TOKENS]))


CONDITIONS = {
    "names": ({"texts": TEXTS}, ValueError, "a dict of text, as the Sampler's example is, got a dict of texts"),
    "tensor": (TEXTS, ValueError, "condition must be a dict of text, as the Sampler's example is, got a tensor"),
    "tuple": ((TEXTS, TEXTS), ValueError, "got a tuple of 2"),
    "keys": ({1: TEXTS}, TypeError, "condition must have names of arguments as keys"),
    "value": ({"text": [1]}, TypeError, r"condition\['text'\] must be a tensor, got list"),
    "shape": ({"text": TEXTS[:, :3]}, ValueError, r"condition\['text'\] must have shape \(4, 5\), .*, got \(4, 3\)"),
    "empty": ({}, ValueError, "got nothing"),
}


@pytest.mark.parametrize(("condition", "error", "text"), CONDITIONS.values(), ids=CONDITIONS)
def test_bad_conditions(condition: object, error: type[Exception], text: str) -> None:
    sampler = Sampler(network(ATTEND["fill"]), **GIVEN, condition={"text": TEXTS[0]})
    with pytest.raises(error, match=text):
        sampler.sample(4, condition=condition)
