"""Adversarial losses against closed forms, PyTorch's own losses and autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastgen import losses

SHAPES = [(1,), (7,), (5, 1), (3, 1, 2, 2)]


def scores(shape=(7,), dtype=torch.float64):
    return 3 * torch.randn(shape, dtype=dtype) + 1, 3 * torch.randn(shape, dtype=dtype) - 1


def log_sigmoid(x):
    return torch.log(torch.sigmoid(x))


# name -> (loss, discriminator's formula, generator's formula), written with the papers' symbols
FORMULAS = {
    "minimax": (
        losses.MinimaxLoss(),
        lambda x, g: -log_sigmoid(x).mean() - torch.log(1 - torch.sigmoid(g)).mean(),
        lambda g: torch.log(1 - torch.sigmoid(g)).mean(),
    ),
    "non-saturating": (
        losses.NonSaturatingLoss(),
        lambda x, g: -log_sigmoid(x).mean() - torch.log(1 - torch.sigmoid(g)).mean(),
        lambda g: -log_sigmoid(g).mean(),
    ),
    "least squares, eq. 9": (
        losses.LeastSquaresLoss(),
        lambda x, g: ((x - 1) ** 2).mean() / 2 + (g**2).mean() / 2,
        lambda g: ((g - 1) ** 2).mean() / 2,
    ),
    "least squares, eq. 8": (
        losses.LeastSquaresLoss(a=-1, b=1, c=0),
        lambda x, g: ((x - 1) ** 2).mean() / 2 + ((g + 1) ** 2).mean() / 2,
        lambda g: (g**2).mean() / 2,
    ),
    "wasserstein": (losses.WassersteinLoss(), lambda x, g: g.mean() - x.mean(), lambda g: -g.mean()),
    "wasserstein-gp": (losses.WassersteinGPLoss(), lambda x, g: g.mean() - x.mean(), lambda g: -g.mean()),
    "hinge": (
        losses.HingeLoss(),
        lambda x, g: -(x - 1).clamp(max=0).mean() - (-1 - g).clamp(max=0).mean(),
        lambda g: -g.mean(),
    ),
    "began, k = 0": (losses.BEGANLoss(), lambda x, g: x.mean(), lambda g: g.mean()),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name, shape):
    loss, discriminator, generator = FORMULAS[name]
    real, fake = scores(shape)
    torch.testing.assert_close(loss.discriminator(real, fake), discriminator(real, fake))
    torch.testing.assert_close(loss.generator(fake), generator(fake))
    assert loss.generator(fake.float()).dtype == loss.discriminator(real.float(), fake.float()).dtype == torch.float32


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients(name):
    loss = FORMULAS[name][0]
    real, fake = (s.requires_grad_() for s in scores((5,)))
    assert torch.autograd.gradcheck(loss.discriminator, (real, fake))
    assert torch.autograd.gradcheck(loss.generator, (fake,))


@pytest.mark.parametrize("name", FORMULAS)
def test_without_a_penalty_there_is_none(name):
    loss, critic = FORMULAS[name][0], torch.nn.Linear(3, 1)
    before = [p.clone() for p in critic.parameters()]
    if not isinstance(loss, losses.WassersteinGPLoss):
        assert loss.penalty(critic, torch.randn(2, 3), torch.randn(2, 3)) == 0
    if not isinstance(loss, losses.WassersteinLoss):
        loss.constrain(critic)
        assert all(map(torch.equal, before, critic.parameters()))
    if not isinstance(loss, losses.BEGANLoss):
        assert loss.update(*scores()) == {}


def test_log_losses_are_binary_cross_entropies():
    real, fake = scores()
    expected = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    expected = expected + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    torch.testing.assert_close(losses.NonSaturatingLoss().discriminator(real, fake), expected)


def test_sure_discriminators_stay_finite():
    real, fake = torch.tensor([1e4, -1e4]).requires_grad_(), torch.tensor([1e4, -1e4]).requires_grad_()
    for loss in (losses.MinimaxLoss(), losses.NonSaturatingLoss()):
        total = loss.discriminator(real, fake) + loss.generator(fake)
        assert all(torch.isfinite(g).all() for g in (total, *torch.autograd.grad(total, (real, fake))))


def test_the_minimax_generator_saturates_and_the_other_does_not():
    fake = torch.tensor([-20.0], requires_grad=True)
    (saturated,) = torch.autograd.grad(losses.MinimaxLoss().generator(fake), fake)
    (alive,) = torch.autograd.grad(losses.NonSaturatingLoss().generator(fake), fake)
    assert abs(saturated) < 1e-8 and abs(alive + 1) < 1e-6


def test_optimal_discriminator_of_known_densities():
    """Goodfellow et al., proposition 1 and theorem 1: at D = p/(p+q) the loss is log 4 - 2 JSD(p || q)."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.1, 0.6, 0.3]).double()
    logits = torch.log(p / q).requires_grad_()  # sigmoid(log p/q) = p / (p + q)

    def weighted(scores, weights):  # a mean over draws of a distribution on three points
        return scores.repeat_interleave((weights * 10).round().long())

    loss = losses.NonSaturatingLoss().discriminator(weighted(logits, p), weighted(logits, q))
    m = (p + q) / 2
    divergence = 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum()
    torch.testing.assert_close(loss, math.log(4) - 2 * divergence)
    (slope,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(slope, torch.zeros(3).double())


def test_clipping():
    critic = torch.nn.Linear(50, 3)
    weights = critic.weight.detach().clone()
    losses.WassersteinLoss(clip=0.05).constrain(critic)
    assert torch.equal(critic.weight, weights.clamp(-0.05, 0.05))
    assert critic.bias.abs().max() <= 0.05 < weights.abs().max()


@pytest.mark.parametrize("norm", [0.0, 0.25, 1.0, 3.0])
def test_gradient_penalty_of_a_linear_critic(norm):
    """s(x) = w x + b has the slope w everywhere: the penalty is (|w| - 1)^2, its gradient 2 (|w| - 1) w / |w|."""
    critic = torch.nn.Linear(12, 1).double()
    with torch.no_grad():
        critic.weight.mul_(norm / critic.weight.norm())
    real, fake = torch.randn(2, 5, 12).double()
    penalty = losses.gradient_penalty(critic, real, fake)
    torch.testing.assert_close(penalty, torch.tensor((norm - 1) ** 2).double())
    slope, flat = torch.autograd.grad(penalty, (critic.weight, critic.bias), allow_unused=True)
    expected = 2 * (norm - 1) * critic.weight / norm if norm else torch.zeros(1, 12).double()
    torch.testing.assert_close(slope, expected.detach())
    assert flat is None or not flat.any()


def test_gradient_penalty_of_a_quadratic_critic():
    """s(x) = a |x|^2 / 2 has the slope a x: with real = fake = x the penalty is mean (a |x_i| - 1)^2."""
    a = torch.tensor(0.7).double().requires_grad_()
    x = torch.randn(6, 2, 3, 3).double()
    penalty = losses.gradient_penalty(lambda y: 0.5 * a * y.square().sum(dim=(1, 2, 3)), x, x)
    norms = x.flatten(1).norm(dim=1)
    torch.testing.assert_close(penalty, (a * norms - 1).square().mean())
    (slope,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(slope, (2 * (a * norms - 1) * norms).mean().detach())


def test_gradient_penalty_is_taken_between_the_images():
    seen = []

    def critic(y, offset):
        seen.append(y.detach())
        return (y * offset).sum(dim=1)

    real, fake = torch.zeros(2000, 2), torch.tensor([1.0, 10.0]).expand(2000, 2)
    assert losses.gradient_penalty(critic, real, fake, torch.tensor([0.6, 0.8])) < 1e-9
    (y,) = seen
    torch.testing.assert_close(y[:, 1], 10 * y[:, 0])  # one share for each pair
    assert 0 <= y[:, 0].min() < 0.01 and 0.99 < y[:, 0].max() <= 1 and abs(y[:, 0].mean() - 0.5) < 0.03


def test_gradient_penalty_has_second_derivatives():
    """Against finite differences in the critic's weights; the random shares are those of one seed."""
    real, fake = torch.randn(2, 3, 1, 6, 6).double()
    torch.manual_seed(3)
    weight, head = torch.randn(2, 1, 3, 3).double().requires_grad_(), torch.randn(2).double().requires_grad_()

    def penalty(weight, head):
        torch.manual_seed(1)
        return losses.gradient_penalty(
            lambda y: F.leaky_relu(F.conv2d(y, weight), 0.2).square().mean(dim=(2, 3)) @ head, real, fake
        )

    assert torch.autograd.gradcheck(penalty, (weight, head))


def test_gradient_penalty_flows_into_images_that_want_it():
    real, fake = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    penalty = losses.gradient_penalty(lambda y: y.square().sum(dim=1), real, fake)
    assert torch.autograd.grad(penalty, fake)[0].abs().min() > 0


def test_wasserstein_gp_weighs_the_penalty():
    critic, (real, fake) = torch.nn.Linear(4, 1), torch.randn(2, 3, 4)
    expected = 2.5 * (critic.weight.norm() - 1).square()
    torch.testing.assert_close(losses.WassersteinGPLoss(2.5).penalty(critic, real, fake), expected)


def test_began_moves_k_towards_the_equilibrium():
    loss = losses.BEGANLoss(gamma=0.5, lambda_k=0.1)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([0.2, 0.4])
    figures = loss.update(real, fake)
    assert math.isclose(loss.k, 0.1 * (0.5 * 2 - 0.3), rel_tol=1e-6)
    assert figures["k"] == loss.k
    assert math.isclose(figures["convergence"], 2 + abs(0.5 * 2 - 0.3), rel_tol=1e-6)
    torch.testing.assert_close(loss.discriminator(real, fake), torch.tensor(2 - 0.07 * 0.3))
    for _ in range(30):
        loss.update(real, fake)
    assert loss.k == 1
    for _ in range(100):
        loss.update(fake, real)
    assert loss.k == 0


def test_began_keeps_its_state():
    loss, other = losses.BEGANLoss(lambda_k=0.1), losses.BEGANLoss(lambda_k=0.1)
    loss.update(torch.tensor([1.0]), torch.tensor([0.1]))
    other.load_state_dict(loss.state_dict())
    assert other.k == loss.k > 0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: losses.WassersteinLoss(clip=0), "clip: expected a number above 0, got 0"),
        (lambda: losses.WassersteinGPLoss(-1), "weight: expected a number of at least 0, got -1"),
        (lambda: losses.BEGANLoss(gamma=1.5), r"gamma: expected a number in 0..1, got 1.5"),
        (lambda: losses.BEGANLoss(lambda_k=math.nan), "lambda_k: expected a number above 0, got nan"),
        (lambda: losses.gradient_penalty(torch.sum, torch.ones(2, 3), torch.ones(3, 3)), r"got \[2, 3\] and \[3, 3\]"),
        (lambda: losses.gradient_penalty(torch.sum, torch.ones(0, 3), torch.ones(0, 3)), "N >= 1"),
    ],
    ids=range(6),
)
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text):
        make()
