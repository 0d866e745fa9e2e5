"""The samplers that `make gpu` measures: of PixelCNN++ at its published size, and of a transformer over codes."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import code_prior
from bench.gpu.place import Check, Place, Row, reason
from bench.harness.case import Case, Provider, Work
from bench.sampling import plain_forward, timed

CHECKED_IMAGES = 4
# Of fastgen's samplers: the name in rows -> precision of weights, of float32 products. The most wanted ones first.
VARIANTS = {"": ("fp32", "highest"), " bf16 weights": ("bf16", "highest"), " tf32": ("fp32", "high")}


class Subject(ABC):
    """A model with random weights, and its samplers of all precisions; `given` is what these are told of it."""

    name: str
    batches: tuple[int, ...]
    given: dict[str, Any]

    def __init__(self, backend: str, place: Place):
        self.backend, self.place = backend, place
        self.given = {}
        torch.manual_seed(0)
        self.model: Any = self.make().eval()
        self.on_cpu = copy.deepcopy(self.model)
        self.model.to(place.device)
        self.samplers: dict[str, tuple[Any, float]] = {}  # by precision: sampler, seconds to make it

    @abstractmethod
    def make(self) -> nn.Module: ...

    @abstractmethod
    def peers(self, batch: int) -> tuple[dict[str, Provider], int]:
        """What people do without fastgen, and the bytes of images that it takes."""

    def why_not(self) -> str | None:
        """Why there is no such executor here; that of the CPU takes models on a GPU, too."""
        import fastgen.sampling.sampler  # registers them

        if self.backend == "cpu":
            return fastgen.backends.unavailable("cpu")
        with fastgen.backend(self.backend):
            return fastgen.backends.reasons("sample_plan", torch.empty(0, device=self.place.device))[self.backend]

    def sampler(self, precision: str) -> tuple[Any, float]:
        import fastgen

        if precision not in self.samplers:
            options = {"backend": self.backend, "max_batch": self.batches[-1], "precision": precision, **self.given}
            self.samplers[precision] = timed(partial(fastgen.Sampler, self.model, **options))
        return self.samplers[precision]

    def build(self, batch: int, variant: str) -> Work:
        providers, bytes = self.peers(batch)
        precision, products = VARIANTS[variant]
        name = f"fastgen {self.backend}{variant}"
        why_not = self.why_not()
        if why_not is not None:
            return Work(providers, 0.0, bytes, {name: why_not})
        try:
            sampler, seconds = self.sampler(precision)
            draw = partial(with_products, products, sampler.sample, batch)
            _, first = timed(draw)
        except Exception as error:  # the peers are measured all the same
            return Work(providers, 0.0, bytes, failed={name: reason(error)})
        extra = {
            "compile_s": seconds,
            "first_call_s": first,
            "workspace_bytes": sampler.sample_bytes * batch,
            "weight_bytes": sampler.weight_bytes,
            "executed_mflop_per_sample": sampler.flops / 1e6,
        }
        providers[name] = Provider(draw, extra=extra)
        return Work(providers, sampler.plan.flops * batch, bytes + sampler.weight_bytes)

    def check(self, precision: str) -> Row:
        """The same images as on the CPU, but for ties; the hash is to be compared with that of other executors."""
        import fastgen

        sampler, _ = self.sampler(precision)
        images = sampler.sample(CHECKED_IMAGES)
        on_cpu = fastgen.Sampler(self.on_cpu, backend="cpu", precision=precision, **self.given)
        expected = on_cpu.sample(CHECKED_IMAGES)
        found = fastgen.audit(self.on_cpu, images, precision=precision, **self.given)
        return {
            "ok": found.ok,
            "backend": self.backend,
            "precision": precision,
            "images": CHECKED_IMAGES,
            "sha256": hashlib.sha256(images.numpy().tobytes()).hexdigest(),
            "images_equal_to_cpu": int((images == expected).flatten(1).all(1).sum()),
            "audit": {"mismatches": found.mismatches, "ties": found.ties, "elements": found.elements},
        }

    def cases(self) -> Iterator[Case | Check]:
        """A case for each sampler, beside the peers, so that a run that is cut off has rows of the first ones."""
        checked = set()
        for variant, (precision, _) in VARIANTS.items():
            for batch in reversed(self.batches):
                name = f"{self.name}, batch {batch}{variant and ','}{variant}"
                yield Case(name, {"batch": batch}, partial(self.build, batch, variant))
            if precision in self.samplers and precision not in checked:
                checked.add(precision)
                yield Check(f"{self.name}, images of {self.backend}, {precision}", partial(self.check, precision))


class Pixels(Subject):
    """PixelCNN++ at its published size, 53,659,080 parameters."""

    name = "PixelCNN++"

    def make(self) -> nn.Module:
        from fastgen import models

        small = {"image_shape": (3, 4, 5), "num_filters": 4, "num_blocks": 1, "num_mixtures": 2}
        self.batches = (1, 3) if self.place.tiny else (1, 256)
        return models.PixelCNNpp(**(small if self.place.tiny else {}))

    def peers(self, batch: int) -> tuple[dict[str, Provider], int]:
        channels, height, width = self.model.image_shape
        images = torch.randint(256, (batch, channels, height, width), dtype=torch.uint8)
        encoded = self.model.head.encode(images).to(self.place.device)
        note = (
            f"extrapolated: the first of {height * width} pixels was drawn, with PyTorch's kernels and PyTorch's "
            "default precision (convolutions in TF32)"
        )
        providers = {
            "naive": Provider(partial(self.naive, batch), True, height * width, note),
            "forward": Provider(partial(plain_forward, self.model, encoded), True, note="scores, draws nothing"),
        }
        return providers, images.numel()

    def naive(self, batch: int) -> None:
        """The first pixel of the loop: a forward pass of the whole batch, and its draw."""
        from fastgen.sampling.subject import make_subject

        subject = make_subject(self.model, None, None, None)
        head = subject.head
        images = torch.zeros(batch, *subject.image_shape, dtype=torch.uint8)
        for group in head.groups(len(images[0])):
            params = subject.head.encode(images).to(self.place.device)
            params = plain_forward(self.model, params)[:, group.params, 0, 0].cpu()
            uniforms = torch.rand(batch, head.num_uniforms(len(images[0])))[:, group.uniforms]
            images[:, group.colours, 0, 0] = head.draw(params, uniforms, 1.0)


class Codes(Subject):
    """The transformer of `bench.code_prior`; its peers draw what they need with PyTorch's random numbers."""

    def make(self) -> nn.Module:
        from fastgen.sampling import Categorical

        ((name, options),) = (code_prior.QUICK_SIZES if self.place.tiny else code_prior.SIZES).items()
        self.name, self.side = f"transformer, {name}", options["side"]
        self.batches = (1, 3) if self.place.tiny else (1, 64)
        self.codes = options["codes"]
        self.given = {"image_shape": (self.side,) * 2, "head": Categorical(self.codes, input_range=None)}
        return code_prior.Prior(**options)

    def peers(self, batch: int) -> tuple[dict[str, Provider], int]:
        images = torch.randint(self.codes, (batch, self.side, self.side)).to(self.place.device)
        note = f"estimate: one forward pass times the {self.side**2} passes of the loop"
        forward = partial(self.on_device, code_prior.forward, images)
        providers = {
            "naive": Provider(forward, True, self.side**2, note),
            "cached": Provider(
                partial(self.on_device, code_prior.cached_loop, batch), True, note="keys and values kept"
            ),
        }
        return providers, images.numel()

    def on_device(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        with torch.device(self.place.device):
            return function(self.model, *arguments)


def with_products(precision: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """`call` with float32 products of a precision, see `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return call(*arguments)
    finally:
        torch.set_float32_matmul_precision(before)


def cases(kind: type[Subject], backend: str, place: Place) -> Iterator[Case | Check]:
    yield from kind(backend, place).cases()
