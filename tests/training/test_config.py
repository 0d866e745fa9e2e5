"""The training configuration: checks, budget and schedules."""

from __future__ import annotations

import math

import pytest

from fastgen.training import TrainConfig


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "expected max_steps, max_seconds or both, got neither"),
        ({"max_steps": 0}, "max_steps: expected an integer of at least 1, got 0"),
        ({"max_steps": 10.0}, "max_steps: expected an integer of at least 1, got 10.0"),
        ({"max_seconds": 0.0}, "max_seconds: expected a number above 0, got 0.0"),
        ({"max_seconds": float("nan")}, "max_seconds: expected a number above 0, got nan"),
        ({"max_steps": 1, "batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"max_steps": 1, "learning_rate": -1e-3}, "learning_rate: expected a number above 0, got -0.001"),
        ({"max_steps": 1, "clip_norm": 0}, "clip_norm: expected a number above 0, got 0"),
        ({"max_steps": 1, "ema_decay": 1.0}, "ema_decay: expected a number of at least 0 and below 1, got 1.0"),
        ({"max_steps": 1, "weight_decay": -0.1}, "weight_decay: expected a number of at least 0"),
        ({"max_steps": 1, "validate_every": 0}, "validate_every: expected an integer of at least 1, got 0"),
        ({"max_steps": 1, "seed": 0.5}, "seed: expected an integer, got 0.5"),
    ],
    ids=str,
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(**options)


def test_the_limit_that_is_reached_first_counts():
    both = TrainConfig(max_steps=100, max_seconds=10.0)
    assert both.budget_used(50, 1.0) == 0.5
    assert both.budget_used(50, 9.0) == 0.9
    assert TrainConfig(max_seconds=10.0).budget_used(1000, 5.0) == 0.5
    assert TrainConfig(max_steps=100).budget_used(100, 1e9) == 1.0


def test_learning_rate_warms_up_and_decays_to_zero():
    config = TrainConfig(max_steps=1000, learning_rate=0.5, warmup=0.1)
    rates = [config.learning_rate_at(step, 0.0) for step in range(1000)]
    top = rates.index(max(rates))
    assert 95 <= top <= 105
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[0] < 0.01
    assert 0.48 < rates[top] <= 0.5
    assert 0 <= rates[-1] < 1e-5


def test_learning_rate_follows_the_clock_when_time_is_the_limit():
    config = TrainConfig(max_seconds=10.0, learning_rate=1.0, warmup=0.0)
    assert config.learning_rate_at(0, 0.0) == 1.0
    assert config.learning_rate_at(123, 5.0) == pytest.approx(0.5)
    assert config.learning_rate_at(999, 11.0) == pytest.approx(0.0)


def test_moving_average_follows_fast_at_first():
    config = TrainConfig(max_steps=1, ema_decay=0.99)
    decays = [config.ema_decay_at(step) for step in range(2000)]
    assert decays[0] == 0.1
    assert decays == sorted(decays)
    assert decays[-1] == 0.99


def test_the_average_forgets_the_first_weights_within_a_few_steps():
    """Whatever the decay, so that a short run is not held back by the weights it began with."""
    config = TrainConfig(max_steps=1, ema_decay=0.9999)
    assert math.prod(config.ema_decay_at(step) for step in range(20)) < 1e-6
