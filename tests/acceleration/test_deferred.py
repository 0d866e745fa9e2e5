"""Stand-ins for images and for weights of each sample, by themselves."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import nn

from fastgen.acceleration.deferred import plain
from fastgen.acceleration.deferred_images import Images, images
from fastgen.acceleration.scaled_weights import ScaledWeight, own_weight


def one_view(x, draw):
    """A random view, pad or part of a tensor, or of what stands for one."""
    kind, shape = draw.randrange(8), list(x.shape)
    at = draw.randrange(len(shape))
    if kind == 0 and at + 1 < len(shape):
        return x.reshape([*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]])
    if kind == 1:
        return x.permute(draw.sample(range(len(shape)), len(shape)))
    if kind == 2:
        return x.unsqueeze(at)
    if kind == 3:
        divisor = draw.choice([d for d in range(1, shape[at] + 1) if shape[at] % d == 0])
        return x.reshape(*shape[:at], divisor, shape[at] // divisor, *shape[at + 1 :])
    if kind == 4:
        sides = [draw.choice([0, 0, 1, 2]) for _ in range(2 * draw.randrange(1, min(4, len(shape) + 1)))]
        return F.pad(x, sides)
    if kind == 5 and shape[at] > 1:
        index = [slice(None)] * len(shape)
        index[at] = slice(draw.randrange(2), shape[at] - draw.randrange(shape[at] // 2), draw.choice([None, 1, 2]))
        return x[tuple(index)]
    if kind == 6 and shape[at] == 1 and len(shape) > 1:
        return x.squeeze(at)
    return x[None] if kind == 7 else x.transpose(0, at)


@torch.no_grad()
def test_views_of_images():
    torch.manual_seed(0)
    for seed in range(400):
        draw = random.Random(seed)
        x = torch.randn(draw.sample([1, 2, 3, 4, 5], 4))
        x = x.contiguous(memory_format=draw.choice([torch.contiguous_format, torch.channels_last]))
        deferred, expected = images(x), x.contiguous()
        assert type(deferred) is Images
        for _ in range(draw.randrange(1, 7)):
            state = draw.getstate()
            expected = one_view(expected, draw)
            draw.setstate(state)
            deferred = one_view(deferred, draw)
            assert deferred.shape == expected.shape
        assert torch.equal(plain(deferred), expected)


@torch.no_grad()
def test_views_and_scales_of_weights():
    for seed in range(400):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        sizes = draw.sample([1, 2, 3, 4, 5], 4)
        parameter = nn.Parameter(torch.randn([1] * draw.randrange(3) + sizes))
        deferred, expected = own_weight(parameter), parameter
        assert type(deferred) is ScaledWeight
        for _ in range(draw.randrange(1, 7)):
            if draw.random() < 0.5:
                shape = [draw.choice([1, 3 if size == 1 else size]) for size in expected.shape]
                scale = torch.rand(shape[draw.randrange(2) :]) + 0.5
                deferred, expected = draw.choice(
                    [
                        (deferred * scale, expected * scale),
                        (torch.mul(scale, deferred), expected * scale),
                        (deferred / scale, expected / scale),
                        (deferred * 0.5, expected * 0.5),
                    ]
                )
            else:
                state = draw.getstate()
                expected = one_view(expected, draw)
                draw.setstate(state)
                deferred = one_view(deferred, draw)
            assert deferred.shape == expected.shape
        torch.testing.assert_close(plain(deferred), expected.detach(), check_stride=False)
        dims = sorted(draw.sample(range(expected.dim()), draw.randrange(1, expected.dim() + 1)))
        keep = draw.random() < 0.5
        torch.testing.assert_close(
            (deferred * deferred).sum(dims, keepdim=keep), expected.detach().square().sum(dims, keepdim=keep)
        )
