"""Vector quantisation of feature maps, as a layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import ops
from fastgen._arguments import positive

SMOOTHING = 1e-5  # added to the count of every code, so that none is divided by zero


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

    Args:
        num_codes: K, codes in the codebook.
        code_dim: D, length of a code.
        decay: gamma of the moving averages; None for a codebook that is learned by gradients.
        commitment: beta, weight of the loss that keeps vectors near their codes (equation 3, third term).
        min_usage: of the moving averages: a code that recent calls used less than this share of the mean becomes a
            vector of the call at random (Dhariwal et al. 2020, "Jukebox", 2005.00341, section 3.1), for codes that are
            never the nearest never move.

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
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay: expected None or a number of at least 0 and below 1, got {decay!r}")
        if not commitment >= 0:
            raise ValueError(f"commitment: expected a number of at least 0, got {commitment!r}")
        if not 0 <= min_usage < 1:
            raise ValueError(f"min_usage: expected a number of at least 0 and below 1, got {min_usage!r}")
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
            TypeError, ValueError: as `ops.nearest_code`.
        """
        x = x.to(self.codebook.dtype)  # under autocast, the encoder's may be half as precise
        codes = ops.nearest_code(x, self.codebook)
        chosen = self.look_up(codes)
        loss = self.commitment * F.mse_loss(x, chosen.detach())
        if self.decay is None:
            loss = loss + F.mse_loss(chosen, x.detach())
        elif self.training:
            self._update(x.detach(), codes)
        return Quantized(x + (chosen - x).detach(), codes, loss)

    def look_up(self, codes: Tensor) -> Tensor:
        """Integer codes [N, *spatial], each in 0..K-1 -> their vectors [N, D, *spatial]."""
        return F.embedding(codes.long(), self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Makes codes of vectors of feature maps [N, D, *spatial], drawn with PyTorch's generator, each at most once
        where there are enough.
        """
        vectors = x.movedim(1, -1).flatten(0, -2)
        rounds = -(-self.num_codes // len(vectors))
        order = torch.cat([torch.randperm(len(vectors)) for _ in range(rounds)])[: self.num_codes]
        self.codebook.copy_(vectors[order.to(x.device)])
        if self.decay is not None:
            self.counts.fill_(1.0)
            self.sums.copy_(self.codebook)

    @torch.no_grad()
    def _update(self, x: Tensor, codes: Tensor) -> None:
        """A step of the moving averages (appendix A.1, equations 6 to 8)."""
        assert self.decay is not None
        vectors = x.movedim(1, -1).flatten(0, -2).to(self.sums.dtype)
        codes = codes.flatten()
        counts = torch.bincount(codes, minlength=self.num_codes).to(self.counts.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        if self.min_usage and len(vectors):
            least = self.min_usage * self.counts.mean()
            unused = self.counts < least
            instead = vectors[torch.randint(len(vectors), (self.num_codes,)).to(x.device)]
            self.sums.copy_(torch.where(unused[:, None], instead * least, self.sums))
            self.counts.copy_(torch.where(unused, least, self.counts))
        total = self.counts.sum()
        smooth = (self.counts + SMOOTHING) / (total + self.num_codes * SMOOTHING) * total
        self.codebook.copy_(self.sums / smooth[:, None])

    def extra_repr(self) -> str:
        return (
            f"{self.num_codes}, {self.code_dim}, decay={self.decay}, commitment={self.commitment}, "
            f"min_usage={self.min_usage}"
        )
