"""Folders of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen import data

rng = np.random.default_rng(0)


def save(path, *shape: int, **options) -> np.ndarray:
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def load(path, **options) -> data.Dataset:
    return data.load(path, **{"split": "all", **options})


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "PNG"])
def test_flat_folder(tmp_path, suffix):
    b, a = save(tmp_path / f"b.{suffix}", 4, 6, 3), save(tmp_path / f"a.{suffix}", 4, 6, 3)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_bytes(b"not an image")
    dataset = load(tmp_path)
    assert dataset.labels is None
    assert torch.equal(dataset.images.permute(0, 2, 3, 1), torch.from_numpy(np.stack([a, b])))


def test_sub_folders_are_classes(tmp_path):
    for name in ("dog/2.png", "dog/1.png", "cat/deep/1.png", "emu/x.png"):
        save(tmp_path / name, 3, 3)
    (tmp_path / "empty").mkdir()
    dataset = load(tmp_path)
    assert dataset.labels.tolist() == [0, 1, 1, 2]
    assert dataset.num_classes == 3
    assert dataset.image_shape == (1, 3, 3)


def test_one_colour_image_makes_all_of_them_colour(tmp_path):
    grey, colour = save(tmp_path / "a.png", 3, 3), save(tmp_path / "b.png", 3, 3, 3)
    images = load(tmp_path).images
    assert torch.equal(images[0], torch.from_numpy(grey).expand(3, 3, 3))
    assert torch.equal(images[1].permute(1, 2, 0), torch.from_numpy(colour))


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, [255]),
        ("LA", (0, 0), [255]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("P", 0, [0, 0, 0]),
        ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
        ("I;16", 0x1234, [0x12]),
    ],
)
def test_modes(tmp_path, mode, value, expected):
    Image.new(mode, (2, 2), value).save(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"))
    assert load(tmp_path).images[0, :, 0, 0].tolist() == expected


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    pixels = save(tmp_path / "a.png", 2, 3, exif=exif)
    assert torch.equal(load(tmp_path).images[0, 0], torch.from_numpy(np.rot90(pixels, -1).copy()))


@pytest.mark.parametrize("size", [4, (4, 4), (6, 3), (9, 20)])
def test_size(tmp_path, size):
    save(tmp_path / "a.png", 8, 16, 3)
    save(tmp_path / "b.png", 5, 5, 3)
    expected = (size, size) if isinstance(size, int) else size
    assert load(tmp_path, size=size).image_shape == (3, *expected)


def test_size_cuts_the_centre(tmp_path):
    pixels = np.zeros((4, 12), np.uint8)
    pixels[:, 4:8] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (load(tmp_path, size=4).images == 200).all()


def test_unequal_sizes(tmp_path):
    save(tmp_path / "a.png", 4, 6)
    save(tmp_path / "b.png", 6, 4)
    with pytest.raises(ValueError, match=r"b\.png: is 6x4 but a\.png is 4x6 \(height x width\); give a size$"):
        load(tmp_path)


def test_mixed_layout(tmp_path):
    save(tmp_path / "a.png", 4, 4)
    save(tmp_path / "cat" / "b.png", 4, 4)
    with pytest.raises(ValueError, match=r"both directly .* and in sub-folders"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x89PNG\r\n\x1a\n"])
@pytest.mark.parametrize("name", ["b.png", "b.jpg", "b.webp", "b.gif"])
def test_unreadable_image(tmp_path, name, content):
    save(tmp_path / "a.png", 4, 4)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not a readable image"):
        load(tmp_path)


def test_truncated_image(tmp_path):
    save(tmp_path / "a.png", 40, 40, 3)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        load(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no images that Pillow can read"):
        load(tmp_path)
