"""Checkpoints: safetensors files that say which model they hold.

The metadata key ``fastgen`` holds JSON ``{"format": 1, "model": registered name, "config": constructor arguments}``;
the tensors are the state dict.  That of a prior over codes also has ``codes_of``, see `models.AutoregressiveModel`.
Checkpoints of a training run are the same with more: tensors under ``training/`` and a
metadata key ``training``, which `load` ignores.  Files are written whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from fastgen import models
from fastgen._files import save_tensors

FORMAT = 1
TRAINING_PREFIX = "training/"  # of extra tensors; no module name holds a slash


def save(model: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a model's weights, name and configuration to a safetensors file.

    Raises:
        TypeError: the model is not one of `fastgen.models`.
        ValueError: its tensors are not those of such a model, as where a parametrization (weight_norm, ...) was added.
        OSError: the folder is missing or cannot be written to, or the disk is full.
    """
    write(path, model.state_dict(), {"fastgen": describe(model)})


def load(path: str | os.PathLike[str]) -> torch.nn.Module:
    """Reads the model of a checkpoint, in eval mode, on the CPU, in the dtype it was saved in.

    From a checkpoint of a training run this is the model with the best weights so far.

    Raises:
        ValueError: the file is missing, truncated or not a fastgen checkpoint, its weights do not fit its
            configuration, or a weight is NaN or infinite.
    """
    tensors, metadata = read(path)
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(TRAINING_PREFIX)}
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: the tensor {name!r} holds NaN or infinity")
    description = metadata["fastgen"]
    try:
        with torch.random.fork_rng(devices=[]):  # initialising consumes no random numbers of the caller
            model = models.get(description["model"])(**description["config"])
        model.load_state_dict(weights, assign=True)
        if "codes_of" in description:
            model.codes_of = description["codes_of"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: the checkpoint does not fit this version of fastgen: {error}") from error
    return model.eval()


def sample(
    model: torch.nn.Module | str | os.PathLike[str],
    n: int,
    *,
    seed: int = 0,
    vqvae: models.VQVAE | str | os.PathLike[str] | None = None,
    **options: Any,
) -> Tensor:
    """Draws ``n`` images from a model or from the model in a checkpoint.

    Args:
        model: a model, or the path of a checkpoint.
        n: number of images.
        seed: seed of the random numbers.
        vqvae: a `models.VQVAE`, or the path of its checkpoint, of whose codes the model is a prior: the images of the
            drawn codes are returned.
        options: those of the model's ``sample``, or else of `fastgen.Sampler.sample` (start, labels, temperature, ...).
            A conditional model that is given no labels draws its classes in turn: sample i is of class
            ``i % num_classes``.

    Returns:
        uint8 levels [n, C, H, W]; int64 of more than 256 levels.

    Raises:
        ValueError: the model draws no codes of the ``vqvae``; and the errors of `load` and of the sampler.
    """
    from fastgen.sampling import Sampler

    if not isinstance(model, torch.nn.Module):
        model = load(model)
    if isinstance(model, models.VQVAE):
        raise ValueError("model: codes of a vqvae are drawn by a prior over them: sample(prior, n, vqvae=...)")
    if vqvae is not None:
        vqvae = load_vqvae(vqvae, model)
    num_classes = getattr(model, "num_classes", None)
    if num_classes is not None and options.get("labels") is None:
        options["labels"] = in_turn(n, options.get("start", 0), num_classes)
    draw = model.sample if isinstance(model, models.AdversarialModel | models.VAE) else Sampler(model).sample
    drawn = draw(n, seed=seed, **options)
    return drawn if vqvae is None else vqvae.render(drawn)


def load_vqvae(vqvae: torch.nn.Module | str | os.PathLike[str], prior: torch.nn.Module | None = None) -> models.VQVAE:
    """A `models.VQVAE`, or that of a checkpoint, when it is one, and its codes are those that a prior draws.

    Raises:
        ValueError: it is another model, or the prior is of other codes; and the errors of `load`.
    """
    model = vqvae if isinstance(vqvae, torch.nn.Module) else load(vqvae)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(model, models.VQVAE):
        raise ValueError(f"vqvae: expected a models.VQVAE, got a {type(model).__name__}")
    if prior is None:
        return model
    shape, levels = getattr(prior, "image_shape", None), getattr(getattr(prior, "head", None), "levels", None)
    if shape is None or tuple(shape) not in (model.code_shape, (1, *model.code_shape)) or levels != model.num_codes:
        raise ValueError(
            f"model: expected a prior over the {model.num_codes} codes of the vqvae, {list(model.code_shape)} an "
            f"image, got a {type(prior).__name__} of {levels} levels and image_shape {shape}"
        )
    codes_of = getattr(prior, "codes_of", None)
    if codes_of is not None and codes_of != model.fingerprint():
        raise ValueError(
            f"model: a prior over the codes of another vqvae, with fingerprint {codes_of}, not {model.fingerprint()}"
        )
    return model


def in_turn(n: int, start: int, count: int) -> Tensor:
    """``i % count`` of the samples i = start .. start+n-1, int64 [n]."""
    return (torch.arange(max(0, n)) + start % count) % count


def load_state_dict_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the state dict in a foreign ``.safetensors``, ``.pt`` or ``.pth`` file, without running code from it.

    A dictionary that holds the weights under the key ``state_dict`` is unwrapped.

    Raises:
        ValueError: the file is missing, unreadable, or holds anything but tensors by name.
    """
    if Path(path).suffix == ".safetensors":
        return _read_safetensors(path)[0]
    _check_is_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no common base class: pickle, zip, end of file, runtime errors
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not a PyTorch file of weights: {reason}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: expected a state dict (tensors by name), found {type(content).__name__}")
    return dict(content)


def describe(model: torch.nn.Module) -> dict[str, Any]:
    """The metadata from which `load` builds the model again.

    Raises:
        TypeError: the model is not one of `fastgen.models`.
        ValueError: its tensors are not those of a new one of its configuration, so that `load` could not take them.
    """
    name = getattr(model, "name", None)
    if name not in models.names() or models.get(name) is not type(model):
        known = ", ".join(models.get(name).__name__ for name in models.names())
        raise TypeError(f"model: expected one of fastgen.models ({known}), got {type(model).__name__}")
    with torch.device("meta"):  # without values or random numbers
        expected = _shapes(type(model)(**model.config))
    different = sorted({tensor for tensor, _ in _shapes(model).items() ^ expected.items()})
    if different:
        raise ValueError(
            f"model: {different[0]!r} is not as in a new {type(model).__name__} of its configuration, and could not be "
            "loaded: remove what was added (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    codes_of = getattr(model, "codes_of", None)
    description: dict[str, Any] = {"format": FORMAT, "model": name, "config": model.config}
    return description if codes_of is None else description | {"codes_of": codes_of}


def _shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors and JSON-able metadata, atomically."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_tensors(Path(path), tensors, {key: json.dumps(value) for key, value in metadata.items()})


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write` wrote, and checks that it is a fastgen checkpoint of a known format.

    Raises:
        ValueError: the file is missing, truncated or not a fastgen checkpoint.
    """
    tensors, texts = _read_safetensors(path)
    if "fastgen" not in texts:
        raise ValueError(f"{path}: a safetensors file, but not a fastgen checkpoint (no 'fastgen' in its metadata)")
    try:
        metadata = {key: json.loads(text) for key, text in texts.items()}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the checkpoint's metadata is not JSON: {error}") from error
    description = metadata["fastgen"]
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path}: expected checkpoint format {FORMAT}, found {description!r:.100}")
    return tensors, metadata


def _read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    _check_is_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118, not a dict
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def _check_is_file(path: str | os.PathLike[str]) -> None:
    if not Path(path).is_file():
        raise ValueError(f"{path}: {'is a folder, not a file' if Path(path).is_dir() else 'no such file'}")
