"""Held-out likelihood of a checkpoint, in bits per dimension (per image element)."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "bits per dimension of a checkpoint on a data set"
EXAMPLES = """examples:
  fastgen eval runs/gated_pixelcnn-digits/model.safetensors --data digits
  fastgen eval model.safetensors --data photos/ --split all
  fastgen eval prior.safetensors --vqvae vqvae.safetensors --data patches
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastgen.cli import shared

    parser.add_argument("checkpoint", metavar="CKPT", help="a model or training checkpoint (.safetensors)")
    shared.add_data(parser)
    parser.add_argument("--split", choices=("val", "train", "all"), default="val", help="which part (default: val)")
    shared.add_precision(parser)
    shared.add_vqvae(parser, "the model is a prior over the codes of this vqvae: the bound of both together")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    import fastgen
    from fastgen.cli import shared

    shared.check_range("--batch-size", options.batch_size, 1, 2**31 - 1)
    model = fastgen.load(options.checkpoint)
    if not hasattr(model, "log_prob"):
        raise ValueError(f"{options.checkpoint}: a {model.name} has no likelihood to evaluate")
    if options.vqvae is not None:
        return _eval_prior(options, model)
    data = shared.load_for(model, options.data, options.split, not options.quiet)
    labels = shared.labels_for(model, data)
    bits = fastgen.bits_per_dim(model, data.images, labels, batch_size=options.batch_size, precision=options.precision)
    bound = "at most " if isinstance(model, fastgen.models.VAE | fastgen.models.VQVAE) else ""
    print(f"{bound}{bits:.5f} bits/dim on {len(data)} images ({options.split}) of {data.name}")
    return 0


def _eval_prior(options: argparse.Namespace, prior: Any) -> int:
    """log p(x | z_q(x)) + log p(z_q(x)), a bound of log p(x), in bits per element of the images."""
    from fastgen import checkpoint
    from fastgen.cli import shared
    from fastgen.metrics import two_stages_bits_per_dim

    vqvae = checkpoint.load_vqvae(options.vqvae, prior)
    data = shared.load_for(vqvae, options.data, options.split, not options.quiet)
    labels = shared.labels_for(prior, data)
    measured = {"batch_size": options.batch_size, "precision": options.precision}
    both, of_codes = two_stages_bits_per_dim(vqvae, prior, data.images, labels, **measured)
    print(
        f"at most {both:.5f} bits/dim on {len(data)} images ({options.split}) of {data.name}, "
        f"{of_codes:.5f} of them for the codes"
    )
    return 0
