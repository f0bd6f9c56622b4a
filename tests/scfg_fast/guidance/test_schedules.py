"""Weight schedules: means, ends, identities and directions of arXiv 2404.13040."""

from __future__ import annotations

import math

import pytest

from scfg_fast.guidance import SHAPES, Step, WeightSchedule
from scfg_fast.guidance.schedules import shape_value

OMEGA, N = 7.5, 50
SCALE = OMEGA + 1.0


def weights(count: int = N, scale: float = SCALE, **options) -> list[float]:
    schedule = WeightSchedule(**options)
    return [schedule.weight(Step(i, count, scale)) for i in range(count)]


def mean_omega(**options) -> float:
    return sum(weights(**options)) / N - 1.0


def mean_factor(shape: str, samples: int = 4096, **options: float) -> float:
    """Mean of a shape over the run; midpoint rule."""
    return sum(shape_value(shape, (i + 0.5) / samples, **options) for i in range(samples)) / samples


@pytest.mark.parametrize("shape", ["linear", "cosine", "inverse-linear", "sine", "v", "lambda"])
def test_the_mean_weight_is_that_of_a_constant(shape: str) -> None:
    assert mean_omega(shape=shape) == pytest.approx(7.5, abs=1e-12)


@pytest.mark.parametrize("shape, ends", {
    "constant": (1, 1), "linear": (0, 2), "cosine": (0, 2), "inverse-linear": (2, 0), "sine": (2, 0), "v": (2, 2),
    "lambda": (0, 0), "power-cosine": (0, 1),
}.items())  # fmt: skip
def test_values_at_the_ends(shape: str, ends: tuple[float, float]) -> None:
    assert (shape_value(shape, 0.0), shape_value(shape, 1.0)) == pytest.approx(ends, abs=1e-12)


@pytest.mark.parametrize("one, other", [("linear", "inverse-linear"), ("cosine", "sine"), ("v", "lambda")])
def test_opposite_shapes_add_up_to_two(one: str, other: str) -> None:
    for i in range(101):
        assert shape_value(one, i / 100) + shape_value(other, i / 100) == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize("shape, sign", [("linear", 1), ("cosine", 1), ("inverse-linear", -1), ("sine", -1)])
def test_direction_and_crossing(shape: str, sign: int) -> None:
    values = weights(shape=shape)
    assert all(sign * (b - a) > 0 for a, b in zip(values, values[1:], strict=False))
    assert shape_value(shape, 0.5) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("floor", [1.0, 2.0, 4.0])
def test_clamped_shapes(floor: float) -> None:
    for shape, base in (("clamp-linear", "linear"), ("clamp-cosine", "cosine")):
        clamped, plain = weights(shape=shape, floor=floor), weights(shape=base)
        assert all(w - 1.0 >= floor - 1e-12 for w in clamped)
        assert all(c == pytest.approx(p) for c, p in zip(clamped, plain, strict=True) if p - 1.0 >= floor)
    assert OMEGA * mean_factor("clamp-linear", floor=floor / OMEGA) == pytest.approx(
        OMEGA + floor**2 / (4 * OMEGA), abs=1e-5
    )


@pytest.mark.parametrize("floor, mean", [(1.0, 7.610), (2.0, 7.814), (4.0, 8.402)])
def test_mean_of_clamp_cosine(floor: float, mean: float) -> None:
    assert OMEGA * mean_factor("clamp-cosine", floor=floor / OMEGA) == pytest.approx(mean, abs=5e-4)


@pytest.mark.parametrize("power, mean", [(0.1, 0.9646), (0.5, 0.7026), (1.0, 0.5), (2.0, 0.3130), (4.0, 0.1782)])
def test_mean_of_power_cosine(power: float, mean: float) -> None:
    assert mean_factor("power-cosine", power=power, samples=20_000) == pytest.approx(mean, abs=1e-4)


def test_power_cosine_order() -> None:
    for i in range(1, 100):
        tau = i / 100
        assert shape_value("power-cosine", tau) == pytest.approx(shape_value("cosine", tau) / 2)
        falling = [shape_value("power-cosine", tau, power=s) for s in (0.1, 0.5, 1.0, 2.0, 4.0)]
        assert all(0.0 <= b < a <= 1.0 for a, b in zip(falling, falling[1:], strict=False))
    for power in (0.1, 1.0, 4.0):
        values = [shape_value("power-cosine", i / 100, power=power) for i in range(101)]
        assert all(b > a for a, b in zip(values, values[1:], strict=False))


def test_a_scale_of_one_stays_one() -> None:
    """What is scheduled is omega = guidance_scale - 1: never below the conditional prediction."""
    for shape in SHAPES:
        assert set(weights(shape=shape, scale=1.0, floor=2.0)) == {1.0}
        assert min(weights(shape=shape)) >= 1.0
    assert weights() == [SCALE] * N


def test_a_table_is_resampled_and_a_function_is_called() -> None:
    assert weights(count=4, scale=2.0, shape=[0.0, 1.0]) == [1.0, 1.25, 1.75, 2.0]
    assert weights(count=4, scale=2.0, shape=[0.0, 1.0, 1.0, 0.0]) == [1.0, 2.0, 2.0, 1.0]
    assert weights(count=3, scale=3.0, shape=[0.5]) == [2.0, 2.0, 2.0]
    assert weights(count=2, scale=2.0, shape=lambda tau: math.sqrt(tau)) == [1.5, 1.0 + math.sqrt(0.75)]


def test_an_interval_in_progress_or_sigma() -> None:
    inside = [w > 1.0 for w in weights(count=10, interval=(0.2, 0.7))]
    assert inside == [False] * 2 + [True] * 5 + [False] * 3
    schedule = WeightSchedule(interval=(0.5, 5.0), interval_in="sigma")
    assert [schedule.weight(Step(i, 3, 4.0, sigma)) for i, sigma in enumerate((10.0, 2.0, 0.1))] == [1.0, 4.0, 1.0]
    with pytest.raises(ValueError, match="publishes no noise levels"):
        schedule.weight(Step(0, 3, 4.0))


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        WeightSchedule(shape="triangle", interval=(0.7, 0.2), interval_in="t", power=0.0)
    for word in ("shape=", "interval must", "interval_in=", "power must"):
        assert word in str(caught.value)
    assert "'linear'" in str(caught.value) and len(SHAPES) == 10
