"""Training of a likelihood model by gradient descent on its bits per dimension.

A step is a function of (weights, optimiser state, seed, number of the step): the order of the data and the random
numbers of the step are derived from the seed and the step's number, not from the state of a generator.  So a run that
was interrupted anywhere goes on to the weights of an uninterrupted one, bit for bit on the CPU (with the same number
of threads, and a limit in steps: a limit in seconds makes the learning rate depend on the clock).
"""

from __future__ import annotations

import functools
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fastgen import checkpoint
from fastgen.metrics import bits_per_dim
from fastgen.training.config import TrainConfig
from fastgen.training.monitor import Log, ProgressBar, deferred_signals
from fastgen.training.state import State

SampleGrid = Callable[[torch.nn.Module, Path], Any]  # draws from a model in eval mode and writes a picture to the path


class Data(Protocol):
    """Images uint8 [N, C, H, W] and labels int64 [N] or None, as in `fastgen.data.Dataset`."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor | None: ...


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        model: the model that was passed in, with the best weights, in eval mode.
        bits_per_dim: of the best weights on the validation images; None without these.
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
        TypeError: ``out`` is given, but the model is not one of `fastgen.models`.
        RuntimeError: the loss is not finite, or the model failed; the last checkpoint is left as it was.
    """
    _check_data(model, train_data, "train_data")
    if val_data is not None:
        _check_data(model, val_data, "val_data")
    run = _Run(State(model, config), train_data, val_data, _prepare_folder(model, out, resume), sample_grid)
    if resume and run.checkpoint:
        run.state.restore(run.checkpoint, len(train_data.images))
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), deferred_signals() as signals:
        run.loop(signals, progress)
        if signals:
            run.save()
        else:
            run.finish()
    state = run.state
    best_step = state.step if state.best_bits is None else state.best_step
    return TrainResult(model, state.best_bits, best_step, state.step, state.seconds, run.checkpoint)


def initialize(model: torch.nn.Module, data: Data, config: TrainConfig) -> None:
    """Data-dependent initialisation on the batch of the first step, for a new model of a kind that has one
    (`PixelCNNpp.initialize`); other models are left as they are.
    """
    if hasattr(model, "initialize"):
        _check_data(model, data, "data")
        cast(Any, model).initialize(*_batch(model, data, 0, config))


class _Run:
    """One call of `train`: the state, and where the loop reads from and writes to."""

    def __init__(
        self, state: State, train_data: Data, val_data: Data | None, folder: Path | None, sample_grid: SampleGrid | None
    ) -> None:
        self.state, self.config = state, state.config
        self.train_data, self.val_data = train_data, val_data
        self.folder, self.sample_grid = folder, sample_grid
        self.checkpoint = None if folder is None else folder / "checkpoint.safetensors"

    def loop(self, signals: list[int], progress: bool) -> None:
        """Steps until the budget is used up or a signal has come."""
        state, config = self.state, self.config
        self.log = Log(self.folder and self.folder / "log.jsonl", state.step)
        self.saved_step, self.saved_at = state.step, time.monotonic()
        started = time.monotonic() - state.seconds
        state.model.train()
        with ProgressBar(progress) as bar:
            while config.budget_used(state.step, state.seconds) < 1 and not signals:
                bits, norm = self.step()
                state.seconds = time.monotonic() - started
                self.log.add(bits_per_dim=bits, gradient_norm=norm)
                bar.update(config.budget_used(state.step, state.seconds), state.step, bits, state.best_bits)
                self.after_step()

    def step(self) -> tuple[float, float]:
        """Takes the next step; returns the batch's bits/dim and the norm of the gradient."""
        step = self.state.step
        images, labels = _batch(self.state.model, self.train_data, step, self.config)
        torch.manual_seed(_subseed(self.config.seed, "step", step))
        try:
            return self.state.update(images, labels)
        except RuntimeError as error:
            last = f"last checkpoint: step {self.saved_step}" if self.saved_step else "no checkpoint yet"
            raise RuntimeError(f"training stopped at step {step} ({last}): {error}") from error

    def after_step(self) -> None:
        """Validates, samples and saves, in this order, where it is time to."""
        step, config = self.state.step, self.config
        if step % config.validate_every == 0:
            self.validate()
        if step % config.sample_every == 0:
            self.sample()
        if step % config.checkpoint_every == 0 or time.monotonic() - self.saved_at >= config.checkpoint_seconds:
            self.save()

    def finish(self) -> None:
        """Does what is due at the end of a whole run, the picture last; leaves the best weights in the model."""
        state = self.state
        if state.step % self.config.validate_every:
            self.validate()
        self.save()
        state.model.load_state_dict(state.best())
        state.model.eval()
        if self.folder:
            checkpoint.save(state.model, self.folder / "model.safetensors")
        if state.step % self.config.sample_every:
            self.sample()

    def validate(self) -> None:
        state, figures = self.state, {}
        if self.val_data is not None:
            bits = bits_per_dim(state.average, self.val_data.images, _labels(state.model, self.val_data))
            state.consider(bits)
            figures["val_bits_per_dim"] = bits
        self.log.write(step=state.step, seconds=round(state.seconds, 3), **figures)

    def sample(self) -> None:
        if self.folder and self.sample_grid:
            self.sample_grid(self.state.average, self.folder / f"samples-{self.state.step:06d}.png")

    def save(self) -> None:
        if self.checkpoint and self.state.step > self.saved_step:
            self.state.save(self.checkpoint, len(self.train_data.images))
            self.saved_step, self.saved_at = self.state.step, time.monotonic()


def _batch(model: torch.nn.Module, data: Data, step: int, config: TrainConfig) -> tuple[Tensor, Tensor | None]:
    """Images and labels of a step, on the model's device."""
    device = next(model.parameters()).device
    batch = batch_indices(step, len(data.images), config.batch_size, config.seed)
    labels = _labels(model, data)
    return data.images[batch].to(device), None if labels is None else labels[batch].to(device)


def batch_indices(step: int, count: int, batch_size: int, seed: int) -> Tensor:
    """The images of a step: int64 [min(batch_size, count)]; within an epoch no image comes twice."""
    steps_per_epoch = max(1, count // batch_size)
    epoch, index = divmod(step, steps_per_epoch)
    return _epoch_order(count, epoch, seed)[index * batch_size : (index + 1) * batch_size]


@functools.lru_cache(maxsize=1)
def _epoch_order(count: int, epoch: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(_subseed(seed, "epoch", epoch)))


def _subseed(seed: int, purpose: str, number: int) -> int:
    """A seed for each purpose and number, in the 32 bits of a seed that torch's CPU generator reads."""
    return zlib.crc32(f"{seed} {purpose} {number}".encode())


def _labels(model: torch.nn.Module, data: Data) -> Tensor | None:
    return None if getattr(model, "num_classes", None) is None else data.labels


def _check_data(model: torch.nn.Module, data: Data, name: str) -> None:
    if len(data.images) == 0:
        raise ValueError(f"{name}: holds no images")
    if getattr(model, "num_classes", None) is not None and data.labels is None:
        raise ValueError(f"{name}: the model is conditional on {model.num_classes} classes, the data have no labels")


def _prepare_folder(model: torch.nn.Module, out: str | os.PathLike[str] | None, resume: bool) -> Path | None:
    if out is None:
        if resume:
            raise ValueError("resume: expected the folder of the run as out, got None")
        return None
    checkpoint.describe(model)
    folder = Path(out)
    path = folder / "checkpoint.safetensors"
    if resume and not path.exists():
        raise ValueError(f"resume: there is no checkpoint {path}")
    if path.exists() and not resume:
        raise ValueError(f"out: {path} exists; resume that run or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
