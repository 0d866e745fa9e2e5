"""Adversarial training.

A step is a function of (weights, optimiser state, seed, number of the step), as in `fastgen.training.train`, and a run
that was interrupted anywhere goes on to the weights of an uninterrupted one, bit for bit on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgen import charts, images
from fastgen.models import AdversarialModel
from fastgen.training.batches import Data, batch, check_data, check_kind
from fastgen.training.gan.config import GANConfig
from fastgen.training.gan.state import GANState
from fastgen.training.monitor import read_log
from fastgen.training.run import Run, SampleGrid, prepare_folder

# panel of curves.png -> figures of the log, with what they are called there
CURVES = {
    "losses": {"loss_discriminator": "discriminator", "loss_generator": "generator"},
    "mean scores of the discriminator": {"score_real": "real images", "score_fake": "generated images"},
    "gradient penalty": {"penalty": "weighted penalty"},
    "BEGAN": {"convergence": "convergence measure M", "k": "k"},
    "Frechet distance": {"frechet_distance": "generated images"},
    "Inception score": {"inception_score": "generated images"},
}
Score = Callable[[torch.nn.Module], dict[str, float]]  # figures of a model in eval mode, for the log


@dataclass(frozen=True)
class GANResult:
    """What `train_gan` returns.

    Attributes:
        model: the model that was passed in, with the generator's moving average, in eval mode.
        steps: steps taken in all, before and after interruptions.
        seconds: seconds of training in all.
        checkpoint: path of the checkpoint, or None.
    """

    model: AdversarialModel
    steps: int
    seconds: float
    checkpoint: Path | None


def train_gan(
    model: AdversarialModel,
    train_data: Data,
    config: GANConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    sample_grid: SampleGrid | None = None,
    score: Score | None = None,
) -> GANResult:
    """Trains a generator against a discriminator to a limit of steps or seconds.

    The generator's weights and BatchNorm statistics are averaged over the steps (exponential moving average); the
    average is sampled and kept.  SIGINT and SIGTERM end the run after the current step with a checkpoint, and then act
    as usual.

    Args:
        model: trained on the device of its parameters.
        train_data: images of the model's shape and levels, and labels where it has ``num_classes``: generated images
            get the labels of the real ones of their batch.
        config: loss, limits, optimiser, intervals.
        out: folder for ``checkpoint.safetensors`` (for `fastgen.load` and for resuming), ``log.jsonl``, ``curves.png``
            (losses and scores), ``samples-STEP.png`` and finally ``model.safetensors``; created if missing. None:
            nothing is written.
        resume: go on from the checkpoint in ``out``.
        progress: show a progress bar on stderr.
        sample_grid: called with the averaged model and the path of a picture to write.
        score: called with the averaged model whenever a grid is drawn; its figures go to the log, and those that are
            called frechet_distance and inception_score to ``curves.png``.

    Raises:
        ValueError: there are no images, or labels are missing; ``out`` holds a checkpoint but resume is not asked for,
            or the other way round; the checkpoint is of another model, configuration or data size.
        TypeError: ``out`` is given, but the model is not one of `fastgen.models`.
        RuntimeError: a loss is not finite; the last checkpoint is left as it was.
    """
    check_kind(model, AdversarialModel, "train_gan")
    check_data(model, train_data, "train_data")
    state = GANState(model, config)
    run = _Run(state, config, train_data, prepare_folder(model, out, resume), sample_grid, score)
    run.go(resume, progress)
    return GANResult(model, state.step, state.seconds, run.checkpoint)


class _Run(Run):
    """One call of `train_gan`."""

    state: GANState
    config: GANConfig

    def __init__(
        self,
        state: GANState,
        config: GANConfig,
        data: Data,
        folder: Path | None,
        sample_grid: SampleGrid | None,
        score: Score | None,
    ) -> None:
        super().__init__(state, config, data, folder, sample_grid)
        self.score = score

    @property
    def report_every(self) -> int:
        return self.config.log_every

    def step(self) -> dict[str, float]:
        state, config = self.state, self.config
        first = state.step * config.critic_steps
        for number in range(first, first + config.critic_steps):
            real, labels = batch(state.model, self.data, number, config.batch_size, config.seed)
            figures, scores = state.update_discriminator(real, labels)
        return figures | state.update_generator(scores, labels)

    def report(self) -> None:
        self.log.write(step=self.state.step, seconds=round(self.state.seconds, 3))

    def progress_text(self, means: dict[str, float]) -> str:
        return f"losses {means['loss_discriminator']:.3f} discriminator, {means['loss_generator']:.3f} generator"

    def sample(self) -> None:
        super().sample()
        if self.score:
            self.log.write(step=self.state.step, **self.score(self.state.average))
        if self.folder:
            draw_curves(self.folder)


def draw_curves(folder: Path) -> None:
    """Draws ``curves.png`` from ``log.jsonl`` in the folder of a run; nothing before the log has two lines."""
    lines = read_log(folder / "log.jsonl")
    if len(lines) < 2:
        return
    panels = []
    for title, names in CURVES.items():
        curves = {
            label: [(line["step"], line[name]) for line in lines if name in line] for name, label in names.items()
        }
        if any(curves.values()):
            panels.append((title, charts.lines(curves, x_label="step")))
    images.save_png(images.captioned(panels), folder / "curves.png")
