"""The executors of a GPU against each other and against the CPU, on any stream; compute-sanitizer watches, too."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from fastgen import backends
from fastgen.sampling import Sampler, audit

from .test_engine import MODELS, make_model
from .test_guidance import LABELS, NOTHING, labelled

pytestmark = pytest.mark.gpu


def executors() -> list[str]:
    """Those that can run here."""
    names = backends.operations()["sample_plan"]
    return [name for name in ("cuda", "triton") if name in names and backends.unavailable(name) is None]


@pytest.mark.parametrize("other_stream", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_executors_draw_the_same(name: str, other_stream: bool) -> None:
    """Images differ from the CPU's at proven ties only: its log, erf and sums round in other ways."""
    model, labels = make_model(name)
    options = {"seed": 2**63 + 1, "start": 5, "labels": labels}
    drawn = {"cpu": Sampler(model, backend="cpu").sample(6, **options)}
    model.cuda()
    with torch.cuda.stream(torch.cuda.Stream()) if other_stream else contextlib.nullcontext():
        for backend in executors():
            drawn[backend] = Sampler(model, backend=backend).sample(6, **options)
    assert_agree(model, drawn, **options)


@pytest.mark.parametrize("guidance_scale", [2.5, -1.0])
def test_executors_are_guided_alike(guidance_scale: float) -> None:
    model, count = labelled(), len(LABELS)
    options = {"labels": LABELS, "guidance_scale": guidance_scale, "null_labels": NOTHING, "seed": 2}
    drawn = {"cpu": Sampler(model, backend="cpu").sample(count, **options)}
    model.cuda()
    for backend in executors():
        drawn[backend] = Sampler(model, backend=backend).sample(count, **options)
    assert_agree(model, drawn, **options)


def assert_agree(model: nn.Module, drawn: dict[str, Tensor], **options: object) -> None:
    """Images by backend."""
    if len(drawn) == 1:
        pytest.skip("neither the cuda nor the triton executor can run here")
    model.cpu()
    for backend, images in drawn.items():
        for other, expected in drawn.items():
            if not torch.equal(images, expected):
                report = audit(model, images, **options)  # type: ignore[arg-type]
                assert report.ok, f"{backend} and {other}: {report}"
