"""Training of a likelihood model by gradient descent on its bits per dimension.

A step is a function of (weights, optimiser state, seed, number of the step): the order of the data and the random
numbers of the step are derived from the seed and the step's number, not from the state of a generator.  So a run that
was interrupted anywhere goes on to the weights of an uninterrupted one, bit for bit on the CPU (with the same number
of threads, and a limit in steps: a limit in seconds makes the learning rate depend on the clock).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from fastgen.metrics import bits_per_dim
from fastgen.models import VAE, VQVAE, AdversarialModel
from fastgen.training.batches import Data, batch, check_data, drop_labels, labels_for
from fastgen.training.config import TrainConfig
from fastgen.training.run import Run, SampleGrid, prepare_folder
from fastgen.training.state import State

OTHERS = {VAE: "train_vae", VQVAE: "train_vqvae", AdversarialModel: "train_gan"}  # what `train` does not train


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        model: the model that was passed in, with the best weights, in eval mode.
        bits_per_dim: of the best weights on the validation images; None without these. Of a VAE or VQ-VAE a bound.
        best_step: the step of the best weights.
        steps: steps taken in all, before and after interruptions.
        seconds: seconds of training in all.
        checkpoint: path of the checkpoint, or None.
    """

    model: torch.nn.Module
    bits_per_dim: float | None
    best_step: int
    steps: int
    seconds: float
    checkpoint: Path | None


def train(
    model: torch.nn.Module,
    train_data: Data,
    val_data: Data | None,
    config: TrainConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    sample_grid: SampleGrid | None = None,
) -> TrainResult:
    """Trains a model to its limit of steps or seconds, and leaves the best weights in it.

    Weights are averaged over the steps (exponential moving average); the average is validated, sampled and kept.
    SIGINT and SIGTERM end the run after the current step with a checkpoint, and then act as usual.

    Args:
        model: has ``log_prob(images, labels) -> [n]`` nats; trained on the device of its parameters.
        train_data: images and labels to train on; labels are used when the model has ``num_classes``.
        val_data: images and labels to choose the best weights by, or None: then the last ones are kept.
        config: limits, optimiser, intervals.
        out: folder for ``checkpoint.safetensors`` (for `fastgen.load` and for resuming), ``log.jsonl``,
            ``samples-STEP.png`` and finally ``model.safetensors``; created if missing. None: nothing is written.
        resume: go on from the checkpoint in ``out``.
        progress: show a progress bar on stderr.
        sample_grid: called with the averaged model and the path of a picture to write.

    Raises:
        ValueError: there are no images, or labels are missing; ``out`` holds a checkpoint but resume is not asked for,
            or the other way round; the checkpoint is of another model, configuration or data size.
        TypeError: ``out`` is given, but the model is not one of `fastgen.models`; or it is one of `OTHERS`.
        RuntimeError: the loss is not finite, or the model failed; the last checkpoint is left as it was.
    """
    if isinstance(model, tuple(OTHERS)):
        others = ", ".join(f"a {kind.__name__} by {function}" for kind, function in OTHERS.items())
        raise TypeError(f"model: train takes autoregressive models, got a {type(model).__name__}; {others}")
    run = LikelihoodRun(State(model, config), config, train_data, val_data, out, resume, sample_grid)
    return run.train(resume, progress)


def initialize(model: torch.nn.Module, data: Data, config: TrainConfig) -> None:
    """Data-dependent initialisation on the batch of the first step, for a new model of a kind that has one
    (`PixelCNNpp`, `PixelSNAIL`, `VQVAE`); other models are left as they are.
    """
    if hasattr(model, "initialize"):
        check_data(model, data, "data")
        cast(Any, model).initialize(*batch(model, data, 0, config.batch_size, config.seed))


def _check_nothing(model: torch.nn.Module, data: Data) -> None:
    """
    Raises:
        ValueError: the model has no class beside those of the data, which would stand for none.
    """
    labels, num_classes = labels_for(model, data), getattr(model, "num_classes", None)
    if labels is None or num_classes is None:
        raise ValueError("label_dropout: the model is not conditional on classes")
    if int(labels.max()) == num_classes - 1:
        raise ValueError(f"label_dropout: the last of {num_classes} classes stands for none, but the data have it")


class LikelihoodRun(Run):
    """One call of `train`; of the other functions that train on a likelihood, subclasses."""

    state: State
    config: TrainConfig

    def __init__(
        self,
        state: State,
        config: TrainConfig,
        train_data: Data,
        val_data: Data | None,
        out: str | os.PathLike[str] | None,
        resume: bool,
        sample_grid: SampleGrid | None,
    ) -> None:
        check_data(state.model, train_data, "train_data")
        if val_data is not None:
            check_data(state.model, val_data, "val_data")
        if config.label_dropout:
            _check_nothing(state.model, train_data)
        super().__init__(state, config, train_data, prepare_folder(state.model, out, resume), sample_grid)
        self.val_data = val_data

    def train(self, resume: bool, progress: bool) -> TrainResult:
        """The whole run."""
        self.go(resume, progress)
        state = self.state
        best_step = state.step if state.best_bits is None else state.best_step
        return TrainResult(state.model, state.best_bits, best_step, state.step, state.seconds, self.checkpoint)

    @property
    def report_every(self) -> int:
        return self.config.validate_every

    def step(self) -> dict[str, float]:
        state, config = self.state, self.config
        images, labels = batch(state.model, self.data, state.step, config.batch_size, config.seed)
        if config.label_dropout and labels is not None:
            nothing = cast(Any, state.model).num_classes - 1
            labels = drop_labels(labels, nothing, config.label_dropout, config.seed, state.step)
        bits, norm = state.update(images, labels)
        return {**(state.figures or {"bits_per_dim": bits}), "gradient_norm": norm}

    def report(self) -> None:
        """Validates, and keeps the average if it is the best so far."""
        state, figures = self.state, dict[str, float]()
        if self.val_data is not None:
            bits, figures = self.validate(self.val_data)
            state.consider(bits)
        self.log.write(step=state.step, seconds=round(state.seconds, 3), **figures)

    def validate(self, data: Data) -> tuple[float, dict[str, float]]:
        """The average's bits/dim on the validation images, by which the best is chosen, and figures for the log."""
        bits = bits_per_dim(self.state.average, data.images, labels_for(self.state.model, data))
        return bits, {"val_bits_per_dim": bits}

    def progress_text(self, means: dict[str, float]) -> str:
        best = self.state.best_bits
        validation = "" if best is None else f", best validation {best:.3f}"
        return f"{means['bits_per_dim']:.3f} bits/dim{validation}"
