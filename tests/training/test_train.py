"""Training: it learns, keeps the best weights, survives any interruption bit for bit, and stops on NaN."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgen import checkpoint, training
from fastgen.metrics import bits_per_dim
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNpp
from fastgen.training import TrainConfig
from fastgen.training.batches import batch_indices
from fastgen.training.monitor import Log

STEPS = 11  # of 4 per epoch
FILES = ["checkpoint.safetensors", "log.jsonl", "model.safetensors"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dataset(count=22, seed=0):
    """Images of two grey levels per class, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = labels[:, None, None, None] * 2 + torch.randint(2, (count, 1, 4, 3), generator=generator)
    return SimpleNamespace(images=images.to(torch.uint8), labels=labels)


def build(**options):
    torch.manual_seed(0)
    options = {"num_filters": 4, "num_blocks": 2, "kernel_size": 3, "num_classes": 2, **options}
    return GatedPixelCNN(image_shape=(1, 4, 3), levels=4, **options)


def config(**options):
    return TrainConfig(**{"max_steps": STEPS, "batch_size": 5, "learning_rate": 0.02, "validate_every": 3, **options})


def run(out, model=None, resume=False, sample_grid=None, **options):
    model = build() if model is None else model
    return training.train(
        model,
        dataset(),
        dataset(8, 1),
        config(**options),
        out=out,
        resume=resume,
        progress=False,
        sample_grid=sample_grid,
    )


def interrupt(model, path):
    """As a sample grid: Ctrl-C at that step."""
    signal.raise_signal(signal.SIGINT)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(folder, other):
    """The same tensors, bit for bit, in all files, and the same log but for the clock."""
    for name in ("checkpoint.safetensors", "model.safetensors"):
        tensors, metadata = checkpoint.read(folder / name)
        expected, expected_metadata = checkpoint.read(other / name)
        assert tensors.keys() == expected.keys()
        assert [key for key in tensors if not torch.equal(tensors[key], expected[key])] == []
        for key in ("step", "best_bits", "best_step"):
            assert metadata.get("training", {}).get(key) == expected_metadata.get("training", {}).get(key)
    log, expected_log = read_log(folder), read_log(other)
    assert [line["step"] for line in log] == [line["step"] for line in expected_log]
    assert [line["val_bits_per_dim"] for line in log] == [line["val_bits_per_dim"] for line in expected_log]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(folder)
    torch.set_num_threads(threads)
    return folder


def test_it_learns(tmp_path):
    before = bits_per_dim(build(), dataset(8, 1).images, dataset(8, 1).labels)
    result = run(tmp_path, max_steps=80)
    assert before > 1.8
    assert result.bits_per_dim < 1.2  # the noise alone is 1 bit
    assert result.steps == 80
    assert not result.model.training
    validation = [line["val_bits_per_dim"] for line in read_log(tmp_path)]
    assert result.bits_per_dim == min(validation)
    assert bits_per_dim(result.model, dataset(8, 1).images, dataset(8, 1).labels) == result.bits_per_dim


def test_what_is_written(tmp_path):
    pictures = []
    result = run(
        tmp_path / "deep" / "er",
        sample_grid=lambda model, path: pictures.append((model.training, path.name)),
        sample_every=4,
    )
    folder = tmp_path / "deep" / "er"
    assert sorted(os.listdir(folder)) == FILES
    assert pictures == [(False, f"samples-{step:06d}.png") for step in (4, 8, 11)]
    assert [line["step"] for line in read_log(folder)] == [3, 6, 9, 11]
    assert read_log(folder)[0].keys() == {"step", "seconds", "bits_per_dim", "gradient_norm", "val_bits_per_dim"}
    assert result.checkpoint == folder / "checkpoint.safetensors"
    expected = result.model.state_dict()
    for name in ("checkpoint.safetensors", "model.safetensors"):
        loaded = checkpoint.load(folder / name).state_dict()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_a_last_picture_that_fails_costs_no_weights(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, sample_grid=fail, sample_every=100)
    assert checkpoint.read(tmp_path / "checkpoint.safetensors")[1]["training"]["step"] == STEPS
    checkpoint.load(tmp_path / "model.safetensors")


def fail(model, path):
    raise OSError("disk full")


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(None, sample_grid=lambda model, path: pytest.fail("no folder, no picture"), sample_every=1)
    assert result.checkpoint is None
    assert result.steps == STEPS
    assert os.listdir(tmp_path) == []


def overfit(out, resume=False, sample_grid=None):
    """The validation images have other noise: fitting the few training images soon makes them worse."""
    options = config(max_steps=60, learning_rate=0.1, validate_every=5, sample_every=50)
    return training.train(
        build(num_filters=16),
        dataset(5, 2),
        dataset(16, 3),
        options,
        out=out,
        resume=resume,
        progress=False,
        sample_grid=sample_grid,
    )


def test_best_weights_are_kept_when_later_ones_are_worse(tmp_path):
    result = overfit(tmp_path / "whole")
    validation = {line["step"]: line["val_bits_per_dim"] for line in read_log(tmp_path / "whole")}
    assert result.bits_per_dim == validation[result.best_step] == min(validation.values())
    assert validation[60] > result.bits_per_dim + 0.1

    assert result.best_step < 50
    with pytest.raises(KeyboardInterrupt):
        overfit(tmp_path / "parts", sample_grid=interrupt)
    assert overfit(tmp_path / "parts", resume=True).best_step == result.best_step
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_the_last_checkpoint_has_the_best_weights(tmp_path):
    """Those that only the validation at the end has found, too, after a checkpoint of the same step."""
    result = run(tmp_path, max_steps=4, validate_every=3, checkpoint_every=4)
    saved = checkpoint.load(tmp_path / "checkpoint.safetensors").state_dict()
    assert result.best_step == 4
    assert all(torch.equal(saved[name], tensor) for name, tensor in result.model.state_dict().items())


def test_without_validation_the_last_average_is_kept():
    result = training.train(build(), dataset(), None, config(), progress=False)
    assert result.bits_per_dim is None
    assert result.best_step == STEPS


def test_an_unconditional_model_ignores_labels():
    model = PixelCNN(image_shape=(1, 4, 3), levels=4, num_filters=2, num_blocks=1, num_features=4)
    assert training.train(model, dataset(), dataset(8), config(max_steps=2), progress=False).steps == 2


def test_the_callers_random_numbers_are_left_alone():
    model = build()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    run(None, model)
    assert torch.equal(torch.rand(1), expected)


def test_the_seed_orders_the_data():
    results = [run(None, max_steps=3, seed=seed).model.state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert not all(torch.equal(results[0][key], results[2][key]) for key in results[0])


@pytest.mark.parametrize(("count", "batch_size"), [(22, 5), (4, 5), (5, 5), (7, 1)])
def test_batches_of_an_epoch_are_disjoint(count, batch_size):
    per_epoch = max(1, count // batch_size)
    epochs = [
        torch.cat([batch_indices(epoch * per_epoch + i, count, batch_size, seed=3) for i in range(per_epoch)]).tolist()
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == min(count, per_epoch * batch_size)
        assert set(epoch) <= set(range(count))
    assert epochs[0] != epochs[1]


def test_a_limit_in_seconds_ends_the_run():
    result = run(None, max_steps=None, max_seconds=0.3)
    assert 0.3 <= result.seconds < 10
    assert result.steps >= 1


@pytest.mark.parametrize("interrupted_at", [1, 3, 4, 6, 10])  # an epoch has 4 steps, a validation comes every 3
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, uninterrupted, interrupted_at):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, sample_grid=interrupt, sample_every=interrupted_at)
    assert checkpoint.read(tmp_path / "checkpoint.safetensors")[1]["training"]["step"] == interrupted_at
    checkpoint.load(tmp_path / "checkpoint.safetensors")
    result = run(tmp_path, resume=True)
    assert result.steps == STEPS
    assert_same_run(tmp_path, uninterrupted)


def test_a_finished_run_that_is_resumed_writes_no_line_again(tmp_path, uninterrupted):
    for resume in (False, True):
        run(tmp_path, resume=resume)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_a_full_disk_is_named(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*log\.jsonl'"):
        log.write(step=1)


def pixelcnnpp():
    torch.manual_seed(0)
    return PixelCNNpp(image_shape=(1, 4, 3), levels=4, num_filters=2, num_blocks=1, num_mixtures=2, num_classes=2)


def test_a_run_with_dropout_resumes_bitwise(tmp_path):
    for name in ("whole", "parts"):
        model = pixelcnnpp()
        training.initialize(model, dataset(), config())
        if name == "parts":
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / name, model, sample_grid=interrupt, sample_every=4)
            model = pixelcnnpp()  # nobody initialises it again
        run(tmp_path / name, model, resume=name == "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_dropped_labels_are_functions_of_seed_and_step():
    """Of 22 images in batches of 5; the validation has them all."""

    class Spied(GatedPixelCNN):
        def log_prob(self, images, labels=None):
            if self.training:
                seen.append((images[:, 0, 0, 0] // 2, labels))
            return super().log_prob(images, labels)

    def labels_of(share, seed=0):
        seen.clear()
        torch.manual_seed(0)
        model = Spied(image_shape=(1, 4, 3), levels=4, num_filters=2, num_blocks=1, num_classes=3)
        training.train(model, dataset(), None, config(max_steps=40, label_dropout=share, seed=seed), progress=False)
        for of_images, labels in seen:
            assert ((labels == of_images) | (labels == 2)).all()
        return torch.cat([labels for _, labels in seen])

    seen = []
    assert not (labels_of(0.0) == 2).any()
    dropped = labels_of(0.4)
    assert 0.25 < (dropped == 2).float().mean() < 0.55  # of 200
    assert torch.equal(labels_of(0.4), dropped) and not torch.equal(labels_of(0.4, seed=1), dropped)


def test_a_run_with_dropped_labels_resumes_bitwise(tmp_path):
    options = {"label_dropout": 0.4}
    run(tmp_path / "whole", build(num_classes=3), **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", build(num_classes=3), sample_grid=interrupt, sample_every=4, **options)
    with pytest.raises(ValueError, match=r"cannot resume: label_dropout was 0\.4, this run has 0\.0"):
        run(tmp_path / "parts", build(num_classes=3), resume=True)
    run(tmp_path / "parts", build(num_classes=3), resume=True, **options)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_checkpoint_without_a_later_option_resumes(tmp_path):
    run(tmp_path, max_steps=2)
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = checkpoint.read(path)
    del metadata["training"]["config"]["label_dropout"]
    checkpoint.write(path, tensors, metadata)
    assert run(tmp_path, resume=True, max_steps=4).steps == 4


def test_initialisation_is_on_the_batch_of_the_first_step():
    model, expected = pixelcnnpp(), pixelcnnpp()
    data, batch = dataset(), batch_indices(0, 22, config().batch_size, config().seed)
    training.initialize(model, data, config())
    expected.initialize(data.images[batch], data.labels[batch])
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    assert not all(map(torch.equal, model.parameters(), pixelcnnpp().parameters()))


def test_models_without_a_data_dependent_initialisation_are_left_alone():
    model = build()
    training.initialize(model, dataset(), config())
    assert all(map(torch.equal, model.parameters(), build().parameters()))


def test_interrupted_again_and_again(tmp_path, uninterrupted):
    for step in range(1, STEPS):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, sample_grid=interrupt, sample_every=step, resume=step > 1)
    run(tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_resuming_a_finished_run_changes_nothing(tmp_path, uninterrupted):
    run(tmp_path)
    result = run(tmp_path, resume=True)
    assert result.steps == STEPS
    expected = checkpoint.load(uninterrupted / "model.safetensors").state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in result.model.state_dict().items())


def test_channels_last_weights_resume(tmp_path):
    """Moments must come back in the memory layout of their parameters."""

    def channels_last():
        return build().to(memory_format=torch.channels_last)

    for name in ("whole", "parts"):
        if name == "parts":
            with pytest.raises(KeyboardInterrupt):
                run(
                    tmp_path / name,
                    build().to(memory_format=torch.channels_last),
                    sample_grid=interrupt,
                    sample_every=5,
                )
        run(tmp_path / name, build().to(memory_format=torch.channels_last), resume=name == "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
import test_train
from fastgen.training.state import State

def save_and_die(state, path, num_images):
    if state.step == 10:  # the new checkpoint is on the disk under its temporary name only
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    save(state, path, num_images)

save, State.save = State.save, save_and_die
torch.set_num_threads(1)
test_train.run({folder!r}, checkpoint_every=5)
"""


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, uninterrupted):
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert checkpoint.read(tmp_path / "checkpoint.safetensors")[1]["training"]["step"] == 5
    assert [line["step"] for line in read_log(tmp_path)] == [3, 6, 9]
    run(tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_sigterm_saves_and_then_acts(tmp_path):
    path, received = tmp_path / "checkpoint.safetensors", []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(path.exists()))
    try:
        result = run(tmp_path, sample_grid=lambda *_: signal.raise_signal(signal.SIGTERM), sample_every=5)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [True]
    assert result.steps == checkpoint.read(path)[1]["training"]["step"] == 5


def test_handlers_are_put_back_and_a_second_signal_acts_at_once(tmp_path):
    def interrupt_twice(model, path):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal did not act")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, sample_grid=interrupt_twice, sample_every=2)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_training_in_another_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(run(None, max_steps=1)))
    thread.start()
    thread.join()
    assert results[0].steps == 1


@pytest.mark.parametrize("poison", ["weight", "gradient"])
def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path, poison):
    model = build()

    def spoil(average, path):
        if poison == "weight":
            model.output.bias.data[0] = math.nan
        else:
            model.output.bias.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(RuntimeError, match=r"training stopped at step 7 \(last checkpoint: step 6\): .*(nan|inf|NaN)"):
        run(tmp_path, model, sample_grid=spoil, sample_every=7, checkpoint_every=3)
    assert checkpoint.read(tmp_path / "checkpoint.safetensors")[1]["training"]["step"] == 6
    for parameter in checkpoint.load(tmp_path / "checkpoint.safetensors").parameters():
        assert torch.isfinite(parameter).all()
    if poison == "gradient":
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="resume: expected the folder of the run as out, got None"):
        run(None, resume=True)
    with pytest.raises(ValueError, match="resume: there is no checkpoint"):
        run(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(TypeError, match=r"expected one of fastgen\.models"):
        training.train(torch.nn.Linear(1, 1), dataset(), None, config(), out=tmp_path / "new")
    with pytest.raises(ValueError, match="train_data: holds no images"):
        training.train(build(), dataset(0), None, config())
    unlabelled = SimpleNamespace(images=dataset().images, labels=None)
    with pytest.raises(ValueError, match="val_data: the model is conditional on 2 classes, the data have no labels"):
        training.train(build(), dataset(), unlabelled, config())
    with pytest.raises(ValueError, match=r"train_data: expected labels in 0\.\.1, got 0\.\.2"):
        training.train(build(), SimpleNamespace(images=dataset(3).images, labels=torch.arange(3)), None, config())

    with pytest.raises(ValueError, match="label_dropout: the last of 2 classes stands for none, but the data have it"):
        training.train(build(), dataset(), None, config(label_dropout=0.1))
    with pytest.raises(ValueError, match="label_dropout: the model is not conditional on classes"):
        training.train(build(num_classes=None), dataset(), None, config(label_dropout=0.1))

    run(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"checkpoint.safetensors exists; resume that run or choose another folder"):
        run(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="cannot resume: batch_size was 5, this run has 6"):
        run(tmp_path, resume=True, batch_size=6)
    filters, classes = "num_filters was 4, this run has 6", "num_classes was 2, this run has None"
    with pytest.raises(ValueError, match=f"cannot resume: {filters}; {classes}$"):
        run(tmp_path, build(num_filters=6, num_classes=None), resume=True)
    other = PixelCNN(image_shape=(1, 4, 3), levels=4, num_filters=4, num_blocks=1, num_features=4)
    with pytest.raises(ValueError, match=r"cannot resume: the model was gated_pixelcnn, this run has pixelcnn$"):
        run(tmp_path, other, resume=True)
    with pytest.raises(ValueError, match="cannot resume: number of training images was 22, this run has 20"):
        training.train(build(), dataset(20), None, config(), out=tmp_path, resume=True, progress=False)
    (tmp_path / "model.safetensors").replace(tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="holds a model, but no training run to resume"):
        run(tmp_path, resume=True)


def test_limits_and_intervals_may_change_on_resuming(tmp_path):
    run(tmp_path, max_steps=2)
    assert run(tmp_path, resume=True, max_steps=4, validate_every=2).steps == 4
    assert [line["step"] for line in read_log(tmp_path)] == [2, 4]


def test_the_progress_bar_shows_bits_per_dim(capsys):
    training.train(build(), dataset(), dataset(8), config(), progress=True)
    text = capsys.readouterr().err
    assert "100%" in text
    assert f"step {STEPS}" in text
    assert "bits/dim, best validation" in text
