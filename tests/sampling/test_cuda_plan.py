"""The CUDA kernel for pixels draws what the C++ executor draws: its schedule on a team of host threads, under
ThreadSanitizer; the whole of its source on tests/cuda_on_host; and on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastgen import backends
from fastgen.models import GatedPixelCNN, PixelCNNpp, PixelRNN
from fastgen.sampling import Bernoulli, Categorical, Sampler, audit, naive_sample
from fastgen.sampling.executors.cuda import CudaExecutor, Strategy
from fastgen.sampling.executors.operands import Operands
from fastgen.sampling.executors.pixel_tables import DEPTH, DRAW, PixelTables
from fastgen.sampling.precision import PRECISIONS
from tests.kernels import attending

from .host_team import Watch, host_sampler, program
from .networks import LEVELS, NETWORKS, make
from .test_engine import MODELS, make_model
from .test_guidance import Binary, Forbidding, labelled
from .test_levels import CASES
from .test_levels import make as make_levels
from .test_recurrent import GIVEN, Above, EachColumn, Tokens
from .test_recurrent import make as make_recurrent


def wide() -> PixelCNNpp:
    """Sums of several blocks and steps of several tiles; three levels of stride."""
    return pixelcnnpp((3, 3, 4), num_filters=40)


def pixelcnnpp(image_shape: tuple[int, int, int], **options: int) -> PixelCNNpp:
    torch.manual_seed(2)
    model = PixelCNNpp(image_shape=image_shape, **{"num_filters": 6, "num_blocks": 1, "num_mixtures": 3, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    labels = None if model.num_classes is None else torch.arange(4) % model.num_classes
    model.initialize(torch.randint(model.levels, (4, *image_shape), dtype=torch.uint8), labels)
    return model.eval()


GUIDED: dict[str, Callable[[], nn.Module]] = {"labels": labelled, "forbidden": Forbidding, "binary": Binary}


def assert_same(images: Tensor, expected: Tensor, model: nn.Module, **options: object) -> None:
    """The same images, but for proven ties: log, erf and draws go through other libraries' functions."""
    if not torch.equal(images, expected):
        report = audit(model, images, **options)  # type: ignore[arg-type]
        assert report.ok, report


@pytest.mark.parametrize("name", MODELS)
def test_models_equal_the_cpu(name: str) -> None:
    model, labels = make_model(name)
    options = {"seed": 2**63 + 1, "start": 5, "labels": labels}
    images = host_sampler(model).sample(6, **options)
    assert_same(images, Sampler(model, backend="cpu").sample(6, **options), model, **options)
    assert len(images.unique()) > 1


@pytest.mark.parametrize("size", [(5, 6), (1, 1)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", NETWORKS)
def test_foreign_networks_equal_the_naive_loop(name: str, size: tuple[int, int]) -> None:
    network, channels, num_classes = make(name, *size)
    given = {"image_shape": (channels, *size), "head": Categorical(LEVELS), "num_classes": num_classes}
    labels = torch.arange(3) % num_classes if num_classes else None
    images = host_sampler(network, **given).sample(3, seed=5, labels=labels)
    expected = naive_sample(network, 3, **given, seed=5, labels=labels)
    assert_same(images, expected, network, **given, seed=5, labels=labels)


@pytest.mark.parametrize("run", CASES, ids=lambda f: f.__name__)
def test_levels_equal_the_cpu(run: Callable) -> None:
    network, given = make_levels(run, (7, 6))
    labels = torch.tensor([2, 0, 1])
    images = host_sampler(network, **given).sample(3, labels=labels)
    expected = Sampler(network, **given, backend="cpu").sample(3, labels=labels)
    assert_same(images, expected, network, **given, labels=labels)


@pytest.mark.parametrize(("network", "layer"), [(Tokens, "two lstms"), (EachColumn, "gru"), (Above, "lstm")])
def test_recurrent_layers_equal_the_naive_loop(network: type[Tokens], layer: str) -> None:
    """Which read in a column what was written in the one before; in `Above` far ahead of the drawing."""
    model, given = make_recurrent(network, layer), {"image_shape": (3, 4), **GIVEN}
    for watch in (Watch.SCHEDULE, Watch.KERNEL):
        images = host_sampler(model, **given, watch=watch).sample(2, seed=5)
        assert_same(images, naive_sample(model, 2, **given, seed=5), model, **given, seed=5)


def test_pixelrnn_equals_the_cpu() -> None:
    torch.manual_seed(0)
    model = PixelRNN(image_shape=(3, 3, 4), levels=5, num_filters=6, num_blocks=2, num_features=9).eval()
    images = host_sampler(model).sample(2, seed=1)
    assert_same(images, Sampler(model, backend="cpu").sample(2, seed=1), model, seed=1)


@pytest.mark.parametrize("image_shape", [(3, 9, 10), (1, 5, 11), (3, 5, 1)], ids=lambda s: "x".join(map(str, s)))
def test_pixelcnnpp_equals_the_cpu(image_shape: tuple[int, int, int]) -> None:
    model = pixelcnnpp(image_shape)
    images = host_sampler(model).sample(3, seed=1)
    assert_same(images, Sampler(model, backend="cpu").sample(3, seed=1), model, seed=1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_several_blocks_and_tiles(precision: str) -> None:
    model = wide()
    images = host_sampler(model, precision=precision).sample(2, seed=1)
    expected = Sampler(model, precision=precision, backend="cpu").sample(2, seed=1)
    assert_same(images, expected, model, seed=1, precision=precision)


@pytest.mark.parametrize("name", ["gated labels", "pixelcnn rgb", "pixelcnn binary"])
def test_known_pixels_and_temperature(name: str) -> None:
    model, labels = make_model(name)
    known = torch.randint(model.levels, (6, *model.image_shape)).to(torch.uint8)
    mask = torch.rand(6, *model.image_shape[1:]) < 0.4
    options = {"seed": 1, "labels": labels, "temperature": 0.6, "known": known, "mask": mask}
    images = host_sampler(model).sample(6, **options)
    expected = Sampler(model, backend="cpu").sample(6, **options)
    assert_same(images, expected, model, **{k: v for k, v in options.items() if k != "known"})


@pytest.mark.parametrize("watch", [Watch.SCHEDULE, Watch.KERNEL], ids=lambda w: w.name)
@pytest.mark.parametrize(
    "truncation", [{"top_k": 1}, {"top_k": 3, "top_p": 0.7}, {"top_p": 0.5}, {"top_k": 99}], ids=str
)
@pytest.mark.parametrize("name", ["gated labels", "pixelcnn rgb"])
def test_the_likeliest_levels(name: str, truncation: dict[str, float], watch: Watch) -> None:
    model, labels = make_model(name)
    options = {"seed": 1, "labels": labels, "temperature": 1.5, **truncation}
    images = host_sampler(model, watch=watch).sample(6, **options)
    assert_same(images, Sampler(model, backend="cpu").sample(6, **options), model, **options)
    everything = Sampler(model, backend="cpu").sample(6, seed=1, labels=labels, temperature=1.5)
    assert torch.equal(images, everything) == (truncation == {"top_k": 99})


@pytest.mark.parametrize("watch", [Watch.SCHEDULE, Watch.KERNEL], ids=lambda w: w.name)
@pytest.mark.parametrize("count", [1, 5, 11])
@pytest.mark.parametrize("name", GUIDED)
def test_guidance(name: str, count: int, watch: Watch) -> None:
    """Two rows of each sample; 11: more than are multiplied at a time, the last with one sample."""
    model, given = GUIDED[name](), {"image_shape": (2, 4, 3), "head": Categorical(LEVELS), "num_classes": 4}
    if name == "binary":
        given |= {"image_shape": (1, 4, 3), "head": Bernoulli()}
    known = torch.randint(2, (count, *given["image_shape"]), dtype=torch.uint8)
    options = {
        "labels": torch.arange(count) % 4, "guidance_scale": 2.5, "null_labels": 3, "seed": 2,
        "mask": torch.rand(count, 4, 3) < 0.2,
    }  # fmt: skip
    images = host_sampler(model, **given, watch=watch, clusters=3).sample(count, known=known, **options)
    expected = Sampler(model, **given, backend="cpu").sample(count, known=known, **options)
    assert_same(images, expected, model, **given, **options)
    alone = host_sampler(model, **given, watch=watch, clusters=1, max_batch=2).sample(count, known=known, **options)
    assert torch.equal(images, alone)
    options |= {"guidance_scale": 1.0}
    assert not torch.equal(images, Sampler(model, **given, backend="cpu").sample(count, known=known, **options))


@pytest.mark.parametrize("watch", [Watch.SCHEDULE, Watch.KERNEL], ids=lambda w: w.name)
@pytest.mark.parametrize("truncation", [{}, {"top_k": 60}, {"top_k": 500, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("count", [255, 257, 600])
def test_large_codebooks(count: int, truncation: dict[str, float], watch: Watch) -> None:
    """Of segments of a level, two of them, and more; the last ones have none."""
    torch.manual_seed(4)
    model = GatedPixelCNN(image_shape=(1, 2, 3), levels=count, embedding_dim=4, num_filters=4, num_blocks=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    images = host_sampler(model, watch=watch).sample(4, seed=6, **truncation)
    assert_same(images, Sampler(model, backend="cpu").sample(4, seed=6, **truncation), model, seed=6, **truncation)
    assert len(images.unique()) > 10


def test_a_temperature_of_almost_nothing() -> None:
    """1 / temperature is infinite in float32."""
    model, _ = make_model("gated")
    images = host_sampler(model).sample(2, temperature=1e-40)
    assert torch.equal(images, Sampler(model, backend="cpu").sample(2, temperature=1e-40))


@pytest.mark.parametrize(
    ("clusters", "size", "lanes"), [(1, 1, 1), (1, 1, 5), (1, 3, 1), (2, 3, 2), (3, 1, 2), (2, 16, 1)]
)
def test_team_changes_no_bit(clusters: int, size: int, lanes: int) -> None:
    """More blocks than tiles; sums of several blocks."""
    model = wide()
    expected = host_sampler(model).sample(3, seed=4)
    assert torch.equal(host_sampler(model, clusters=clusters, size=size, lanes=lanes).sample(3, seed=4), expected)


@pytest.mark.parametrize("name", ["gated labels", "pixelcnn rgb"])
@pytest.mark.parametrize(("count", "max_batch"), [(3, 1), (19, 19)])
def test_batches_change_no_bit(name: str, count: int, max_batch: int) -> None:
    """19: a cluster multiplies more samples than fit into its rows."""
    model, _ = make_model(name)
    labels = None if model.num_classes is None else torch.arange(count) % model.num_classes
    expected = host_sampler(model, max_batch=7).sample(count, seed=9, labels=labels)
    assert torch.equal(host_sampler(model, max_batch=max_batch).sample(count, seed=9, labels=labels), expected)
    part = None if labels is None else labels[1:3]
    assert torch.equal(host_sampler(model).sample(2, seed=9, start=1, labels=part), expected[1:3])


@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_draws_models(name: str) -> None:
    model, labels = make_model(name)
    options = {"seed": 2**63 + 1, "start": 5, "labels": None if labels is None else labels[:4]}
    images = host_sampler(model, watch=Watch.KERNEL, size=3, share=2).sample(4, **options)
    assert_same(images, Sampler(model, backend="cpu").sample(4, **options), model, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_kernel_has_the_precision_of_float32(precision: str) -> None:
    """Images and features; 11 samples: more than are multiplied at a time."""
    model = wide()
    kernel = host_sampler(model, watch=Watch.KERNEL, precision=precision, clusters=1)
    schedule = host_sampler(model, precision=precision, clusters=1)
    images = kernel.sample(11, seed=4)
    assert torch.equal(images, schedule.sample(11, seed=4))
    features, expected = (s._executor.space(11, "ieee").planes.double() for s in (kernel, schedule))
    assert (features - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize(("clusters", "size", "share"), [(2, 1, 1), (3, 2, 2), (1, 16, 1)])
def test_clusters_change_no_bit(clusters: int, size: int, share: int) -> None:
    model = pixelcnnpp((3, 2, 3), num_filters=10)
    expected = host_sampler(model, watch=Watch.KERNEL, clusters=1).sample(3, seed=4)
    team = {"clusters": clusters, "size": size, "share": share}
    assert torch.equal(host_sampler(model, watch=Watch.KERNEL, **team).sample(3, seed=4), expected)


def test_the_kernel_stays_within_its_memory() -> None:
    model = pixelcnnpp((3, 2, 2), num_filters=20)
    images = host_sampler(model, watch=Watch.MEMORY, clusters=1).sample(2, seed=4)
    assert torch.equal(images, Sampler(model, backend="cpu").sample(2, seed=4))


@pytest.mark.parametrize("watch", Watch, ids=lambda w: w.name)
def test_the_programs_are_watched(watch: Watch) -> None:
    if not program(watch)[1]:
        pytest.skip(f"the compiler has no {watch.value[1]}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_packed_for_tensor_cores(precision: str) -> None:
    """Fragment by fragment, against the definition."""
    plan = Sampler(wide(), precision=precision, backend="reference").plan
    operands = Operands(plan, pixel_weights=False)
    tables = PixelTables(plan, operands)
    packed, steps = tables.tensors()["weights"].float(), tables.rows
    compared = 0
    for row, step in zip(steps, plan.pixel_steps(0), strict=True):
        width, groups, per_tile, weight, blocks = row[0], row[1], row[2], row[7], row[9]
        if not blocks:
            continue
        tiles = -(-width // per_tile)
        ours = packed[weight * 32 * 8 :][: tiles * blocks * 32 * 8].view(tiles, blocks, 8, 4, 2, 4)
        block = 0
        first = 0  # row of the weight
        for tap in step.taps:
            for k in range(tap.count):
                at, depth = divmod(k, DEPTH)
                for g in range(groups):
                    for channel in range(0, width, 7):
                        tile, i = divmod(channel, per_tile)
                        column = g * per_tile + i
                        found = ours[tile, block + at, column % 8, depth // 4, column // 8, depth % 4]
                        assert found == step.weight[first + k, g * width + channel]
                        compared += 1
            first += tap.count
            block += -(-tap.count // DEPTH)
        assert block == blocks
        assert ours.count_nonzero() <= step.weight.count_nonzero()
    assert compared > 1000


def test_the_cluster_waits_where_it_must() -> None:
    """Before whatever reads a plane that was written since it waited; weights are fetched for the next product."""
    model = wide()
    plan = Sampler(model, backend="reference").plan
    tables = PixelTables(plan, Operands(plan, pixel_weights=False))
    steps = plan.pixel_steps(0)
    written: set[int] = set()
    expected_fetch = None
    actions = tables.actions(((), tuple(steps), True)).tolist()
    for what, how in actions:
        waits, what = how >> 16, what & 0xFFFF
        if what >= DRAW:
            reads, writes = {plan.draws[what - DRAW].plane}, {e.plane for e in plan.encodings}
        else:
            step = steps[what]
            reads = {t.plane for t in step.taps} | {r.plane for r in step.reads()}
            writes = {s.plane for s in step.stores}
            if step.taps:
                assert expected_fetch in (None, what)
                expected_fetch = how & 0xFFFF
        assert waits == bool(reads & written)
        written = (set() if waits else written) | writes
    assert expected_fetch == DRAW  # after the last one
    assert 0 < sum(how >> 16 for _, how in actions) < len(actions)


def test_attention_of_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of rows is Triton's."""
    monkeypatch.setattr(backends, "native_cuda", lambda: None)
    given = {"image_shape": (1, 2, 3), "head": Categorical(LEVELS), "backend": "reference"}
    pixels = Sampler(attending.Attending(attending.earlier, (2, 3), 1, 4, 4), **given).plan
    with pytest.raises(RuntimeError, match="the cuda executor has no attention: backend='triton' has"):
        CudaExecutor(pixels)
    rows = Sampler(attending.Above(attending.rows_above, (2, 3), 1, 4, 4), **given).plan
    assert any(step.attention for step in rows.row_steps())
    assert PixelTables(rows, Operands(rows, pixel_weights=False)).rows


def test_without_a_gpu_the_request_fails() -> None:
    model, _ = make_model("gated")
    with pytest.raises(RuntimeError, match="the backend 'cuda' was asked for, but cannot be used: "):
        Sampler(model, backend="cuda")


needs_clusters = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="the GPU has no clusters"
)


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize("name", MODELS)
def test_models_on_a_gpu(name: str) -> None:
    model, labels = make_model(name)
    options = {"seed": 3, "start": 2, "labels": labels}
    expected = Sampler(model, backend="cpu").sample(6, **options)
    images = Sampler(model.cuda(), backend="cuda").sample(6, **options)
    assert_same(images, expected, model.cpu(), **options)


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize("precision", PRECISIONS)
def test_batches_and_strategies_on_a_gpu(precision: str) -> None:
    model = wide()
    expected = Sampler(model, precision=precision, backend="cpu").sample(70, seed=4)
    sampler = Sampler(model.cuda(), precision=precision, backend="cuda")
    images = sampler.sample(70, seed=4)
    for strategy in Strategy:
        sampler._executor.strategy = strategy  # type: ignore[union-attr]
        sampler._executor._spaces.clear()  # type: ignore[union-attr]
        assert torch.equal(sampler.sample(70, seed=4), images)
    for max_batch in (1, 9):
        small = Sampler(model, precision=precision, backend="cuda", max_batch=max_batch)
        assert torch.equal(small.sample(10, seed=4), images[:10])
    assert_same(images, expected, model.cpu(), seed=4, precision=precision)


@pytest.mark.gpu
@needs_clusters
def test_known_pixels_on_another_stream() -> None:
    model, labels = make_model("gated labels")
    known = torch.randint(model.levels, (6, *model.image_shape)).to(torch.uint8)
    mask = torch.rand(6, *model.image_shape[1:]) < 0.4
    options = {"seed": 1, "labels": labels, "temperature": 0.6, "known": known, "mask": mask}
    expected = Sampler(model, backend="cpu").sample(6, **options)
    sampler = Sampler(model.cuda(), backend="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        images = sampler.sample(6, **options)
    del options["known"]
    assert_same(images, expected, model.cpu(), **options)


@pytest.mark.gpu
@needs_clusters
def test_the_gpu_is_the_models() -> None:
    model, _ = make_model("gated")
    with pytest.raises(RuntimeError, match="it takes cuda tensors, got one on cpu"):
        Sampler(model, backend="cuda")
    assert backends.reasons("sample_plan", torch.zeros(1, device="cuda"))["cuda"] is not None
