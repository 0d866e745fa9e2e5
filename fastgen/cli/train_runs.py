"""The runs of `fastgen train`: data and model by the options, what trains the model, and what it reports."""

from __future__ import annotations

import argparse
import inspect
from functools import partial
from pathlib import Path
from typing import Any

from fastgen.cli import shared
from fastgen.cli.train import DCGAN_SIZE, DEFAULT_STEPS, configuration, model_arguments, training_arguments

GRID = 64  # images of a picture
EMBEDDING_DIM = 64  # of codes of a file


def train_likelihood(options: argparse.Namespace, kind: type) -> int:
    """Trains an autoregressive model on images."""
    from fastgen.training import train

    config = _train_config(options)
    train_data, val_data = _splits(options)
    model = _new(options, kind, config, train_data, {})
    return _report(options, _run(options, model, train_data, train, val_data, config), "", "dim")


def train_prior(options: argparse.Namespace, kind: type) -> int:
    """Trains an autoregressive model on codes of images: those that a vqvae has for them, or of a file."""
    from fastgen import checkpoint, data
    from fastgen.training import encoded, train

    if options.vqvae is not None and options.codes is not None:
        raise ValueError("--codes: with --vqvae the codes are those of the vqvae")
    option = "--vqvae" if options.codes is None else "--codes"
    if "embedding_dim" not in inspect.signature(kind).parameters:
        raise ValueError(f"{options.model} has no option {option}: expected gated_pixelcnn, pixelsnail or image_gpt")
    for name in ("size", "levels"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: with {option} it is that of the {option[2:]}")
    config = _train_config(options)
    if options.codes is not None:
        shared.check_range("--codes", options.codes, 2, 2**31 - 1)
        parts = [data.load_codes(options.data, options.codes, split=split) for split in ("train", "val")]
        model = _new(options, kind, config, parts[0], {"embedding_dim": EMBEDDING_DIM, "head": "categorical"})
        return _report(options, _run(options, model, parts[0], train, parts[1], config, sample_grid=None), "", "code")
    vqvae = checkpoint.load_vqvae(options.vqvae)
    images = [shared.load_for(vqvae, options.data, split, not options.quiet) for split in ("train", "val")]
    train_data, val_data = (encoded(vqvae, part, f"codes of {part.name}") for part in images)
    own = {"embedding_dim": vqvae.config["latent_dim"], "head": "categorical"}
    model = _new(options, kind, config, train_data, own)
    model.codes_of = vqvae.fingerprint()
    draw = partial(save_grid, vqvae=vqvae)
    return _report(options, _run(options, model, train_data, train, val_data, config, sample_grid=draw), "", "code")


def train_variational(options: argparse.Namespace, kind: type) -> int:
    """Trains a variational autoencoder."""
    import torch

    from fastgen.training import VAEConfig, train_vae

    config = configuration(VAEConfig, training_arguments(options, VAEConfig))
    train_data, val_data = _splits(options)
    model = _new(options, kind, config, train_data, {})
    given: dict[str, Any] = {}
    if model.condition is not None:
        index, labels = torch.arange(GRID) % len(val_data.images), shared.labels_for(model, val_data)
        given = {"condition": val_data.images[index], "labels": None if labels is None else labels[index]}
    draw = partial(save_grid, given=given)
    result = _run(options, model, train_data, train_vae, val_data, config, sample_grid=draw)
    return _report(options, result, "at most ", "dim")


def train_quantized(options: argparse.Namespace, kind: type) -> int:
    """Trains an autoencoder with discrete latents."""
    from fastgen.training import train_vqvae

    config = _train_config(options)
    train_data, val_data = _splits(options)
    model = _new(options, kind, config, train_data, {})
    draw = partial(save_reconstructions, originals=val_data.images)
    result = _run(options, model, train_data, train_vqvae, val_data, config, sample_grid=draw)
    return _report(options, result, "at most ", "dim")


def _train_config(options: argparse.Namespace) -> Any:
    from fastgen.training import TrainConfig, recipes

    own = recipes.OPTIONS.get(options.model, {})
    return configuration(TrainConfig, own | training_arguments(options, TrainConfig))


def _splits(options: argparse.Namespace) -> list[Any]:
    """Training and validation images."""
    from fastgen import data

    arguments = {"size": options.size, "levels": options.levels, "progress": not options.quiet}
    return [data.load(options.data, split=split, **arguments) for split in ("train", "val")]


def train_adversarial(options: argparse.Namespace, kind: type) -> int:
    """Trains a generator against a discriminator."""
    from fastgen import data
    from fastgen.training import LOSSES, GANConfig, train_gan
    from fastgen.training.gan import DIGITS, DIGITS_MODEL

    loss = options.loss or GANConfig.loss
    own = dict(LOSSES[loss].model.get(options.model, {}))
    short: dict[str, Any] = {}
    size = options.size
    if options.data == "digits" and options.model == "dcgan":
        short = DIGITS | LOSSES[loss].digits
        shape = DIGITS_MODEL | LOSSES[loss].digits_model
        own["num_filters"] = shape["num_filters"]
        size = shape["size"] if size is None else size
    given = training_arguments(options, GANConfig, short.pop("max_steps", DEFAULT_STEPS))
    given["loss_options"] = short.get("loss_options", {}) | given.get("loss_options", {})
    config = configuration(GANConfig.of, {"loss": loss} | short | given)
    if size is None and options.model == "dcgan":
        size = DCGAN_SIZE
    progress = not options.quiet
    train_data = data.load(options.data, size=size, levels=options.levels, resize=True, progress=progress)
    model = _new(options, kind, config, train_data, own)
    score = _scorer(options, model) if options.scores else None
    result = _run(options, model, train_data, train_gan, config, score=score)
    print(f"{result.steps} steps in {result.seconds:.0f} s")
    print(f"wrote {folder(options) / 'model.safetensors'}")
    return 0


def _scorer(options: argparse.Namespace, model: Any) -> Any:
    from fastgen import data, scores

    shape = {"size": tuple(model.image_shape[1:]), "levels": model.levels, "resize": True}
    val = data.load(options.data, split="val", progress=not options.quiet, **shape)
    return scores.scorer(scores.classifier(options.data, progress=not options.quiet), val.images, val.levels)


def _new(options: argparse.Namespace, kind: type, config: Any, data: Any, own: dict[str, Any]) -> Any:
    """The model, initialised on the data where it wants to be and the run is a new one; ``own``: see
    `model_arguments`.
    """
    import torch

    from fastgen.training import initialize

    arguments = model_arguments(options, kind, data, own)
    torch.manual_seed(config.seed)
    model = kind(**arguments)
    if not options.resume:
        initialize(model, data, config)
    return model


def _run(options: argparse.Namespace, model: Any, train_data: Any, function: Any, *arguments: Any, **more: Any) -> Any:
    """``function(model, train_data, *arguments, **more)`` with what all kinds of training take."""
    out = folder(options)
    print(f"{options.model} with {sum(p.numel() for p in model.parameters()):,} parameters on {train_data}")
    try:
        return function(
            model,
            train_data,
            *arguments,
            out=out,
            resume=options.resume,
            progress=not options.quiet,
            **{"sample_grid": save_grid, **more},
        )
    except KeyboardInterrupt:
        print(f"stopped; go on with --resume --out {out}")
        raise


def _report(options: argparse.Namespace, result: Any, at_most: str, unit: str) -> int:
    print(f"{at_most}{result.bits_per_dim:.4f} bits/{unit}, validation, at step {result.best_step} of {result.steps}")
    print(f"wrote {folder(options) / 'model.safetensors'}")
    return 0


def folder(options: argparse.Namespace) -> Path:
    """The folder of a run."""
    of_codes = "" if options.vqvae is None else "-codes"
    return options.out or Path("runs") / f"{options.model}-{Path(options.data).stem}{of_codes}"


def save_grid(model: Any, path: Path, given: Any = None, vqvae: Any = None) -> None:
    """Draw a grid of samples to a PNG file, classes in turn; ``given``: images of which the model is given a part as
    condition, with their labels; ``vqvae``: what makes images of the codes that the model draws.
    """
    from fastgen import checkpoint, images

    drawn = checkpoint.sample(model, GRID, seed=0, vqvae=vqvae, **(given or {}))
    images.save_png(images.grid(drawn, (vqvae or model).levels), path)


def save_reconstructions(model: Any, path: Path, originals: Any) -> None:
    """Draw images above what an autoencoder makes of them to a PNG file."""
    from fastgen import images

    originals = originals[:: max(1, len(originals) // (GRID // 2))][: GRID // 2]
    images.save_png(images.pairs(originals, model.reconstruct(originals), model.levels, columns=8), path)
