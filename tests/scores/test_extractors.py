"""The default extractor and its cache, and what extractors are given."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from fastgen import data, scores
from fastgen._files import cache_folder
from fastgen.scores import classify as module


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cache")
    return scores.classifier("digits", cache=folder), folder


def test_the_classifier_knows_digits(digits):
    model, _ = digits
    val = data.load("digits", split="val")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    found = scores.extract(model, val.images, val.levels, batch_size=50)
    assert found.features.shape == (180, module.FEATURES) and found.logits.shape == (180, 10)
    right = float((found.logits.argmax(1) == val.labels).float().mean())
    assert right == pytest.approx(float(model.accuracy)) and right > 0.95


def test_the_size_and_the_levels_of_images_do_not_matter_to_it(digits):
    model, _ = digits
    small = data.load("digits", split="val")
    large = data.load("digits", split="val", size=64, resize=True)
    a, b = (scores.extract(model, x.images, x.levels).logits.argmax(1) for x in (small, large))
    assert float((a == b).float().mean()) > 0.97


def test_it_is_trained_once(digits, monkeypatch):
    model, folder = digits
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained again"))
    again = scores.classifier("digits", cache=folder)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    monkeypatch.setenv("FASTGEN_CACHE", str(folder))
    scores.classifier("digits")


def test_a_spoilt_file_or_other_data_are_trained_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 1)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for labels in (np.arange(40) % 2, np.arange(40) // 20):
        np.savez(tmp_path / "x.npz", images=images, labels=labels)
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        first = scores.classifier(tmp_path / "x.npz", cache=tmp_path / "cache")
        assert torch.equal(torch.rand(1), expected)  # the caller's
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    again = scores.classifier(tmp_path / "x.npz", cache=tmp_path / "cache")
    assert all(map(torch.equal, again.state_dict().values(), first.state_dict().values()))


def test_data_without_labels():
    with pytest.raises(ValueError, match="patches: the data have no labels to train a classifier on"):
        scores.classifier("patches")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fastgen"
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_shifted_images_keep_their_content():
    torch.manual_seed(0)
    images = torch.zeros(9, 2, module.SIZE, module.SIZE, dtype=torch.uint8)
    images[:, :, 10, 20] = 7
    moved = module._shifted(images)
    assert moved.shape == images.shape and moved.dtype == torch.uint8
    y, x = (moved[:, 0] == 7).nonzero()[:, 1:].T
    assert len(y) == 9 and (y - 10).abs().max() <= module.SHIFT and (x - 20).abs().max() <= module.SHIFT
    assert len(set(zip(y.tolist(), x.tolist(), strict=True))) > 3


def test_any_extractor_gets_256_levels_in_batches():
    seen = []

    def extractor(images):
        seen.append(images)
        return images.flatten(1).float(), torch.zeros(len(images), 3)

    levels = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    found = scores.extract(extractor, levels, 5, batch_size=2)
    assert [len(x) for x in seen] == [2, 2, 1]
    assert found.features.flatten().tolist() == [0, 64, 128, 191, 255]
    assert found.logits.shape == (5, 3)
    for bad, error in ((levels.float(), TypeError), (levels[:0], ValueError)):
        with pytest.raises(error, match="images: expected"):
            scores.extract(extractor, bad, 5)


def test_inception_needs_its_weights_and_library(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such file; the weights of Inception v3 are not downloaded"):
        scores.inception(tmp_path / "missing.pth")
    (tmp_path / "some.pth").write_bytes(b"not weights")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(RuntimeError, match=r"pip install 'fastgen\[inception\]'"):
        scores.inception(tmp_path / "some.pth")
