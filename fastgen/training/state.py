"""The state of a training run: all that a step changes, and its way to a checkpoint and back."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fastgen import checkpoint
from fastgen.checkpoint import TRAINING_PREFIX
from fastgen.training.config import RunConfig, TrainConfig

MODEL, AVERAGE, ADAM = (TRAINING_PREFIX + part for part in ("model/", "average/", "adam/"))


class State:
    """Weights, their moving average, the best average so far, the optimiser, and the counters.

    Attributes:
        model: the weights that are trained.
        average: a copy of the model in eval mode whose weights are the moving average.
        step: steps taken.
        seconds: seconds of training so far.
        best_bits: bits/dim of the best average so far, or None before the first validation.
        best_step: its step.
        figures: what a subclass says about its last step, for the log, in place of bits/dim.
    """

    def __init__(self, model: torch.nn.Module, config: TrainConfig) -> None:
        self.model = model
        self.config = config
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self.seconds = 0.0
        self.figures: dict[str, float] = {}
        self.best_bits: float | None = None
        self.best_step = 0
        self._best: dict[str, Tensor] | None = None

    def update(self, images: Tensor, labels: Tensor | None) -> tuple[float, float]:
        """Takes one step on a batch; returns its bits/dim and the norm of their gradient.

        Raises:
            RuntimeError: one of the two is not finite; the parameters are left as they were.
        """
        bits = -self.log_likelihood(images, labels).mean() / (images[0].numel() * math.log(2))
        self.optimizer.zero_grad()
        bits.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        if not (math.isfinite(bits.item()) and math.isfinite(norm.item())):
            raise RuntimeError(f"{bits.item()} bits/dim with a gradient of norm {norm.item()}")
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate_at(self.step, self.seconds)
        self.optimizer.step()
        self._update_average()
        self.step += 1
        return bits.item(), norm.item()

    def log_likelihood(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """What a step makes larger: nats of each image."""
        return cast(Any, self.model).log_prob(images, labels)

    @torch.no_grad()
    def _update_average(self) -> None:
        weight = 1.0 - self.config.ema_decay_at(self.step)
        for mean, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(new, weight)
        for kept, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
            kept.copy_(buffer)

    def consider(self, bits: float) -> None:
        """Keeps the average if ``bits``, its validation bits/dim, are the best so far."""
        if not math.isnan(bits) and (self.best_bits is None or bits < self.best_bits):
            self.best_bits, self.best_step = bits, self.step
            self._best = _copy(self.average)

    def adopt(self) -> None:
        """Puts the best weights into the model."""
        self.model.load_state_dict(self.best())

    def best(self) -> dict[str, Tensor]:
        """The best weights; before any validation, the current average."""
        return _copy(self.average) if self._best is None else self._best

    def save(self, path: Path, num_images: int) -> None:
        """Writes a checkpoint from which `fastgen.load` gives the best weights and `restore` the whole state."""
        tensors = dict(self.best())
        tensors |= {MODEL + name: tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {AVERAGE + name: tensor for name, tensor in self.average.state_dict().items()}
        tensors |= optimizer_tensors(self.model, self.optimizer)
        training = {
            "step": self.step,
            "seconds": self.seconds,
            "best_bits": self.best_bits,
            "best_step": self.best_step,
            "num_images": num_images,
            "config": self.config.as_dict(),
        }
        checkpoint.write(path, tensors, {"fastgen": checkpoint.describe(self.model), "training": training})

    def restore(self, path: Path, num_images: int) -> None:
        """Takes over the state in a checkpoint.

        Raises:
            ValueError: the file is not a training checkpoint, or one of another model, configuration or data size.
        """
        tensors, training = read_run(path, self.model, self.config, num_images)
        self.model.load_state_dict(part(tensors, MODEL))
        self.average.load_state_dict(part(tensors, AVERAGE))
        restore_optimizer(self.model, self.optimizer, tensors)
        self.step, self.seconds = training["step"], training["seconds"]
        self.best_bits, self.best_step = training["best_bits"], training["best_step"]
        if self.best_bits is not None:
            device = next(self.model.parameters()).device
            best = {name: tensor for name, tensor in tensors.items() if not name.startswith(TRAINING_PREFIX)}
            self._best = {name: tensor.to(device) for name, tensor in best.items()}


def read_run(
    path: Path, model: torch.nn.Module, config: RunConfig, num_images: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a training checkpoint, and its metadata about the training.

    Raises:
        ValueError: the file is not a training checkpoint, or one of another model, configuration or data size.
    """
    tensors, metadata = checkpoint.read(path)
    if "training" not in metadata:
        raise ValueError(f"{path}: holds a model, but no training run to resume")
    training = metadata["training"]
    if different := _differences(metadata["fastgen"], checkpoint.describe(model)):
        raise ValueError(f"{path}: cannot resume: {different}")
    saved = training["config"] | {"number of training images": training["num_images"]}
    wanted = config.as_dict() | {"number of training images": num_images}
    for name in (*config.FIXED, "number of training images"):
        was = saved.get(name, getattr(type(config), name, None))  # options that came later had their default
        if was != wanted[name]:
            raise ValueError(f"{path}: cannot resume: {name} was {was}, this run has {wanted[name]}")
    return tensors, training


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What two descriptions of models differ in, or nothing; of models of different kinds, these alone."""
    if saved["model"] != wanted["model"]:
        return f"the model was {saved['model']}, this run has {wanted['model']}"
    was, has = (part["config"] | {"fingerprint of the vqvae": part.get("codes_of")} for part in (saved, wanted))
    names = [name for name in was | has if was.get(name) != has.get(name)]
    return "; ".join(f"{name} was {was.get(name)}, this run has {has.get(name)}" for name in names)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an Adam optimiser of the model's parameters, by names for a checkpoint."""
    return {
        f"{ADAM}{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Takes over what `optimizer_tensors` gave."""
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = _adam_state(part(tensors, f"{ADAM}{name}/"), parameter)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _copy(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _adam_state(saved: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """Moments in the memory layout of their parameter, which the fused optimiser walks through in parallel."""
    step = saved.pop("step").to(parameter.device)
    return {"step": step} | {name: torch.empty_like(parameter).copy_(tensor) for name, tensor in saved.items()}
