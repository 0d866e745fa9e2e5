"""The data sets inside scikit-learn and the fixed split."""

from __future__ import annotations

import pytest
import torch

from fastgen import data
from fastgen.data.builtin import patch_corners
from fastgen.data.dataset import validation_mask


def test_digits():
    whole = data.load("digits", split="all")
    assert (len(whole), whole.image_shape, whole.levels, whole.num_classes) == (1797, (1, 8, 8), 17, 10)
    assert whole.images.dtype == torch.uint8
    assert whole.labels.dtype == torch.int64
    assert int(whole.images.max()) == 16
    assert whole.labels[:10].tolist() == list(range(10))
    assert whole.images[0, 0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_split_is_a_partition_in_the_order_of_the_data():
    whole, train, val = (data.load("digits", split=split) for split in ("all", "train", "val"))
    held_out = validation_mask(1797)
    assert (len(train), len(val)) == (1617, 180)
    assert torch.equal(whole.images[held_out], val.images)
    assert torch.equal(whole.images[~held_out], train.images)
    assert torch.equal(whole.labels[held_out], val.labels)
    assert torch.equal(whole.labels[~held_out], train.labels)
    assert val.labels.bincount().min() > 5  # every class is held out


def test_split_never_changes():
    """Checkpoints quote held-out bits/dim, so the held-out images may never change."""
    assert validation_mask(40).nonzero().flatten().tolist() == [7, 15, 25, 38]
    assert torch.equal(validation_mask(40), validation_mask(40))


@pytest.mark.parametrize("count", [2, 3, 9, 10, 11, 105, 1000])
def test_split_holds_out_a_tenth(count):
    assert int(validation_mask(count).sum()) == max(1, round(count / 10))


def test_split_of_one_image():
    with pytest.raises(ValueError, match="photos has 1 image; a train/validation split needs at least 2"):
        validation_mask(1, "photos")


@pytest.mark.parametrize("size", [None, 8, 24, (16, 16), 64])
def test_patches(size):
    train, val = data.load("patches", split="train", size=size), data.load("patches", split="val", size=size)
    side = {None: 32, (16, 16): 16}.get(size, size)
    assert train.image_shape == val.image_shape == (3, side, side)
    assert (train.levels, train.labels, train.num_classes) == (256, None, None)
    assert len(train) > 10 * len(val) > 0


@pytest.mark.parametrize(("height", "width", "side"), [(427, 640, 32), (160, 200, 4), (427, 640, 64), (101, 97, 5)])
def test_patches_of_the_splits_share_no_pixel(height, width, side):
    corners, held_out = patch_corners(height, width, side)
    seen = torch.zeros(2, height, width, dtype=torch.bool)
    for (y, x), val in zip(corners.tolist(), held_out.tolist(), strict=True):
        seen[int(val), y : y + side, x : x + side] = True
        assert y + side <= height
        assert x + side <= width
    assert not (seen[0] & seen[1]).any()
    assert seen[0].float().mean() > 0.7
    assert 0.05 < seen[1].float().mean() < 0.12


def test_patches_are_cut_from_the_photographs():
    from sklearn.datasets import load_sample_images

    photos = [torch.from_numpy(photo.copy()) for photo in load_sample_images().images]
    whole = data.load("patches", split="all")
    corners, _ = patch_corners(427, 640, 32)
    for k in (0, 1, 777, len(corners) - 1, len(corners), len(whole) - 1):
        y, x = corners[k % len(corners)].tolist()
        patch = photos[k // len(corners)][y : y + 32, x : x + 32]
        assert torch.equal(whole.images[k].permute(1, 2, 0), patch)


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [(17, 2, [0] * 9 + [1] * 8), (17, 16, [0, 0, *range(1, 16)]), (17, 17, list(range(17))), (4, 3, [0, 0, 1, 2])],
)
def test_requantise_rule(stored, wanted, expected):
    from fastgen.data.dataset import _requantise

    images, levels = _requantise(torch.arange(stored, dtype=torch.uint8).view(1, 1, 1, -1), stored, wanted)
    assert levels == wanted
    assert images.dtype == torch.uint8
    assert images.flatten().tolist() == expected


def test_requantise_keeps_the_upper_bits():
    fine, coarse = data.load("patches", split="val"), data.load("patches", split="val", levels=32)
    assert coarse.levels == 32
    assert torch.equal(coarse.images, fine.images >> 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "test"}, ValueError, "split must be one of train, val, all, got 'test'"),
        ({"levels": 1}, ValueError, "levels must be in 2..256, got 1"),
        ({"levels": 18}, ValueError, "levels must be at most the 17 that are stored, got 18"),
        ({"levels": 2.0}, TypeError, "levels must be an integer, got float"),
        ({"size": 0}, ValueError, "size must be in 1..4096, got 0"),
        ({"size": "8"}, TypeError, "size must be an integer or"),
        ({"size": 9}, ValueError, "size must be that of the images of digits, 8x8, got 9x9"),
        ({"spec": "patches", "size": (8, 9)}, ValueError, "must be square, 4..64 pixels a side, got 8x9"),
        ({"spec": "patches", "size": 65}, ValueError, "must be square, 4..64 pixels a side, got 65x65"),
        ({"spec": "digit"}, ValueError, "'digit' is neither 'digits', 'patches' nor an existing"),
        ({"spec": 3}, TypeError, "spec must be a string or a path, got int"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        data.load(**{"spec": "digits", **arguments})
