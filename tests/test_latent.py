"""Latent tools against geometry, statistics and hand-made sums."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen import latent, models, ops

A, B = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
METHOD = pytest.mark.parametrize("method", latent.METHODS)


def test_linear():
    assert latent.linear(A, B, 0.25).tolist() == [2.25, 0.5, 0]
    assert latent.linear(A, B, torch.tensor([0.0, 0.5, 1.0])).tolist() == [[3, 0, 0], [1.5, 1, 0], [0, 2, 0]]


def test_spherical_of_a_right_angle():
    """sin((1-t) 90 deg) a + sin(t 90 deg) b."""
    for t in (0.0, 0.25, 0.5, 1.0):
        expected = [3 * math.cos(t * math.pi / 2), 2 * math.sin(t * math.pi / 2), 0]
        torch.testing.assert_close(latent.spherical(A, B, t), torch.tensor(expected))


def test_spherical_keeps_the_norm_and_turns_evenly():
    a, b = torch.nn.functional.normalize(torch.randn(2, 5, 40).double(), dim=-1)
    walk = latent.spherical(a, b, torch.linspace(0, 1, 9))  # [9, 5, 40]
    torch.testing.assert_close(walk.norm(dim=-1), torch.ones(9, 5).double())
    turns = (walk[1:] * walk[:-1]).sum(-1)
    torch.testing.assert_close(turns, turns[:1].expand(8, 5), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(walk[0], a)
    torch.testing.assert_close(walk[-1], b)


@pytest.mark.parametrize(
    "b",
    [A, 2 * A, -A, 0 * A, A + torch.tensor([0.0, 1e-12, 0.0])],
    ids=["same", "longer", "opposite", "zero", "nearly the same"],
)
def test_spherical_without_a_plane_is_linear(b):
    for first, second in ((A, b), (b, A)):
        torch.testing.assert_close(latent.spherical(first, second, 0.3), latent.linear(first, second, 0.3))


def test_spherical_of_nearly_equal_latents_is_accurate():
    a = torch.randn(40)
    b = a + 1e-3 * torch.randn(40)
    torch.testing.assert_close(latent.spherical(a, b, 0.5), latent.linear(a, b, 0.5), rtol=1e-6, atol=1e-6)


@METHOD
def test_interpolate(method):
    a, b = torch.randn(2, 4, 6)
    walk = latent.interpolate(a, b, 5, method)
    assert walk.shape == (5, 4, 6) and walk.dtype == torch.float32
    torch.testing.assert_close(walk[[0, 4]], torch.stack((a, b)))
    torch.testing.assert_close(walk[1], getattr(latent, method)(a, b, 0.25))
    torch.testing.assert_close(latent.interpolate(a[2], b[2], 5, method), walk[:, 2])


@METHOD
def test_grid(method):
    corners = torch.randn(4, 6)
    plane = latent.grid(corners, 3, 5, method)
    assert plane.shape == (15, 6)
    plane = plane.unflatten(0, (3, 5))
    torch.testing.assert_close(plane[[0, 0, 2, 2], [0, 4, 0, 4]], corners)
    torch.testing.assert_close(plane[1, 0], getattr(latent, method)(corners[0], corners[2], 0.5))
    torch.testing.assert_close(plane[1], latent.interpolate(plane[1, 0], plane[1, 4], 5, method))


def test_grid_of_a_plane_is_bilinear():
    corners = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 2.0], [4.0, 2.0]])
    expected = [[x, y] for y in (0, 1, 2) for x in (0, 2, 4)]
    assert latent.grid(corners, 3, 3, "linear").tolist() == expected


def test_arithmetic():
    a, b, c = torch.randn(3, 7), torch.randn(2, 7), torch.randn(1, 7)
    torch.testing.assert_close(latent.arithmetic([a, c], [b]), (a[0] + a[1] + a[2]) / 3 + c[0] - (b[0] + b[1]) / 2)
    torch.testing.assert_close(latent.arithmetic([a]), a.mean(0))


@pytest.mark.parametrize("limit", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_truncated_latents_are_truncated_normal(limit):
    """Against the distribution of drawing again until inside: its CDF, by Kolmogorov and Smirnov."""
    z = ops.normal(500, (400,)).flatten()
    values = latent.truncate(z, limit)
    assert values.dtype == z.dtype and values.abs().max() <= limit
    inside = values.double().sort().values
    low, high = (torch.special.ndtr(torch.tensor(side * limit).double()) for side in (-1, 1))
    cdf = (torch.special.ndtr(inside) - low) / (high - low)
    steps = torch.arange(1, len(cdf) + 1) / len(cdf)
    assert (cdf - steps).abs().max() < 1.95 / len(cdf) ** 0.5
    order = z.argsort()
    assert (values[order].diff() >= 0).all() and torch.equal(values.sign(), z.sign())


def test_truncation_at_the_ends():
    z = torch.tensor([-40.0, -1.0, 0.0, 5.0, 40.0])
    assert torch.equal(latent.truncate(z, math.inf), z)
    assert latent.truncate(z, 1e-4).abs().max() <= 1e-4
    assert torch.isfinite(latent.truncate(z, 30)).all()
    torch.testing.assert_close(latent.truncate(z[1:4], 9.0), z[1:4], rtol=1e-6, atol=0)


def test_double_latents_stay_double():
    a, b = torch.randn(2, 4).double()
    for result in (
        latent.linear(a, b, 0.5),
        latent.interpolate(a, b, 3),
        latent.truncate(a, 1),
        latent.arithmetic([a[None]]),
    ):
        assert result.dtype == torch.float64


def test_pictures_of_any_decoder():
    model = models.GAN(image_shape=(1, 4, 4), latent_dim=3, num_filters=5)
    ends = model.latents(2)
    images = model.render(latent.interpolate(ends[0], ends[1], 3))
    assert torch.equal(images[[0, 2]], model.sample(2))


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda: latent.linear(A, B[:2], 0.5), r"one shape \[..., D\], got \[3\] and \[2\]"),
        (lambda: latent.spherical(A, B, torch.zeros(2, 2)), r"t: expected a number or a tensor of shape \[T\]"),
        (lambda: latent.interpolate(A, B, 1), "steps: expected an integer of at least 2, got 1"),
        (lambda: latent.interpolate(A, B, 3, "cubic"), "method: expected one of spherical, linear, got 'cubic'"),
        (lambda: latent.grid(torch.zeros(3, 2), 2, 2), r"corners: expected shape \[4, D\], got \[3, 2\]"),
        (lambda: latent.arithmetic([]), "expected at least one group"),
        (lambda: latent.arithmetic([torch.zeros(2, 3)], [torch.zeros(0, 3)]), r"got \[\[2, 3\], \[0, 3\]\]"),
        (lambda: latent.truncate(A, 0), "limit: expected a number above 0, got 0"),
        (lambda: latent.truncate(A, math.nan), "limit: expected a number above 0, got nan"),
    ],
    ids=range(9),
)
def test_bad_values(act, text):
    with pytest.raises(ValueError, match=text):
        act()


def test_bad_types():
    with pytest.raises(TypeError, match="b: expected a floating point tensor"):
        latent.linear(A, B.long(), 0.5)


def test_manifold_is_the_inverse_of_the_distribution_function():
    plane = latent.manifold(3, 5)
    assert plane.shape == (15, 2) and plane.dtype == torch.float32
    across, up = torch.special.ndtr(plane.double()).unflatten(0, (3, 5)).unbind(-1)
    torch.testing.assert_close(across[1], torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64))
    torch.testing.assert_close(up[:, 2], torch.tensor([5 / 6, 0.5, 1 / 6], dtype=torch.float64))
    assert torch.equal(latent.manifold(1, 1), torch.zeros(1, 2))


def test_traverse_changes_one_element():
    z = torch.tensor([1.0, 2.0, 3.0])
    walk = latent.traverse(z, 1, torch.tensor([-1.0, 0.5]))
    assert walk.tolist() == [[1, -1, 3], [1, 0.5, 3]]
    assert z.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: latent.quantiles(0), "count: expected an integer of at least 1, got 0"),
        (lambda: latent.manifold(2, 1.5), "count: expected an integer"),
        (lambda: latent.traverse(torch.zeros(3), 3, torch.zeros(2)), "dimension: expected 0..2, got 3"),
        (lambda: latent.traverse(torch.zeros(1, 3), 0, torch.zeros(2)), "expected shapes"),
    ],
)
def test_errors_of_walks_of_autoencoders(call, message):
    with pytest.raises(ValueError, match=message):
        call()
