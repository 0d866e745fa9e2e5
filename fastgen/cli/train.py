"""Train an autoregressive model on images.

The folder given by --out gets checkpoint.safetensors (to go on from with --resume), log.jsonl (a line per validation),
sample grids, and at the end model.safetensors with the best weights.  A run that is killed loses at most the steps
since its last checkpoint; Ctrl-C writes one first.
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
"""
DEFAULT_STEPS = 10_000
GRID = 64

# option -> (type, help) of what is handed to the model's constructor when it is given
MODEL_OPTIONS: dict[str, tuple[Any, str]] = {
    "num_filters": (int, "feature maps"),
    "num_blocks": (int, "layers or residual blocks"),
    "num_features": (int, "feature maps of the first output layer (pixelcnn)"),
    "kernel_size": (int, "odd size of the kernels after the first layer (gated_pixelcnn)"),
    "num_mixtures": (int, "logistic components per pixel (pixelcnnpp)"),
    "dropout": (float, "share of features dropped in training (pixelcnnpp)"),
    "head": (str, "categorical, bernoulli for two levels, or logistic_mixture (pixelcnnpp)"),
}
METAVARS = {int: "N", float: "P", str: "NAME"}
# option -> (field of TrainConfig, help)
TRAINING_OPTIONS = {
    "batch_size": ("batch_size", "images per step"),
    "lr": ("learning_rate", "peak learning rate of AdamW; warm-up, then half a cosine to zero"),
    "warmup": ("warmup", "fraction of the run that warms up"),
    "weight_decay": ("weight_decay", "decoupled weight decay"),
    "clip_norm": ("clip_norm", "largest gradient norm"),
    "ema_decay": ("ema_decay", "decay of the moving average of the weights, which is what is kept"),
    "validate_every": ("validate_every", "steps between validations"),
    "sample_every": ("sample_every", "steps between sample grids"),
    "checkpoint_every": ("checkpoint_every", "steps between checkpoints"),
    "seed": ("seed", "of the weights and of the order of the images"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastgen import models
    from fastgen.training import TrainConfig, recipes

    parser.add_argument("model", metavar="MODEL", choices=models.names(), help=f"one of {', '.join(models.names())}")
    shared.add_data(parser)
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side that image folders and patches are cut to")
    parser.add_argument("--levels", type=int, metavar="K", help="requantise to K levels, 2..256 (default: as stored)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/MODEL-DATA)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--steps", type=int, metavar="N", help=f"steps in all (default: {DEFAULT_STEPS} without --minutes)"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="minutes in all; ends the run like --steps")
    parser.add_argument("--unconditional", action="store_true", help="ignore the labels of the data")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    group = parser.add_argument_group("model (defaults: as published)")
    for name, (kind, text) in MODEL_OPTIONS.items():
        group.add_argument(_flag(name), type=kind, metavar=METAVARS[kind], help=text)
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    group = parser.add_argument_group("training")
    for name, (field, text) in TRAINING_OPTIONS.items():
        default = defaults[field]
        others = "".join(f"; {model}: {own[field]}" for model, own in recipes.OPTIONS.items() if field in own)
        group.add_argument(_flag(name), type=type(default), metavar="N", help=f"{text} (default: {default}{others})")


def run(options: argparse.Namespace) -> int:
    import torch

    from fastgen import data, models
    from fastgen.training import TrainConfig, initialize, recipes, train

    given = {field: getattr(options, name) for name, (field, _) in TRAINING_OPTIONS.items()}
    fields = recipes.OPTIONS.get(options.model, {}) | {key: value for key, value in given.items() if value is not None}
    steps = DEFAULT_STEPS if options.steps is None and options.minutes is None else options.steps
    seconds = None if options.minutes is None else 60 * options.minutes
    config = TrainConfig(max_steps=steps, max_seconds=seconds, **fields)
    train_data, val_data = (
        data.load(options.data, split=split, size=options.size, levels=options.levels, progress=not options.quiet)
        for split in ("train", "val")
    )
    kind = models.get(options.model)
    arguments = _model_arguments(options, kind, train_data)
    torch.manual_seed(config.seed)
    model = kind(**arguments)
    if not options.resume:
        initialize(model, train_data, config)
    out = options.out or Path("runs") / f"{options.model}-{Path(options.data).stem}"
    out.mkdir(parents=True, exist_ok=True)
    print(f"{options.model} with {sum(p.numel() for p in model.parameters()):,} parameters on {train_data}")
    try:
        result = train(
            model,
            train_data,
            val_data,
            config,
            out=out,
            resume=options.resume,
            progress=not options.quiet,
            sample_grid=save_grid,
        )
    except KeyboardInterrupt:
        print(f"stopped; go on with --resume --out {out}")
        raise
    print(f"{result.bits_per_dim:.4f} bits/dim, validation, at step {result.best_step} of {result.steps}")
    print(f"wrote {out / 'model.safetensors'}")
    return 0


def save_grid(model: Any, path: Path) -> None:
    """Draw a grid of samples, classes in turn, to a PNG file."""
    from fastgen import checkpoint, images

    images.save_png(images.grid(checkpoint.sample(model, GRID, seed=0), model.levels), path)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _model_arguments(options: argparse.Namespace, kind: type, train_data: Any) -> dict[str, Any]:
    """The constructor's arguments: what the data say, and what was asked for."""
    takes = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {"image_shape": train_data.image_shape, "levels": train_data.levels}
    for name in MODEL_OPTIONS:
        value = getattr(options, name)
        if value is not None:
            if name not in takes:
                raise ValueError(f"{options.model} has no option {_flag(name)}")
            arguments[name] = value
    if "num_classes" in takes and train_data.num_classes is not None and not options.unconditional:
        arguments["num_classes"] = train_data.num_classes
    return arguments
