"""Causal attention through the sampler: it draws what the naive loop draws, or says what it does not understand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.sampling import Categorical, Sampler, UnsupportedModel, audit, naive_sample
from fastgen.sampling.plan import Attention, Plan, Step
from fastgen.sampling.schedule import Stage
from fastgen.sampling.scores import unfused

from .attention_models import MODELS, Arithmetic, Axial, Pooled, PrefixLM, Subpixels
from .attention_networks import CODES, STYLES, WRONG, Case, Prior, alibi, lower, min_gpt, nano_gpt, prior, t5, window
from .networks import LEVELS


def built(case: Case) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A network, what a sampler is told of it, and what a batch of three is given."""
    torch.manual_seed(3)
    network = case.build().eval()
    if next(network.parameters()).dtype == torch.float32:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.6)
    given = {"image_shape": case.shape, "head": case.head, "num_classes": case.num_classes}
    options: dict[str, Any] = {}
    if case.num_classes is not None:
        options["labels"] = torch.arange(3) % case.num_classes
    if case.condition is not None:
        step = torch.arange(3).view(3, *[1] * case.condition.dim())
        floats = case.condition.is_floating_point()
        options["condition"] = case.condition * (1 + step) if floats else (case.condition + step) % 3
    return network, given, options


def sampler_of(case: Case, network: nn.Module, given: dict[str, Any], **options: Any) -> Sampler:
    return Sampler(network, **given, condition=case.condition, **options)


@pytest.mark.parametrize("case", [*STYLES.values(), *MODELS.values()], ids=[*STYLES, *MODELS])
def test_equals_naive_loop(case: Case) -> None:
    network, given, options = built(case)
    expected = naive_sample(network, 3, **given, **options)
    for backend in ("reference", "cpu"):
        assert torch.equal(sampler_of(case, network, given, backend=backend).sample(3, **options), expected)


def test_own_kernel_in_inference_mode() -> None:
    """Where its operator comes out of a composite one."""
    network, given, options = built(STYLES["own_kernel_masked"])
    with torch.inference_mode():
        images = Sampler(network, **given).sample(3, **options)
    assert torch.equal(images, naive_sample(network, 3, **given, **options))


@pytest.mark.parametrize(
    ("name", "mask", "options"),
    [
        ("flash_attention_for_cpu", "attn_mask", ()),
        ("flash_attention", None, ()),
        ("efficient_attention", "attn_bias", (False,)),
        ("cudnn_attention", "attn_bias", (False,)),
        ("fused_attention_overrideable", "attn_bias", ()),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_fused_operators(name: str, mask: str | None, options: tuple) -> None:
    """As other devices have them, too: what they compute, and as many results as they give."""
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    q, k, v = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 6, 3), torch.randn(2, 2, 6, 7)
    bias = torch.randn(2, 1, 5, 6)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if mask is None else bias, is_causal=mask is None, scale=0.4, enable_gqa=True
    )
    by_name = {} if mask is None else {mask: bias}
    positional = [by_name.pop(mask), *options] if mask == "attn_bias" else []
    found, *others = unfused(operator, (q, k, v, *positional), {**by_name, "is_causal": mask is None, "scale": 0.4})
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6) and found.transpose(1, 2).is_contiguous()
    assert len(others) + 1 == len(operator._schema.returns)
    assert unfused(torch.ops.aten.softmax.int, (q, 1), {}) is NotImplemented


@pytest.mark.parametrize(("case", "error", "text"), WRONG.values(), ids=WRONG)
def test_refused(case: Case, error: type[Exception], text: str) -> None:
    network, given, _ = built(case)
    with pytest.raises(error, match=text):
        sampler_of(case, network, given)


def test_tokens_of_colours_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"aten.add.Tensor on tensors that are not shifted"):
        Sampler(Subpixels(), (3, 3, 4), Categorical(LEVELS, input_range=None))


def test_tokens_in_front_that_see_later_ones_are_refused() -> None:
    """It is causal, and not computed in order."""
    case = Case(lambda: PrefixLM(20, LEVELS + 4, 4), condition=torch.randint(3, (4,)))
    network, given, _ = built(case)
    with pytest.raises(UnsupportedModel, match="of positions that do not depend on the image and see later ones"):
        sampler_of(case, network, given)


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (lambda x: x.clamp(max=3), "aten.embedding.default of anything but the levels of the image"),
        (lambda x: x + x, "aten.embedding.default of anything but the levels of the image"),
        (lambda x: x % 3, "aten.remainder.Scalar"),
        (lambda x: 4 * x, "raised IndexError: index out of range"),
        (lambda x: torch.cat([x[:, :1] * 0 + 99, x[:, 1:]], 1), "raised IndexError: index out of range"),
    ],
    ids=["bounded", "added", "remainder", "too large", "no row"],
)
def test_tokens_that_are_refused(token: Callable, text: str) -> None:
    with pytest.raises((UnsupportedModel, ValueError), match=text):
        Sampler(Arithmetic(token), (4, 5), Categorical(LEVELS, input_range=None))


CASES = {
    name: (STYLES | MODELS)[name]
    for name in ("window", "t5", "own_kernel_masked", "rosinality conditional", "prefix gpt", "axial")
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_known_pixels_and_temperature(case: Case) -> None:
    network, given, options = built(case)
    *_, height, width = case.shape
    options |= {"mask": torch.rand(3, height, width) < 0.4, "temperature": 0.7, "seed": 5, "start": 2}
    options["known"] = torch.randint(LEVELS, (3, 1, height, width), dtype=case.head.dtype)
    images = sampler_of(case, network, given).sample(3, **options)
    assert torch.equal(images, naive_sample(network, 3, **given, **options))
    options.pop("known")
    assert audit(network, images, **given, **options).ok


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_batches_and_threads_do_not_matter(case: Case) -> None:
    network, given, options = built(case)
    sampler = sampler_of(case, network, given, backend="cpu")
    expected = sampler.sample(3, **options)
    condition = options.get("condition")
    for i in range(3):
        one = {} if condition is None else {"condition": condition[i]}
        assert torch.equal(sampler.sample(1, start=i, **one), expected[i : i + 1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 3)
    try:
        assert torch.equal(sampler.sample(3, **options), expected)
    finally:
        torch.set_num_threads(threads)


# What becomes of it.


def attentions(plan: Plan) -> list[tuple[Step, Attention]]:
    return [(step, step.attention) for step in plan.steps if step.attention is not None]


def compiled(case: Case) -> Plan:
    network, given, _ = built(case)
    return sampler_of(case, network, given, backend="reference").plan


def test_triangle_has_no_bias() -> None:
    plan = compiled(prior(min_gpt, (4, 5), 2, 3))
    ((step, attention),) = attentions(plan)
    assert step.stage == Stage.PIXEL and (step.lag_y, step.lag_x) == (0, 0)
    assert (attention.heads, attention.depth, attention.width) == (2, 3, 3)
    assert attention.bias is None and attention.scale == pytest.approx(3**-0.5)
    assert attention.spans.tolist() == [[0, p + 1] for p in range(20)]
    assert all(plan.planes[read.plane].rows == 4 for read in (attention.keys, attention.values))
    assert plan.planes[attention.query.plane].rows == 1


def test_holes_are_biases_inside_of_spans() -> None:
    ((_, attention),) = attentions(compiled(prior(window, (4, 5), 2, 3)))
    y, x = torch.arange(20) // 5, torch.arange(20) % 5
    near = ((y[:, None] - y).abs() <= 2) & ((x[:, None] - x).abs() <= 1) & lower(20)
    assert attention.bias is not None and attention.bias.shape == (1, 20, 20)
    assert torch.equal(attention.bias[0] == 0, near) and torch.equal(attention.bias[0] == -torch.inf, ~near)
    begin = torch.maximum(y - 2, torch.zeros(())) * 5 + torch.maximum(x - 1, torch.zeros(()))
    assert attention.spans.tolist() == torch.stack([begin.int(), torch.arange(1, 21)], 1).tolist()


def test_bias_of_each_head() -> None:
    ((_, attention),) = attentions(compiled(prior(alibi, (4, 5), 3, 2)))
    position = torch.arange(20)
    expected = 2.0 ** -torch.arange(1, 4)[:, None, None] * (position - position[:, None])
    assert attention.bias is not None
    assert torch.equal(attention.bias, expected.masked_fill(~lower(20), -torch.inf))


@pytest.mark.parametrize("attend", [nano_gpt, t5], ids=lambda f: f.__name__)
def test_columns_of_an_image_of_another_shape(attend: Callable) -> None:
    """Positions are counted in raster order whatever their number in a row."""
    for size in ((2, 10), (10, 2), (5, 4)):
        ((_, attention),) = attentions(compiled(prior(attend, size, 2, 3)))
        assert attention.spans.tolist() == [[0, p + 1] for p in range(20)]


def test_coarser_keys_above_are_computed_by_rows() -> None:
    plan = compiled(Case(Pooled, (1, 4, 6), Categorical(LEVELS)))
    ((step, attention),) = attentions(plan)
    assert step.stage == Stage.PIXEL
    keys = plan.planes[attention.keys.plane]
    assert keys.stride == (2, 2) and (keys.height, keys.width, keys.rows) == (2, 3, 2)
    assert all(s.stage == Stage.ROW for s in plan.steps if attention.keys.plane in [store.plane for store in s.stores])


class Above(Prior):
    """Positions ask finished rows."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embedding(x.flatten(1)) + self.position)
        asked = self.query(self.position).expand(len(x), -1, -1)
        q, k, v = (t.unflatten(2, (-1, self.depth)).transpose(1, 2) for t in (asked, self.keys(h), self.values(h)))
        row = torch.arange(x[0].numel()) // self.size[1]
        scores = (q @ k.mT).masked_fill(row[:, None] <= row, -torch.inf)
        y = torch.nan_to_num(scores.softmax(-1)) @ v
        return self.out(self.project(y.transpose(1, 2).flatten(2))).transpose(1, 2).unflatten(2, self.size)


def test_attention_to_finished_rows_is_of_the_row_stage() -> None:
    case = Case(lambda: Above(min_gpt, 4, 5), (4, 5))
    network, given, _ = built(case)
    for backend in ("reference", "cpu"):
        sampler = Sampler(network, **given, backend=backend)
        assert torch.equal(sampler.sample(3), naive_sample(network, 3, **given))
        ((step, attention),) = attentions(sampler.plan)
        assert step.stage == Stage.ROW and attention.spans.tolist() == [[0, p // 5 * 5] for p in range(20)]


def test_rows_attend_by_spans() -> None:
    plan = compiled(Case(lambda: Axial(only="row"), (1, 4, 5), Categorical(LEVELS)))
    ((_, attention),) = attentions(plan)
    assert attention.bias is None
    assert attention.spans.tolist() == [[p // 5 * 5, p + 1] for p in range(20)]


def test_planes_in_large_pages() -> None:
    """Constants lie where steps read them."""
    torch.manual_seed(0)
    net, given = Prior(min_gpt, 3, 4).eval(), {"image_shape": (3, 4), "head": CODES}
    count = 2**21 // Sampler(net, **given, backend="cpu").sample_bytes + 1
    sampler = Sampler(net, **given, backend="cpu", max_batch=count)
    assert any(plane.kind == "constant" for plane in sampler.plan.planes)
    assert torch.equal(sampler.sample(count), naive_sample(net, count, **given))
