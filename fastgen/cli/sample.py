"""Draw images from a checkpoint with the compiled sampler.

Sample i of a seed is always the same image, whatever the number of samples or threads: 'fastgen sample M -n 8 --start
8' goes on where 'fastgen sample M -n 8' ended.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fastgen.cli import shared

if TYPE_CHECKING:
    from torch import Tensor

HELP = "draw images from a checkpoint"
EXAMPLES = """examples:
  fastgen sample model.safetensors -n 64 -o grid.png
  fastgen sample model.safetensors -n 100 --labels 7 --temperature 0.9 -o sevens.png
  fastgen sample model.safetensors -n 100 --labels 7 --guidance-scale 2 -o typical_sevens.png
  fastgen sample model.safetensors -n 10000 -o samples.npz --audit
  fastgen sample model.safetensors -n 16 --known digits --keep top -o completions.png
  fastgen sample prior.safetensors --vqvae vqvae.safetensors -n 64 -o grid.png
"""
SUFFIXES = (".png", ".npy", ".npz")
BYTES_BESIDE = 32  # that a sample takes beside its levels: labels, and numbers they are made of
# options of the sampler of pixel models, with their defaults
SAMPLER_OPTIONS = {
    "temperature": 1.0, "top_k": None, "top_p": None, "guidance_scale": 1.0, "null_label": None, "known": None,
    "keep": None, "precision": "fp32", "backend": "auto", "max_batch": None, "vqvae": None, "audit": False,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a model or training checkpoint (.safetensors)")
    parser.add_argument("-n", type=int, default=64, metavar="N", help="number of samples (default: 64)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("samples.png"), metavar="FILE",
        help="a .png grid, or the levels as .npy or .npz (images, and labels if any) (default: samples.png)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="0..2^64-1 (default: 0)")
    parser.add_argument("--start", type=int, default=0, metavar="I", help="index of the first sample (default: 0)")
    parser.add_argument(
        "--labels",
        metavar="L[,L...]",
        help="classes, one for all or one for each sample (default: all classes in turn)",
    )
    parser.add_argument("--columns", type=int, metavar="N", help="images per row of the grid (default: square)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    group = parser.add_argument_group("pixel models")
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="below 1: more likely images (default: 1)"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest levels or codes alone")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="from the fewest, likeliest first, whose probabilities sum to P"
    )
    group.add_argument(
        "--guidance-scale", type=float, default=1.0, metavar="W",
        help="above 1: images more typical of their class; for models trained with --label-dropout (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--null-label",
        type=int,
        metavar="L",
        help="the class that --guidance-scale leads away from (default: the last)",
    )
    group.add_argument(
        "--known", metavar="SPEC", help="complete the held-out images of these data (also conditional_vae)"
    )
    group.add_argument(
        "--keep", choices=("top", "bottom", "left", "right"), help="the half that --known gives (default: top)"
    )
    shared.add_precision(group)
    group.add_argument(
        "--backend", default="auto", metavar="NAME", help="auto, reference, cpu, triton or cuda (default: auto)"
    )
    group.add_argument("--max-batch", type=int, metavar="N", help="samples at a time (default: what fits the memory)")
    shared.add_vqvae(group, "the samples are codes of this vqvae: render their images")
    group.add_argument("--audit", action="store_true", help="prove by a parallel forward pass; status 1 if it fails")


def run(options: argparse.Namespace) -> int:
    import fastgen
    from fastgen import checkpoint

    _check(options)
    model: Any = fastgen.load(options.checkpoint)
    if isinstance(model, fastgen.models.VQVAE):
        raise ValueError(f"{options.checkpoint}: its codes are drawn by a prior: fastgen sample PRIOR --vqvae CKPT")
    vqvae = None if options.vqvae is None else checkpoint.load_vqvae(options.vqvae, model)
    _check_memory(options.n, vqvae or model)
    if isinstance(model, fastgen.models.AdversarialModel | fastgen.models.VAE):
        return _sample_generator(options, model)
    if vqvae is None and shared.draws_codes(model) and options.output.suffix == ".png":
        raise ValueError("-o: the samples are codes: give --vqvae to render them, or the name of an .npy or .npz file")
    labels, known, mask = _given(options, model, vqvae)
    sampler = fastgen.Sampler(model, precision=options.precision, backend=options.backend, max_batch=options.max_batch)
    draw = {"seed": options.seed, "start": options.start, "labels": labels, "temperature": options.temperature}
    draw |= {"top_k": options.top_k, "top_p": options.top_p, **_guidance(options, model)}
    images = sampler.sample(options.n, **draw, known=known, mask=mask, progress=not options.quiet)
    pictures = images if vqvae is None else vqvae.render(images, progress=not options.quiet)
    _write(options, pictures, (vqvae or model).levels, labels)
    print(f"wrote {len(images)} samples to {options.output}")
    if not options.audit:
        return 0
    report = fastgen.audit(model, images, precision=options.precision, **draw, mask=mask)
    print(f"audit: {report.elements} elements, {report.mismatches} mismatches, {report.ties} ties")
    return 0 if report.ok else 1


def _sample_generator(options: argparse.Namespace, model: Any) -> int:
    given_images = getattr(model, "condition", None) is not None
    for name, default in SAMPLER_OPTIONS.items():
        if getattr(options, name) != default and not (given_images and name == "known"):
            raise ValueError(f"{model.name} has no option --{name.replace('_', '-')}: it does not draw pixel by pixel")
    labels, known, _ = _given(options, model)
    draw: dict[str, Any] = {"seed": options.seed, "start": options.start, "labels": labels}
    if given_images:
        if known is None:
            raise ValueError(f"--known: expected a data set, whose validation images ({model.condition}) are completed")
        draw["condition"] = known
    images = model.sample(options.n, **draw, progress=not options.quiet)
    _write(options, images, model.levels, labels)
    print(f"wrote {len(images)} samples to {options.output}")
    return 0


def _check(options: argparse.Namespace) -> None:
    """What can be refused before anything is loaded or drawn."""
    shared.check_output(options.output, SUFFIXES)
    shared.check_range("-n", options.n, 0, 2**31 - 1)
    if options.n == 0 and options.output.suffix == ".png":
        raise ValueError("-n: a picture needs at least one sample, got 0")
    shared.check_range("--start", options.start, 0, 2**62 - 1)
    shared.check_seed(options.seed)
    if options.keep is not None and options.known is None:
        raise ValueError("--keep: the half of which images? --known says it")
    if options.columns is not None:
        shared.check_range("--columns", options.columns, 1, 2**31 - 1)


def _check_memory(n: int, model: Any) -> None:
    from fastgen._memory import total_memory

    needed = n * (math.prod(model.image_shape) + BYTES_BESIDE)
    if needed > (memory := total_memory()):
        raise ValueError(f"-n: {n} samples take {needed / 1e9:.0f} GB, and there are {memory / 1e9:.0f} GB")


def _given(
    options: argparse.Namespace, model: Any, vqvae: Any = None
) -> tuple[Tensor | int | None, Tensor | None, Tensor | None]:
    """Labels, known images, or their codes, and mask of all samples."""
    from fastgen.checkpoint import in_turn
    from fastgen.images import half

    labels: Tensor | int | None = None
    if options.labels is not None:
        labels = _parse_labels(options.labels)
    elif model.num_classes is not None:
        labels = in_turn(options.n, options.start, model.num_classes)
        if null := _guidance(options, model):
            labels = in_turn(options.n, options.start, model.num_classes - 1)
            labels += labels >= null["null_labels"]
    if options.known is None:
        return labels, None, None
    data = shared.load_for(vqvae or model, options.known, "val", not options.quiet)
    index = in_turn(options.n, options.start, len(data))
    own = shared.labels_for(model, data) if options.labels is None else None
    mask = half(options.keep or "top", *model.image_shape[1:])
    images = data.images[index] if vqvae is None else vqvae.encode(data.images)[index]
    return labels if own is None else own[index], images, mask


def _guidance(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """The arguments of a draw that is led away from a class."""
    if options.guidance_scale == 1:
        if options.null_label is not None:
            raise ValueError("--null-label: without --guidance-scale nothing leads away from it")
        return {}
    if model.num_classes is None:
        raise ValueError("--guidance-scale: the model has no classes")
    null = model.num_classes - 1 if options.null_label is None else options.null_label
    shared.check_range("--null-label", null, 0, model.num_classes - 1)
    return {"guidance_scale": options.guidance_scale, "null_labels": null}


def _parse_labels(text: str) -> Tensor | int:
    import torch

    try:
        labels = torch.tensor([int(part) for part in text.split(",")])
    except (ValueError, RuntimeError):  # of more than 64 bits
        raise ValueError(f"--labels: expected whole numbers separated by commas, got {text!r:.80}") from None
    return int(labels) if len(labels) == 1 else labels


def _write(options: argparse.Namespace, pictures: Tensor, levels: int, labels: Tensor | int | None) -> None:
    import numpy as np
    import torch

    from fastgen import images
    from fastgen._files import atomic_path

    if options.output.suffix == ".png":
        images.save_png(images.grid(pictures, levels, options.columns), options.output)
        return
    with atomic_path(options.output) as temporary, open(temporary, "wb") as file:
        if options.output.suffix == ".npy":
            # Not to the file itself: NumPy writes there past Python, and does not say why it could not.
            np.save(SimpleNamespace(write=file.write), pictures.numpy())
        elif labels is None:
            np.savez_compressed(file, images=pictures.numpy())
        else:
            every = torch.as_tensor(labels).expand(len(pictures)).numpy()
            np.savez_compressed(file, images=pictures.numpy(), labels=every)
