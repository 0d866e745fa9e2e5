"""Walks through a latent space: latents in, latents out, for any generator or decoder that makes images of them.

::

    z = model.latents(2, seed=0)                                   # [2, D]
    walk = latent.interpolate(z[0], z[1], 9)                       # [9, D]
    images.save_png(images.grid(model.render(walk), model.levels, columns=9), "walk.png")

Latents are floating point tensors [..., D]; results have their dtype and device.  `fastgen latent` draws the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

METHODS = ("spherical", "linear")


def linear(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """(1 - t) a + t b.

    Args:
        a: where t = 0, [..., D].
        b: where t = 1, of the same shape.
        t: a number, or a tensor [T].

    Returns:
        [..., D], or [T, ..., D] for a tensor t.
    """
    _check_pair(a, b)
    t = _as_factor(t, a)
    return (1 - t) * a + t * b


def spherical(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """The way along the great circle: sin((1-t) w) / sin(w) a + sin(t w) / sin(w) b, w the angle between a and b.

    White 2016 (1609.04468): latents of many dimensions lie near a sphere, whose inside, through which the
    straight line goes, the generator has hardly seen.  Where the angle is 0 or 180 degrees, or a latent is zero, this
    is `linear`.  Arguments and result are those of `linear`; angles are computed in float64.
    """
    _check_pair(a, b)
    t = _as_factor(t, a).double()
    x, y = (torch.nn.functional.normalize(v.double(), dim=-1) for v in (a, b))
    angle = 2 * torch.atan2((x - y).norm(dim=-1, keepdim=True), (x + y).norm(dim=-1, keepdim=True))
    sine = torch.sin(angle)
    flat = (sine < 1e-6) | (x.norm(dim=-1, keepdim=True) == 0) | (y.norm(dim=-1, keepdim=True) == 0)
    safe = torch.where(flat, 1.0, sine)
    from_a = torch.where(flat, 1 - t, torch.sin((1 - t) * angle) / safe)
    from_b = torch.where(flat, t, torch.sin(t * angle) / safe)
    return (from_a * a + from_b * b).to(a.dtype)


def interpolate(a: Tensor, b: Tensor, steps: int, method: str = "spherical") -> Tensor:
    """Equal steps from a to b, both included: [..., D] twice -> [steps, ..., D].

    Raises:
        ValueError: fewer than 2 steps, another method than those in `METHODS`, or different shapes.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps: expected an integer of at least 2, got {steps!r}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    walk = spherical if method == "spherical" else linear
    return walk(a, b, torch.linspace(0, 1, steps, dtype=torch.float64, device=a.device))


def grid(corners: Tensor, rows: int, columns: int, method: str = "spherical") -> Tensor:
    """A plane between four latents: [4, D] (upper left, upper right, lower left, lower right) -> [rows * columns, D].

    Row by row: the left and the right edge are interpolated, then the rows between them.  Errors as `interpolate`.
    """
    if not isinstance(corners, Tensor) or corners.dim() != 2 or len(corners) != 4:
        shape = list(corners.shape) if isinstance(corners, Tensor) else type(corners).__name__
        raise ValueError(f"corners: expected shape [4, D], got {shape}")
    left, right = interpolate(corners[0], corners[2], rows, method), interpolate(corners[1], corners[3], rows, method)
    return interpolate(left, right, columns, method).transpose(0, 1).flatten(0, 1)


def arithmetic(plus: Sequence[Tensor], minus: Sequence[Tensor] = ()) -> Tensor:
    """Sum of the means of groups of latents, [N_i, D] each, minus those of others: [D].

    Radford et al. 2016 (1511.06434), section 6.3.2: averages of three latents each are stable, single ones are not:
    ``arithmetic(plus=[smiling_women, neutral_men], minus=[neutral_women])``.

    Raises:
        ValueError: no group, an empty one, or different dimensions.
    """
    groups = [*plus, *minus]
    if not groups:
        raise ValueError("plus and minus: expected at least one group of latents, got none")
    for group in groups:
        if not isinstance(group, Tensor) or group.dim() != 2 or len(group) == 0 or group.shape[1] != groups[0].shape[1]:
            shapes = [list(g.shape) if isinstance(g, Tensor) else type(g).__name__ for g in groups]
            raise ValueError(f"plus and minus: expected groups of shape [N, D], N >= 1, got {shapes}")
    return torch.stack([g.mean(0) for g in plus] + [-g.mean(0) for g in minus]).sum(0)


def truncate(z: Tensor, limit: float) -> Tensor:
    """Standard normal latents -> normal latents truncated to -limit..limit, element by element.

    The truncation trick (Brock, Donahue, Simonyan 2019, 1809.11096, section 3.1) draws an element again until it lies
    inside.  This gives the same distribution without drawing: z' = sqrt(2) erfinv(erf(z / sqrt 2) erf(limit / sqrt 2))
    maps the quantiles of one distribution to those of the other, so that a latent moves continuously with the limit.

    Args:
        z: any shape.
        limit: above 0; infinity leaves z as it is.

    Raises:
        ValueError: the limit is not above 0.
    """
    if not limit > 0:
        raise ValueError(f"limit: expected a number above 0, got {limit!r}")
    if limit == math.inf:
        return z
    share = torch.erf(z.double() / math.sqrt(2)) * math.erf(limit / math.sqrt(2))
    return (math.sqrt(2) * torch.erfinv(share)).clamp(-limit, limit).to(z.dtype)


def manifold(rows: int, columns: int) -> Tensor:
    """The plane of two standard normal latents, at equal steps of probability: float32 [rows * columns, 2].

    The inverse of the normal distribution function at the middles of equal shares of (0, 1), as in figure 4 of Kingma &
    Welling 2014 (1312.6114).  Row by row; the first latent grows to the right, the second one upwards.

    Raises:
        ValueError: rows or columns is below 1.
    """
    upwards, rightwards = (quantiles(count) for count in (rows, columns))
    y, x = torch.meshgrid(upwards.flip(0), rightwards, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)


def quantiles(count: int) -> Tensor:
    """Where the standard normal distribution function is (i + 1/2) / count: float32 [count], rising.

    Raises:
        ValueError: the count is below 1.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count: expected an integer of at least 1, got {count!r}")
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()


def traverse(z: Tensor, dimension: int, values: Tensor) -> Tensor:
    """Copies of a latent with one element replaced by each of some values: [D] and [T] -> [T, D].

    Raises:
        ValueError: the latent has no such dimension, or a shape is not as above.
    """
    if z.dim() != 1 or values.dim() != 1:
        raise ValueError(f"z, values: expected shapes [D] and [T], got {list(z.shape)} and {list(values.shape)}")
    if not 0 <= dimension < len(z):
        raise ValueError(f"dimension: expected 0..{len(z) - 1}, got {dimension}")
    walk = z.repeat(len(values), 1)
    walk[:, dimension] = values.to(z)
    return walk


def _check_pair(a: Tensor, b: Tensor) -> None:
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a floating point tensor [..., D], got {found}")
    if a.shape != b.shape:
        raise ValueError(f"a and b: expected one shape [..., D], got {list(a.shape)} and {list(b.shape)}")


def _as_factor(t: float | Tensor, like: Tensor) -> Tensor:
    """[T, 1, ..., 1] that broadcasts against [..., D]; [] for a number."""
    t = torch.as_tensor(t, dtype=like.dtype, device=like.device)
    if t.dim() > 1:
        raise ValueError(f"t: expected a number or a tensor of shape [T], got {list(t.shape)}")
    return t.reshape(t.shape + (1,) * like.dim()) if t.dim() else t
