"""Language models as networks over the codes of an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen._arguments import integer
from fastgen.sampling.heads import Categorical
from fastgen.sampling.subject import entries_of


class NextToken(nn.Module):
    """A model of token sequences, GPT-like, as what a `Sampler` takes: a network over the codes of an image, in raster
    order behind tokens that are given.

    A sequence is the token of the label, the tokens of the condition, `start` and the codes, each where there is one.
    The logits of a token are those of the one behind it, so that the last token is never read::

        Sampler(NextToken(gpt, image_shape=(16, 16), levels=512, start=512))

    Args:
        model: int64 tokens [N, T] -> logits [N, T, vocabulary], alone, as the first part of a tuple, or as `logits` of
            a mapping or a dataclass. Its tokens see none behind them.
        image_shape: (H, W) of the codes.
        levels: number of the codes.
        start: the token in front of the codes; None where labels or a condition, int64 [N, tokens], are there.
        num_classes: of the labels; None where there are none.
        first_class, first_code: the tokens of class 0 and of code 0; the others follow.

    Raises:
        TypeError, ValueError: bad arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_shape: tuple[int, int],
        levels: int,
        start: int | None = None,
        num_classes: int | None = None,
        first_class: int = 0,
        first_code: int = 0,
    ):
        super().__init__()
        if not isinstance(image_shape, tuple | list) or len(image_shape) != 2:
            raise ValueError(f"image_shape must be (H, W), got {image_shape!r}")
        self.model = model
        self.image_shape = tuple(image_shape)
        self.head = Categorical(levels, input_range=None)
        self.num_classes = num_classes
        self.start = None if start is None else integer("start", start, 0, 2**62)
        self.first_class = integer("first_class", first_class, 0, 2**62)
        self.first_code = integer("first_code", first_code, 0, 2**62)

    def forward(self, codes: Tensor, *given: Tensor) -> Tensor:
        """Logits [N, levels, H, W] of codes [N, H, W]; given: labels [N] and a condition [N, tokens], if any."""
        front = [t[:, None] + self.first_class if t.dim() == 1 else t for t in given]
        if self.start is not None:
            front.append(torch.full((len(codes), 1), self.start, device=codes.device))
        if not front:
            raise ValueError("nothing is in front of the first code: NextToken needs start, labels or a condition")
        tokens = torch.cat([*front, codes.flatten(1) + self.first_code], dim=1)[:, :-1]
        logits = self._logits(self.model(tokens))
        of_codes = logits[:, -codes[0].numel() :, self.first_code : self.first_code + self.head.levels]
        return of_codes.transpose(1, 2).unflatten(2, self.image_shape)

    @staticmethod
    def _logits(output: Any) -> Tensor:
        found = entries_of(output).get("logits")
        if found is None:
            found = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(found, Tensor):
            raise TypeError(
                "the model's output must be logits [N, T, vocabulary], a tuple that begins with them or a mapping with "
                f"logits, got {type(output).__name__}"
            )
        return found
