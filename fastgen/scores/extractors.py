"""Networks whose features are scored, and what they say of images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import checkpoint

Extractor = Callable[[Tensor], tuple[Tensor, Tensor]]  # uint8 [N, C, H, W], 256 levels -> [N, D], [N, K]


class Features(NamedTuple):
    """What a network says of N images.

    Attributes:
        features: [N, D], for the Frechet distance.
        logits: [N, K], unnormalised log-probabilities of classes, for the Inception score.
    """

    features: Tensor
    logits: Tensor


@torch.no_grad()
def extract(extractor: Extractor, images: Tensor, levels: int, *, batch_size: int = 256) -> Features:
    """The features of images.

    Args:
        extractor: called with images uint8 [n, C, H, W] of 256 levels, of the size that they have; returns features
            [n, D] and logits [n, K].  A module should be in eval mode.
        images: uint8 levels [N, C, H, W], N >= 1.
        levels: number of levels; ``levels - 1`` becomes 255.
        batch_size: images at a time.

    Raises:
        TypeError, ValueError: the images are not as above.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a uint8 tensor of levels, got {found}")
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"images: expected shape [N, C, H, W], N >= 1, got {list(images.shape)}")
    table = (torch.arange(256) * 255 / (levels - 1)).round().clamp(max=255).to(torch.uint8)
    parts = [extractor(table[part.int()]) for part in images.cpu().split(batch_size)]
    features, logits = (torch.cat(found) for found in zip(*parts, strict=True))
    return Features(features, logits)


def inception(weights: str | os.PathLike[str]) -> Extractor:
    """Inception v3 as published scores use it: 2048 pooled features, logits of 1008 classes.

    Needs torch-fidelity, ``pip install 'fastgen[inception]'``, and the weights that its authors publish as
    ``weights-inception-2015-12-05-6726825d.pth``; nothing is downloaded.  Images of one channel are shown as grey.

    Raises:
        ValueError: there is no such file, or it does not hold these weights.
        RuntimeError: torch-fidelity is missing.
    """
    if not Path(weights).is_file():
        raise ValueError(f"{weights}: no such file; the weights of Inception v3 are not downloaded")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that is not for this torch
        raise RuntimeError(f"Inception v3 needs torch-fidelity: pip install 'fastgen[inception]' ({error})") from error
    state = checkpoint.load_state_dict_file(weights)
    with tempfile.TemporaryDirectory() as folder:  # torch-fidelity would run code from the file; now it holds none
        safe = Path(folder) / "inception.pth"
        torch.save(state, safe)
        try:
            network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(safe)
            )
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{weights}: these are not the weights of Inception v3: {reason}") from error
    network.eval().requires_grad_(False)
    return lambda images: network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)
