"""The yardstick: one full forward pass of the network for every image element."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastgen.sampling.heads import Head
from fastgen.sampling.request import Condition, make_request
from fastgen.sampling.subject import evaluating, make_subject
from fastgen.sampling.uniforms import image_uniforms


def naive_sample(
    model: nn.Module,
    n: int,
    *,
    image_shape: tuple[int, ...] | None = None,
    head: Head | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    start: int = 0,
    labels: Tensor | int | None = None,
    condition: Condition | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    guidance_scale: float = 1.0,
    null_labels: Tensor | int | None = None,
    null_condition: Condition | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw the images that `Sampler.sample` draws, with one forward pass of the whole batch for each group of colours
    of each pixel.

    Arguments and result are those of `Sampler` and `Sampler.sample`, but for the condition, of which there is no
    example: tensors [n, *shape], or [1, *shape] for all.

    Raises:
        RuntimeError: the network gives NaN.
    """
    subject = make_subject(model, image_shape, head, num_classes)
    request = make_request(
        subject,
        n,
        seed=seed,
        start=start,
        labels=labels,
        condition=condition,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        known=known,
        mask=mask,
        guidance_scale=guidance_scale,
        null_labels=null_labels,
        null_condition=null_condition,
    )
    channels, height, width = subject.image_shape
    n = request.n
    images = torch.zeros(n, *subject.image_shape, dtype=subject.head.dtype, device="cpu")
    if n == 0:
        return images
    head = subject.head.keeping(request.truncation)
    groups = head.groups(channels)
    uniforms = image_uniforms(request.seed, request.start, n, (subject.head.num_uniforms(channels), height, width))
    with evaluating(subject.module), tqdm(total=height, desc="naive loop", unit="row", disable=not progress) as bar:
        for y in range(height):
            for x in range(width):
                for group in groups:
                    params = request.params(subject, images)[:, group.params, y, x].cpu()
                    if params.isnan().any():
                        raise RuntimeError(f"the network gives NaN for row {y}, column {x}")
                    drawn = head.draw(params, uniforms[:, group.uniforms, y, x], request.temperature)
                    if request.known is not None and request.mask is not None:
                        given = request.mask[:, y, x].unsqueeze(1)
                        drawn = torch.where(given, request.known[:, group.colours, y, x], drawn)
                    images[:, group.colours, y, x] = drawn
            bar.update()
    return images
