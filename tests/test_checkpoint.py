"""Checkpoint files: round trips, and an error in words for every file that is not one."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastgen import backend, checkpoint, models
from fastgen.sampling import naive_sample
from fastgen.training.run import prepare_folder


def build(name="gated_pixelcnn", **options):
    torch.manual_seed(0)
    options = {"num_filters": 4, "num_blocks": 2, **options}
    return models.get(name)(image_shape=(1, 3, 4), levels=5, **options)


def rewrite(path: Path, metadata: dict | None = None, tensors: dict | None = None) -> Path:
    """The checkpoint of a small model with other metadata or tensors."""
    model = build()
    tensors = dict(model.state_dict()) | (tensors or {})
    description = checkpoint.describe(model) | (metadata or {})
    safetensors.torch.save_file(tensors, path, {"fastgen": json.dumps(description)})
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [("pixelcnn", {"num_features": 7}), ("gated_pixelcnn", {"num_classes": 3}), ("gated_pixelcnn", {"kernel_size": 1})],
    ids=str,
)
def test_round_trip(tmp_path, name, options):
    model = build(name, **options).train()
    checkpoint.save(model, tmp_path / "m.safetensors")
    loaded = checkpoint.load(tmp_path / "m.safetensors")
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_dtype_is_kept_and_no_random_numbers_are_used(tmp_path):
    checkpoint.save(build().double(), str(tmp_path / "m.safetensors"))
    before = torch.get_rng_state()
    loaded = checkpoint.load(str(tmp_path / "m.safetensors"))
    assert torch.equal(torch.get_rng_state(), before)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float64}


def test_loaded_weights_can_be_trained_while_the_file_is_replaced(tmp_path):
    path = tmp_path / "m.safetensors"
    checkpoint.save(build(), path)
    loaded = checkpoint.load(path)
    checkpoint.save(build(), path)
    for parameter in loaded.parameters():
        parameter.data.add_(1.0)
    images = torch.zeros(2, 1, 3, 4, dtype=torch.uint8)
    assert not torch.equal(loaded.log_prob(images), checkpoint.load(path).log_prob(images))


def test_channels_last_weights_can_be_saved(tmp_path):
    model = build().to(memory_format=torch.channels_last)
    checkpoint.save(model, tmp_path / "m.safetensors")
    loaded = checkpoint.load(tmp_path / "m.safetensors").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_sample_from_a_model_or_a_file(tmp_path):
    path = tmp_path / "m.safetensors"
    model = build(num_classes=3).eval()
    checkpoint.save(model, path)
    with backend("reference"):
        images = checkpoint.sample(model, 5, seed=4)
        assert torch.equal(images, naive_sample(model, 5, seed=4, labels=torch.tensor([0, 1, 2, 0, 1])))
        assert torch.equal(checkpoint.sample(path, 3, seed=4, start=2), images[2:])
        ones = checkpoint.sample(path, 2, seed=4, labels=torch.tensor([1, 1]))
        assert torch.equal(ones[1], images[1])
    for name, value in (("n", -1), ("start", 10**20), ("seed", 2**64)):
        with pytest.raises(ValueError, match=f"{name} must be in"):
            checkpoint.sample(model, **{"n": 2, name: value})


def test_a_failed_write_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"cannot write .*m\.safetensors: .*File too large"):
        checkpoint.save(build(num_filters=16), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_unwritable_folders(tmp_path):
    (tmp_path / "m.safetensors").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*m\.safetensors: Is a directory"):
        checkpoint.save(build(), tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_only_registered_models_are_saved(tmp_path):
    class Mine(models.PixelCNN):
        pass

    for model in (torch.nn.Linear(1, 1), Mine(num_filters=1, num_blocks=1)):
        with pytest.raises(TypeError, match=f"expected one of fastgen.models .*, got {type(model).__name__}"):
            checkpoint.save(model, tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


CHANGES = {
    "parametrization": lambda model: torch.nn.utils.parametrizations.weight_norm(model.output),
    "hook": lambda model: torch.nn.utils.spectral_norm(model.output),
    "other layer": lambda model: setattr(model, "output", torch.nn.Conv2d(4, 6, 1)),
    "more": lambda model: model.register_buffer("more", torch.ones(2)),
    "less": lambda model: delattr(model, "output"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_could_not_be_loaded_is_not_saved(tmp_path, change):
    model = build()
    change(model)
    with pytest.raises(ValueError, match=r"model: '(output|more).* is not as in a new GatedPixelCNN .* remove"):
        checkpoint.save(model, tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="model: "):
        prepare_folder(model, tmp_path / "run", resume=False)
    assert os.listdir(tmp_path) == []


def test_truncated_files(tmp_path):
    path = rewrite(tmp_path / "m.safetensors")
    content = path.read_bytes()
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"m.safetensors: not a readable safetensors file: "):
            checkpoint.load(path)


NAN = {"output.bias": torch.full((5,), math.nan)}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is a folder, not a file"),
        (lambda path: path.write_bytes(b"PK\x03\x04 something else"), "not a readable safetensors file"),
        (lambda path: safetensors.torch.save_file({"a": torch.ones(2)}, path), "not a fastgen checkpoint"),
        (lambda path: rewrite(path, {"format": 2}), "expected checkpoint format 1, found .*'format': 2"),
        (lambda path: rewrite(path, {"model": "pixelvae"}), "unknown model 'pixelvae'"),
        (lambda path: rewrite(path, {"config": {"num_filters": -1}}), "num_filters: expected .* got -1"),
        (lambda path: rewrite(path, {"config": {"depth": 1}}), "unexpected keyword argument 'depth'"),
        (lambda path: rewrite(path, {"config": None}), "does not fit"),
        (lambda path: rewrite(path, tensors={"output.bias": torch.ones(6)}), "size mismatch for output.bias"),
        (lambda path: rewrite(path, tensors={"extra": torch.ones(6)}), "extra"),
        (lambda path: rewrite(path, tensors=NAN), "the tensor 'output.bias' holds NaN or infinity"),
    ],
    ids=range(12),
)
def test_unreadable_files(tmp_path, make, text):
    path = tmp_path / "m.safetensors"
    make(path)
    with pytest.raises(ValueError, match=rf"m\.safetensors: (?s:.*){text}"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
def test_foreign_state_dicts(tmp_path, name):
    weights = {"a.weight": torch.randn(2, 3), "a.bias": torch.ones(2)}
    if name.endswith("safetensors"):
        safetensors.torch.save_file(weights, tmp_path / name)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if name == "w.pth" else weights, tmp_path / name)
    loaded = checkpoint.load_state_dict_file(tmp_path / name)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_foreign_files_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Malicious()}, "new.pt")
    Path("old.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    for name in ("new.pt", "old.pt"):
        with pytest.raises(ValueError, match=f"{name}: not a PyTorch file of weights"):
            checkpoint.load_state_dict_file(name)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [({"epoch": 3}, "expected a state dict .* found dict"), ([1.0], "found list"), (torch.ones(1), "found Tensor")],
    ids=str,
)
def test_foreign_files_without_weights(tmp_path, content, text):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=text):
        checkpoint.load_state_dict_file(tmp_path / "w.pt")


@pytest.mark.parametrize(("content", "text"), [(None, "no such file"), (b"", "not a PyTorch file"), (b"junk", "not a")])
def test_unreadable_foreign_files(tmp_path, content, text):
    if content is not None:
        (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=f"w.pt: {text}"):
        checkpoint.load_state_dict_file(tmp_path / "w.pt")
