"""The quantiser against its formulas, written out vector by vector."""

from __future__ import annotations

import pytest
import torch

from fastgen import nn

K, D = 5, 3


def build(**options):
    torch.manual_seed(0)
    return nn.VectorQuantizer(K, D, **{"min_usage": 0.0, **options})


def features(shape=(4, D, 2, 3), seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vectors(x):
    return [x[n, :, i, j] for n in range(x.shape[0]) for i in range(x.shape[2]) for j in range(x.shape[3])]


def nearest(vector, codebook):
    return min(range(len(codebook)), key=lambda k: float((vector - codebook[k]).double().square().sum()))


@pytest.mark.parametrize("shape", [(4, D, 2, 3), (6, D), (2, D, 5), (0, D, 2, 2)])
def test_every_vector_becomes_its_nearest_code(shape):
    layer = build().eval()
    x = features(shape)
    quantized = layer(x)
    assert quantized.features.shape == x.shape and quantized.codes.shape == (shape[0], *shape[2:])
    for at in torch.cartesian_prod(*(torch.arange(n) for n in quantized.codes.shape)).view(-1, len(shape) - 1).tolist():
        vector = x[(at[0], slice(None), *at[1:])]
        code = nearest(vector, layer.codebook)
        assert int(quantized.codes[tuple(at)]) == code
        torch.testing.assert_close(quantized.features[(at[0], slice(None), *at[1:])], layer.codebook[code])
    assert torch.equal(layer.look_up(quantized.codes), layer.codebook[quantized.codes].movedim(-1, 1))


@pytest.mark.parametrize("decay", [0.9, None])
def test_gradients_are_those_of_the_paper(decay):
    layer = build(decay=decay, commitment=0.5)
    x = features().requires_grad_()
    before = layer.codebook.detach().clone()
    quantized = layer(x)
    weights = features(seed=2)
    (gradient,) = torch.autograd.grad((quantized.features * weights).sum(), x, retain_graph=True)
    assert torch.equal(gradient, weights)  # straight through
    quantized.loss.backward()
    chosen = [before[nearest(v, before)] for v in vectors(x.detach())]
    difference = torch.stack([v - e for v, e in zip(vectors(x.detach()), chosen, strict=True)])
    square = difference.square().mean()
    torch.testing.assert_close(quantized.loss.detach(), (1.5 if decay is None else 0.5) * square)
    torch.testing.assert_close(torch.stack(vectors(x.grad)), 0.5 * 2 * difference / difference.numel())
    if decay is None:
        expected = torch.zeros(K, D)
        for v, d in zip(vectors(x.detach()), difference, strict=True):
            expected[nearest(v, before)] -= 2 * d / difference.numel()
        torch.testing.assert_close(layer.codebook.grad, expected)
        assert torch.equal(layer.codebook.detach(), before)


def test_codes_are_moving_averages_of_their_vectors():
    layer = build(decay=0.75)
    counts, sums = [1.0] * K, [row.clone() for row in layer.codebook]
    for seed in range(4):
        x = features(seed=seed)
        found = [[v for v in vectors(x) if nearest(v, layer.codebook) == k] for k in range(K)]
        layer(x)
        for k in range(K):
            counts[k] = 0.75 * counts[k] + 0.25 * len(found[k])
            sums[k] = 0.75 * sums[k] + 0.25 * sum(found[k], torch.zeros(D))
        expected = torch.stack([s / c for s, c in zip(sums, counts, strict=True)])
        torch.testing.assert_close(layer.codebook, expected, rtol=1e-4, atol=1e-4)
    before = layer.codebook.clone()
    layer.eval()(features())
    assert torch.equal(layer.codebook, before)  # in eval nothing moves


def far_away(**options):
    """All codes but the first are where no vector is."""
    layer = build(**options)
    layer.codebook[1:] = 100.0
    layer.sums[1:] = 100.0
    return layer


def test_codes_that_nothing_is_near_to_start_anew():
    kept, restarted = far_away(decay=0.5), far_away(decay=0.5, min_usage=0.2)
    torch.manual_seed(3)
    for seed in range(12):
        for layer in (kept, restarted):
            layer(features(seed=seed))
    assert torch.equal(kept.codebook[1:], torch.full((4, 3), 100.0))
    assert (restarted.codebook.abs() < 5).all() and restarted(features(seed=12)).codes.unique().numel() > 1
    layer = far_away(decay=0.5, min_usage=0.9)
    x = features()
    layer(x)
    mean = (0.5 * K + 0.5 * 24) / K
    places = torch.isclose(torch.stack(vectors(x)), layer.codebook[1:, None]).all(2)
    assert places.any(1).all()  # each is one of the vectors, with the least count that is no reason to start anew
    torch.testing.assert_close(layer.counts[1:], torch.full((4,), 0.9 * mean))
    torch.testing.assert_close(layer.sums[1:], layer.codebook[1:] * layer.counts[1:, None])


def test_without_decay_unused_codes_stay_and_empty_calls_change_nothing():
    layer = far_away(decay=0.0)
    layer(features())
    assert torch.equal(layer.codebook[1:], torch.full((4, 3), 100.0))
    torch.testing.assert_close(layer.codebook[0], torch.stack(vectors(features())).mean(0))
    for min_usage in (0.0, 0.5):
        layer = build(decay=0.0, min_usage=min_usage)
        before = layer.codebook.clone()
        quantized = layer(features((0, D, 2, 2)))
        assert quantized.codes.shape == (0, 2, 2) and torch.equal(layer.codebook, before)


@pytest.mark.parametrize("min_usage", [0.0, 0.9])
def test_vectors_that_are_not_finite_move_nothing(min_usage):
    whole, broken = build(decay=0.5, min_usage=min_usage), build(decay=0.5, min_usage=min_usage)
    x = features((6, D))
    torch.manual_seed(0)
    whole(x[:5])
    bad = torch.cat((x[:5], torch.full((1, D), float("nan"))))
    torch.manual_seed(1)
    assert not torch.isfinite(broken(bad).loss)
    assert torch.isfinite(broken.codebook).all() and torch.isfinite(broken.sums).all()
    if not min_usage:
        torch.testing.assert_close(broken.codebook, whole.codebook)


def test_no_code_starts_anew_from_a_vector_that_is_not_finite():
    layer = far_away(decay=0.5, min_usage=0.9)
    layer.counts[0] = 100.0  # of which the others have too small a share
    layer(torch.full((6, D), float("inf")))
    assert torch.equal(layer.codebook[1:], torch.full((4, 3), 100.0))


def test_features_are_the_codes_themselves():
    layer = build().eval()
    for scale in (1.0, 1e8):
        quantized = layer(scale * features())
        assert torch.equal(quantized.features, layer.look_up(quantized.codes))


@pytest.mark.parametrize("decay", [0.9, None])
def test_initialize_takes_vectors_of_the_data(decay):
    layer = build(decay=decay)
    x = features()
    layer.initialize(x)
    every = torch.stack(vectors(x))
    places = [(every == row).all(1).nonzero().flatten().tolist() for row in layer.codebook]
    assert all(len(place) == 1 for place in places) and len({place[0] for place in places}) == K
    layer.initialize(x[:1, :, :1])  # three vectors for five codes
    assert len({tuple(row.tolist()) for row in layer.codebook}) == 3
    if decay is not None:
        assert torch.equal(layer.counts, torch.full((K,), 3 / K))
        torch.testing.assert_close(layer.sums, layer.codebook * 3 / K)


def test_under_autocast_codes_are_as_precise_as_the_codebook():
    layer, x = build(), features().bfloat16()
    expected = build()(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        quantized = layer(x)
    assert quantized.features.dtype == torch.float32
    assert torch.equal(quantized.features, expected.features) and torch.equal(quantized.loss, expected.loss)


def test_state_dicts_hold_the_averages():
    layer, other = build(), nn.VectorQuantizer(K, D, min_usage=0.0)
    layer(features())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(features(seed=5)).features, other(features(seed=5)).features)
    assert torch.equal(layer.codebook, other.codebook)
    assert list(build(decay=None).state_dict()) == ["codebook"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_codes": 0}, "num_codes: expected an integer of at least 1, got 0"),
        ({"code_dim": 2.5}, "code_dim: expected an integer of at least 1, got 2.5"),
        ({"decay": 1.0}, "decay: expected a finite number of at least 0 and below 1, got 1.0"),
        ({"decay": "a"}, "decay: expected a finite number of at least 0 and below 1, got 'a'"),
        ({"commitment": -1}, "commitment: expected a finite number of at least 0, got -1"),
        ({"commitment": float("inf")}, "commitment: expected a finite number of at least 0, got inf"),
        ({"min_usage": 1}, "min_usage: expected a finite number of at least 0 and below 1, got 1"),
    ],
    ids=str,
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        nn.VectorQuantizer(**{"num_codes": K, "code_dim": D, **options})


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda layer: layer([1]), TypeError, "x: expected a floating point tensor, got list"),
        (
            lambda layer: layer(torch.zeros(2, D).long()),
            TypeError,
            "x: expected a floating point tensor",
        ),
        (lambda layer: layer(torch.zeros(2, D + 1)), ValueError, r"x: expected shape \[N, 3, \.\.\.\], got \[2, 4\]"),
        (lambda layer: layer(torch.zeros(D)), ValueError, r"x: expected shape \[N, 3, \.\.\.\], got \[3\]"),
        (
            lambda layer: layer.initialize(torch.zeros(9, 1)),
            ValueError,
            r"x: expected shape \[N, 3, ",
        ),
        (lambda layer: layer.initialize(torch.zeros(0, D)), ValueError, "x: expected finite vectors, at least one"),
        (lambda layer: layer.initialize(torch.full((9, D), float("inf"))), ValueError, "x: expected finite vectors"),
        (
            lambda layer: layer.look_up(torch.zeros(2)),
            TypeError,
            "codes: expected a tensor of integers",
        ),
    ],
    ids=range(8),
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call(build())
