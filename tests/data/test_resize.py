"""Images of another size than the model's, scaled when that is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastgen import data
from fastgen.data.resize import cover


def test_digits_in_the_size_of_a_model():
    small, large = data.load("digits", split="val"), data.load("digits", split="val", size=32, resize=True)
    assert (large.image_shape, large.levels, large.num_classes) == ((1, 32, 32), 256, 10)
    assert large.images.dtype == torch.uint8
    assert torch.equal(large.labels, small.labels)
    blocks = large.images.float().unflatten(2, (8, 4)).unflatten(4, (8, 4)).mean(dim=(3, 5))
    assert (blocks - small.images * (255 / 16)).abs().mean() < 12  # the same picture
    assert data.load("digits", split="val", size=32, resize=True, levels=4).levels == 4


def test_images_that_have_the_size_are_left_alone():
    plain, asked = data.load("digits", split="val"), data.load("digits", split="val", size=8, resize=True)
    assert torch.equal(plain.images, asked.images) and asked.levels == 17


def test_without_resize_another_size_is_refused():
    with pytest.raises(ValueError, match="only image folders are resized"):
        data.load("digits", size=32)


@pytest.mark.parametrize("size", [(6, 6), (12, 5), (3, 9), (1, 1), (8, 10)], ids=str)
def test_flat_images_stay_flat_and_the_whole_range_is_used(size):
    images = torch.tensor([0, 3, 16], dtype=torch.uint8)[:, None, None, None].expand(3, 2, 8, 10)
    scaled = cover(images, 17, size)
    assert scaled.shape == (3, 2, *size)
    assert [set(image.flatten().tolist()) for image in scaled] == [{0}, {48}, {255}]


def test_the_centre_is_kept():
    """A wide image with a dark left, a bright middle and a dark right: the square shows the middle."""
    image = torch.zeros(1, 1, 6, 18, dtype=torch.uint8)
    image[..., 6:12] = 255
    assert cover(image, 256, (6, 6)).min() > 250
    assert int(cover(image, 256, (12, 12))[..., 2:-2].min()) > 240


def test_arrays(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    loaded = data.load(tmp_path / "x.npy", split="all", size=32, resize=True)
    assert loaded.image_shape == (1, 32, 32) and loaded.levels == 256
