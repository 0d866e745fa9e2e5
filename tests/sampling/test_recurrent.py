"""Recurrent layers: PyTorch's over tokens of the image, and the Row LSTM, draw what the naive loop draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import ops
from fastgen.models import PixelRNN
from fastgen.sampling import Categorical, Sampler, UnsupportedModel, audit, naive_sample
from fastgen.sampling.schedule import Stage

LEVELS = 5
GIVEN: dict[str, Any] = {"head": Categorical(LEVELS, input_range=None)}
SHAPES = pytest.mark.parametrize("shape", [(4, 5), (1, 6), (5, 1), (3, 3)], ids=str)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])


class Tokens(nn.Module):
    """All pixels in raster order: what a layer makes of those before."""

    def __init__(self, layer: nn.Module, size: int = 7):
        super().__init__()
        self.embedding, self.layer, self.out = nn.Embedding(LEVELS, 6), layer, nn.Linear(size, LEVELS)

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(self.embedding(x.flatten(1)), (0, 0, 1, 0))[:, :-1]
        if not self.layer.batch_first:
            before = before.transpose(0, 1)
        h = self.layer(before)[0]
        h = h if self.layer.batch_first else h.transpose(0, 1)
        return self.out(h).transpose(1, 2).unflatten(2, x.shape[1:])


class EachRow(Tokens):
    """Along each row by itself."""

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(self.embedding(x), (0, 0, 1, 0))[:, :, :-1]
        h = self.layer(before.flatten(0, 1))[0].unflatten(0, x.shape[:2])
        return self.out(h).permute(0, 3, 1, 2)


class EachColumn(Tokens):
    """Down each column by itself, with the pixels on the left."""

    def forward(self, x: Tensor) -> Tensor:
        codes = self.embedding(x)
        left, above = F.pad(codes, (0, 0, 1, 0))[:, :, :-1], F.pad(codes, (0, 0, 0, 0, 1, 0))[:, :-1]
        columns = torch.tanh(left + above).transpose(1, 2)
        h = self.layer(columns.flatten(0, 1))[0].unflatten(0, columns.shape[:2])
        return self.out(h).permute(0, 3, 2, 1)


class Above(Tokens):
    """Along each row of what the rows above make; the sampler runs it ahead of the drawing."""

    def forward(self, x: Tensor) -> Tensor:
        above = F.pad(self.embedding(x), (0, 0, 0, 0, 1, 0))[:, :-1]
        h = self.layer(above.flatten(0, 1))[0].unflatten(0, x.shape[:2])
        return self.out(h).permute(0, 3, 1, 2)


class Farther(Tokens):
    """Along each row of what is two rows or two pixels away; one gate knows only the former, others only the latter."""

    def forward(self, x: Tensor) -> Tensor:
        above, left = self.embedding(x).chunk(2, dim=3)
        above, left = F.pad(above, (0, 0, 0, 0, 2, 0))[:, :-2], F.pad(left, (0, 0, 2, 0))[:, :, :-2]
        with torch.no_grad():
            self.layer.weight_ih_l0[0, 3:] = 0
            self.layer.weight_ih_l0[1:, :3] = 0
        h = self.layer(torch.cat([above, left], 3).flatten(0, 1))[0].unflatten(0, x.shape[:2])
        return self.out(h).permute(0, 3, 1, 2)


class FarAbove(Tokens):
    """Down each column of what is three rows above."""

    def forward(self, x: Tensor) -> Tensor:
        columns = F.pad(self.embedding(x), (0, 0, 0, 0, 3, 0))[:, :-3].transpose(1, 2)
        h = self.layer(columns.flatten(0, 1))[0].unflatten(0, columns.shape[:2])
        return self.out(h).permute(0, 3, 2, 1)


LAYERS = {
    "lstm": lambda: nn.LSTM(6, 7, batch_first=True),
    "two lstms": lambda: nn.LSTM(6, 7, num_layers=2, dropout=0.5),
    "gru": lambda: nn.GRU(6, 7, batch_first=True),
    "two grus without bias": lambda: nn.GRU(6, 7, num_layers=2, bias=False),
    "tanh": lambda: nn.RNN(6, 7, batch_first=True),
    "relu": lambda: nn.RNN(6, 7, num_layers=2, nonlinearity="relu"),
}


def strengthened(network: nn.Module) -> nn.Module:
    """With weights large enough that mistakes show."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    return network.eval()


def make(network: type[Tokens], layer: str) -> nn.Module:
    torch.manual_seed(1)
    return strengthened(network(LAYERS[layer]()))


@BACKENDS
@SHAPES
@pytest.mark.parametrize("layer", LAYERS)
def test_in_raster_order(layer, shape, backend):
    network = make(Tokens, layer)
    images = Sampler(network, shape, **GIVEN, backend=backend).sample(3, seed=2)
    assert torch.equal(images, naive_sample(network, 3, seed=2, image_shape=shape, **GIVEN))


@BACKENDS
@SHAPES
@pytest.mark.parametrize("network", [EachRow, EachColumn, Above])
@pytest.mark.parametrize("layer", ["lstm", "gru", "tanh"])
def test_along_rows_and_columns(layer, network, shape, backend):
    model = make(network, layer)
    images = Sampler(model, shape, **GIVEN, backend=backend).sample(3)
    assert torch.equal(images, naive_sample(model, 3, image_shape=shape, **GIVEN))


@BACKENDS
@pytest.mark.parametrize("network", [Farther, FarAbove])
@pytest.mark.parametrize("layer", ["lstm", "gru", "tanh"])
def test_no_state_is_computed_ahead_of_the_one_before(layer, network, backend):
    model = make(network, layer)
    images = Sampler(model, (8, 4), **GIVEN, backend=backend).sample(6)
    assert torch.equal(images, naive_sample(model, 6, image_shape=(8, 4), **GIVEN))


@pytest.mark.parametrize("layer", ["lstm", "gru", "tanh"])
def test_columns_of_zeros_lie_in_a_row(layer):
    model = make(FarAbove, layer)
    images = Sampler(model, (1, 4), **GIVEN).sample(3)
    assert torch.equal(images, naive_sample(model, 3, image_shape=(1, 4), **GIVEN))


@pytest.mark.parametrize("layer", ["lstm", "gru", "tanh"])
def test_tokens_of_zeros_are_an_image(layer):
    class Left(Tokens):
        """Knows the pixels on the left: of a single column nothing, not even where they are."""

        def forward(self, x: Tensor) -> Tensor:
            left = F.pad(self.embedding(x), (0, 0, 1, 0))[:, :, :-1]
            h = self.layer(left.flatten(1, 2))[0]
            return self.out(h).transpose(1, 2).unflatten(2, x.shape[1:])

    network = make(Left, layer)
    images = Sampler(network, (4, 1), **GIVEN).sample(3)
    assert torch.equal(images, naive_sample(network, 3, image_shape=(4, 1), **GIVEN))


def test_states_that_come_last_can_be_used():
    class Last(Tokens):
        """What is left of a row is known to the next."""

        def forward(self, x: Tensor) -> Tensor:
            rows = self.embedding(x)
            _, (h, c) = self.layer(rows.flatten(0, 1))
            last = (h[-1] + c[-1]).unflatten(0, x.shape[:2])  # [N, H, 7]
            last = F.pad(last, (0, 0, 1, 0))[:, :-1, None].expand(-1, -1, x.shape[2], -1)
            return self.out(last).permute(0, 3, 1, 2)

    network = make(Last, "lstm")
    images = Sampler(network, (4, 3), **GIVEN).sample(3)
    assert torch.equal(images, naive_sample(network, 3, image_shape=(4, 3), **GIVEN))


def test_batches_threads_known_pixels_and_temperature():
    network, shape = make(Tokens, "two lstms"), (5, 4)
    sampler = Sampler(network, shape, **GIVEN)
    known, mask = torch.randint(LEVELS, (6, 1, *shape), dtype=torch.uint8), torch.rand(6, *shape) < 0.3
    options = {"seed": 2**40, "known": known, "mask": mask, "temperature": 0.7}
    images = sampler.sample(6, **options)
    assert torch.equal(images, naive_sample(network, 6, image_shape=shape, **GIVEN, **options))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            parts = [
                sampler.sample(2, seed=2**40, start=i, temperature=0.7, known=known[i : i + 2], mask=mask[i : i + 2])
                for i in (0, 2, 4)
            ]
            assert torch.equal(torch.cat(parts), images)
    finally:
        torch.set_num_threads(threads)


@BACKENDS
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 4, 5), (3, 1, 3), (2, 5, 1)], ids=str)
def test_pixelrnn(shape, backend):
    torch.manual_seed(0)
    model = PixelRNN(image_shape=shape, levels=LEVELS, num_filters=6, num_blocks=2, num_features=9)
    strengthened(model)
    images = Sampler(model, backend=backend).sample(4, seed=3)
    assert len(images.unique()) == LEVELS
    assert torch.equal(images, naive_sample(model, 4, seed=3))
    assert audit(model, images, seed=3).ok


def test_what_the_row_above_adds_to_a_row_lstm_is_computed_for_whole_rows():
    """And cells and outputs are kept for two rows."""
    plan = Sampler(PixelRNN(image_shape=(1, 6, 5), levels=3, num_filters=4, num_blocks=1, num_features=4)).plan
    layers = [s for s in plan.steps if s.name == "blocks.0.lstm" and s.taps]
    macs = {stage: sum(s.macs for s in layers if s.stage == stage) for stage in Stage}
    assert macs == {Stage.ROW: 16 * 3 * 4, Stage.PIXEL: 16 * 2 * 8}
    (cell,) = (s for s in plan.steps if len(s.stores) == 2)
    assert [plan.planes[s.plane].rows for s in cell.stores] == [2, 2]


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.LSTM(6, 7, batch_first=True, bidirectional=True), "operator lstm in two directions"),
        (nn.LSTM(6, 9, batch_first=True, proj_size=7), "operator lstm with a projection of its output"),
    ],
    ids=["two directions", "projection"],
)
def test_refused(layer, text):
    network = Tokens(layer, 14 if layer.bidirectional else 7).eval()
    with pytest.raises(UnsupportedModel, match=f"module 'layer': {text}"):
        Sampler(network, (3, 4), **GIVEN)


def test_an_initial_state_is_refused():
    class Started(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            before = F.pad(self.embedding(x.flatten(1)), (0, 0, 1, 0))[:, :-1]
            h = self.layer(before, torch.ones(1, len(x), 7))[0]
            return self.out(h).transpose(1, 2).unflatten(2, x.shape[1:])

    with pytest.raises(UnsupportedModel, match="operator gru with a state to begin with that is not zero"):
        Sampler(make(Started, "gru"), (3, 4), **GIVEN)


def test_what_a_row_lstm_refuses_is_refused():
    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4 * LEVELS, LEVELS, 2))

        def forward(self, x: Tensor) -> Tensor:
            above = F.pad(x, (0, 0, 1, 0))[:, :, :-1]
            return ops.row_lstm(above.expand(-1, 4 * LEVELS, -1, -1), self.weight)

    with pytest.raises(UnsupportedModel, match=r"weight must be \[20, 5, k\] with odd k .* got \(20, 5, 2\)"):
        Sampler(Even(), (1, 3, 4), Categorical(LEVELS))
