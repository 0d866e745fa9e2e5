"""Proof that images are the samples they claim to be, by one parallel forward pass."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fastgen.sampling.heads import Head
from fastgen.sampling.precision import weights_in
from fastgen.sampling.request import Condition, Request, images_of, make_request
from fastgen.sampling.subject import Subject, evaluating, make_subject
from fastgen.sampling.uniforms import image_uniforms

CHUNK_BYTES = 1 << 27  # of parameters, or cumulative probabilities, held at a time


@dataclass(frozen=True)
class AuditReport:
    """What `audit` found.

    elements: image elements checked (given ones are not); pixels, where the head draws the colours of a pixel together.
    mismatches: elements that the model would have drawn differently, beyond a tie.
    ties: elements that differ because the uniform lies so close to a boundary between two levels that the rounding of
    float32 decides.
    max_margin: largest distance, in probability, of a differing element's uniforms from the region of its level.
    """

    elements: int
    mismatches: int
    ties: int
    max_margin: float

    @property
    def ok(self) -> bool:
        return self.mismatches == 0


def audit(
    model: nn.Module,
    images: Tensor,
    *,
    image_shape: tuple[int, ...] | None = None,
    head: Head | None = None,
    num_classes: int | None = None,
    precision: str = "fp32",
    seed: int = 0,
    start: int = 0,
    labels: Tensor | int | None = None,
    condition: Condition | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    mask: Tensor | None = None,
    guidance_scale: float = 1.0,
    null_labels: Tensor | int | None = None,
    null_condition: Condition | None = None,
) -> AuditReport:
    """Check that `images` are samples start, start+1, ... of the sequence of `seed`.

    A network is causal, so one forward pass over finished images gives for every element the distribution that the
    naive loop would have drawn it from.  An element agrees if its uniform draws its level.  One that does not is a tie
    if its margin is within the error of float32, measured on the same images: four times the largest difference between
    the cumulative probabilities of a float32 and a float64 forward pass.

    Args:
        model, image_shape, head, num_classes, precision: as for `Sampler`.
        images: levels [n, C, H, W], as `Sampler.sample` gives them.
        seed, start, labels, temperature, top_k, top_p, guidance_scale, null_labels: as given to `Sampler.sample`.
        condition, null_condition: tensors [n, *shape], or [1, *shape] for all; for models that read some.
        mask: bool [n, H, W] or [H, W]; pixels where it is True were given and are not checked.

    Raises:
        RuntimeError: the network gives NaN for one of these images, so that nothing can be said of it.
        TypeError: an image differs, and the model cannot be copied to find out whether by rounding.
    """
    subject = make_subject(model, image_shape, head, num_classes)
    images = images_of("images", images, subject)
    request = make_request(
        subject,
        len(images),
        seed=seed,
        start=start,
        labels=labels,
        condition=condition,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        known=None if mask is None else images,
        mask=mask,
        guidance_scale=guidance_scale,
        null_labels=null_labels,
        null_condition=null_condition,
    )
    channels, height, width = subject.image_shape
    subject = replace(subject, head=subject.head.keeping(request.truncation))
    head = subject.head
    chunk = max(1, CHUNK_BYTES // (8 * height * width * max(channels * head.levels, head.num_params(channels))))
    found = _Found()
    for first in range(0, len(images), chunk):
        part = slice(first, first + chunk)
        size = (head.num_uniforms(channels), height, width)
        uniforms = image_uniforms(request.seed, request.start + first, len(images[part]), size)
        with weights_in(precision):
            found.add(subject, images[part], uniforms, request, part)
    return AuditReport(found.elements, found.mismatches, found.ties, found.max_margin)


class _Found:
    def __init__(self) -> None:
        self.elements = self.mismatches = self.ties = 0
        self.max_margin = 0.0

    def add(
        self,
        subject: Subject,
        images: Tensor,
        uniforms: Tensor,
        request: Request,
        part: slice,
    ) -> None:
        """Checks a part of the images of a request."""
        params = _params(subject, images, request, part)
        boundaries = subject.head.boundaries(params, images, request.temperature)
        margin = subject.head.margins(boundaries, images, uniforms)
        checked = torch.ones_like(margin, dtype=torch.bool)
        if request.mask is not None:
            checked &= ~request.mask[part].unsqueeze(1)
        if (undefined := margin.isnan() & checked).any():
            sample, _, y, x = undefined.nonzero()[0].tolist()
            raise RuntimeError(f"the network gives NaN for row {y}, column {x} of images[{sample + part.start}]")
        self.elements += int(checked.sum())
        for nearby in request.truncation.nearby():  # levels whose order rounding decides, of which one is kept
            head = subject.head.keeping(nearby)
            other = head.margins(head.boundaries(params, images, request.temperature), images, uniforms)
            self.ties += int(((other <= 0) & (margin > 0) & checked).sum())
            margin = torch.minimum(margin, other)
        differ = (margin > 0) & checked
        suspects = differ.flatten(1).any(1).nonzero()[:, 0]
        if not len(suspects):
            return
        exact = replace(subject, module=_in_float64(subject.module, len(suspects)))
        with _Widening():
            precise = _params(exact, images[suspects], request, part.start + suspects)
            precise = exact.head.boundaries(precise, images[suspects], request.temperature)
        error = float((precise - boundaries[suspects]).abs().max())
        margins = margin[suspects][differ[suspects]]
        ties = int((margins <= 4 * error).sum())
        self.ties += ties
        self.mismatches += len(margins) - ties
        self.max_margin = max(self.max_margin, float(margins.max()))


def _in_float64(module: nn.Module, suspects: int) -> nn.Module:
    try:
        return copy.deepcopy(module).double()
    except Exception as error:  # locks, files: whatever a module may hold
        raise TypeError(
            f"{suspects} images are not what the network draws, and whether only by rounding takes a copy of it in "
            f"float64, which cannot be made: {error}"
        ) from error


class _Widening(TorchDispatchMode):
    """Makes float64 of the float32 tensors that a module's forward creates, and of those that it brings along."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `fastgen.sampling.trace.Tracer`

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        dtypes = {a.dtype for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)}
        if torch.float64 in dtypes and torch.float32 in dtypes and not func._schema.is_mutable:
            args, kwargs = tree_map(_widened, (args, kwargs))
        result = func(*args, **kwargs)
        return result if func._schema.is_mutable else tree_map(_widened, result)


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _params(subject: Subject, images: Tensor, request: Request, samples: slice | Tensor) -> Tensor:
    with evaluating(subject.module):
        return request.params(subject, images, samples).cpu()
