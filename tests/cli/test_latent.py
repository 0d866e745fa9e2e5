"""`fastgen latent`: pictures of the right size, of the images that the functions give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastgen
from fastgen import images, latent, models
from fastgen.cli import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    fastgen.save(models.GAN(image_shape=(1, 5, 5), latent_dim=4, num_filters=7), "g.safetensors")
    fastgen.save(models.GAN(image_shape=(1, 5, 5), latent_dim=4, num_filters=7, num_classes=3), "c.safetensors")
    return tmp_path


def drawn(command: str) -> np.ndarray:
    assert main(f"latent {command} -o p.png".split()) == 0
    return np.asarray(Image.open("p.png"))


def test_interpolate(here: Path) -> None:
    model = fastgen.load("c.safetensors")
    ends = model.latents(8, seed=3)
    rows = [latent.interpolate(ends[2 * i], ends[2 * i + 1], 5, "linear") for i in range(4)]
    labels = torch.tensor([0, 1, 2, 0]).repeat_interleave(5)
    expected = images.grid(model.render(torch.cat(rows), labels), 256, columns=5)
    assert np.array_equal(drawn("interpolate c.safetensors -n 4 --steps 5 --seed 3 --method linear"), expected)


def test_grid(here: Path) -> None:
    model = fastgen.load("c.safetensors")
    corners = model.latents(10)[[9, 2, 4, 4]]
    expected = images.grid(model.render(latent.grid(corners, 3, 3), 2), 256, columns=3)
    assert np.array_equal(drawn("grid c.safetensors --corners 9,2,4,4 --steps 3 --label 2"), expected)


def test_rows_of_images_and_what_was_made_of_them() -> None:
    above, below = (torch.full((5, 1, 2, 3), level, dtype=torch.uint8) for level in (1, 2))
    black = torch.zeros(1, 1, 2, 3, dtype=torch.uint8)
    rows = [above[:3], below[:3], above[3:], black, below[3:], black]
    expected = images.grid(torch.cat(rows), 4, columns=3)
    assert np.array_equal(images.pairs(above, below, 4, columns=3), expected)
    assert np.array_equal(images.pairs(above, below, 4), images.grid(torch.cat((above, below)), 4, columns=5))
    with pytest.raises(ValueError, match="images must not be empty"):
        images.pairs(above[:0], below[:0], 4)


def test_truncate(here: Path) -> None:
    model = fastgen.load("g.safetensors")
    z = model.latents(6)
    expected = images.grid(model.render(torch.cat((latent.truncate(z, 0.5), z))), 256, columns=6)
    assert np.array_equal(drawn("truncate g.safetensors -n 6 --limits 0.5,inf"), expected)


def test_truncated_samples_keep_their_classes(here: Path) -> None:
    model = fastgen.load("c.safetensors")
    expected = images.grid(model.render(model.latents(4).repeat(2, 1), torch.arange(4).repeat(2) % 3), 256, columns=4)
    assert np.array_equal(drawn("truncate c.safetensors -n 4 --limits inf,inf"), expected)


def test_arithmetic(here: Path) -> None:
    command = "arithmetic g.safetensors --plus 0,1,2 --minus 3 --plus 4,5"
    picture = drawn(command)
    assert min(picture.shape[:2]) > 100 and picture.shape[2] == 3
    assert np.array_equal(picture, drawn(command))
    assert not np.array_equal(picture, drawn(command + " --noise 3"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("grid g.safetensors --corners 0,1,2", "--corners: expected 4 numbers, got '0,1,2'"),
        ("grid g.safetensors --corners 0,1,2,x", "--corners: expected whole numbers separated by commas"),
        ("grid g.safetensors --corners 0,1,2,-3", "start must be in 0"),
        ("grid g.safetensors --label 1", "labels were given, but the model has no classes"),
        ("grid c.safetensors --label 3", "labels must be in 0..2, got 3"),
        ("grid g.safetensors --steps 1", "steps: expected an integer of at least 2, got 1"),
        ("interpolate g.safetensors -n 0", "-n: expected at least 1, got 0"),
        ("interpolate g.safetensors -o p.jpg", "-o: the file's name must end in .png, got 'p.jpg'"),
        ("interpolate g.safetensors -o no/p.png", "-o: there is no folder 'no'"),
        ("interpolate a.safetensors", "a.safetensors: a pixelcnn has no latents to walk through"),
        ("arithmetic g.safetensors", "expected at least one group"),
        ("truncate g.safetensors --limits 0", "limit: expected a number above 0, got 0.0"),
        ("truncate g.safetensors --limits a", "--limits: expected numbers separated by commas, got 'a'"),
    ],
)
def test_bad_input(command: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fastgen.save(models.PixelCNN(image_shape=(1, 4, 4), num_filters=2, num_blocks=1, num_features=2), "a.safetensors")
    before = set(here.iterdir())
    assert main(["latent", *command.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert set(here.iterdir()) == before


@pytest.fixture
def vae(here: Path) -> models.VAE:
    torch.manual_seed(0)
    model = models.VAE(image_shape=(1, 8, 8), levels=17, latent_dim=3, num_filters=7).eval()
    fastgen.save(model, "v.safetensors")
    return model


def test_manifold(vae: models.VAE) -> None:
    z = torch.zeros(16, 3)
    z[:, 2], z[:, 0] = latent.manifold(4, 4).unbind(1)
    expected = images.grid(vae.render(z), 17, columns=4)
    assert np.array_equal(drawn("manifold v.safetensors --steps 4 --dimensions 2,0"), expected)


def test_traverse(vae: models.VAE) -> None:
    z = vae.latents(1, seed=2, start=5)[0]
    rows = [latent.traverse(z, i, latent.quantiles(3)) for i in (1, 0)]
    expected = images.grid(vae.render(torch.cat(rows)), 17, columns=3)
    command = "traverse v.safetensors --steps 3 --dimensions 1,0 --sample 5 --seed 2"
    assert np.array_equal(drawn(command), expected)
    assert drawn("traverse v.safetensors --steps 3").shape == (3 * 66 - 2, 3 * 66 - 2, 3)


def test_reconstruct(vae: models.VAE) -> None:
    originals = fastgen.data.load("digits", split="val").images[:13]
    again = vae.reconstruct(originals)
    picture = drawn("reconstruct v.safetensors --data digits -n 13")
    assert picture.shape == (4 * 66 - 2, 10 * 66 - 2, 3)
    assert np.array_equal(picture[:64], images.grid(originals[:10], 17, columns=10))
    assert np.array_equal(picture[198:, :196], images.grid(again[10:], 17, columns=10)[:, :196])
    assert np.array_equal(drawn("reconstruct v.safetensors --data digits -n 3")[66:], images.grid(again[:3], 17, 3))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("manifold v.safetensors --dimensions 0,3", "--dimensions: expected 2 of 0..2, got '0,3'"),
        ("manifold v.safetensors --dimensions 1", "--dimensions: expected 2 of 0..2"),
        ("manifold v.safetensors --steps 0", "--steps: expected at least 1"),
        ("reconstruct g.safetensors --data digits", "a gan has no encoder"),
    ],
)
def test_errors_of_the_pictures_of_autoencoders(
    vae: models.VAE, command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"latent {command} -o p.png".split()) == 2
    assert message in capsys.readouterr().err
