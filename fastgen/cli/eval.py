"""Held-out likelihood of a checkpoint, in bits per dimension (per image element)."""

from __future__ import annotations

import argparse

HELP = "bits per dimension of a checkpoint on a data set"
EXAMPLES = """examples:
  fastgen eval runs/gated_pixelcnn-digits/model.safetensors --data digits
  fastgen eval model.safetensors --data photos/ --split all
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastgen.cli import shared

    parser.add_argument("checkpoint", metavar="CKPT", help="a model or training checkpoint (.safetensors)")
    shared.add_data(parser)
    parser.add_argument("--split", choices=("val", "train", "all"), default="val", help="which part (default: val)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights, as for sampling (default: fp32)"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")


def run(options: argparse.Namespace) -> int:
    import fastgen
    from fastgen.cli import shared

    model = fastgen.load(options.checkpoint)
    if not hasattr(model, "log_prob"):
        raise ValueError(f"{options.checkpoint}: a {model.name} has no likelihood to evaluate")
    data = shared.load_for(model, options.data, options.split)
    labels = shared.labels_for(model, data)
    bits = fastgen.bits_per_dim(model, data.images, labels, batch_size=options.batch_size, precision=options.precision)
    bound = "at most " if isinstance(model, fastgen.models.VAE) else ""  # the importance-weighted bound
    print(f"{bound}{bits:.5f} bits/dim on {len(data)} images ({options.split}) of {data.name}")
    return 0
