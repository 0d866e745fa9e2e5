"""Adversarial losses: what a discriminator and a generator minimise in turn.

Each loss is a module with the same methods, so that a training loop need not know which one it uses::

    loss = losses.NonSaturatingLoss()
    d = loss.discriminator(D(real), D(fake)) + loss.penalty(D, real, fake)    # fake: detached
    d.backward(); optimizer_d.step(); loss.constrain(D)
    g = loss.generator(D(G(z)))
    g.backward(); optimizer_g.step()
    loss.update(D(real), D(G(z)))                                              # the scores that are at hand

Scores are what the last layer gives, [N] or any other shape, without a sigmoid; results are means over them, 0-d
tensors of their dtype.  x are real images, G(z) generated ones, s(.) scores, and D = sigmoid(s) where a probability is
meant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class AdversarialLoss(torch.nn.Module):
    """What all losses here have; `penalty`, `constrain` and `update` do nothing unless a loss says so."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the discriminator minimises, from its scores of real and of generated images."""
        raise NotImplementedError

    def generator(self, fake: Tensor) -> Tensor:
        """What the generator minimises, from the scores of generated images."""
        raise NotImplementedError

    def penalty(self, critic: Callable[..., Tensor], real: Tensor, fake: Tensor, *inputs: Any) -> Tensor:
        """What is added to the discriminator's loss, from images [N, ...]; ``inputs`` go to the critic as well."""
        return real.new_zeros(())

    def constrain(self, critic: torch.nn.Module) -> None:
        """What is done to the discriminator after its step."""

    def update(self, real: Tensor, fake: Tensor) -> dict[str, float]:
        """Moves the loss's own state after a step, by the scores of that step; returns figures worth a look."""
        return {}


class NonSaturatingLoss(AdversarialLoss):
    """Goodfellow et al. 2014 (1406.2661), section 3: equation 1 for the discriminator, and log D(G(z)) to be maximised.

    discriminator: mean softplus(-s(x)) + mean softplus(s(G(z))), that is -log D(x) - log(1 - D(G(z)));
    generator: mean softplus(-s(G(z))), that is -log D(G(z)).
    """

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def generator(self, fake: Tensor) -> Tensor:
        return F.softplus(-fake).mean()


class MinimaxLoss(NonSaturatingLoss):
    """Goodfellow et al. 2014, equation 1: the generator minimises what the discriminator maximises.

    discriminator: as in `NonSaturatingLoss`; generator: -mean softplus(s(G(z))), that is log(1 - D(G(z))), whose
    gradient vanishes where the discriminator is sure.
    """

    def generator(self, fake: Tensor) -> Tensor:
        return -F.softplus(fake).mean()


class LeastSquaresLoss(AdversarialLoss):
    """LSGAN (Mao et al. 2017, 1611.04076): targets a of generated, b of real images, c what G wants.

    discriminator: mean (s(x) - b)^2 / 2 + mean (s(G(z)) - a)^2 / 2; generator: mean (s(G(z)) - c)^2 / 2.
    The defaults are the paper's 0-1 coding; its other choice, a=-1, b=1, c=0, minimises a Pearson chi^2 divergence.
    """

    def __init__(self, a: float = 0.0, b: float = 1.0, c: float = 1.0) -> None:
        super().__init__()
        self.a, self.b, self.c = a, b, c

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * (real - self.b).square().mean() + 0.5 * (fake - self.a).square().mean()

    def generator(self, fake: Tensor) -> Tensor:
        return 0.5 * (fake - self.c).square().mean()


class WassersteinLoss(AdversarialLoss):
    """Wasserstein GAN (Arjovsky, Chintala, Bottou 2017, 1701.07875), algorithm 1.

    discriminator (critic): mean s(G(z)) - mean s(x); generator: -mean s(G(z)).  `constrain` clips the critic's weights
    to [-clip, clip] after each of its steps.

    Raises:
        ValueError: clip is not above 0.
    """

    def __init__(self, clip: float = 0.01) -> None:
        super().__init__()
        if not clip > 0:
            raise ValueError(f"clip: expected a number above 0, got {clip!r}")
        self.clip = clip

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake.mean() - real.mean()

    def generator(self, fake: Tensor) -> Tensor:
        return -fake.mean()

    @torch.no_grad()
    def constrain(self, critic: torch.nn.Module) -> None:
        for parameter in critic.parameters():
            parameter.clamp_(-self.clip, self.clip)


class WassersteinGPLoss(AdversarialLoss):
    """WGAN-GP (Gulrajani et al. 2017, 1704.00028), equation 3: `WassersteinLoss` with `gradient_penalty`, not clipping.

    ``weight`` is the paper's lambda.  The critic must not normalise over the batch (section 4).

    Raises:
        ValueError: weight is negative.
    """

    def __init__(self, weight: float = 10.0) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight: expected a number of at least 0, got {weight!r}")
        self.weight = weight

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake.mean() - real.mean()

    def generator(self, fake: Tensor) -> Tensor:
        return -fake.mean()

    def penalty(self, critic: Callable[..., Tensor], real: Tensor, fake: Tensor, *inputs: Any) -> Tensor:
        return self.weight * gradient_penalty(critic, real, fake, *inputs)


class HingeLoss(AdversarialLoss):
    """Geometric GAN (Lim & Ye 2017, 1705.02894); Miyato et al. 2018 (1802.05957).

    discriminator: mean max(0, 1 - s(x)) + mean max(0, 1 + s(G(z))); generator: -mean s(G(z)).
    """

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()

    def generator(self, fake: Tensor) -> Tensor:
        return -fake.mean()


class BEGANLoss(AdversarialLoss):
    """Boundary equilibrium GAN, BEGAN (Berthelot, Schumm, Metz 2017, 1703.10717).

    The discriminator is an autoencoder, and its "scores" are the reconstruction errors L >= 0 of the images.

    discriminator: mean L(x) - k_t mean L(G(z)); generator: mean L(G(z)).  `update`, called once per step, moves k::

        k_{t+1} = clip(k_t + lambda_k (gamma L(x) - L(G(z))), 0, 1)        k_0 = 0

    which keeps E L(G(z)) at gamma E L(x).

    Args:
        gamma: the diversity ratio, 0..1; lower is sharper and less diverse (the paper shows 0.3 to 0.7).
        lambda_k: learning rate of k, which takes about 1 / (lambda_k L) steps to take hold: the published 0.001 is for
            hundreds of thousands of steps.

    Attributes:
        k: buffer, 0-d float64; part of the state dict.

    Raises:
        ValueError: gamma or lambda_k is out of range.
    """

    k: Tensor

    def __init__(self, gamma: float = 0.5, lambda_k: float = 1e-3) -> None:
        super().__init__()
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma: expected a number in 0..1, got {gamma!r}")
        if not lambda_k > 0:
            raise ValueError(f"lambda_k: expected a number above 0, got {lambda_k!r}")
        self.gamma, self.lambda_k = gamma, lambda_k
        self.register_buffer("k", torch.zeros((), dtype=torch.float64))

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return real.mean() - self.k.to(real.dtype) * fake.mean()

    def generator(self, fake: Tensor) -> Tensor:
        return fake.mean()

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> dict[str, float]:
        """Moves k by the errors of real and generated images; returns the new k and `convergence`."""
        balance = self.gamma * real.double().mean() - fake.double().mean()
        self.k.add_(self.lambda_k * balance.to(self.k.device)).clamp_(0.0, 1.0)
        return {"k": float(self.k), "convergence": self.convergence(real, fake)}

    @torch.no_grad()
    def convergence(self, real: Tensor, fake: Tensor) -> float:
        """The global measure M = L(x) + |gamma L(x) - L(G(z))|; it falls as training converges."""
        error = real.double().mean()
        return float(error + (self.gamma * error - fake.double().mean()).abs())


def gradient_penalty(critic: Callable[..., Tensor], real: Tensor, fake: Tensor, *inputs: Any) -> Tensor:
    """Mean of (||grad s(y)||_2 - 1)^2 over points y between real and generated images (Gulrajani et al. 2017, eq. 3).

    y = e x + (1 - e) G(z) with one e from U(0, 1), torch's generator, for each pair (algorithm 1).  The result can be
    differentiated with respect to the critic's weights, and, where the images require it, to the images.

    Args:
        critic: images, *inputs -> scores of each image, from that image alone.
        real: floating point images [N, ...].
        fake: generated images, of the same shape.
        inputs: what else the critic takes, such as labels.

    Raises:
        ValueError: the shapes differ, or there is no image.
    """
    if real.shape != fake.shape or real.dim() < 1 or len(real) == 0:
        raise ValueError(f"real and fake: expected one shape [N, ...], N >= 1, got {[*real.shape]} and {[*fake.shape]}")
    share = torch.rand(len(real), *[1] * (real.dim() - 1), dtype=real.dtype, device=real.device)
    points = torch.lerp(fake, real, share)
    if not points.requires_grad:
        points.requires_grad_()
    (slope,) = torch.autograd.grad(critic(points, *inputs).sum(), points, create_graph=True)
    return (torch.linalg.vector_norm(slope.flatten(1), dim=1) - 1.0).square().mean()
