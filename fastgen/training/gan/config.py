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
        make: the loss, from `GANConfig.loss_options`.
        training: fields of `GANConfig` where that has other defaults.
        model: constructor arguments that the loss asks of a model, by the model's name.
        digits: fields of `GANConfig` for minutes on the digits where `DIGITS` has others.
        digits_model: the same of `DIGITS_MODEL`.
    """

    make: Callable[..., losses.AdversarialLoss]
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, dict[str, Any]] = field(default_factory=dict)
    digits: dict[str, Any] = field(default_factory=dict)
    digits_model: dict[str, int] = field(default_factory=dict)


# For recognisable digits after minutes on one core, by a DCGAN: what is published is for large photographs.
DIGITS_MODEL = {"size": 32, "num_filters": 16}  # pixels a side; feature maps
DIGITS = {"batch_size": 64, "learning_rate": 5e-4, "ema_decay": 0.99, "max_steps": 2000}
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
        # k integrates lambda_k times errors of some 0.1: at the published 0.001 it is still 0 after thousands of steps,
        # in which the generator settles for one grey image.  At gamma = 0.7 it settles for ones, the easiest digits; of
        # 32 pixels with 16 feature maps it gives one digit at a time.  Even so a short run prefers the easy digits.
        {"batch_size": 16, "learning_rate": 1e-3, "loss_options": {"gamma": 1.0, "lambda_k": 0.05}},
        {"size": 16, "num_filters": 8},
    ),
}


@dataclass(frozen=True)
class GANConfig(RunConfig):
    """Options of `train_gan`: those of `RunConfig`, and more.  The defaults are those of DCGAN (section 4); some losses
    have others, see `GANConfig.of`.

    A step is ``critic_steps`` steps of the discriminator, each on a batch of its own, and one step of the generator.

    Attributes:
        loss: one of `LOSSES`.
        loss_options: arguments of the loss where it has other defaults, such as ``{"gamma": 0.7}`` of began.
        critic_steps: steps of the discriminator for one of the generator.
        learning_rate: of Adam, constant.
        beta1: Adam's decay of the mean gradient.
        beta2: Adam's decay of the mean square gradient.
        log_every: steps between lines of the log.

    Raises:
        ValueError: no limit, or a value out of range.
    """

    loss: str = "non-saturating"
    loss_options: dict[str, float] = field(default_factory=dict)
    batch_size: int = 128
    learning_rate: float = 2e-4
    critic_steps: int = 1
    beta1: float = 0.5
    beta2: float = 0.999
    sample_every: int = 500
    log_every: int = 50

    FIXED: ClassVar[tuple[str, ...]] = (*RunConfig.FIXED, "loss", "loss_options", "critic_steps", "beta1", "beta2")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        try:
            self.make_loss()
        except TypeError as error:
            raise ValueError(f"loss_options: {self.loss} does not take {self.loss_options}: {error}") from None
        self._check_counts("critic_steps", "log_every")
        self._check_range("beta1", 1)
        self._check_range("beta2", 1)

    def make_loss(self) -> losses.AdversarialLoss:
        """The loss, in its first state."""
        return LOSSES[self.loss].make(**self.loss_options)

    @classmethod
    def of(cls, loss: str, **options: Any) -> GANConfig:
        """The options that a loss is trained with by its authors, and these.

        Raises:
            ValueError: an option is out of range, or there is no such loss.
        """
        recipe = LOSSES.get(loss)
        return cls(loss=loss, **({} if recipe is None else recipe.training) | options)
