"""Data sets in files: read back what was written, refuse what is broken and name it."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from fastgen import data
from fastgen.data.dataset import validation_mask

rng = np.random.default_rng(0)


def levels(*shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def cifar(images: np.ndarray, *labels: np.ndarray) -> bytes:
    return np.concatenate([np.stack(labels, 1).astype(np.uint8), images.reshape(len(images), -1)], 1).tobytes()


def load(path, **options) -> data.Dataset:
    return data.load(str(path), **{"split": "all", **options})


# --- NumPy


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((7, 5, 4), (0, 1, 2)),
        ((7, 5, 4, 3), (0, 3, 1, 2)),
        ((7, 5, 4, 1), (0, 3, 1, 2)),
        ((7, 3, 5, 4), (0, 1, 2, 3)),
        ((7, 1, 5, 4), (0, 1, 2, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_numpy_layouts(tmp_path, shape, axes, suffix):
    images = levels(*shape)
    path = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(path, images)
    else:
        np.savez(path, images=images)
    expected = torch.from_numpy(images.transpose(axes)).reshape(7, -1, 5, 4)
    dataset = load(path)
    assert torch.equal(dataset.images, expected)
    assert (dataset.levels, dataset.labels, dataset.name) == (256, None, str(path))


def test_numpy_labels_follow_their_images(tmp_path):
    images, labels = levels(50, 4, 4), rng.integers(0, 6, 50)
    labels[-1] = 6
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    for split, chosen in (("val", validation_mask(50)), ("train", ~validation_mask(50))):
        dataset = load(tmp_path / "x.npz", split=split)
        assert dataset.num_classes == 7  # of the whole set, whatever the split holds
        assert torch.equal(dataset.labels, torch.from_numpy(labels)[chosen])
        assert torch.equal(dataset.images[:, 0], torch.from_numpy(images)[chosen])


@pytest.mark.parametrize(
    ("stored", "stated", "wanted", "expected", "levels"),
    [
        ([0, 100, 255], None, None, [0, 100, 255], 256),
        ([0, 100, 255], None, 2, [0, 0, 1], 2),
        ([0, 3, 16], None, None, [0, 3, 16], 256),
        ([0, 3, 16], None, 17, [0, 3, 16], 17),  # no value reaches 17: quantised already
        ([0, 3, 16], 17, None, [0, 3, 16], 17),
        ([0, 3, 16], 17, 2, [0, 0, 1], 2),
        ([False, True, True], None, None, [0, 1, 1], 2),
    ],
)
def test_numpy_levels(tmp_path, stored, stated, wanted, expected, levels):
    extra = {} if stated is None else {"levels": stated}
    stored = np.array(stored) if isinstance(stored[0], bool) else np.array(stored, np.int64)
    np.savez(tmp_path / "x.npz", images=stored.reshape(1, 1, 3), **extra)
    dataset = load(tmp_path / "x.npz", levels=wanted)
    assert (dataset.images.flatten().tolist(), dataset.levels) == (expected, levels)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": levels(2, 4, 4)}, "expected an array named 'images', found pictures"),
        ({"images": np.zeros((2, 4, 4), np.float32)}, r"must be integers 0\.\.255, got float32"),
        ({"images": np.full((2, 4, 4), 256)}, r"must lie in 0\.\.255, got 256\.\.256"),
        ({"images": np.full((2, 4, 4), -1, np.int8)}, r"must lie in 0\.\.255, got -1\.\.-1"),
        ({"images": levels(2, 4)}, r"got shape \[2, 4\]"),
        ({"images": levels(2, 4, 4, 2)}, r"got shape \[2, 4, 4, 2\]"),
        ({"images": levels(2, 3, 4, 1)}, "the second axis or the last"),
        ({"images": levels(0, 4, 4)}, "holds no images"),
        ({"images": levels(2, 4, 4), "labels": np.zeros(3, int)}, r"must be 2 integers, got int64 of shape \[3\]"),
        ({"images": levels(2, 4, 4), "labels": np.zeros(2)}, "must be 2 integers, got float64"),
        ({"images": levels(2, 4, 4), "labels": np.array([0, -1])}, "must not be negative, got -1"),
        ({"images": np.full((2, 4, 4), 20), "levels": 17}, "states 17 levels, but holds level 20"),
        ({"images": levels(2, 4, 4), "levels": 1}, r"one integer in 2\.\.256, got 1"),
        ({"images": np.array([object()])}, "not a readable NumPy file"),
    ],
)
def test_bad_numpy(tmp_path, arrays, message):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"x.npz.*{message}"):
        load(path)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x93NUMPY\x01\x00", b"PK\x03\x04 not a zip"])
def test_unreadable_numpy(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*not a readable NumPy file"):
        load(tmp_path / name)


def test_truncated_numpy(tmp_path):
    np.save(tmp_path / "x.npy", levels(10, 4, 4))
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"x\.npy.*not a readable NumPy file"):
        load(tmp_path / "x.npy")


# --- IDX


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("style", ["{}-images-idx3-ubyte", "{}-images.idx3-ubyte"])
def test_idx(tmp_path, packed, style):
    images, labels = levels(12, 6, 5), rng.integers(0, 10, 12, dtype=np.uint8)
    name = style.format("train")
    for file, array in ((name, images), (name.replace("images", "labels").replace("idx3", "idx1"), labels)):
        content = idx(array)
        (tmp_path / (file + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    for spec in (tmp_path / (name + ".gz" * packed), tmp_path):  # the file, or the folder of the distribution
        dataset = load(spec)
        assert torch.equal(dataset.images[:, 0], torch.from_numpy(images))
        assert dataset.labels.tolist() == labels.tolist()
        assert (dataset.image_shape, dataset.levels, dataset.num_classes) == ((1, 6, 5), 256, labels.max() + 1)


def test_idx_without_labels(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(levels(3, 2, 2)))
    assert load(tmp_path / "t10k-images-idx3-ubyte").labels is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated IDX file: 0 bytes"),
        (idx(levels(3, 2, 2))[:15], "truncated IDX file: 15 bytes"),
        (idx(levels(3, 2, 2))[:-1], r"truncated IDX file: shape \[3, 2, 2\] needs 12 bytes, got 11"),
        (idx(levels(3, 2, 2)) + b"x", "too long IDX file"),
        (idx(levels(3, 2, 2), magic=0x0D03), "must be 0x00000803, got 0x00000d03"),
        (idx(levels(20), magic=0x0801), "this is a label file"),
        (idx(levels(0, 2, 2)), "holds no images"),
        (struct.pack(">4I", 0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1), "truncated IDX file"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_bad_idx(tmp_path, content, message, packed):
    path = tmp_path / ("x-images-idx3-ubyte" + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=f"x-images-idx3-ubyte.*{message}"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"not gzip", gzip.compress(idx(levels(3, 20, 20)))[:-20]])
def test_bad_gzip(tmp_path, content):
    (tmp_path / "x-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x-images-idx3-ubyte\.gz: (not a readable gzip|truncated)"):
        load(tmp_path / "x-images-idx3-ubyte.gz")


@pytest.mark.parametrize(
    ("labels", "message"), [(idx(levels(4)), "has 4 labels for the 3 images"), (idx(levels(3))[:-1], "truncated")]
)
def test_bad_idx_labels(tmp_path, labels, message):
    (tmp_path / "x-images-idx3-ubyte").write_bytes(idx(levels(3, 2, 2)))
    (tmp_path / "x-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(ValueError, match=f"x-labels-idx1-ubyte.*{message}"):
        load(tmp_path / "x-images-idx3-ubyte")


# --- CIFAR


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, classes):
    images, labels = levels(9, 3, 32, 32), rng.integers(0, classes, 9)
    coarse = [] if classes == 10 else [rng.integers(0, 20, 9)]
    (tmp_path / "data_batch_1.bin").write_bytes(cifar(images[:4], *(c[:4] for c in coarse), labels[:4]))
    (tmp_path / "data_batch_2.bin").write_bytes(cifar(images[4:], *(c[4:] for c in coarse), labels[4:]))
    (tmp_path / "test_batch.bin").write_bytes(cifar(images[:1], *(c[:1] for c in coarse), labels[:1]))
    (tmp_path / "batches.meta.txt").write_text("airplane\n")
    dataset = load(tmp_path)
    assert torch.equal(dataset.images, torch.from_numpy(images))
    assert dataset.labels.tolist() == labels.tolist()
    assert (dataset.levels, dataset.num_classes) == (256, classes)
    assert len(load(tmp_path / "test_batch.bin")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no images"),
        (bytes(3072), "3072 bytes is a multiple neither of 3073"),
        (bytes(2 * 3073 - 1), "6145 bytes is a multiple neither of 3073"),
        (b"\x0a" + bytes(3072), "label 10 is not below 10"),
        (b"\x00\x64" + bytes(3072), "label 100 is not below 100"),
    ],
)
def test_bad_cifar(tmp_path, content, message):
    (tmp_path / "train.bin").write_bytes(content)
    for spec in (tmp_path, tmp_path / "train.bin"):
        with pytest.raises(ValueError, match=rf"train\.bin.*{message}"):
            load(spec)


def test_cifar_kinds_are_not_mixed(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(3073))
    (tmp_path / "b.bin").write_bytes(bytes(3074))
    with pytest.raises(ValueError, match=r"b\.bin: CIFAR-10 and CIFAR-100 cannot be mixed \(a\.bin"):
        load(tmp_path)


def test_unknown_file(tmp_path):
    (tmp_path / "x.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match=r"x\.csv: unknown kind of data"):
        load(tmp_path / "x.csv")
