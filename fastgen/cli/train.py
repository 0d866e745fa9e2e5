"""Train a model on images: an autoregressive one on its likelihood, vae, conditional_vae and vqvae on a bound of it,
gan and dcgan against a discriminator; or, with --vqvae, an autoregressive one on the codes that a vqvae has for them.

The folder given by --out gets checkpoint.safetensors (to go on from with --resume), log.jsonl (a line per validation),
sample grids, and at the end model.safetensors with the best weights, or, of a generator, the averaged ones; adversarial
runs also draw curves.png.  A run that is killed loses at most the steps since its last checkpoint; Ctrl-C writes one
first.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from pathlib import Path
from typing import Any

from fastgen.cli import shared

HELP = "train a model"
EXAMPLES = """examples:
  fastgen train gated_pixelcnn --data digits --num-filters 32 --num-blocks 6 --kernel-size 3 --minutes 1
  fastgen train pixelcnn --data patches --levels 32 --steps 20000 --out runs/patches
  fastgen train pixelcnn --data patches --levels 32 --steps 40000 --out runs/patches --resume
  fastgen train pixelcnnpp --data digits --num-filters 32 --num-blocks 1 --dropout 0.2 --lr 3e-3 --minutes 3
  fastgen train pixelcnnpp --data patches --num-filters 32 --num-blocks 2 --steps 20000
  fastgen train pixelsnail --data digits --head categorical --num-filters 32 --num-blocks 2 --dropout 0.1 --lr 3e-3
  fastgen train image_gpt --data digits --num-filters 64 --num-blocks 4 --num-heads 4 --dropout 0.1 --lr 3e-3
  fastgen train dcgan --data digits --scores
  fastgen train dcgan --loss wgan-gp --data photos/ --size 64 --steps 50000
  fastgen train vae --data digits --latent-dim 2 --lr 3e-3 --minutes 2
  fastgen train conditional_vae --data patches --size 32 --architecture convolutional --condition grey --unconditional
  fastgen train vqvae --data patches --num-filters 128 --lr 1e-3 --minutes 30
  fastgen train gated_pixelcnn --data patches --vqvae runs/vqvae-patches/model.safetensors --num-filters 64
  fastgen train image_gpt --data codes.npz --codes 1024 --num-filters 256 --num-blocks 8
"""
DEFAULT_STEPS = 10_000
DCGAN_SIZE = 32  # where --size is not given
ON_DIGITS = "dcgan --data digits"  # has other defaults than those published: `training.gan.DIGITS`

# option -> (type, help) of what is handed to the model's constructor when it is given
MODEL_OPTIONS: dict[str, tuple[Any, str]] = {
    "num_filters": (int, "feature maps"),
    "embedding_dim": (
        int,
        "of codes (gated_pixelcnn, pixelsnail, image_gpt; default with --vqvae: that of the vqvae, with --codes: 64)",
    ),
    "num_blocks": (int, "layers or residual blocks"),
    "num_features": (int, "feature maps of the first output layer (pixelcnn, pixelrnn)"),
    "kernel_size": (int, "odd size of the kernels after the first layer (gated_pixelcnn, pixelrnn)"),
    "num_layers": (int, "residual layers of a block (pixelsnail)"),
    "key_dim": (int, "channels of the keys of attention (pixelsnail)"),
    "value_dim": (int, "channels of the values of attention (pixelsnail)"),
    "num_heads": (int, "heads of attention (pixelsnail, image_gpt)"),
    "num_mixtures": (int, "logistic components per pixel (pixelcnnpp, pixelsnail, image_gpt)"),
    "dropout": (float, "share of features dropped in training (pixelcnnpp, pixelsnail, image_gpt, gan)"),
    "head": (str, "categorical, bernoulli for two levels, or logistic_mixture (pixelcnnpp, pixelsnail, image_gpt)"),
    "latent_dim": (int, "dimension of the latents (gan, dcgan, vae, conditional_vae), of a code (vqvae)"),
    "num_codes": (int, "codes of the codebook (vqvae)"),
    "downsampling": (int, "pixels a side for one code: 2, 4, 8, ... (vqvae)"),
    "commitment": (float, "weight of the loss that keeps the encoder near the codes (vqvae)"),
    "min_usage": (float, "codes used less than this share of the mean start anew (vqvae)"),
    "architecture": (str, "perceptron or convolutional (vae, conditional_vae)"),
    "likelihood": (str, "bernoulli, gaussian, logistic or categorical (vae, conditional_vae, vqvae)"),
    "scale": (float, "standard deviation of a gaussian likelihood, levels as 0..1 (vae, conditional_vae, vqvae)"),
    "condition": (str, "grey, top, bottom, left or right: what of an image is given (conditional_vae)"),
}
VARIATIONAL_OPTIONS = {
    "beta": ("beta", "weight of the divergence"),
    "kl_warmup": ("kl_warmup", "fraction of the run in which that weight grows from 0"),
    "num_samples": ("num_samples", "latents drawn for each image of a step"),
    "iwae_samples": ("iwae_samples", "latents of the importance-weighted bound in validations"),
}
METAVARS = {int: "N", float: "P", str: "NAME"}
# option -> (field of TrainConfig, help)
TRAINING_OPTIONS = {
    "batch_size": ("batch_size", "images per step"),
    "lr": (
        "learning_rate",
        "learning rate: of AdamW, the peak after a warm-up and before half a cosine to zero; of GANs, constant",
    ),
    "warmup": ("warmup", "fraction of the run that warms up (not gan, dcgan)"),
    "weight_decay": ("weight_decay", "decoupled weight decay (not gan, dcgan)"),
    "clip_norm": ("clip_norm", "largest gradient norm (not gan, dcgan)"),
    "label_dropout": (
        "label_dropout",
        "share of labels replaced by one more class, the last, for 'fastgen sample --guidance-scale'; 0.1 is usual "
        "(not gan, dcgan)",
    ),
    "ema_decay": ("ema_decay", "decay of the moving average of the weights, which is what is kept"),
    "validate_every": ("validate_every", "steps between validations (not gan, dcgan)"),
    "sample_every": ("sample_every", "steps between sample grids"),
    "checkpoint_every": ("checkpoint_every", "steps between checkpoints"),
    "seed": ("seed", "of the weights and of the order of the images"),
}
ADVERSARIAL_OPTIONS = {
    "loss": ("loss", "what generator and discriminator minimise"),
    "loss_options": ("loss_options", "arguments of the loss, as gamma=0.7,lambda_k=0.01 for began"),
    "critic_steps": ("critic_steps", "steps of the discriminator for one of the generator"),
    "beta1": ("beta1", "Adam's decay of the mean gradient"),
    "beta2": ("beta2", "Adam's decay of the mean square gradient"),
    "log_every": ("log_every", "steps between lines of the log"),
}
CONFIG_OPTIONS = TRAINING_OPTIONS | ADVERSARIAL_OPTIONS | VARIATIONAL_OPTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastgen import models
    from fastgen.training import LOSSES, GANConfig, TrainConfig, VAEConfig, recipes
    from fastgen.training.gan import DIGITS, DIGITS_MODEL

    parser.add_argument("model", metavar="MODEL", choices=models.names(), help=f"one of {', '.join(models.names())}")
    shared.add_data(parser)
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="side that image folders and patches are cut to, and for gan and dcgan (default: "
        f"{DCGAN_SIZE}) all images are scaled to",
    )
    parser.add_argument("--levels", type=int, metavar="K", help="requantise to K levels, 2..256 (default: as stored)")
    shared.add_vqvae(parser, "train on the codes that this vqvae has for the images, in its size and levels")
    parser.add_argument(
        "--codes",
        type=int,
        metavar="K",
        help="the data are codes 0..K-1 of images, of a VQ-VAE or VQGAN of your own: integers [N, H, W] in a .npy, "
        "or named codes, with labels if any, in an .npz (gated_pixelcnn, pixelsnail, image_gpt)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the run (default: runs/MODEL-DATA, with --vqvae runs/MODEL-DATA-codes)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"steps in all (default: {DEFAULT_STEPS} without --minutes; {ON_DIGITS}: {DIGITS['max_steps']})",
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="minutes in all; ends the run like --steps")
    parser.add_argument("--unconditional", action="store_true", help="ignore the labels of the data")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    group = parser.add_argument_group(
        f"model (defaults: as published; {ON_DIGITS}: --num-filters {DIGITS_MODEL['num_filters']})"
    )
    for name, (kind, text) in MODEL_OPTIONS.items():
        group.add_argument(_flag(name), type=kind, metavar=METAVARS[kind], help=text)
    by_loss = {f"--loss {name}": recipe.training for name, recipe in LOSSES.items()}
    by_loss[ON_DIGITS] = DIGITS
    by_loss |= {f"{ON_DIGITS} --loss {name}": recipe.digits for name, recipe in LOSSES.items()}
    plain = {field.name: field.default for field in dataclasses.fields(GANConfig)}
    different = {name: value for name, value in plain.items() if value != getattr(TrainConfig, name, value)}
    others = recipes.OPTIONS | {"gan, dcgan": different} | by_loss
    _add_training(parser.add_argument_group("training"), TRAINING_OPTIONS, TrainConfig, others)
    group = parser.add_argument_group("training of vae and conditional_vae")
    _add_training(group, VARIATIONAL_OPTIONS, VAEConfig, {})
    group = parser.add_argument_group("training of gan and dcgan")
    _add_training(group, ADVERSARIAL_OPTIONS, GANConfig, by_loss, {"loss": tuple(LOSSES)})
    group.add_argument(
        "--scores",
        action="store_true",
        help="Frechet distance and Inception score of 1000 samples with each sample grid, for the log and curves.png, "
        "against the held-out images, on features of a classifier of the data (see 'fastgen score'; needs labels)",
    )


def _add_training(
    group: Any,
    options: dict[str, tuple[str, str]],
    config: Any,
    others: dict[str, dict[str, Any]],
    choices: dict[str, tuple[str, ...]] | None = None,
) -> None:
    """Options that are fields of a configuration, each with its default, and with the defaults of others."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, (field, text) in options.items():
        if field == "loss_options":
            group.add_argument(_flag(name), type=_numbers, metavar="NAME=X,...", help=text)
            continue
        default = defaults[field]
        more = "".join(f"; {other}: {own[field]}" for other, own in others.items() if field in own)
        allowed = (choices or {}).get(name)
        help_text = f"{text}{': ' + ', '.join(allowed) if allowed else ''} (default: {default}{more})"
        metavar = "NAME" if allowed else "N"
        group.add_argument(_flag(name), type=type(default), choices=allowed, metavar=metavar, help=help_text)


def run(options: argparse.Namespace) -> int:
    from fastgen import models
    from fastgen.cli import train_runs

    if options.seed is not None:
        shared.check_seed(options.seed)
    if options.minutes is not None:
        shared.check_above_0("--minutes", options.minutes)
    shared.check_folder(train_runs.folder(options))
    kind = models.get(options.model)
    if options.scores and not issubclass(kind, models.AdversarialModel):
        raise ValueError(f"{options.model} has no option --scores: it is validated by its likelihood")
    if options.vqvae is not None or options.codes is not None:
        return train_runs.train_prior(options, kind)
    if issubclass(kind, models.VAE):
        return train_runs.train_variational(options, kind)
    if issubclass(kind, models.VQVAE):
        return train_runs.train_quantized(options, kind)
    if issubclass(kind, models.AdversarialModel):
        return train_runs.train_adversarial(options, kind)
    return train_runs.train_likelihood(options, kind)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _numbers(text: str) -> dict[str, float]:
    """``a=1,b=0.5`` -> numbers by name."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name: float(value) for name, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER,..., got {text!r}") from None


def training_arguments(options: argparse.Namespace, config: Any, default_steps: int = DEFAULT_STEPS) -> dict[str, Any]:
    """The limits and the options that were given, as fields of a configuration."""
    steps = default_steps if options.steps is None and options.minutes is None else options.steps
    seconds = None if options.minutes is None else 60 * options.minutes
    arguments: dict[str, Any] = {"max_steps": steps, "max_seconds": seconds}
    takes = {field.name for field in dataclasses.fields(config)}
    for name, (field, _) in CONFIG_OPTIONS.items():
        value = getattr(options, name)
        if value is not None:
            if field not in takes:
                raise ValueError(f"{options.model} has no option {_flag(name)}")
            arguments[field] = value
    return arguments


def configuration(make: Any, arguments: dict[str, Any]) -> Any:
    """``make(**arguments)``, whose errors begin with the name of a field: they name the option instead."""
    flags = {field: _flag(name) for name, (field, _) in CONFIG_OPTIONS.items()} | {"max_steps": "--steps"}
    try:
        return make(**arguments)
    except ValueError as error:
        field, colon, reason = str(error).partition(":")
        raise ValueError(f"{flags.get(field, field)}{colon}{reason}") from error


def model_arguments(options: argparse.Namespace, kind: type, train_data: Any, own: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments: what the data say, what belongs to the loss (``own``), and what was asked for."""
    takes = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {"image_shape": train_data.image_shape, "levels": train_data.levels}
    if "num_classes" in takes and train_data.num_classes is not None and not options.unconditional:
        arguments["num_classes"] = train_data.num_classes + bool(options.label_dropout)
    elif options.label_dropout:
        raise ValueError("--label-dropout: the data have no labels, or the model takes none")
    arguments |= own
    for name in MODEL_OPTIONS:
        value = getattr(options, name)
        if value is not None:
            if name not in takes:
                raise ValueError(f"{options.model} has no option {_flag(name)}")
            arguments[name] = value
    return arguments
