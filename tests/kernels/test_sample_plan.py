"""The Triton executor draws what the C++ executor draws: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastgen import backends, models
from fastgen.kernels import sample_plan
from fastgen.nn import MaskedConv2d
from fastgen.sampling import Bernoulli, Categorical, LogisticMixture, Sampler, audit
from fastgen.sampling.executors import Batch
from fastgen.sampling.executors import triton as executor
from fastgen.sampling.executors.cpu import CpuExecutor
from fastgen.sampling.plan import (
    PRIMITIVES,
    UNARY,
    Attention,
    Draw,
    Instr,
    Plan,
    Plane,
    Read,
    Step,
    Store,
    apply,
)
from fastgen.sampling.request import make_request
from fastgen.sampling.schedule import Stage
from fastgen.sampling.truncation import make_truncation
from fastgen.sampling.uniforms import image_uniforms
from tests.sampling import networks, test_levels, test_recurrent

from . import attending
from .conftest import INTERPRETED

LARGE = 2**64 - 5, 2**33 + 7  # a seed and a start that need all their bits


def gated() -> nn.Module:
    return models.GatedPixelCNN(image_shape=(1, 2, 3), levels=5, num_filters=4, num_blocks=1, num_classes=3)


def narrow() -> nn.Module:
    return models.GatedPixelCNN(image_shape=(1, 2, 1), levels=5, num_filters=8, num_blocks=1, num_classes=3)


def binary() -> nn.Module:
    return models.PixelCNN(
        image_shape=(1, 2, 3), levels=2, head="bernoulli", num_filters=4, num_blocks=1, num_features=4
    )


def colours() -> nn.Module:
    return models.PixelCNN(image_shape=(3, 1, 2), levels=5, num_filters=6, num_blocks=1, num_features=6)


def wide() -> nn.Module:
    """Channels in fours; taps of several blocks, steps of several tiles."""
    return models.PixelCNN(image_shape=(1, 1, 2), levels=20, num_filters=36, num_blocks=1, num_features=36)


def mixture() -> nn.Module:
    model = models.PixelCNNpp(image_shape=(3, 2, 2), num_filters=5, num_blocks=1, num_mixtures=3)
    model.initialize(torch.randint(256, (4, 3, 2, 2), dtype=torch.uint8))
    return model


def recurrent() -> nn.Module:
    return models.PixelRNN(image_shape=(1, 3, 3), levels=5, num_filters=4, num_blocks=1, num_features=4)


def make(build: Callable[[], nn.Module]) -> nn.Module:
    """With weights large enough that mistakes show."""
    torch.manual_seed(3)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def sampler(model: nn.Module, device: str, **given: Any) -> Sampler:
    return Sampler(model if device == "cpu" else copy.deepcopy(model).to(device), backend="triton", **given)


def assert_same(triton_sampler: Sampler, model: nn.Module, given: dict[str, Any], n: int, **options: Any) -> Tensor:
    """It draws what the CPU draws, but for proven ties: sums and elementary functions round in other ways. Images are
    so small that many mistakes change none of them, so the last row's parameters are compared, too.
    """
    images = triton_sampler.sample(n, **options)
    last_row = parameters_of_last_row(triton_sampler, n)
    on_cpu = Sampler(model, backend="cpu", **given)
    expected = on_cpu.sample(n, **options)
    assert len(expected.unique()) > 1
    if not torch.equal(images, expected):
        report = audit(model, images, **given, **{k: v for k, v in options.items() if k != "known"})
        assert report.ok, report
    everything = torch.ones(images.shape[2:], dtype=torch.bool)
    request = make_request(on_cpu._subject, n, **{**options, "known": images, "mask": everything})
    params = torch.empty(n, on_cpu.plan.head.num_params(images.shape[1]), *images.shape[2:])
    on_cpu._executor.sample(on_cpu._batch(request, slice(0, n), tqdm(disable=True)), params)
    torch.testing.assert_close(last_row, params[:, :, -1], rtol=1e-5, atol=1e-5 * params.abs().max().item())
    return images


def parameters_of_last_row(triton_sampler: Sampler, n: int) -> Tensor:
    """[n, parameters, W]: what the pixels of the batch's last row were drawn from."""
    plan = triton_sampler.plan
    result = []
    for draw in plan.draws:
        plane = plan.planes[draw.plane]
        values = plane_of(triton_sampler._executor, draw.plane, n)
        row = values[(plane.height - 1) % plane.rows, :, :, draw.channel : draw.channel + draw.count]
        result.append(row.permute(1, 2, 0))
    return torch.cat(result, dim=1)


def plane_of(of: executor.TritonExecutor, index: int, n: int) -> Tensor:
    """[rows, W, n, channels] in a batch of n."""
    plane = of.plan.planes[index]
    shape = (plane.rows, plane.width, n, -(-plane.channels // 4) * 4)
    values = of.space(n, "ieee").planes[of._tables.offsets[index] * n :][: math.prod(shape)]
    return values.view(shape)[..., : plane.channels].cpu()


@pytest.mark.parametrize("build", [gated, binary, colours, wide, mixture, recurrent], ids=lambda f: f.__name__)
def test_models_equal_the_cpu(build, device):
    model = make(build)
    options = {"seed": LARGE[0], "start": LARGE[1]}
    if model.num_classes is not None:
        options["labels"] = torch.tensor([2, 0, 1])
    assert_same(sampler(model, device), model, {}, 3, **options)


def attention(name: str, size: tuple[int, int]) -> tuple[nn.Module, dict[str, Any]]:
    """A network and what its sampler is given."""
    half = (size[0] + 1) // 2, (size[1] + 1) // 2
    build: dict[str, Callable[[], nn.Module]] = {
        "PixelSNAIL": lambda: attending.Attending(attending.earlier, size, heads=2, depth=3, width=5),
        "transformer": lambda: attending.Tokens(size, heads=2, depth=5, width=3),
        "relative positions": lambda: attending.Attending(attending.at_a_distance, size, heads=2, depth=4, width=4),
        "capped": lambda: attending.Attending(attending.capped, size, heads=2, depth=3, width=4),
        "mixed": lambda: attending.Attending(attending.mixed, size, heads=2, depth=3, width=4),
        "rows": lambda: attending.Above(attending.rows_above, size, heads=3, depth=2, width=1),
        "stride of two": lambda: attending.Halved(attending.rows_above, half, heads=1, depth=4, width=4),
    }
    shape, head = (1, *size), Categorical(attending.LEVELS)
    if name == "transformer":
        shape, head = size, Categorical(attending.LEVELS, input_range=None)
    return make(build[name]), {"image_shape": shape, "head": head}


ATTENTION = ["PixelSNAIL", "transformer", "relative positions", "capped", "mixed", "rows", "stride of two"]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_equals_the_cpu(name, device):
    """Of more keys than are read at once."""
    network, given = attention(name, (6, 3) if name == "stride of two" else (3, 4))
    attends = sampler(network, device, **given)
    (step,) = (s for s in attends.plan.steps if s.attention is not None)
    assert step.stage == (Stage.ROW if name in ("rows", "stride of two") else Stage.PIXEL)
    assert_same(attends, network, given, 2, seed=1)


@pytest.mark.parametrize("name", ["PixelSNAIL", "rows"])
def test_attention_in_other_batches_changes_no_bit(name, device):
    network, given = attention(name, (3, 3))
    whole = sampler(network, device, **given)
    images = whole.sample(2, seed=4)
    parameters = parameters_of_last_row(whole, 2)
    alone = sampler(network, device, **given)
    assert torch.equal(alone.sample(1, seed=4, start=1), images[1:])
    assert torch.equal(parameters_of_last_row(alone, 1), parameters[1:])


def attending_step(
    heads: int, depth: int, width: int, biased: bool, stage: Stage, cap: float, softmax: bool, added: bool
) -> Plan:
    """A plan of one step at image rows that are odd, added to what it reads elsewhere; keys lie in a plane of another
    size, together with their values and what is added to their scores. Some positions see no key.
    """
    height, columns, channels, skipped = 3, 2, heads * width, 4 - heads * depth % 4
    before = skipped + height * columns  # what is added for each position
    sizes = [(heads * depth + 1, height, columns), (before + heads * (depth + width), 5, 4), (channels, 1, 1)]
    planes = [Plane("given", "condition", *size, rows=size[1]) for size in sizes]
    planes.append(Plane("result", "cache", channels + 1, height, columns, stride=(2, 1), rows=height))
    positions, num_keys = height * columns, 5 * 4
    spans = torch.randint(num_keys + 1, (positions, 2), dtype=torch.int32).sort(1).values
    spans[0], spans[1] = torch.tensor([0, num_keys]), torch.tensor([7, 7])
    bias = torch.randn(heads, positions, num_keys)
    if softmax:
        bias[torch.rand(bias.shape) < 0.3] = -math.inf
        bias[0, 0] = -math.inf
    of = Attention(
        heads, depth, width, 0.7, Read(0, 0, 0, 1), Read(1, 0, 0, before), Read(1, 0, 0, before + heads * depth),
        spans, bias if biased else None, Read(1, 0, 0, skipped - 1) if added else None, added == "each query", cap,
        softmax,
    )  # fmt: skip
    program = (Instr("acc", 0), Instr("load", read=Read(2, 0, 0, 0)), Instr("add", 0, 1))
    step = Step("", stage, -1, 0, 0, channels, program, (Store(3, 1, 2),), groups=1, attention=of)
    image = (1, 2 * height - 1, columns)
    return Plan(image, Categorical(2), planes, [step], [Draw(3, 0, 2)], [], [0, 1, 2])


def attended(plan: Plan, conditions: list[Tensor]) -> Tensor:
    """[N, heads * width, h, w], as the plan defines it."""
    step = plan.steps[0]
    of = step.attention
    query, keys, values = (
        conditions[r.plane][:, r.channel : r.channel + count].flatten(2).unflatten(1, (of.heads, -1))
        for r, count in of.reads()[:3]
    )
    scores = of.scale * torch.einsum("nhdp,nhds->nhps", query, keys)
    scores = of.cap * torch.tanh(scores / of.cap) if of.cap else scores
    scores = scores if of.bias is None else scores + of.bias
    if of.of_keys is not None:
        count = len(of.spans) if of.each_query else 1
        scores = scores + conditions[1][:, of.of_keys.channel :][:, :count].flatten(2)[:, None]
    s = torch.arange(scores.shape[3])
    scores.masked_fill_((s < of.spans[:, :1]) | (s >= of.spans[:, 1:]), -math.inf if of.softmax else 0)
    weights = torch.ops.aten._safe_softmax(scores, 3) if of.softmax else scores
    result = torch.einsum("nhps,nhcs->nhcp", weights, values).flatten(1, 2)
    return result.unflatten(2, conditions[0].shape[2:]) + conditions[2]


@pytest.mark.parametrize(
    ("heads", "depth", "width", "biased", "stage", "cap", "softmax", "added"),
    [
        (2, 3, 5, True, Stage.PIXEL, 0.0, True, False),
        (1, 8, 8, False, Stage.PIXEL, 0.0, True, True),
        (3, 4, 4, True, Stage.ROW, 0.0, True, True),
        (3, 4, 4, True, Stage.ROW, 0.0, True, "each query"),
        (2, 3, 5, False, Stage.PIXEL, 0.0, True, "each query"),
        (2, 1, 2, False, Stage.ROW, 0.0, True, False),
        (2, 5, 3, True, Stage.PIXEL, 0.8, True, True),
        (1, 4, 4, False, Stage.ROW, 3.0, True, False),
        (2, 0, 3, True, Stage.PIXEL, 0.0, False, False),
        (1, 0, 6, True, Stage.ROW, 0.0, False, False),
    ],
)
def test_attention_is_what_the_plan_says(heads, depth, width, biased, stage, cap, softmax, added, device):
    """As precisely as PyTorch in float32; NaN of a sample and a head stays there."""
    plan = attending_step(heads, depth, width, biased, stage, cap, softmax, added)
    conditions = [2 * torch.randn(2, p.channels, p.height, p.width) for p in plan.planes[:3]]
    step = plan.steps[0]
    of = executor.TritonExecutor(plan, torch.device(device))

    def run() -> Tensor:
        space = of.space(2, "ieee")
        of._begin(Batch(2, 0, 0, conditions=conditions), space)
        for row in range(3):
            space.state[0] = 2 * row - 1
            of.launch_row(((step,), (), False) if stage == Stage.ROW else ((), (step,), False), space)
        return plane_of(of, 3, 2)[..., 1:].permute(2, 3, 0, 1)

    exact, plain = attended(plan, [c.double() for c in conditions]), attended(plan, conditions)
    error = (run() - exact).abs().max()
    assert error <= 2 * max((plain - exact).abs().max(), 2**-23 * exact.abs().max())
    if not softmax:
        return
    key = step.attention.keys.channel
    conditions[1][1, key, 2, 0] = math.nan
    result, expected = run().isnan(), attended(plan, conditions).isnan()
    assert torch.equal(result, expected)
    assert result.any() and not result[0].any() and not result[:, width:].any()


def test_the_next_batch_of_a_size_begins_as_the_first(device):
    """Constant planes are still there, and what was written is not."""
    network, given = attention("transformer", (2, 3))
    attends = sampler(network, device, **given)
    assert any(p.kind == "constant" for p in attends.plan.planes)
    first = attends.sample(2, seed=1)
    assert not torch.equal(attends.sample(2, seed=2), first)
    assert torch.equal(attends.sample(2, seed=1), first)
    assert_same(attends, network, given, 2, seed=2)
    assert attends._executor.space(2, "ieee").planes.nbytes == 2 * attends._executor.sample_bytes


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_rounded_weights(precision, device):
    model, given = make(wide), {"precision": precision}
    assert_same(sampler(model, device, **given), model, given, 2, seed=1)


@pytest.mark.parametrize("name", ["centred then shifted", "permuted", "labelled"])
def test_foreign_networks_equal_the_cpu(name, device):
    network, channels, num_classes = networks.make(name, 2, 3)
    given = {"image_shape": (channels, 2, 3), "head": Categorical(networks.LEVELS), "num_classes": num_classes}
    options = {"labels": torch.tensor([1, 3])} if num_classes else {}
    assert_same(sampler(network, device, **given), network, given, 2, **options)


@pytest.mark.parametrize(("network", "layer"), [(test_recurrent.Tokens, "two lstms"), (test_recurrent.EachRow, "gru")])
def test_recurrent_layers_equal_the_cpu(network, layer, device):
    model, given = test_recurrent.make(network, layer), {"image_shape": (3, 3), **test_recurrent.GIVEN}
    assert_same(sampler(model, device, **given), model, given, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_mixtures_equal_the_cpu(channels, device):
    """Of components that are drawn from, and scales and coefficients that matter."""
    head = LogisticMixture(5, levels=7)
    network = nn.Sequential(MaskedConv2d(channels, 6, 3, mask_type="A"), nn.Conv2d(6, head.num_params(channels), 1))
    given = {"image_shape": (channels, 2, 3), "head": head}
    assert_same(sampler(network, device, **given), network, given, 3, temperature=1.5)


@pytest.mark.parametrize("name", ["three_levels", "strides_of_their_own", "nearest"])
def test_levels_equal_the_cpu(name, device):
    network, given = test_levels.make(getattr(test_levels, name), (4, 3))
    options = {"labels": torch.tensor([2, 0])}
    assert_same(sampler(network, device, **given), network, given, 2, **options)


@pytest.mark.parametrize("build", [binary, colours], ids=lambda f: f.__name__)
def test_known_pixels_and_temperature(build, device):
    model = make(build)
    known = torch.randint(model.levels, (3, *model.image_shape), dtype=torch.uint8)
    mask = torch.rand(3, *model.image_shape[1:]) < 0.4
    options = {"seed": 1, "temperature": 0.6, "known": known, "mask": mask}
    images = assert_same(sampler(model, device), model, {}, 3, **options)
    given = mask.unsqueeze(1).expand_as(known)
    assert torch.equal(images[given], known[given])


def test_more_levels_than_a_program_reads_at_once(device, monkeypatch):
    monkeypatch.setattr(executor, "_DRAW_LEVELS", 2)
    model = make(gated)
    assert_same(sampler(model, device), model, {}, 4, seed=2, labels=1)


@pytest.mark.parametrize(
    ("options", "at_once"),
    [({"top_k": 2}, 512), ({"top_p": 0.4}, 8), ({"top_k": 12, "top_p": 0.8, "temperature": 0.5}, 8)],
    ids=str,
)
def test_the_likeliest_levels_alone(options, at_once, device, monkeypatch):
    monkeypatch.setattr(executor, "_DRAW_LEVELS", at_once)
    model = make(wide)
    assert_same(sampler(model, device), model, {}, 5, seed=2, **options)


def drawing_plan(count: int) -> Plan:
    """Of draws from logits that are given, and a step, for every plan has one."""
    planes = [Plane("logits", "condition", count, 1, 3, rows=1), Plane("zeros", "cache", 1, 1, 3, rows=1)]
    step = Step("", Stage.ROW, -1, 0, 0, 1, (Instr("const", value=0.0),), (Store(1, 0, 0),))
    return Plan((1, 1, 3), Categorical(count), planes, [step], [Draw(0, 0, count)], [], [0])


def logits_of(kind: str, count: int) -> Tensor:
    """The last of `count` levels is likely, so that the end is drawn, too."""
    logits = 2 * torch.randn(3, count, 1, 3)
    if kind == "alike":
        logits = logits.round()
    elif kind == "few":
        logits[torch.rand(logits.shape) < 0.99] = -math.inf
    logits[:, -1] = math.log(count) + 1
    return logits


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("different", {}),
        ("different", {"top_k": 100}),
        ("different", {"top_k": 400, "top_p": 0.95, "temperature": 1.3}),
        ("alike", {"top_k": 300}),  # the last one that is kept is as likely as others
        ("alike", {"top_p": 0.6}),
        ("few", {"top_k": 100}),  # more than there are
        ("few", {"top_p": 0.9}),
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1023, 2048, 2049, 6150])
def test_large_codebooks(count, kind, options, device):
    """Around the levels that a program reads at a time; against the C++ executor and the definition."""
    plan, logits = drawing_plan(count), logits_of(kind, count)
    temperature = options.get("temperature", 1.0)
    truncation = make_truncation(options.get("top_k"), options.get("top_p"))
    batch = Batch(3, 5, 2**33, temperature, truncation, conditions=[logits])
    levels = executor.TritonExecutor(plan, torch.device(device)).sample(batch)
    cdf = plan.head.keeping(truncation).cdf(logits, temperature)
    uniforms = image_uniforms(5, 2**33, 3, plan.image_shape)
    assert torch.equal(levels.long(), (cdf < uniforms[:, :, None]).sum(2))
    assert torch.equal(levels, CpuExecutor(plan).sample(batch).to(levels.dtype))


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}], ids=str)
def test_draws_of_every_piece(options, device, monkeypatch):
    monkeypatch.setattr(executor, "_DRAW_LEVELS", 16)
    plan, logits = drawing_plan(61), torch.randn(12, 61, 1, 3)
    batch = Batch(12, 7, 0, 1.0, make_truncation(options.get("top_k"), options.get("top_p")), conditions=[logits])
    levels = executor.TritonExecutor(plan, torch.device(device)).sample(batch)
    assert len((levels // 16).unique()) == 4
    assert torch.equal(levels, CpuExecutor(plan).sample(batch).to(levels.dtype))


@triton.jit
def _thresholds(odds, wanted, out, COUNTED: tl.constexpr, LEVELS: tl.constexpr):
    own = tl.load(odds + tl.arange(0, LEVELS))[None, :]
    least, exists = tl.zeros([1], tl.float32), tl.full([1], 1, tl.int1)
    enough = tl.load(wanted + tl.program_id(0) + tl.arange(0, 1))
    found = sample_plan._threshold(own, odds, exists, LEVELS, least, enough, COUNTED, LEVELS, True)
    tl.store(out + tl.program_id(0) + tl.arange(0, 1), found)


@pytest.mark.parametrize("counted", [True, False], ids=["top_k", "top_p"])
@pytest.mark.parametrize("kind", ["wide", "units in the last place", "alike", "subnormal"])
def test_thresholds(kind, counted, device):
    """What is left is the shortest beginning of the sorted odds that is enough, and what is as likely as its last."""
    bits = {
        "wide": torch.randint(0x3F800000, (256,), dtype=torch.int32),
        "units in the last place": 0x3E123450 + torch.randperm(256, dtype=torch.int32),
        "alike": 0x3D000000 + 0x80000 * torch.randint(20, (256,), dtype=torch.int32),
        "subnormal": torch.randint(2000, (256,), dtype=torch.int32),
    }[kind]
    bits[torch.randint(256, (5,))] = 0
    odds = bits.view(torch.float32)
    ordered = odds.sort(descending=True).values
    sums = torch.arange(1.0, 257) if counted else ordered.double().cumsum(0)
    wanted = sums[[0, 1, 7, 100, 200, 250]] * (1 if counted else 1 - 1e-12)
    last = ordered[(sums >= wanted[:, None]).int().argmax(1)]
    out = torch.empty(len(wanted), device=device)
    _thresholds[(len(wanted),)](odds.to(device), wanted.to(device), out, COUNTED=counted, LEVELS=256)
    assert torch.equal(odds >= out.cpu()[:, None], odds >= last[:, None])


@pytest.mark.parametrize(
    ("options", "at_once"), [({}, 2), ({"top_k": 2}, 512), ({"top_p": 0.5, "temperature": 0.7}, 2)], ids=str
)
def test_guidance(options, at_once, device, monkeypatch):
    """Two rows of a sample have the same levels; known ones, too."""
    monkeypatch.setattr(executor, "_DRAW_LEVELS", at_once)
    model = make(gated)
    known = torch.randint(model.levels, (3, *model.image_shape), dtype=torch.uint8)
    mask = torch.rand(3, *model.image_shape[1:]) < 0.3
    options |= {"labels": torch.tensor([0, 1, 2]), "guidance_scale": 3.0, "null_labels": 1, "mask": mask}
    guided = sampler(model, device)
    for n in (3, 2):
        options |= {"labels": options["labels"][:n], "mask": mask[:n]}
        images = guided.sample(n, known=known[:n], **options)
        expected = Sampler(model, backend="cpu").sample(n, known=known[:n], **options)
        assert torch.equal(images, expected) or audit(model, images, **options).ok
    unled = {key: value for key, value in options.items() if "gui" not in key and "null" not in key}
    assert_same(guided, model, {}, 2, known=known[:2], **unled)  # in other memory


def test_guidance_of_bits(device):
    network = nn.Sequential(MaskedConv2d(1, 6, 3, mask_type="A"), nn.ELU(), nn.Conv2d(6, 1, 1))
    given = {"image_shape": (1, 3, 3), "head": Bernoulli(), "condition": torch.zeros(1, 1, 1)}
    network, options = Tinted(network), {"condition": torch.randn(4, 1, 1, 1), "null_condition": torch.ones(1, 1, 1)}
    options |= {"guidance_scale": 2.0, "seed": 3}
    images = sampler(network, device, **given).sample(4, **options)
    assert torch.equal(images, Sampler(network, backend="cpu", **given).sample(4, **options))


class Tinted(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, tint: Tensor) -> Tensor:
        return self.network(x + tint)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batches_change_no_bit(precision, device):
    """Of more samples than a tile has rows; memory of three sizes, of which two are kept."""
    model = make(narrow)
    whole = sampler(model, device, precision=precision)
    images = whole.sample(17, seed=4, labels=torch.arange(17) % 3)
    for first, last in [(16, 17), (3, 5)]:
        labels = torch.arange(first, last) % 3
        assert torch.equal(whole.sample(last - first, seed=4, start=first, labels=labels), images[first:last])
    assert len(whole._executor._spaces) == executor._KEPT


def test_inference_mode_of_one_call_is_not_that_of_the_next(device):
    repeated = sampler(make(narrow), device)
    with torch.inference_mode():
        expected = repeated.sample(2, labels=1)
    assert torch.equal(repeated.sample(2, labels=1), expected)


def test_known_pixels_of_one_call_are_not_those_of_the_next(device):
    repeated = sampler(make(narrow), device)
    plain = repeated.sample(2, labels=1)
    everything = torch.ones(2, 1, dtype=torch.bool)
    assert torch.equal(repeated.sample(2, labels=1, known=4 - plain, mask=everything), 4 - plain)
    assert torch.equal(repeated.sample(2, labels=1), plain)


@triton.jit
def _primitive(a, b, out, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, sample_plan._apply(OP, tl.load(a + i), tl.load(b + i)))


# Of these the PTX ISA allows a GPU more: a relative error of 2^-22.5 to ex2.approx, and two units in the last place to
# div.full. With the roundings around them that is 4.4 * 2^-23 for a sigmoid, 4.3 for tanh and, at 1/2, for expm1.
HARDWARE = ("exp", "expm1", "expm1_of_minus_abs", "elu", "tanh", "sigmoid")


@pytest.mark.parametrize("op", PRIMITIVES)
def test_primitives(op, device):
    """At most twice the error of PyTorch in float32, or two units in the last place; five of what is `HARDWARE`."""
    units = 2 if INTERPRETED or op not in HARDWARE else 5
    a = torch.cat([torch.randn(500) * 4, torch.randn(500) * 0.01, torch.tensor([0.0, -0.0, 1.0, -1.0] * 6)])
    b = torch.randn(1024) * 4
    a, b = (a.abs() if op in ("log", "sqrt") else a), torch.where(b.abs() < 0.1, 1.0, b)
    out = torch.empty(1024, device=device)
    _primitive[(1,)](a.to(device), b.to(device), out, OP=op, SIZE=1024)
    operands = (a,) if op in UNARY else (a, b)
    exact = apply(op, *(x.double() for x in operands))
    error = (apply(op, *operands).double() - exact).abs().nan_to_num(0, 0, 0)
    difference = torch.where(out.cpu() == exact, 0.0, (out.cpu().double() - exact).abs())
    assert (difference <= (2 * error).clamp(min=units * 2.0**-23 * exact.abs().clamp(min=2.0**-126))).all()


@triton.jit
def _dot(a, b, out, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    i, k = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    x, y = tl.load(a + i[:, None] * CHANNELS + k[None, :]), tl.load(b + k[:, None] * ROWS + i[None, :])
    acc = sample_plan._multiply(x, y, tl.zeros([ROWS, ROWS], tl.float32), "ieee")
    tl.store(out + i[:, None] * ROWS + i[None, :], acc)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_have_the_precision_of_float32(dtype, device):
    a, b, out = torch.randn(16, 32), torch.randn(32, 16).to(dtype), torch.empty(16, 16, device=device)
    _dot[(1,)](a.to(device), b.to(device), out, ROWS=16, CHANNELS=32)
    error = (out.cpu().double() - a.double() @ b.double()).abs()
    assert (error <= 32 * 2**-24 * (a.double().abs() @ b.double().abs())).all()


def test_rows_of_operands(device):
    """As `Plan.source` and `Plan.position` say, negative ones too."""
    rows = []
    for lag, stride, num, den, dy in itertools.product((-2, 0, 1), (1, 2), (1, 3), (1, 2, 3), (-4, -1, 0, 2)):
        rows.append((lag, stride, num, den, dy, 5, 3, 70, 1000 * len(rows)))
    fields, where = torch.tensor(rows, device=device), torch.empty(len(rows), dtype=torch.int64, device=device)
    for y in (-2, 0, 5):
        state = torch.tensor([y, 0, 0], device=device)
        sample_plan.begin_row[(2,)](fields, where, state, len(rows), SIZE=128)
        for at, (lag, stride, num, den, dy, height, kept, size, offset) in zip(where.tolist(), rows, strict=True):
            source = ((y - lag) // stride * num + dy) // den
            assert at == (offset + source % kept * size if 0 <= source < height else -1)


def test_where_no_gpu_is_the_request_fails(monkeypatch):
    model = make(binary)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="it takes cuda tensors, got one on cpu"):
        Sampler(model, backend="triton")
    monkeypatch.setattr(executor, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="the triton executor needs a GPU"):
        executor.TritonExecutor(Sampler(model, backend="reference").plan)


def test_rows_beyond_32_bits_are_refused():
    plan = Sampler(make(binary), backend="reference").plan
    with pytest.raises(ValueError, match="a smaller max_batch is needed"):
        executor.TritonExecutor(plan, torch.device("cpu")).space(2**30, "ieee")


# What only a GPU shows.


def tall() -> nn.Module:
    """Rows of several patterns, each of them several times: launched, captured, replayed."""
    return models.PixelCNNpp(image_shape=(3, 13, 6), num_filters=20, num_blocks=1, num_mixtures=3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_rows_draw_the_same(precision):
    model = make(tall)
    repeated = sampler(model, "cuda", precision=precision)
    first = assert_same(repeated, model, {"precision": precision}, 70, seed=1)
    for _ in range(2):
        assert torch.equal(repeated.sample(70, seed=1), first)
    (space,) = repeated._executor._spaces.values()
    assert any(graph is not None for graph in space.graphs.values())
    for max_batch in (1, 9):  # other tiles
        small = sampler(model, "cuda", precision=precision, max_batch=max_batch)
        assert torch.equal(small.sample(10, seed=1), first[:10])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["PixelSNAIL", "relative positions", "rows"])
def test_captured_rows_attend_the_same(name):
    """To more keys than are read at once there, too."""
    network, given = attention(name, (18, 17))
    repeated = sampler(network, "cuda", **given)
    first = assert_same(repeated, network, given, 20, seed=1)
    assert torch.equal(repeated.sample(20, seed=1), first)
    for max_batch in (1, 9):
        small = sampler(network, "cuda", max_batch=max_batch, **given)
        assert torch.equal(small.sample(10, seed=1), first[:10])


@pytest.mark.gpu
def test_on_another_stream():
    model = make(gated)
    repeated = sampler(model, "cuda")
    expected = repeated.sample(5, seed=2, labels=1)
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            assert torch.equal(repeated.sample(5, seed=2, labels=1), expected)
    assert torch.equal(repeated.sample(5, seed=2, labels=1), expected)


@pytest.mark.gpu
def test_tf32_is_for_those_who_ask():
    model = make(tall)
    repeated = sampler(model, "cuda")
    exact = repeated.sample(20)
    torch.set_float32_matmul_precision("high")
    try:
        rough = repeated.sample(20)
        assert torch.equal(sampler(model, "cuda", max_batch=3).sample(20), rough)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(repeated.sample(20), exact)
    assert len(repeated._executor._spaces) == 2


@pytest.mark.gpu
def test_the_automatic_choice_on_a_gpu_and_the_other_executor_there():
    model = make(tall)
    automatic = Sampler(copy.deepcopy(model).cuda())
    assert isinstance(automatic._executor, executor.TritonExecutor)
    images = assert_same(automatic, model, {}, 6, seed=3)
    if backends.import_error("_cuda") is None:
        other = Sampler(copy.deepcopy(model).cuda(), backend="cuda").sample(6, seed=3)
        assert torch.equal(other, images) or audit(model, other, seed=3).ok


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most")
def test_on_the_device_of_the_model():
    model = make(tall)
    images = sampler(model, "cuda:0").sample(20, seed=1)  # captures there
    second = sampler(model, "cuda:1")
    assert second._executor.device == torch.device("cuda", 1)
    for _ in range(3):
        assert torch.equal(second.sample(20, seed=1), images)
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(not INTERPRETED, reason="the automatic choice there is Triton")
def test_models_on_the_cpu_are_sampled_there():
    assert not isinstance(Sampler(make(binary))._executor, executor.TritonExecutor)
