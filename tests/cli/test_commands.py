"""The commands, run as a user would, on tiny models and data."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastgen
from fastgen import data, models
from fastgen.cli import COMMANDS, main

DIGITS = {"image_shape": (1, 8, 8), "levels": 17, "num_filters": 4, "num_blocks": 2, "kernel_size": 3}
PRIOR = {"image_shape": (1, 2, 2), "levels": 64, "embedding_dim": 3, "num_filters": 4, "num_blocks": 1}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoint(folder: Path, **options: object) -> str:
    torch.manual_seed(0)
    path = folder / "m.safetensors"
    fastgen.save(models.GatedPixelCNN(**{**DIGITS, **options}), path)
    return str(path)


def grey_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for i in range(count):
        Image.new("L", (8, 8), 9 * i).save(folder / f"{i}.png")


@pytest.mark.parametrize(
    "model",
    [
        "gated_pixelcnn --num-blocks 2 --kernel-size 3",
        "image_gpt --num-blocks 1 --num-heads 2",
        "pixelcnnpp --num-blocks 1 --num-mixtures 2",
        "pixelrnn --num-blocks 1 --num-features 4",
        "pixelsnail --num-blocks 1 --num-layers 1 --key-dim 4 --value-dim 6 --num-heads 2",
    ],
    ids=["gated_pixelcnn", "image_gpt", "pixelcnnpp", "pixelrnn", "pixelsnail"],
)
def test_train_then_resume_then_eval_and_sample(model: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = f"train {model} --data digits --num-filters 4 --out run --quiet".split()
    assert main([*train, "--steps", "4", "--batch-size", "8", "--sample-every", "3"]) == 0
    assert {"checkpoint.safetensors", "model.safetensors", "log.jsonl"} <= {p.name for p in Path("run").iterdir()}
    assert list(Path("run").glob("*.png"))
    assert main([*train, "--steps", "6", "--batch-size", "8", "--resume"]) == 0
    assert "bits/dim, validation, at step" in capsys.readouterr().out
    assert main(["eval", "run/model.safetensors", "--data", "digits"]) == 0
    assert "bits/dim on 180 images (val) of digits" in capsys.readouterr().out
    assert main(["sample", "run/model.safetensors", "-n", "5", "-o", "s.png", "--audit", "--quiet"]) == 0
    assert "320 elements, 0 mismatches" in capsys.readouterr().out
    assert Image.open("s.png").format == "PNG"


@pytest.mark.parametrize(
    "model",
    [
        "gan",
        "gan --size 12 --unconditional --loss began",
        "dcgan --num-filters 4 --latent-dim 5",
        "dcgan --num-filters 4 --size 16 --loss wgan-gp",
    ],
)
def test_train_a_generator_then_resume_and_sample(model: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = f"train {model} --data digits --out run --quiet --batch-size 4 --critic-steps 1 --log-every 1".split()
    assert main([*train, "--steps", "2", "--sample-every", "1"]) == 0
    written = {p.name for p in Path("run").iterdir()}
    assert written == {
        *("checkpoint.safetensors", "model.safetensors", "log.jsonl", "curves.png"),
        *("samples-000001.png", "samples-000002.png"),
    }
    assert main([*train, "--steps", "3", "--resume"]) == 0
    assert "3 steps in" in capsys.readouterr().out
    loaded = fastgen.load("run/model.safetensors")
    assert loaded.num_classes == (None if "began" in model else 10)
    assert main(["sample", "run/model.safetensors", "-n", "5", "--start", "2", "-o", "s.npy", "--quiet"]) == 0
    expected = fastgen.sample("run/model.safetensors", 5, start=2)
    assert np.array_equal(np.load("s.npy"), expected.numpy())


def test_the_digits_have_settings_of_their_own(here: Path) -> None:
    train = "train dcgan --data digits --quiet --steps 1 --loss began --out run --loss-options gamma=0.7"
    assert main(train.split()) == 0
    config = fastgen.checkpoint.read("run/checkpoint.safetensors")[1]["training"]["config"]
    assert config["loss_options"] == {"gamma": 0.7, "lambda_k": 0.05}
    assert (config["batch_size"], config["learning_rate"], config["ema_decay"]) == (16, 1e-3, 0.99)
    model = fastgen.load("run/model.safetensors")
    assert model.image_shape == (1, 16, 16) and model.config["num_filters"] == 8
    assert main("train dcgan --data digits --quiet --steps 1 --out plain --batch-size 4".split()) == 0
    model = fastgen.load("plain/model.safetensors")
    assert model.image_shape == (1, 32, 32) and model.config["num_filters"] == 16


@pytest.fixture(scope="module")
def classifier_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that was hardly trained."""
    from fastgen.scores import classify

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "STEPS", 30)
        classify.classifier("digits", cache=folder)
    return folder


def test_score_a_generator_and_a_pixel_model(
    here: Path, classifier_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTGEN_CACHE", str(classifier_cache))
    train = "train dcgan --data digits --num-filters 4 --batch-size 4 --size 16 --steps 2 --scores --quiet --out run"
    assert main(train.split()) == 0
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2 and lines[-1]["frechet_distance"] > 0 and lines[-1]["inception_score"] >= 1
    capsys.readouterr()
    for path in ("run/model.safetensors", checkpoint(here)):
        assert main(["score", path, "--data", "digits", "-n", "40", "--splits", "3", "--quiet"]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [row[0] for row in rows] == ["Frechet", "40", "1617", "against"]
        assert [row[-2] for row in rows[1:3]] == ["±", "±"]
        values = [float(row[-3]) for row in rows[1:3]]
        assert 1 <= values[0] <= 10 and 1 <= values[1] <= 10
        assert float(rows[1][2]) > float(rows[2][3])  # the training images are closer


def test_scores_of_few_images(
    here: Path, classifier_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are as many groups of the jackknife as there can be, where 10 are too many."""
    monkeypatch.setenv("FASTGEN_CACHE", str(classifier_cache))
    command = ["score", checkpoint(here), "--data", "digits", "-n", "4", "--quiet"]
    assert main(command) == main([*command, "--splits", "3"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 8 and rows[:4] == rows[4:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("score m.safetensors --data digits -n 1", "-n: expected at least 3, got 1"),
        ("score m.safetensors --data digits --inception x.pth", "x.pth: no such file"),
        ("score m.safetensors --data patches", "the images of patches are (3, 8, 8), the model's are (1, 8, 8)"),
        ("train pixelcnn --data digits --scores", "pixelcnn has no option --scores"),
        ("train dcgan --data patches --scores --num-filters 4 --size 16", "patches: the data have no labels"),
    ],
)
def test_scores_that_cannot_be(arguments: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(here)
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_train_a_generator_on_a_folder_of_images(here: Path) -> None:
    Path("photos").mkdir()
    for i in range(5):
        Image.new("RGB", (40 + i, 30), (50 * i, 90, 10)).save(f"photos/{i}.png")
    options = "--num-filters 4 --size 16 --steps 1 --batch-size 2 --quiet"
    assert main(f"train dcgan --data photos {options}".split()) == 0
    assert fastgen.load("runs/dcgan-photos/model.safetensors").image_shape == (3, 16, 16)


def test_sample_formats_hold_the_samplers_images(here: Path) -> None:
    path = checkpoint(here, num_classes=10)
    options = ["-n", "6", "--seed", "3", "--start", "4", "--temperature", "0.8", "--quiet"]
    assert main(["sample", path, *options, "-o", "s.npz"]) == 0
    assert main(["sample", path, *options, "--labels", "7", "-o", "s.npy"]) == 0
    sampler = fastgen.Sampler(fastgen.load(path))
    labels = torch.arange(4, 10)
    expected = {"seed": 3, "start": 4, "temperature": 0.8}
    with np.load("s.npz") as saved:
        assert np.array_equal(saved["images"], sampler.sample(6, labels=labels, **expected).numpy())
        assert np.array_equal(saved["labels"], labels.numpy())
    assert np.array_equal(np.load("s.npy"), sampler.sample(6, labels=7, **expected).numpy())


def test_the_likeliest_levels_alone(here: Path) -> None:
    command = ["sample", checkpoint(here), "-n", "20", "--quiet", "--audit", "-o"]
    assert main([*command, "all.npy"]) == main([*command, "some.npy", "--top-k", "9", "--top-p", "0.8"]) == 0
    assert len(np.unique(np.load("some.npy"))) <= len(np.unique(np.load("all.npy")))
    assert not np.array_equal(np.load("some.npy"), np.load("all.npy"))


def test_guidance(here: Path) -> None:
    train = "train gated_pixelcnn --data digits --num-filters 4 --num-blocks 1 --kernel-size 3 --steps 2 --batch-size 8"
    assert main([*train.split(), "--label-dropout", "0.2", "--out", "run", "--quiet"]) == 0
    path = "run/model.safetensors"
    model = fastgen.load(path)
    assert model.num_classes == 11
    sample = ["sample", path, "-n", "12", "--quiet", "--audit", "--guidance-scale", "3", "-o", "s.npz"]
    for arguments, labels, null in [
        ([], torch.arange(12) % 10, 10),
        (["--null-label", "4"], torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 0, 1]), 4),
        (["--labels", "10"], torch.full((12,), 10), 10),
    ]:
        assert main([*sample, *arguments]) == 0
        expected = fastgen.Sampler(model).sample(12, labels=labels, guidance_scale=3.0, null_labels=null)
        with np.load("s.npz") as saved:
            assert np.array_equal(saved["labels"], labels.numpy())
            assert np.array_equal(saved["images"], expected.numpy())


@pytest.mark.parametrize("keep", ["top", "bottom", "left", "right"])
def test_completions_keep_the_given_half(here: Path, keep: str) -> None:
    path = checkpoint(here)
    assert (
        main(["sample", path, "-n", "3", "--known", "digits", "--keep", keep, "-o", "s.npy", "--quiet", "--audit"]) == 0
    )
    images = np.load("s.npy")
    known = fastgen.data.load("digits", split="val").images[:3].numpy()
    half = {"top": np.s_[..., :4, :], "bottom": np.s_[..., 4:, :], "left": np.s_[..., :4], "right": np.s_[..., 4:]}[
        keep
    ]
    assert np.array_equal(images[half], known[half])
    assert not np.array_equal(images, known)


def test_demo(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seconds", "0.5", "--quiet"]) == 0
    out = capsys.readouterr().out
    for name in ("held-out bits/dim", "compiled sampler, 64 digits", "naive loop", "speed-up", "audit", "files"):
        assert name in out
    assert min(Image.open("demo-output/demo.png").size) > 300
    assert fastgen.load("demo-output/digits.safetensors").num_classes == 10


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert len(capsys.readouterr().out) > 200


BAD = [
    ("sample missing.safetensors", "missing.safetensors: no such file"),
    ("sample {m} -o s.jpg", "-o: the file's name must end in .png, .npy, .npz, got 's.jpg'"),
    ("sample {m} -o nowhere/s.png", "-o: there is no folder 'nowhere'"),
    ("sample {m} -o .", "-o: the file's name must end in .png, .npy, .npz, got '.'"),
    ("sample {m} -o folder.png", "-o: 'folder.png' is a folder"),
    ("sample {m} -n -1", "-n must be in 0..2147483647, got -1"),
    ("sample {m} -n 0", "-n: a picture needs at least one sample, got 0"),
    ("sample {m} -n 2147483648 -o s.npy", "-n must be in 0..2147483647, got 2147483648"),
    ("sample {c} -n 2000000000 -o s.npy", "-n: 2000000000 samples take 192 GB, and there are 8 GB"),
    ("sample {m} -n 2000000000 -o s.npy", "-n: 2000000000 samples take 192 GB, and there are 8 GB"),
    ("sample {m} --seed -1", "--seed must be in 0..18446744073709551615, got -1"),
    ("sample {c} --start 99999999999999999999", "--start must be in 0..4611686018427387903, got 99999999999999999999"),
    ("sample {c} --labels 99999999999999999999", "--labels: expected whole numbers"),
    ("sample {c} --labels 99999999999999999999,1", "--labels: expected whole numbers"),
    ("sample {m} --columns 0", "--columns must be in 1.."),
    ("sample {m} --temperature 0", "temperature must be positive"),
    ("sample {m} --labels 3", "the model has no classes"),
    ("sample {m} --labels a", "--labels: expected whole numbers"),
    ("sample {m} --backend tpu", "backend must be one of"),
    ("sample {m} --max-batch 0", "max_batch must be in 1..2147483647, got 0"),
    ("sample {m} --top-k 0", "top_k must be in 1..2147483647, got 0"),
    ("sample {m} --top-p 2", "top_p must be above 0 and at most 1, got 2.0"),
    ("sample {g} --top-k 3", "gan has no option --top-k"),
    ("sample {m} --guidance-scale 2", "--guidance-scale: the model has no classes"),
    ("sample {c} --guidance-scale 2 --null-label 10", "--null-label must be in 0..9, got 10"),
    ("sample {c} --guidance-scale nan", "guidance_scale must be finite, got nan"),
    ("sample {c} --null-label 3", "--null-label: without --guidance-scale nothing leads away from it"),
    ("sample {v} --guidance-scale 2", "conditional_vae has no option --guidance-scale"),
    ("train gated_pixelcnn --data patches --label-dropout 0.1", "--label-dropout: the data have no labels"),
    (
        "train gated_pixelcnn --data digits --label-dropout 1 --quiet",
        "--label-dropout: expected a number of at least 0",
    ),
    ("sample {m} --keep left", "--keep: the half of which images? --known says it"),
    ("sample {v} --known digits --keep left", "conditional_vae has no option --keep"),
    ("sample {v}", "--known: expected a data set, whose validation images (top) are completed"),
    ("score {v} --data digits", "v.safetensors: it completes images, and scores are of samples without a condition"),
    ("latent grid {v}", "v.safetensors: it completes images: fastgen sample CKPT --known DATA"),
    ("sample {m} --known nothing", "neither 'digits', 'patches' nor an existing file"),
    ("sample {broken}", "not a readable safetensors file"),
    ("eval {m} --data nothing", "neither 'digits', 'patches' nor an existing file"),
    ("eval {m} --data patches", "model's are (1, 8, 8)"),
    ("eval {m} --data digits --batch-size 0", "--batch-size must be in 1..2147483647, got 0"),
    ("train gated_pixelcnn --data digits --steps -3 --quiet", "--steps: expected an integer of at least 1, got -3"),
    ("train gated_pixelcnn --data digits --minutes 0 --quiet", "--minutes: expected a number above 0, got 0.0"),
    ("train gated_pixelcnn --data digits --lr nan --quiet", "--lr: expected a number above 0, got nan"),
    (
        "train gated_pixelcnn --data digits --vqvae {q} --batch-size 0",
        "--batch-size: expected an integer of at least 1",
    ),
    ("train vqvae --data digits --clip-norm 0 --quiet", "--clip-norm: expected a number above 0, got 0.0"),
    ("train vae --data digits --kl-warmup 2 --quiet", "--kl-warmup: expected a number of at least 0 and below 1"),
    ("train gan --data digits --loss-options a=1 --quiet", "--loss-options: non-saturating does not take {'a': 1.0}"),
    ("train vae --data digits --out few.npz --quiet", "--out: 'few.npz' is a file, not a folder"),
    ("train vae --data digits --out few.npz/run --quiet", "--out: 'few.npz' is a file, not a folder"),
    ("demo --out few.npz", "--out: 'few.npz' is a file, not a folder"),
    ("demo --seconds 0", "--seconds: expected a number above 0, got 0.0"),
    ("score {m} --data grey --quiet", "grey: scores need 3 training and 3 held-out images at least, got 1 and 1"),
    ("train gated_pixelcnn --data digits --levels 1 --quiet", "levels must be in 2..256"),
    ("train gated_pixelcnn --data digits --kernel-size 2 --quiet", "kernel_size: expected an odd integer"),
    ("train pixelcnn --data digits --kernel-size 3 --quiet", "pixelcnn has no option --kernel-size"),
    ("train pixelcnn --data digits --num-filters 2 --num-blocks 1 --num-features 2 --quiet --resume", "checkpoint"),
    ("train pixelcnnpp --data digits --num-heads 2 --quiet", "pixelcnnpp has no option --num-heads"),
    ("train pixelsnail --data digits --num-heads 3 --quiet", "num_heads: expected a divisor of key_dim=16"),
    ("train pixelcnn --data digits --loss hinge --quiet", "pixelcnn has no option --loss"),
    ("train dcgan --data digits --warmup 0.1 --quiet", "dcgan has no option --warmup"),
    ("train dcgan --data digits --kernel-size 3 --quiet", "dcgan has no option --kernel-size"),
    ("train dcgan --data digits --size 24 --quiet", "expected squares of 16, 32, 64, ... pixels a side, got 24x24"),
    ("train dcgan --data digits --critic-steps 0 --quiet", "--critic-steps: expected an integer of at least 1, got 0"),
    ("sample {g} --temperature 0.5", "gan has no option --temperature: it does not draw pixel by pixel"),
    ("sample {g} --audit", "gan has no option --audit"),
    ("sample {g} -n -1", "n must be in 0.."),
    ("eval {g} --data digits", "g.safetensors: a gan has no likelihood to evaluate"),
    ("score {g} --data digits --splits 0", "--splits must be in 2..179, got 0"),
    ("score {g} --data digits -n 40 --splits 40", "--splits must be in 2..39, got 40"),
    ("score {g} --data digits --seed -1", "--seed must be in"),
    ("latent arithmetic {g} --plus 0,1 --noise nan", "--noise: expected a finite number, got nan"),
    ("latent grid {g} --seed -1", "--seed must be in"),
    ("latent grid {g} -o folder.png", "-o: 'folder.png' is a folder"),
    ("train pixelcnn --data digits --quiet --seed 18446744073709551616", "--seed must be in 0..18446744073709551615"),
    (
        "train vqvae --data digits --downsampling 16 --quiet",
        "expected multiples of downsampling=16, got 8x8",
    ),
    ("train pixelcnn --data digits --vqvae {q} --quiet", "pixelcnn has no option --vqvae: expected gated_pixelcnn"),
    ("train gated_pixelcnn --data digits --vqvae {m} --quiet", "vqvae: expected a models.VQVAE, got a GatedPixelCNN"),
    (
        "train gated_pixelcnn --data digits --vqvae {q} --levels 8 --quiet",
        "--levels: with --vqvae",
    ),
    ("train gated_pixelcnn --data patches --vqvae {q} --quiet", "the images of patches are (3, 8, 8)"),
    ("sample {q}", "q.safetensors: its codes are drawn by a prior: fastgen sample PRIOR --vqvae CKPT"),
    ("sample {m} --vqvae {q}", "model: expected a prior over the 64 codes of the vqvae, [2, 2] an image"),
    ("sample {g} --vqvae {q}", "model: expected a prior over the 64 codes of the vqvae"),
    ("eval {m} --vqvae {q} --data digits", "model: expected a prior over the 64 codes of the vqvae"),
    ("latent grid {q}", "q.safetensors: a vqvae has no latents to walk through"),
    (
        "eval {p} --data grey",
        "grey: expected a file of codes (.npy, .npz): the model draws codes; of images, give the vqvae as well",
    ),
    ("eval {p} --data digits", "digits: expected a file of codes (.npy, .npz): the model draws codes"),
    ("eval {p} --data grey.npy", "grey.npy: expected codes in 0..63, got 200..200: the model draws codes; of images"),
    ("eval {p} --data few.npz", "few.npz: expected codes in 0..63, got 3..3 of 17 levels: the model draws codes"),
    ("sample {p} --known grey -o z.npz", "grey: expected a file of codes"),
    ("train gated_pixelcnn --data grey.npy --codes 64 --quiet", "grey.npy: expected codes in 0..63, got 200..200"),
    ("train gated_pixelcnn --data digits --codes 64 --quiet", "digits: expected a file of codes (.npy, .npz)"),
    ("train gated_pixelcnn --data grey.npy --codes 1 --quiet", "--codes must be in 2..2147483647, got 1"),
    ("train gated_pixelcnn --data grey.npy --codes 256 --levels 8 --quiet", "--levels: with --codes it is that of the"),
    ("train gated_pixelcnn --data digits --codes 64 --vqvae {q}", "--codes: with --vqvae the codes are those of the"),
    ("train pixelcnn --data grey.npy --codes 256 --quiet", "pixelcnn has no option --codes: expected gated_pixelcnn"),
]


@pytest.mark.parametrize(("command", "message"), BAD, ids=[command for command, _ in BAD])
def test_bad_input(
    command: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr, exit code 2, no file written, no image drawn."""
    for work in ("sampling.sampler.Sampler._batch", "models.GAN.render", "scores.classify._train"):
        monkeypatch.setattr(f"fastgen.{work}", lambda *_, **__: pytest.fail("refused too late"))
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2_000_000}.__getitem__)
    paths = {name: str(here / f"{name}.safetensors") for name in ("broken", "g", "c", "q", "v", "p")} | {
        "m": checkpoint(here)
    }
    (here / "folder.png").mkdir()
    fastgen.save(models.GAN(image_shape=(1, 8, 8), levels=17, num_filters=5), paths["g"])
    fastgen.save(models.GatedPixelCNN(**DIGITS, num_classes=10), paths["c"])
    fastgen.save(models.ConditionalVAE(image_shape=(1, 8, 8), levels=17, condition="top", num_filters=4), paths["v"])
    fastgen.save(models.VQVAE(image_shape=(1, 8, 8), levels=17, num_codes=64, num_filters=4), paths["q"])
    fastgen.save(models.GatedPixelCNN(**PRIOR), paths["p"])
    grey_images(here / "grey", 2)
    np.save("grey.npy", np.full((2, 2, 2), 200, np.uint8))
    np.savez("few.npz", images=np.full((2, 2, 2), 3, np.uint8), levels=17)
    Path(paths["broken"]).write_bytes(Path(paths["m"]).read_bytes()[:100])
    before = {*here.rglob("*")}
    assert main(command.format(**paths).split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("fastgen: ") and error.count("\n") == 1
    assert {*here.rglob("*")} == before


def test_folders_that_cannot_be_written_to(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    for command in ("sample m.safetensors", "latent grid m.safetensors"):
        assert main(command.split()) == 2
        assert capsys.readouterr().err == "fastgen: -o: the folder '.' cannot be written to\n"
    for command in ("demo", "train pixelcnn --data digits"):
        assert main([*command.split(), "--out", "a/b"]) == 2
        assert capsys.readouterr().err == "fastgen: --out: the folder '.' cannot be written to\n"


@pytest.mark.parametrize("name", ["s.png", "s.npy", "s.npz"])
def test_samples_on_a_full_disk(
    name: str, here: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(here)
    request.getfixturevalue("full_disk")
    assert main(["sample", path, "-n", "50", "-o", name, "--quiet"]) == 2
    assert capsys.readouterr().err == f"fastgen: cannot write {name}: File too large\n"
    assert [file.name for file in here.iterdir()] == ["m.safetensors"]


def test_training_on_a_full_disk(here: Path, full_disk: None, capsys: pytest.CaptureFixture[str]) -> None:
    train = "train pixelcnn --data digits --num-filters 4 --num-blocks 1 --num-features 4 --steps 1 --quiet --out run"
    assert main(train.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastgen: cannot write run/checkpoint.safetensors: ") and error.count("\n") == 1
    assert [file.name for file in Path("run").iterdir()] == ["log.jsonl"]


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nothing"], [], ["train", "no_model", "--data", "digits"], ["sample"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)


def test_interrupt_exits_with_130(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastgen.checkpoint.read", interrupted)
    assert main(["sample", checkpoint(here)]) == 130
    assert not Path("samples.png").exists()


def test_debug_shows_the_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_DEBUG", "1")
    with pytest.raises(ValueError, match="no such file"):
        main(["sample", "missing.safetensors"])


def test_as_a_module(here: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "fastgen", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"fastgen {fastgen.__version__}"
    done = subprocess.run([sys.executable, "-m", "fastgen", "sample", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "fastgen: x: no such file\n"


@pytest.mark.parametrize(
    ("model", "sample"),
    [
        ("vae --latent-dim 2 --likelihood categorical", ""),
        ("conditional_vae --architecture convolutional --beta 0.5", "--labels 3"),
        ("conditional_vae --condition left", "--known digits"),
    ],
    ids=["vae", "labels", "half"],
)
def test_train_evaluate_and_sample_autoencoders(
    model: str, sample: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = f"train {model} --data digits --num-filters 4 --iwae-samples 3 --out run --quiet".split()
    assert main([*train, "--steps", "4", "--batch-size", "8", "--sample-every", "3"]) == 0
    assert len(list(Path("run").glob("*.png"))) == 2
    assert main([*train, "--steps", "6", "--batch-size", "8", "--resume"]) == 0
    assert "bits/dim, validation, at step" in capsys.readouterr().out
    assert main(["eval", "run/model.safetensors", "--data", "digits"]) == 0
    assert "at most " in capsys.readouterr().out
    assert main(f"sample run/model.safetensors -n 5 -o s.npy --quiet {sample}".split()) == 0
    assert np.load("s.npy").shape == (5, 1, 8, 8)


def test_two_stages(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Codes of images, a prior over the codes, images of drawn codes, and the bound of both."""
    train = "train vqvae --data digits --num-filters 4 --num-codes 7 --latent-dim 3 --lr 0.01 --batch-size 16 --quiet"
    assert main(f"{train} --steps 8 --sample-every 5".split()) == 0
    assert main(f"{train} --steps 9 --resume".split()) == 0
    assert len(list(Path("runs/vqvae-digits").glob("*.png"))) == 3
    stage = "--vqvae runs/vqvae-digits/model.safetensors"
    train = f"train gated_pixelcnn --data digits {stage} --num-filters 4 --num-blocks 1 --batch-size 16 --quiet"
    assert main(f"{train} --steps 4".split()) == 0
    assert "bits/code, validation, at step 4 of 4" in capsys.readouterr().out
    prior = "runs/gated_pixelcnn-digits-codes/model.safetensors"
    assert fastgen.load(prior).config["embedding_dim"] == 3 and fastgen.load(prior).num_classes == 10
    assert main(f"sample {prior} {stage} -n 12 --seed 5 -o s.npy --audit --quiet".split()) == 0
    drawn = fastgen.sample(prior, 12, seed=5, vqvae="runs/vqvae-digits/model.safetensors")
    assert np.array_equal(np.load("s.npy"), drawn.numpy()) and drawn.shape == (12, 1, 8, 8)
    capsys.readouterr()
    assert main(f"eval {prior} {stage} --data digits".split()) == 0
    bits, of_codes = (float(x) for x in re.findall(r"\d+\.\d+", capsys.readouterr().out))
    model, val = fastgen.load("runs/vqvae-digits/model.safetensors"), data.load("digits", split="val")
    with torch.no_grad():
        nats = fastgen.load(prior).log_prob(model.encode(val.images), val.labels)
        expected = -(model.log_likelihood(val.images) + nats).mean() / (64 * math.log(2))
    assert bits == pytest.approx(float(expected), abs=2e-5)
    assert of_codes == pytest.approx(float(-nats.mean()) / (64 * math.log(2)), abs=2e-5)
    assert main(f"sample {prior} {stage} -n 6 --known digits --keep left -o k.npy --quiet".split()) == 0
    codes = model.encode(val.images[:6])
    mask = torch.zeros(2, 2, dtype=torch.bool)
    mask[:, :1] = True
    completed = fastgen.Sampler(fastgen.load(prior)).sample(6, labels=val.labels[:6], known=codes, mask=mask)
    assert np.array_equal(np.load("k.npy"), model.render(completed).numpy())
    fastgen.save(models.VQVAE(**model.config), "other.safetensors")
    capsys.readouterr()
    assert main(f"sample {prior} --vqvae other.safetensors".split()) == 2
    assert "a prior over the codes of another vqvae" in capsys.readouterr().err
    assert main(f"{train} --steps 5 --resume --vqvae other.safetensors".split()) == 2
    assert "cannot resume: fingerprint of the vqvae was " in capsys.readouterr().err
    assert main(f"sample {prior}".split()) == main(f"score {prior} --data digits".split()) == 2
    assert "-o: the samples are codes: give --vqvae" in (error := capsys.readouterr().err) and "score PRIOR" in error
    assert main("eval runs/vqvae-digits/model.safetensors --data digits".split()) == 0
    assert "at most " in capsys.readouterr().out
    assert main("latent reconstruct runs/vqvae-digits/model.safetensors --data digits -n 3 -o r.png".split()) == 0


@pytest.mark.parametrize(
    "command",
    [
        "eval m.safetensors --data grey",
        "eval p.safetensors --vqvae q.safetensors --data grey",
        "sample m.safetensors -n 2 --known grey",
        "latent reconstruct q.safetensors --data grey -n 2",
        "train gated_pixelcnn --vqvae q.safetensors --data grey --num-filters 4 --num-blocks 1 --steps 1",
    ],
)
def test_quiet_commands_show_no_bars(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(here)
    fastgen.save(models.VQVAE(image_shape=(1, 8, 8), levels=17, num_codes=64, num_filters=4), "q.safetensors")
    fastgen.save(models.GatedPixelCNN(**PRIOR), "p.safetensors")
    grey_images(here / "grey", 20)
    assert main([*command.split(), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    if not command.startswith("train"):
        assert main(command.split()) == 0
        assert "reading grey" in capsys.readouterr().err


def test_codes_as_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Maps of codes in a file keep their numbers, of a prior that has no vqvae beside it."""
    torch.manual_seed(0)
    prior = models.GatedPixelCNN(**PRIOR).eval()
    fastgen.save(prior, "p.safetensors")
    assert main("sample p.safetensors -n 20 -o codes.npz --quiet".split()) == 0
    codes = torch.from_numpy(np.load("codes.npz")["images"])
    capsys.readouterr()
    assert main("eval p.safetensors --data codes.npz --split all".split()) == 0
    bits = float(re.findall(r"\d+\.\d+", capsys.readouterr().out)[0])
    assert bits == pytest.approx(fastgen.bits_per_dim(prior, codes), abs=2e-5)
    np.savez("stated.npz", images=codes.numpy(), levels=64)
    for name in ("codes.npz", "stated.npz"):
        known = data.load(name, split="val").images
        assert main(f"sample p.safetensors -n {len(known)} --known {name} -o k.npy --quiet".split()) == 0
        assert np.array_equal(np.load("k.npy")[..., :1, :], known[..., :1, :].numpy())


def test_train_on_codes_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More than have a byte, in a file, with labels."""
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 700, (40, 3, 2)), np.arange(40) % 3
    np.savez("own.npz", codes=codes, labels=labels)
    train = "train gated_pixelcnn --data own.npz --codes 700 --num-filters 4 --num-blocks 1 --embedding-dim 3 --quiet"
    assert main(f"{train} --steps 3 --batch-size 8".split()) == 0
    assert "bits/code, validation" in capsys.readouterr().out
    model = fastgen.load("runs/gated_pixelcnn-own/model.safetensors")
    assert (model.levels, model.image_shape, model.num_classes) == (700, (1, 3, 2), 3)
    path = "runs/gated_pixelcnn-own/model.safetensors"
    assert main(f"eval {path} --data own.npz".split()) == 0
    val = data.load_codes("own.npz", 700, split="val")
    assert len(val) == 4 and (val.images.flatten(1)[:, None] == torch.from_numpy(codes).flatten(1)).all(2).any(1).all()
    bits = float(re.findall(r"\d+\.\d+", capsys.readouterr().out)[0])
    assert bits == pytest.approx(fastgen.bits_per_dim(model, val.images, val.labels), abs=2e-5)
    assert main(f"sample {path} -n 5 -o drawn.npz --quiet".split()) == 0
    assert np.load("drawn.npz")["images"].shape == (5, 1, 3, 2)


def test_a_model_that_is_given_a_half_needs_it_for_sampling(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.ConditionalVAE(image_shape=(1, 8, 8), levels=17, num_filters=4, condition="top")
    fastgen.save(model, "m.safetensors")
    assert main("sample m.safetensors -n 2".split()) == 2
    assert "--known: expected a data set" in capsys.readouterr().err
