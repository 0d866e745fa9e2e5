"""Vector quantisation of feature maps, as a layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import ops
from fastgen._arguments import describe, positive

UNUSED = 1e-12  # a code that stood for fewer vectors than this stays where it is


class Quantized(NamedTuple):
    """What `VectorQuantizer` returns.

    features: of the input's shape, each vector replaced by its code; gradients pass through to the input unchanged.
    codes: int64 [N, *spatial]. loss: a scalar, what training adds to the loss of the task.
    """

    features: Tensor
    codes: Tensor
    loss: Tensor


class VectorQuantizer(torch.nn.Module):
    """Each vector of a feature map becomes the nearest of ``num_codes`` learned ones.

    A. van den Oord, O. Vinyals, K. Kavukcuoglu, "Neural Discrete Representation Learning", NIPS 2017 (1711.00937),
    section 3.  The codes are moving averages of the vectors that they stand for (appendix A.1), updated by calls in
    training mode; or, with ``decay=None``, parameters with a loss of their own (equation 3, second term).

    Vectors with a NaN or an infinite value get code 0 and move nothing.  Statistics and codes have the dtype of the
    module: train in float32, or under autocast.  Where a forward pass is run again for the backward pass
    (`torch.utils.checkpoint`), the codes have moved in between, and gradients are those of the second pass.

    Args:
        num_codes: K, codes in the codebook.
        code_dim: D, length of a code.
        decay: gamma of the moving averages; None for a codebook that is learned by gradients.
        commitment: beta, weight of the loss that keeps vectors near their codes (equation 3, third term).
        min_usage: of the moving averages: a code whose number of vectors falls below this share of the mean becomes a
            random vector of the call, by PyTorch's generator, and again until it is used (Dhariwal et al. 2020,
            "Jukebox", 2005.00341, section 3.1, there below a fixed number).  Codes that nothing is near to stay
            without it.

    Attributes:
        codebook: [K, D].

    Raises:
        ValueError: an argument is out of range.
    """

    codebook: Tensor
    counts: Tensor  # [K], and
    sums: Tensor  # [K, D]: moving averages of how many vectors a code stood for, and of their sum

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        decay: float | None = 0.99,
        commitment: float = 0.25,
        min_usage: float = 0.1,
    ) -> None:
        super().__init__()
        if decay is not None:
            _check_number("decay", decay, 1.0)
        _check_number("commitment", commitment, math.inf)
        _check_number("min_usage", min_usage, 1.0)
        self.num_codes, self.code_dim = positive("num_codes", num_codes), positive("code_dim", code_dim)
        self.decay, self.commitment, self.min_usage = decay, commitment, min_usage
        codebook = torch.randn(num_codes, code_dim)
        if decay is None:
            self.codebook = torch.nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("counts", torch.ones(num_codes))
            self.register_buffer("sums", codebook.clone())

    def forward(self, x: Tensor) -> Quantized:
        """Feature maps [N, D, *spatial] -> the quantised ones, their codes and the loss.

        Raises:
            TypeError, ValueError: x is not of that shape.
        """
        self._check(x)
        x = x.to(self.codebook.dtype)  # under autocast, the encoder's may be half as precise
        codes = ops.nearest_code(x, self.codebook)
        chosen = self.look_up(codes)
        loss = self.commitment * F.mse_loss(x, chosen.detach())
        if self.decay is None:
            loss = loss + F.mse_loss(chosen, x.detach())
        elif self.training:
            self._update(x.detach(), codes)
        return Quantized(chosen.detach() + (x - x.detach()), codes, loss)

    def look_up(self, codes: Tensor) -> Tensor:
        """Integer codes [N, *spatial], each in 0..K-1 -> their vectors [N, D, *spatial]."""
        if not isinstance(codes, Tensor) or codes.is_floating_point():
            raise TypeError(f"codes: expected a tensor of integers, got {describe(codes)}")
        return F.embedding(codes.long(), self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Makes codes of vectors of feature maps [N, D, *spatial], drawn with PyTorch's generator, each at most once
        where there are enough.

        Raises:
            TypeError, ValueError: x is not of that shape, or holds no vectors, or NaN or infinity.
        """
        self._check(x)
        vectors = x.movedim(1, -1).flatten(0, -2)
        if len(vectors) == 0 or not torch.isfinite(vectors).all():
            raise ValueError(f"x: expected finite vectors, at least one, got shape {list(x.shape)}")
        rounds = -(-self.num_codes // len(vectors))
        order = torch.cat([torch.randperm(len(vectors)) for _ in range(rounds)])[: self.num_codes]
        self.codebook.copy_(vectors[order.to(x.device)])
        if self.decay is not None:
            self.counts.fill_(len(vectors) / self.num_codes)
            self.sums.copy_(self.codebook * self.counts[:, None])

    @torch.no_grad()
    def _update(self, x: Tensor, codes: Tensor) -> None:
        """A step of the moving averages (appendix A.1, equations 6 to 8)."""
        assert self.decay is not None
        vectors, codes = x.movedim(1, -1).flatten(0, -2), codes.flatten()
        finite = vectors.isfinite().all(1)
        vectors = torch.where(finite[:, None], vectors, 0.0)
        counts = torch.zeros_like(self.counts).index_add_(0, codes, finite.to(self.counts))
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        if self.min_usage and len(vectors):
            least = self.min_usage * self.counts.mean()
            chosen = torch.randint(len(vectors), (self.num_codes,)).to(x.device)
            unused = (self.counts < least) & finite[chosen]
            self.sums.copy_(torch.where(unused[:, None], vectors[chosen] * least, self.sums))
            self.counts.copy_(torch.where(unused, least, self.counts))
        known = (self.counts > UNUSED)[:, None]
        self.codebook.copy_(torch.where(known, self.sums / self.counts[:, None], self.codebook))

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x: expected a floating point tensor, got {describe(x)}")
        if x.dim() < 2 or x.shape[1] != self.code_dim:
            raise ValueError(f"x: expected shape [N, {self.code_dim}, ...], got {list(x.shape)}")

    def extra_repr(self) -> str:
        return (
            f"{self.num_codes}, {self.code_dim}, decay={self.decay}, commitment={self.commitment}, "
            f"min_usage={self.min_usage}"
        )


def _check_number(name: str, value: float, top: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < top:
        below = "" if top == math.inf else f" and below {top:g}"
        raise ValueError(f"{name}: expected a finite number of at least 0{below}, got {value!r}")
