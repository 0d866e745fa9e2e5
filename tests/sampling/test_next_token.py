"""Language models over tokens as networks over an image's codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.sampling import NextToken, NotCausal, Sampler, UnsupportedModel, audit, naive_sample

LEVELS, CLASSES, WORDS, SIZE = 7, 4, 5, (3, 4)
VOCABULARY = LEVELS + CLASSES + WORDS + 1  # words, codes, classes, start
CODE, CLASS, START = WORDS, WORDS + LEVELS, VOCABULARY - 1


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class GPT(nn.Module):
    """tokens [N, T] -> logits [N, T, vocabulary], as `wrap` returns them."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda logits: logits):
        super().__init__()
        self.wrap = wrap
        self.tokens, self.positions = nn.Embedding(VOCABULARY, 8), nn.Embedding(32, 8)
        self.qkv, self.project, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Any:
        n, count = tokens.shape
        x = self.tokens(tokens) + self.positions(torch.arange(count))
        q, k, v = (t.view(n, count, 2, 4).transpose(1, 2) for t in self.qkv(self.norm(x)).split(8, dim=2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(n, count, 8))
        return self.wrap(self.head(x))


GIVEN: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "start": ({"start": START}, {}),
    "labels": ({"num_classes": CLASSES, "first_class": CLASS}, {"labels": torch.tensor([2, 0, 3])}),
    "words": ({}, {"condition": torch.randint(WORDS, (3, 6))}),
    "all": (
        {"start": START, "num_classes": CLASSES, "first_class": CLASS},
        {"labels": torch.tensor([2, 0, 3]), "condition": torch.randint(WORDS, (3, 6))},
    ),
}


def make(wrap: Callable[[Tensor], Any] = lambda logits: logits, **given: Any) -> NextToken:
    torch.manual_seed(3)
    gpt = GPT(wrap).eval()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.mul_(1.7)
    return NextToken(gpt, image_shape=SIZE, levels=LEVELS, first_code=CODE, **given)


def word_by_word(gpt: GPT, front: Tensor, codes: Tensor) -> Tensor:
    """log p of the codes [N, H, W] as those who train language models write it."""
    tokens = torch.cat([front, codes.flatten(1) + CODE], 1)
    logits = gpt(tokens)[:, front.shape[1] - 1 : -1, CODE : CODE + LEVELS]
    return -F.cross_entropy(logits.transpose(1, 2), codes.flatten(1), reduction="none").sum(1)


@pytest.mark.parametrize("given", GIVEN)
def test_the_next_token_is_predicted(given: str) -> None:
    of_model, of_call = GIVEN[given]
    net, codes = make(**of_model), torch.randint(LEVELS, (3, *SIZE))
    front = []
    if "labels" in of_call:
        front.append(of_call["labels"][:, None] + CLASS)
    if "condition" in of_call:
        front.append(of_call["condition"])
    if "start" in of_model:
        front.append(torch.full((3, 1), START))
    with torch.no_grad():
        logits = net(codes, *of_call.values())
        expected = word_by_word(net.model, torch.cat(front, 1), codes)
    assert logits.shape == (3, LEVELS, *SIZE)
    torch.testing.assert_close(-F.cross_entropy(logits, codes, reduction="none").sum((1, 2)), expected)


@pytest.mark.parametrize("given", GIVEN)
def test_equals_naive_loop(given: str) -> None:
    of_model, of_call = GIVEN[given]
    net = make(**of_model)
    expected = naive_sample(net, 3, **of_call)
    assert len(expected.unique()) == LEVELS
    example = of_call["condition"][0] if "condition" in of_call else None
    for backend in ("reference", "cpu"):
        assert torch.equal(Sampler(net, condition=example, backend=backend).sample(3, **of_call), expected)
    assert audit(net, expected, **of_call).ok


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: (logits, None),
        lambda logits: {"loss": None, "logits": logits},
        lambda logits: Output(logits),
    ],
    ids=["minGPT", "mapping", "dataclass"],
)
def test_what_models_return(wrap: Callable[[Tensor], Any]) -> None:
    expected = Sampler(make(start=START)).sample(2)
    assert torch.equal(Sampler(make(wrap, start=START)).sample(2), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_shape": (1, 3, 4)}, ValueError, r"image_shape must be \(H, W\), got \(1, 3, 4\)"),
        ({"start": -1}, ValueError, "start must be in 0"),
        ({"start": 1.5}, TypeError, "start must be an integer, got float"),
        ({"first_code": "a"}, TypeError, "first_code must be an integer, got str"),
        ({"levels": 0}, ValueError, "levels"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NextToken(GPT(), **{"image_shape": SIZE, "levels": LEVELS, **arguments})


@pytest.mark.parametrize("output", [{}, (None,), (), None], ids=repr)
def test_other_outputs(output: Any) -> None:
    with pytest.raises(UnsupportedModel, match=f"must be logits .* got {type(output).__name__}"):
        Sampler(make(lambda logits: output, start=START))


def test_something_is_in_front() -> None:
    with pytest.raises(UnsupportedModel, match="nothing is in front of the first code: NextToken needs start, labels"):
        Sampler(make())


def test_a_language_model_as_it_is_gets_the_hint() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = GPT()

        def forward(self, codes: Tensor) -> Tensor:
            return self.gpt(codes.flatten(1))[..., :LEVELS].transpose(1, 2).unflatten(2, SIZE)

    with pytest.raises(NotCausal, match=r"wrapped: fastgen\.sampling\.NextToken$"):
        Sampler(Bare(), SIZE, make(start=START).head)
