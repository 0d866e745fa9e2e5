"""Frechet distance and Inception score of a checkpoint's samples, with standard errors, against held-out images.

The scores are on features of a small classifier that is trained on the labelled training images once and then cached,
or on those of Inception v3 (--inception), whose weights you bring.  The training images themselves are scored beside
the samples: theirs is about the best that a model can reach, since even two samples of one distribution lie apart, the
more so the fewer images there are; 'bias' estimates by how much.
"""

from __future__ import annotations

import argparse
from typing import Any

HELP = "Frechet distance and Inception score of a checkpoint"
EXAMPLES = """examples:
  fastgen score runs/dcgan-digits/model.safetensors --data digits
  fastgen score prior.safetensors --vqvae vqvae.safetensors --data digits
  fastgen score model.safetensors --data photos/ -n 10000 --inception weights-inception-2015-12-05-6726825d.pth
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastgen.cli import shared

    parser.add_argument("checkpoint", metavar="CKPT", help="a model or training checkpoint (.safetensors)")
    shared.add_data(parser)
    shared.add_vqvae(parser, "the model is a prior over the codes of this vqvae: the images of drawn codes are scored")
    parser.add_argument("-n", type=int, metavar="N", help="number of samples (default: as many as training images)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the samples, 0..2^64-1 (default: 0)")
    parser.add_argument(
        "--splits", type=int, metavar="G", help="groups of the jackknife (default: 10, or fewer than the images)"
    )
    parser.add_argument("--inception", metavar="FILE", help="weights of Inception v3: its features, not a classifier's")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    import fastgen
    from fastgen import checkpoint, data, models, scores
    from fastgen.cli import shared
    from fastgen.scores.estimates import SPLITS, torchmetrics_image

    if options.n is not None and options.n < 3:
        raise ValueError(f"-n: expected at least 3, got {options.n}")
    shared.check_seed(options.seed)
    torchmetrics_image()  # or say now that it is missing, not after the work
    model: Any = fastgen.load(options.checkpoint)
    vqvae = None if options.vqvae is None else checkpoint.load_vqvae(options.vqvae, model)
    if vqvae is None and (isinstance(model, models.VQVAE) or shared.draws_codes(model)):
        raise ValueError(f"{options.checkpoint}: images take a prior and its vqvae: fastgen score PRIOR --vqvae CKPT")
    if getattr(model, "condition", None) is not None:
        raise ValueError(f"{options.checkpoint}: it completes images, and scores are of samples without a condition")
    makes: Any = vqvae or model
    progress = not options.quiet
    shape: dict[str, Any] = {
        "size": tuple(makes.image_shape[1:]),
        "levels": makes.levels,
        "resize": True,
        "progress": progress,
    }
    train, val = (data.load(options.data, split=split, **shape) for split in ("train", "val"))
    if val.image_shape != tuple(makes.image_shape):
        raise ValueError(f"the images of {val.name} are {val.image_shape}, the model's are {tuple(makes.image_shape)}")
    count = len(train) if options.n is None else options.n
    fewest = min(count, len(train), len(val))
    if fewest < 3:
        raise ValueError(
            f"{val.name}: scores need 3 training and 3 held-out images at least, got {len(train)} and {len(val)}"
        )
    splits = min(SPLITS, fewest - 1) if options.splits is None else options.splits
    shared.check_range("--splits", splits, 2, fewest - 1)
    if options.inception is None:
        extractor: Any = scores.classifier(options.data, progress=progress)
        features = f"a classifier that is right on {100 * float(extractor.accuracy):.1f} % of them"
    else:
        extractor, features = scores.inception(options.inception), "Inception v3"
    samples = fastgen.sample(model, count, seed=options.seed, vqvae=vqvae, progress=progress)
    real = scores.extract(extractor, val.images, val.levels).features
    print(f"{'':24}{'Frechet distance':20}{'bias':>8}   Inception score")
    for name, images in ((f"{count} samples", samples), (f"{len(train)} training images", train.images)):
        found = scores.extract(extractor, images, makes.levels)
        distance = scores.frechet_distance(real, found.features, splits=splits)
        score = scores.inception_score(found.logits, splits=splits)
        print(f"{name:24}{distance!s:20}{distance.bias:8.2f}   {score}")
    print(f"against {len(val)} held-out images of {val.name}, on features of {features}")
    return 0
