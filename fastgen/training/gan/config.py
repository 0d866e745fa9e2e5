"""The losses by name with what belongs to each, and the configuration object of adversarial training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastgen import losses
from fastgen.training.config import RunConfig


@dataclass(frozen=True)
class LossRecipe:
    """A loss, and what its paper trains it with.

    Attributes:
        make: the loss.
        training: fields of `GANConfig` where that has other defaults.
        model: constructor arguments that the loss asks of a model, by the model's name.
    """

    make: Callable[[], losses.AdversarialLoss]
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, dict[str, Any]] = field(default_factory=dict)


AUTOENCODER = {"discriminator": "autoencoder", "num_classes": None}
LOSSES = {
    "non-saturating": LossRecipe(losses.NonSaturatingLoss),
    "minimax": LossRecipe(losses.MinimaxLoss),
    "least-squares": LossRecipe(losses.LeastSquaresLoss),
    # Algorithm 1 has RMSProp, because momentum hurts: that is Adam with beta1 = 0, but for the bias correction.
    "wgan": LossRecipe(
        losses.WassersteinLoss,
        {"critic_steps": 5, "learning_rate": 5e-5, "beta1": 0.0, "beta2": 0.99},
        {"gan": {"dropout": 0.0}},
    ),
    "wgan-gp": LossRecipe(  # algorithm 1; no normalisation over the batch
        losses.WassersteinGPLoss,
        {"critic_steps": 5, "learning_rate": 1e-4, "beta1": 0.0, "beta2": 0.9},
        {"dcgan": {"norm": "layer"}, "gan": {"dropout": 0.0}},
    ),
    "hinge": LossRecipe(losses.HingeLoss),
    "began": LossRecipe(
        losses.BEGANLoss,
        {"batch_size": 16, "learning_rate": 1e-4},
        {"dcgan": AUTOENCODER | {"norm": "none"}, "gan": AUTOENCODER},
    ),
}


@dataclass(frozen=True)
class GANConfig(RunConfig):
    """Options of `train_gan`: those of `RunConfig`, and more.  The defaults are those of DCGAN (section 4); some losses
    have others, see `GANConfig.of`.

    A step is ``critic_steps`` steps of the discriminator, each on a batch of its own, and one step of the generator.

    Attributes:
        loss: one of `LOSSES`.
        critic_steps: steps of the discriminator for one of the generator.
        learning_rate: of Adam, constant.
        beta1: Adam's decay of the mean gradient.
        beta2: Adam's decay of the mean square gradient.
        log_every: steps between lines of the log.

    Raises:
        ValueError: no limit, or a value out of range.
    """

    loss: str = "non-saturating"
    batch_size: int = 128
    learning_rate: float = 2e-4
    critic_steps: int = 1
    beta1: float = 0.5
    beta2: float = 0.999
    sample_every: int = 500
    log_every: int = 50

    FIXED: ClassVar[tuple[str, ...]] = (*RunConfig.FIXED, "loss", "critic_steps", "beta1", "beta2")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        self._check_counts("critic_steps", "log_every")
        self._check_range("beta1", 1)
        self._check_range("beta2", 1)

    @classmethod
    def of(cls, loss: str, **options: Any) -> GANConfig:
        """The options that a loss is trained with by its authors, and these.

        Raises:
            ValueError: an option is out of range, or there is no such loss.
        """
        recipe = LOSSES.get(loss)
        return cls(loss=loss, **({} if recipe is None else recipe.training) | options)
