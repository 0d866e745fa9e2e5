"""Pictures of walks through the latent space of a generator or a variational autoencoder."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli import shared

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

HELP = "interpolation, arithmetic, grids, truncation, manifold and traversals of latents, as pictures"
EXAMPLES = """examples:
  fastgen latent interpolate model.safetensors -n 6 --steps 10 -o walks.png
  fastgen latent grid model.safetensors --corners 0,1,2,3 --steps 8 --label 3 -o plane.png
  fastgen latent arithmetic model.safetensors --plus 0,1,2 --minus 3,4,5 --plus 6,7,8 -o sum.png
  fastgen latent truncate model.safetensors --limits 0.25,0.5,1,2,inf -o truncated.png
  fastgen latent manifold vae.safetensors --steps 20 -o manifold.png
  fastgen latent traverse vae.safetensors --steps 11 -o traversals.png
  fastgen latent reconstruct vae.safetensors --data digits -n 10 -o reconstructions.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastgen.latent import METHODS

    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("checkpoint", metavar="CKPT", help="a model or training checkpoint (.safetensors)")
    common.add_argument(
        "-o", "--output", type=Path, default=Path("latent.png"), metavar="FILE", help="default: latent.png"
    )
    common.add_argument("--seed", type=int, default=0, metavar="S", help="of the latents, 0..2^64-1 (default: 0)")
    common.add_argument("--label", type=int, metavar="L", help="class of all images (default: rows take turns, or 0)")
    method = argparse.ArgumentParser(add_help=False)
    method.add_argument("--method", choices=METHODS, default=METHODS[0], help=f"default: {METHODS[0]}")

    add = tools.add_parser("interpolate", parents=[common, method], help="rows from sample 2i to sample 2i + 1")
    add.add_argument("-n", type=int, default=8, metavar="ROWS", help="walks (default: 8)")
    add.add_argument("--steps", type=int, default=9, metavar="N", help="images of a walk (default: 9)")
    add = tools.add_parser("grid", parents=[common, method], help="a plane between four samples")
    add.add_argument("--corners", default="0,1,2,3", metavar="I,I,I,I", help="their numbers (default: 0,1,2,3)")
    add.add_argument("--steps", type=int, default=8, metavar="N", help="images a side (default: 8)")
    add = tools.add_parser("arithmetic", parents=[common], help="sums and differences of averaged samples")
    add.add_argument("--plus", action="append", default=[], metavar="I,I,...", help="a group of samples; repeatable")
    add.add_argument("--minus", action="append", default=[], metavar="I,I,...", help="a group to subtract; repeatable")
    add.add_argument(
        "--noise", type=float, default=0.25, metavar="R", help="neighbours lie within -R..R (default: 0.25)"
    )
    add = tools.add_parser("truncate", parents=[common], help="the same samples with ever less truncated latents")
    add.add_argument("--limits", default="0.25,0.5,1,2,inf", metavar="R,...", help="default: 0.25,0.5,1,2,inf")
    add.add_argument("-n", type=int, default=10, metavar="COLUMNS", help="samples (default: 10)")
    add = tools.add_parser("manifold", parents=[common], help="the plane of two latents, by the inverse normal CDF")
    add.add_argument("--steps", type=int, default=20, metavar="N", help="images a side (default: 20)")
    add.add_argument("--dimensions", default="0,1", metavar="I,J", help="across and up, the others 0 (default: 0,1)")
    add = tools.add_parser("traverse", parents=[common], help="a row for each dimension, which goes from low to high")
    add.add_argument("--steps", type=int, default=11, metavar="N", help="images of a row (default: 11)")
    add.add_argument("--dimensions", metavar="I,...", help="default: all")
    add.add_argument("--sample", type=int, metavar="I", help="start from this sample (default: from the latent 0)")
    add = tools.add_parser("reconstruct", parents=[common], help="images above what an autoencoder makes of them")
    shared.add_data(add)
    add.add_argument("-n", type=int, default=10, metavar="N", help="held-out images (default: 10)")
    add.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    import fastgen
    from fastgen import images

    shared.check_output(options.output, (".png",))
    shared.check_seed(options.seed)
    model: Any = fastgen.load(options.checkpoint)
    if not hasattr(model, "render") or (not hasattr(model, "latents") and options.tool != "reconstruct"):
        raise ValueError(f"{options.checkpoint}: a {model.name} has no latents to walk through")
    if getattr(model, "condition", None) is not None and options.tool != "reconstruct":
        raise ValueError(f"{options.checkpoint}: it completes images: fastgen sample CKPT --known DATA")
    tools = {
        "interpolate": _interpolate, "grid": _grid, "arithmetic": _arithmetic, "truncate": _truncate,
        "manifold": _manifold, "traverse": _traverse, "reconstruct": _reconstruct,
    }  # fmt: skip
    images.save_png(tools[options.tool](options, model), options.output)
    print(f"wrote {options.output}")
    return 0


def _interpolate(options: argparse.Namespace, model: Any) -> np.ndarray:
    import torch

    from fastgen import latent

    ends = model.latents(2 * _at_least_1("-n", options.n), seed=options.seed)
    walks = latent.interpolate(ends[::2], ends[1::2], options.steps, options.method)  # [steps, rows, D]
    return _picture(options, model, walks.transpose(0, 1), torch.arange(options.n)[:, None])


def _grid(options: argparse.Namespace, model: Any) -> np.ndarray:
    from fastgen import latent

    corners = _samples(options, model, "--corners", options.corners)
    if len(corners) != 4:
        raise ValueError(f"--corners: expected 4 numbers, got {options.corners!r}")
    plane = latent.grid(corners, options.steps, options.steps, options.method)
    return _picture(options, model, plane.unflatten(0, (options.steps, -1)))


def _arithmetic(options: argparse.Namespace, model: Any) -> np.ndarray:
    import torch

    from fastgen import images, latent

    if not math.isfinite(options.noise):
        raise ValueError(f"--noise: expected a finite number, got {options.noise}")
    groups = [(sign, text) for sign, texts in (("plus", options.plus), ("minus", options.minus)) for text in texts]
    latents = [_samples(options, model, f"--{sign}", text) for sign, text in groups]
    plus = len(options.plus)
    result = latent.arithmetic(latents[:plus], latents[plus:])
    noise = torch.rand(9, len(result), generator=torch.Generator().manual_seed(options.seed % 2**63))
    around = result + options.noise * (2 * noise - 1)
    around[4] = result
    panels = [
        (f"{sign} {text}, their mean", _picture(options, model, torch.cat((z, z.mean(0, keepdim=True)))[None]))
        for (sign, text), z in zip(groups, latents, strict=True)
    ]
    panels.append(("the sum, amid its neighbours", _picture(options, model, around.unflatten(0, (3, 3)))))
    return images.captioned(panels, columns=1)


def _truncate(options: argparse.Namespace, model: Any) -> np.ndarray:
    import torch

    from fastgen import latent

    z = model.latents(_at_least_1("-n", options.n), seed=options.seed)
    limits = _numbers("--limits", options.limits, float)
    return _picture(options, model, torch.stack([latent.truncate(z, r) for r in limits]), torch.arange(options.n))


def _manifold(options: argparse.Namespace, model: Any) -> np.ndarray:
    import torch

    from fastgen import latent

    across, up = _dimensions(options, model, 2)
    z = torch.zeros(_at_least_1("--steps", options.steps) ** 2, model.latent_dim)
    z[:, across], z[:, up] = latent.manifold(options.steps, options.steps).unbind(1)
    return _picture(options, model, z.unflatten(0, (options.steps, -1)))


def _traverse(options: argparse.Namespace, model: Any) -> np.ndarray:
    import torch

    from fastgen import latent

    z = torch.zeros(model.latent_dim)
    if options.sample is not None:
        z = model.latents(1, seed=options.seed, start=options.sample)[0]
    values = latent.quantiles(_at_least_1("--steps", options.steps))
    dimensions = range(model.latent_dim) if options.dimensions is None else _dimensions(options, model)
    return _picture(options, model, torch.stack([latent.traverse(z, dimension, values) for dimension in dimensions]))


def _reconstruct(options: argparse.Namespace, model: Any) -> np.ndarray:
    from fastgen import images

    if not hasattr(model, "reconstruct"):
        raise ValueError(f"{options.checkpoint}: a {model.name} has no encoder")
    data = shared.load_for(model, options.data, "val", not options.quiet)
    count = min(_at_least_1("-n", options.n), len(data))
    labels = shared.labels_for(model, data)
    originals = data.images[:count]
    again = model.reconstruct(originals, None if labels is None else labels[:count])
    return images.pairs(originals, again, model.levels)


def _dimensions(options: argparse.Namespace, model: Any, count: int | None = None) -> list[int]:
    found = _numbers("--dimensions", options.dimensions, int)
    wanted = f"{count} " if count else ""
    if not all(0 <= i < model.latent_dim for i in found) or (count and len(set(found)) != count):
        raise ValueError(f"--dimensions: expected {wanted}of 0..{model.latent_dim - 1}, got {options.dimensions!r}")
    return found


def _picture(options: argparse.Namespace, model: Any, z: Tensor, turn: Tensor | None = None) -> np.ndarray:
    """Latents [rows, columns, D] as a grid; classes by ``turn`` (broadcasts to [rows, columns]), 0 without one."""
    import torch

    from fastgen import images

    labels = options.label
    if labels is None and model.num_classes is not None:
        labels = 0 if turn is None else turn % model.num_classes
    if isinstance(labels, torch.Tensor):
        labels = labels.expand(z.shape[:2]).flatten()
    return images.grid(model.render(z.flatten(0, 1), labels), model.levels, columns=z.shape[1])


def _samples(options: argparse.Namespace, model: Any, flag: str, text: str) -> Tensor:
    """The latents of the samples with these numbers, [N, D]."""
    import torch

    return torch.cat([model.latents(1, seed=options.seed, start=i) for i in _numbers(flag, text, int)])


def _numbers(flag: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{flag}: expected {what} separated by commas, got {text!r}") from None


def _at_least_1(flag: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{flag}: expected at least 1, got {value}")
    return value
