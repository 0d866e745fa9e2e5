"""The main job on real data: train a small gated PixelCNN on handwritten digits, draw 64 digits with the compiled
sampler and with the naive loop from the same seed, and check that they are the same.

Writes demo.png (real digits, samples, class-conditional rows, completions of half-hidden digits), demo.json (the
table) and digits.safetensors (the model).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

HELP = "train on real digits for a minute, sample fast and slowly, compare"
SAMPLES = 64
SEED = 0
PER_CLASS = 8
COMPLETED = 5
FILES = ("demo.png", "demo.json", "digits.safetensors")
PER_COMPLETION = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of training (default: 60)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder for the files (default: demo-output)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    import torch

    import fastgen
    from fastgen import data, images
    from fastgen._files import atomic_path
    from fastgen.cli import shared
    from fastgen.sampling import naive_sample
    from fastgen.training import recipes

    shared.check_above_0("--seconds", options.seconds)
    shared.check_folder(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    progress = not options.quiet
    trained = recipes.demo_digits(seconds=options.seconds, progress=progress)
    model: Any = trained.model
    fastgen.save(model, options.out / "digits.safetensors")

    labels = torch.arange(SAMPLES) % model.num_classes
    started = time.perf_counter()
    sampler = fastgen.Sampler(model)
    compiled = time.perf_counter()
    samples = sampler.sample(SAMPLES, seed=SEED, labels=labels, progress=progress)
    drawn = time.perf_counter()
    naive = naive_sample(model, SAMPLES, seed=SEED, labels=labels, progress=progress)
    fast, slow = drawn - compiled, time.perf_counter() - drawn
    report = fastgen.audit(model, samples, seed=SEED, labels=labels)

    held_out = data.load("digits", split="val")
    assert held_out.labels is not None
    picture = _picture(sampler, model, held_out.images, held_out.labels, samples)
    images.save_png(picture, options.out / "demo.png")
    differing = int((samples != naive).flatten(1).any(1).sum())
    same = differing == 0 or (report.ok and report.ties > 0)  # a tie lets an image go its own way from there on
    rows = [
        ("held-out bits/dim", f"{trained.bits_per_dim:.3f} after {trained.steps} steps in {trained.seconds:.0f} s"),
        (f"compiled sampler, {SAMPLES} digits", f"{fast:.3f} s (and {compiled - started:.2f} s once to compile)"),
        (f"naive loop, {SAMPLES} digits", f"{slow:.2f} s"),
        ("speed-up", f"{slow / fast:.0f}x"),
        ("same images", "yes, all" if differing == 0 else f"{SAMPLES - differing} of {SAMPLES}"),
        ("audit", f"{report.elements} elements, {report.mismatches} mismatches, {report.ties} ties"),
        ("files", ", ".join(str(options.out / name) for name in FILES)),
    ]
    with atomic_path(options.out / "demo.json") as temporary:
        temporary.write_text(json.dumps({"command": "fastgen demo", **dict(rows)}, indent=1) + "\n")
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows))
    return 0 if report.ok and same else 1


def _picture(sampler: Any, model: Any, real: Tensor, real_labels: Tensor, samples: Tensor) -> Any:
    import torch

    from fastgen import images

    levels, classes = model.levels, model.num_classes
    rows = torch.arange(classes).repeat_interleave(PER_CLASS)
    by_class = sampler.sample(len(rows), seed=SEED + 1, labels=rows)
    mask = torch.zeros(model.image_shape[1:], dtype=torch.bool)
    mask[: model.image_shape[1] // 2] = True
    known = real[:COMPLETED].repeat_interleave(PER_COMPLETION, 0)
    completed = sampler.sample(
        len(known),
        seed=SEED + 2,
        labels=real_labels[:COMPLETED].repeat_interleave(PER_COMPLETION),
        known=known,
        mask=mask,
    ).unflatten(0, (COMPLETED, PER_COMPLETION))
    scale = 5
    return images.captioned(
        [
            ("real digits", images.grid(real[:SAMPLES], levels, 8, scale)),
            ("samples, classes in turn", images.grid(samples, levels, 8, scale)),
            ("one class per row", images.grid(by_class, levels, PER_CLASS, scale)),
            (
                "upper half given, completions, original",
                images.completions(real[:COMPLETED], mask, completed, levels, scale),
            ),
        ]
    )
