"""PixelCNN++ through the sampler: the images of the naive loop, the parameters of the forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgen.models import PixelCNNpp
from fastgen.sampling import LogisticMixture, Sampler, audit, naive_sample
from fastgen.sampling.executors import Batch
from fastgen.sampling.executors.reference import ReferenceExecutor
from fastgen.sampling.plan import Plan
from tests.instruction_sets import ISAS, chosen
from tests.sampling.parameters import errors, params_of_known

SIZES = [(3, 12, 12), (1, 5, 11), (1, 1, 9), (3, 5, 1)]


def build(image_shape: tuple[int, int, int], **options: int) -> PixelCNNpp:
    """A small model whose weights are all generic, initialised on noise."""
    torch.manual_seed(2)
    options = {"num_filters": 8, "num_blocks": 1, "num_mixtures": 3, **options}
    model = PixelCNNpp(image_shape=image_shape, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    labels = None if model.num_classes is None else torch.arange(8) % model.num_classes
    model.initialize(random_images(model, 8), labels)
    return model


def random_images(model: PixelCNNpp, count: int) -> Tensor:
    return torch.randint(model.levels, (count, *model.image_shape), dtype=torch.uint8)


@pytest.mark.parametrize("image_shape", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_equals_naive_loop(image_shape: tuple[int, int, int]) -> None:
    model = build(image_shape, num_filters=6)
    images = Sampler(model, backend="cpu").sample(3, seed=1)
    assert torch.equal(images, naive_sample(model, 3, seed=1))


def test_labels_known_pixels_and_temperature_equal_naive_loop() -> None:
    model = build((3, 5, 6), num_classes=4)
    mask = torch.rand(3, 5, 6) < 0.4
    options = {"labels": torch.tensor([3, 0, 2]), "known": random_images(model, 3), "mask": mask, "temperature": 0.8}
    images = Sampler(model, backend="cpu").sample(3, seed=2**40, start=7, **options)
    assert torch.equal(images, naive_sample(model, 3, seed=2**40, start=7, **options))


@pytest.mark.parametrize("image_shape", [(3, 17, 23), (1, 64, 64)], ids=lambda s: "x".join(map(str, s)))
def test_audit_of_a_batch(image_shape: tuple[int, int, int]) -> None:
    model = build(image_shape, num_filters=5)
    assert audit(model, Sampler(model, backend="cpu").sample(3, seed=4), seed=4).ok


def test_audit_of_64_images() -> None:
    model = build((3, 8, 8))
    images = Sampler(model, backend="cpu").sample(64, seed=3)
    report = audit(model, images, seed=3)
    assert report.ok and report.elements == 64 * 8 * 8 and report.max_margin < 1e-4


@pytest.mark.parametrize("isa", ISAS)
def test_same_images_on_every_instruction_set(isa: str) -> None:
    model = build((3, 5, 7), num_classes=3, num_filters=20)
    labels = torch.arange(5) % 3
    with chosen(isa):
        images = Sampler(model, backend="cpu").sample(5, labels=labels)
    assert torch.equal(images, naive_sample(model, 5, labels=labels))


def reference_params(plan: Plan, images: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The same by the reference executor, in its precision."""
    seen: list[Tensor] = []

    def draw(head: LogisticMixture, params: Tensor, *_: object) -> Tensor:
        seen.append(params.clone())
        return torch.zeros(len(params), images.shape[1], dtype=head.dtype)

    count, _, height, width = images.shape
    everywhere = torch.ones(count, height, width, dtype=torch.bool)
    monkeypatch.setattr(LogisticMixture, "draw", draw)
    ReferenceExecutor(plan, dtype).sample(Batch(count, seed=0, start=0, known=images, mask=everywhere))
    return torch.stack(seen, dim=2).view(count, -1, height, width)


@pytest.mark.parametrize("isa", ISAS)
def test_parameters_are_those_of_the_forward_pass(isa: str) -> None:
    """Error against float64 at most twice that of PyTorch in float32."""
    model = build((3, 10, 13), num_filters=24)
    images = random_images(model, 3)
    inputs = model.head.encode(images)
    with chosen(isa):
        found = params_of_known(Sampler(model, backend="reference").plan, images)
    with torch.no_grad():
        pytorch = model(inputs)
        truth = model.double()(inputs.double())
    for ours, theirs in zip(errors(found, truth), errors(pytorch, truth), strict=True):
        assert ours <= 2 * theirs


def test_parameters_with_weights_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded are the folded weights and nothing else."""
    model = build((3, 6, 7), num_filters=24)
    images = random_images(model, 3)
    plan = Sampler(model, precision="bf16", backend="reference").plan
    truth = reference_params(plan, images, torch.float64, monkeypatch)
    pytorch = reference_params(plan, images, torch.float32, monkeypatch)
    for ours, theirs in zip(errors(params_of_known(plan, images), truth), errors(pytorch, truth), strict=True):
        assert ours <= 2 * theirs
    exact = reference_params(Sampler(model, backend="reference").plan, images, torch.float64, monkeypatch)
    assert errors(truth, exact)[1] > 100 * errors(pytorch, truth)[1]
