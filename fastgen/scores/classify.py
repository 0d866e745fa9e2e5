"""The default extractor: a small classifier of labelled data that images are to resemble, trained once and cached."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen._files import cache_folder, save_tensors
from fastgen.data import Dataset, load
from fastgen.data.resize import cover

SIZE = 32  # pixels a side that images are scaled to
WIDTHS = (16, 32, 64)
FEATURES = 32  # few, for the 180 validation images of the digits to have moments
STEPS, BATCH, RATE = 600, 64, 4e-3
SHIFT = 2  # pixels that training images are moved by, at most
FORMAT = "1"  # of the cache: another one for another network or training


class Classifier(nn.Module):
    """Images uint8 [N, C, H, W] of 256 levels, any size -> features [N, 32], logits [N, num_classes].

    Attributes:
        accuracy: share of the validation images that are classified rightly, 0..1.
    """

    accuracy: Tensor

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in zip((channels, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        side = SIZE >> len(WIDTHS)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(side * side * WIDTHS[-1], FEATURES))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(FEATURES, num_classes))
        self.register_buffer("accuracy", torch.zeros(()))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if tuple(images.shape[2:]) != (SIZE, SIZE):
            images = cover(images, 256, (SIZE, SIZE))
        features = self.body(images.float() / 127.5 - 1.0)
        return features, self.head(features)


def classifier(spec: str | Path, *, cache: str | os.PathLike[str] | None = None, progress: bool = False) -> Classifier:
    """A classifier of a labelled data set, in eval mode: from the cache, or trained on its training images.

    Three strided 3x3 convolutions with BatchNorm, 32 features, AdamW, 600 steps: some seconds on one core.  The
    training is seeded, but another processor or number of threads rounds differently: scores on features of one file
    can be compared, those of two machines nearly.

    Args:
        spec: as for `data.load`; the images are scaled to 32x32.
        cache: folder; default ``$FASTGEN_CACHE``, or ``fastgen`` in the user's folder for caches.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the data have no labels, or `data.load` refuses them.
    """
    train, val = (
        load(spec, split=split, size=SIZE, levels=256, resize=True, progress=progress) for split in ("train", "val")
    )
    if train.labels is None or train.num_classes is None:
        raise ValueError(
            f"{spec}: the data have no labels to train a classifier on; score with weights of Inception v3"
        )
    folder = cache_folder() if cache is None else Path(cache)
    path = folder / f"classifier-{_digest(train)}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(train.image_shape[0], train.num_classes)
        if not (found := _restore(model, path)):
            _train(model, train, progress)
    if not found:
        model.accuracy.fill_(_accuracy(model.eval(), val))
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(path, model.state_dict())
    return model.eval().requires_grad_(False)


def _restore(model: Classifier, path: Path) -> bool:
    """Whether the file held the model's weights; one that does not is as good as none."""
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, RuntimeError, safetensors.SafetensorError):
        return False
    return True


def _digest(data: Dataset) -> str:
    assert data.labels is not None
    digest = hashlib.sha256(f"{FORMAT} {data.image_shape} {data.num_classes}".encode())
    for tensor in (data.images, data.labels):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _train(model: Classifier, data: Dataset, progress: bool) -> None:
    from tqdm import trange

    assert data.labels is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, fused=True)
    model.train()
    for step in trange(STEPS, desc="classifier", disable=not progress, leave=False):
        chosen = torch.randint(len(data), (BATCH,))
        _, logits = model(_shifted(data.images[chosen]))
        loss = F.cross_entropy(logits, data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.step()


def _shifted(images: Tensor) -> Tensor:
    """Each image is moved by up to `SHIFT` pixels; its border repeats."""
    padded = F.pad(images.float(), (SHIFT,) * 4, mode="replicate").to(torch.uint8)
    y, x = (torch.randint(2 * SHIFT + 1, (len(images), 1)) + torch.arange(SIZE) for _ in range(2))
    picked = torch.arange(len(images))[:, None, None]
    return padded.permute(0, 2, 3, 1)[picked, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def _accuracy(model: Any, data: Dataset) -> float:
    assert data.labels is not None
    right = [model(x)[1].argmax(1) == y for x, y in zip(data.images.split(256), data.labels.split(256), strict=True)]
    return float(torch.cat(right).double().mean())
