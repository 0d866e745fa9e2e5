"""The loop around the steps of any kind of training: limits, log, progress, pictures, checkpoints, interruptions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from fastgen import checkpoint
from fastgen.training.batches import Data, subseed
from fastgen.training.config import RunConfig
from fastgen.training.monitor import Log, ProgressBar, deferred_signals

SampleGrid = Callable[[torch.nn.Module, Path], Any]  # draws from a model in eval mode and writes a picture to the path


class RunState(Protocol):
    """All that the steps of a run change.

    Attributes:
        model: what is trained.
        average: the model that is sampled: its weights are moving averages.
        step: steps taken.
        seconds: seconds of training so far.
    """

    model: torch.nn.Module
    average: torch.nn.Module
    step: int
    seconds: float

    def save(self, path: Path, num_images: int) -> None:
        """Writes a checkpoint from which `restore` takes the whole state."""

    def restore(self, path: Path, num_images: int) -> None:
        """Takes over the state in a checkpoint."""

    def adopt(self) -> None:
        """Puts the weights that are the result of the run into the model."""


class Run:
    """One run: the state, and where the loop reads from and writes to.  Subclasses say what a step and a report are."""

    def __init__(
        self, state: RunState, config: RunConfig, data: Data, folder: Path | None, sample_grid: SampleGrid | None
    ) -> None:
        self.state, self.config, self.data = state, config, data
        self.folder, self.sample_grid = folder, sample_grid
        self.checkpoint = None if folder is None else folder / "checkpoint.safetensors"

    def step(self) -> dict[str, float]:
        """Takes the next step; returns its figures for the log.  RuntimeError: a loss is not finite."""
        raise NotImplementedError

    def report(self) -> None:
        """Writes a line of the log, every `report_every` steps and at the end."""
        raise NotImplementedError

    def progress_text(self, means: dict[str, float]) -> str:
        """What the progress bar says, from running means of the figures."""
        raise NotImplementedError

    @property
    def report_every(self) -> int:
        raise NotImplementedError

    def go(self, resume: bool, progress: bool) -> None:
        """Runs to the end, or to a signal; leaves the result in the model, or the checkpoint on the disk."""
        if resume and self.checkpoint:
            self.state.restore(self.checkpoint, len(self.data.images))
        device = next(self.state.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), deferred_signals() as signals:
            self._loop(signals, progress)
            if signals:
                self._save()
            else:
                self._finish()

    def sample(self) -> None:
        """Draws a picture."""
        if self.folder and self.sample_grid:
            self.sample_grid(self.state.average, self.folder / f"samples-{self.state.step:06d}.png")

    def _loop(self, signals: list[int], progress: bool) -> None:
        """Steps until the budget is used up or a signal has come."""
        state, config = self.state, self.config
        self.log = Log(self.folder and self.folder / "log.jsonl", state.step)
        self._saved_step, self._saved_at = state.step, time.monotonic()
        started = time.monotonic() - state.seconds
        state.model.train()
        with ProgressBar(progress) as bar:
            while config.budget_used(state.step, state.seconds) < 1 and not signals:
                figures = self._step()
                state.seconds = time.monotonic() - started
                self.log.add(**figures)
                bar.update(config.budget_used(state.step, state.seconds), state.step, figures, self.progress_text)
                self._after_step()

    def _step(self) -> dict[str, float]:
        step = self.state.step
        torch.manual_seed(subseed(self.config.seed, "step", step))
        try:
            return self.step()
        except RuntimeError as error:
            last = f"last checkpoint: step {self._saved_step}" if self._saved_step else "no checkpoint yet"
            raise RuntimeError(f"training stopped at step {step} ({last}): {error}") from error

    def _after_step(self) -> None:
        """Reports, samples and saves, in this order, where it is time to."""
        step, config = self.state.step, self.config
        if step % self.report_every == 0:
            self.report()
        if step % config.sample_every == 0:
            self.sample()
        if step % config.checkpoint_every == 0 or time.monotonic() - self._saved_at >= config.checkpoint_seconds:
            self._save()

    def _finish(self) -> None:
        """Does what is due at the end of a whole run, the picture last."""
        state = self.state
        reported = self.log.kept_step == state.step  # where all was done when the run was resumed
        if unreported := bool(state.step % self.report_every) and not reported:
            self.report()
        self._save(again=unreported)  # a report may have found the best weights so far
        state.adopt()
        state.model.eval()
        if self.folder:
            checkpoint.save(state.model, self.folder / "model.safetensors")
        if state.step % self.config.sample_every:
            self.sample()

    def _save(self, again: bool = False) -> None:
        if self.checkpoint and (again or self.state.step > self._saved_step):
            self.state.save(self.checkpoint, len(self.data.images))
            self._saved_step, self._saved_at = self.state.step, time.monotonic()


def prepare_folder(model: torch.nn.Module, out: str | os.PathLike[str] | None, resume: bool) -> Path | None:
    """The folder of a run, created if missing.

    Raises:
        ValueError: it holds a checkpoint but ``resume`` is not asked for, or the other way round.
        TypeError: the model cannot be written to a checkpoint.
    """
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
