"""Negative log-likelihood of a mixture of discretised logistic distributions.

T. Salimans, A. Karpathy, X. Chen, D. P. Kingma, "PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture
Likelihood and Other Modifications", ICLR 2017, sections 2.1 and 2.2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_LOG_SCALE = -7.0  # smaller ones count as this


def logistic_mixture_nll(params: Tensor, images: Tensor, *, levels: int = 256) -> Tensor:
    """Negative log-likelihood of pixels, in nats: [N, H, W] in the dtype of the parameters."""
    return logistic_mixture_nll_reference(params, images, levels)


def logistic_mixture_nll_reference(params: Tensor, images: Tensor, levels: int) -> Tensor:
    """The definition, in plain PyTorch."""
    channels = images.shape[1]
    logits, means, log_scales, coefficients = split_params(params, channels)
    level = images.unsqueeze(2)  # [N, C, 1, H, W]
    x = level.to(params.dtype) * (2 / (levels - 1)) - 1
    if channels == 3:
        red, green, _ = x.unbind(1)
        shifts = (0 * red, coefficients[:, 0] * red, coefficients[:, 1] * red + coefficients[:, 2] * green)
        means = means + torch.stack([shift.expand_as(logits) for shift in shifts], dim=1)
    half, inverse = 1 / (levels - 1), torch.exp(-log_scales)
    far = torch.finfo(params.dtype).max / 16  # sums of six such numbers are finite
    upper = ((x - means + half) * inverse).clamp(-far, far)
    lower = ((x - means - half) * inverse).clamp(-far, far)
    below_upper, above_lower = F.logsigmoid(upper), F.logsigmoid(-lower)
    inner = below_upper + above_lower + _log_one_minus_exp(log_scales.clamp(max=far), 2 * half)
    log_probs = torch.where(level == 0, below_upper, torch.where(level == levels - 1, above_lower, inner))
    return -torch.logsumexp(torch.log_softmax(logits, dim=1) + log_probs.sum(1), dim=1)


def _log_one_minus_exp(log_scales: Tensor, bin_width: float) -> Tensor:
    """log(1 - exp(-width)), width = bin_width * exp(-log_scale); for small ones by its series."""
    width = bin_width * torch.exp(-log_scales)
    small = width < 1e-3
    series = math.log(bin_width) - log_scales - width / 2 + width * width / 24
    return torch.where(small, series, torch.log(-torch.expm1(-torch.where(small, 1.0, width))))


def split_params(params: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N, P, ...] -> mixture logits [N, K, ...]; means, log scales and coefficients [N, C, K, ...], the latter two as they
    act: log scales not below `MIN_LOG_SCALE`, coefficients in [-1, 1].

    Of three channels, coefficient 0 is that of red in green, 1 and 2 are those of red and green in blue; of one
    channel, the coefficients are empty.
    """
    kinds = 3 if channels == 3 else 2
    components = params.shape[1] // (1 + channels * kinds)
    logits, rest = params[:, :components], params[:, components:]
    means, log_scales, *coefficients = rest.unflatten(1, (channels, kinds, components)).unbind(2)
    acting = torch.tanh(coefficients[0]) if coefficients else means[:, :0]
    return logits, means, log_scales.clamp(min=MIN_LOG_SCALE), acting
