"""Loss guidance: the gradient against closed forms, the step lengths, time travel, and samples that stay apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from scfg_fast.guidance.augment import Augment
from scfg_fast.guidance.loss import (
    PUBLISHED_SCALES,
    RULES,
    LossGuidance,
    loss_gradient,
    posterior_weight,
    renoise,
    update,
)
from scfg_fast.guidance.predictions import PREDICTION_TYPES, denoised, noise_of, prediction_of

A, AFTER = 0.3, 0.5  # signal power before and after the step


def normal(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=dtype)


def norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def error(value: Tensor, truth: Tensor) -> float:
    """Largest deviation, relative to the largest entry of the truth."""
    return float((value - truth).abs().max() / truth.abs().max())


def unchanged(copies: int) -> Augment:
    return Augment(copies=copies, translate=0.0, resize=0.0, color=0.0, cutout=0.0)


def square(target: Tensor | float = 0.0) -> Callable[[Tensor], Tensor]:
    return lambda x0: (x0 - target).square().flatten(1).sum(1)


def distance(target: Tensor | float = 0.25) -> Callable[[Tensor], Tensor]:
    return lambda x0: (x0 - target).flatten(1).norm(dim=1)


class Networks:
    """A small convolutional denoiser on 4 channels and a decoder to RGB of twice the size."""

    def __init__(self, rng: torch.Generator, dtype: torch.dtype = torch.float64) -> None:
        shapes = ((8, 4, 3, 3), (4, 8, 3, 3), (4, 3, 2, 2))
        self.weights = [(0.3 * normal(rng, *shape)).to(dtype) for shape in shapes]

    def predict(self, x: Tensor) -> Tensor:
        first, second, _ = self.weights
        return torch.conv2d(torch.tanh(torch.conv2d(x, first, padding=1)), second, padding=1)

    def decode(self, x0: Tensor) -> Tensor:
        return 0.5 + 0.2 * torch.tanh(torch.conv_transpose2d(x0.to(self.weights[2].dtype), self.weights[2], stride=2))


def test_prediction_types_agree(rng: torch.Generator) -> None:
    x0, eps = normal(rng, 2, 4, 3, 3), normal(rng, 2, 4, 3, 3)
    sample = A**0.5 * x0 + (1 - A) ** 0.5 * eps
    predictions = {"epsilon": eps, "v_prediction": A**0.5 * eps - (1 - A) ** 0.5 * x0, "sample": x0}
    assert tuple(predictions) == PREDICTION_TYPES
    for kind, prediction in predictions.items():
        assert error(denoised(prediction, sample, A, kind), x0) < 1e-15
        assert error(noise_of(prediction, sample, A, kind), eps) < 1e-15
        assert error(prediction_of(eps, sample, A, kind), prediction) < 1e-14


def test_pure_noise_can_be_denoised_from_v_and_not_from_epsilon(rng: torch.Generator) -> None:
    sample, prediction = normal(rng, 1, 4, 3, 3), normal(rng, 1, 4, 3, 3)
    assert torch.equal(denoised(prediction, sample, 0.0, "v_prediction"), -prediction)
    assert torch.equal(noise_of(prediction, sample, 0.0, "v_prediction"), sample)
    with pytest.raises(ValueError, match="begin one step later"):
        denoised(prediction, sample, 0.0, "epsilon")
    with pytest.raises(ValueError, match=r"'flow' is unknown.*alpha_bar must be in \[0, 1\), got 1.0"):
        noise_of(prediction, sample, 1.0, "flow")


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_the_pieces_are_the_gradient_of_the_whole_chain(rng: torch.Generator, kind: str, space: str) -> None:
    """Against autograd from the loss to the sample in one go, in float64: 5e-16 relative."""
    networks, sample = Networks(rng), normal(rng, 2, 4, 6, 5)
    x = sample.clone().requires_grad_(True)
    prediction = networks.predict(x)
    x0 = denoised(prediction, x, A, kind)
    whole = distance()(networks.decode(x0) if space == "pixels" else x0)
    (truth,) = torch.autograd.grad(whole.sum(), x)

    settings = LossGuidance(distance(), space=space)
    decode = networks.decode if space == "pixels" else None
    with torch.no_grad():
        loss, gradient, eps = loss_gradient(settings, networks.predict, sample, A, kind, decode, None)
    assert error(gradient, truth) < 1e-14
    assert torch.equal(loss, whole.detach())
    assert torch.equal(eps, noise_of(prediction.detach(), sample, A, kind))
    assert not (loss.requires_grad or gradient.requires_grad or eps.requires_grad)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("alpha_bar", [0.02, 0.3, 0.97])
def test_a_gaussian_prior_has_the_closed_form_of_equation_9(rng: torch.Generator, kind: str, alpha_bar: float) -> None:
    """x0 ~ N(mu, L): grad = 2 (x0_hat - y) sqrt(abar) Cov[x0 | x] / (1 - abar), Cov[x0 | x] the posterior covariance.

    Equation 9 as printed divides by sqrt(abar): it holds for the covariance of sqrt(abar) x0. 1.2e-14 relative.
    """
    n, variance = 12, 1.0 - alpha_bar
    root = normal(rng, n, n)
    prior, mean, target = root @ root.T / n + 0.1 * torch.eye(n).double(), normal(rng, n), normal(rng, 1, 3, 2, 2)
    marginal = alpha_bar * prior + variance * torch.eye(n).double()

    def predict(x: Tensor) -> Tensor:
        eps = variance**0.5 * torch.linalg.solve(marginal, (x.flatten(1) - alpha_bar**0.5 * mean).T).T.view_as(x)
        x0 = (x - variance**0.5 * eps) / alpha_bar**0.5
        return {"epsilon": eps, "v_prediction": alpha_bar**0.5 * eps - variance**0.5 * x0, "sample": x0}[kind]

    sample = normal(rng, 3, 3, 2, 2)
    settings = LossGuidance(square(target), space="latents")
    _, gradient, eps = loss_gradient(settings, predict, sample, alpha_bar, kind, None, None)
    posterior = torch.linalg.inv(torch.linalg.inv(prior) + alpha_bar / variance * torch.eye(n).double())
    x0 = (sample - variance**0.5 * eps) / alpha_bar**0.5
    slope = 2.0 * (x0 - target).flatten(1)
    assert error(gradient.flatten(1), slope @ posterior * alpha_bar**0.5 / variance) < 1e-12
    scaled = alpha_bar * posterior  # of sqrt(abar) x0
    assert error(gradient.flatten(1), slope @ scaled / (variance * alpha_bar**0.5)) < 1e-12


def test_a_half_precision_denoiser_keeps_small_and_large_gradients(rng: torch.Generator) -> None:
    """float16 model and decoder: a loss of 1e-12 times, or 1e12 times, has the float64 gradient within 0.1 %, where
    the plain chain through float16 gives zeros."""
    half = Networks(rng, torch.float16)
    full = Networks(rng)
    full.weights = [w.double() for w in half.weights]
    sample = normal(rng, 2, 4, 8, 8).half()
    for factor in (1e-12, 1.0, 1e12):
        settings = LossGuidance(lambda picture, factor=factor: factor * distance()(picture))
        arguments = (A, "epsilon")
        _, gradient, eps = loss_gradient(settings, half.predict, sample, *arguments, half.decode, None)
        _, truth, _ = loss_gradient(settings, full.predict, sample.double(), *arguments, full.decode, None)
        assert gradient.dtype == eps.dtype == torch.float32
        assert error(gradient.double(), truth) < 0.01
    x = sample.clone().requires_grad_(True)
    (plain,) = torch.autograd.grad(1e-12 * distance()(half.decode(denoised(half.predict(x), x, *arguments))).sum(), x)
    assert int((plain == 0.0).sum()) > 0.9 * plain.numel()


def test_weights_receive_no_gradient_and_the_mode_of_the_caller_stays(rng: torch.Generator) -> None:
    model = torch.nn.Conv2d(4, 4, 3, padding=1).double()
    settings, sample = LossGuidance(square(), space="latents"), normal(rng, 1, 4, 4, 4)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            before = torch.is_grad_enabled()
            loss_gradient(settings, model, sample, A, "epsilon", None, None)
            assert torch.is_grad_enabled() == before
    assert model.weight.grad is None and not sample.requires_grad


def test_inference_mode_is_refused_and_its_samples_are_not(rng: torch.Generator) -> None:
    networks, settings = Networks(rng), LossGuidance(square(), space="latents")
    with torch.inference_mode():
        sample = normal(rng, 1, 4, 4, 4)
        with pytest.raises(RuntimeError, match=r"under torch\.no_grad\(\)"):
            loss_gradient(settings, networks.predict, sample, A, "epsilon", None, None)
    _, gradient, _ = loss_gradient(settings, networks.predict, sample, A, "epsilon", None, None)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0.0


def test_identity_augmentation_is_the_plain_gradient(rng: torch.Generator) -> None:
    """One copy: the same bits. The mean over ten: 4e-16 relative."""
    networks, sample = Networks(rng), normal(rng, 2, 4, 6, 5)

    def of(augment: Augment | None) -> tuple[Tensor, Tensor, Tensor]:
        settings = LossGuidance(distance(), augment=augment)
        return loss_gradient(settings, networks.predict, sample, A, "epsilon", networks.decode, rng)

    plain = of(None)
    assert all(torch.equal(x, y) for x, y in zip(of(unchanged(1)), plain, strict=True))
    assert all(error(x, y) < 1e-15 for x, y in zip(of(unchanged(10)), plain, strict=True))


def test_augmentation_averages_loss_and_gradient_over_the_copies(rng: torch.Generator) -> None:
    """Algorithm 1, against autograd through the mean over copies in one go."""
    networks, sample, augment = Networks(rng), normal(rng, 2, 4, 6, 5), Augment(copies=5)
    x = sample.clone().requires_grad_(True)
    picture = networks.decode(denoised(networks.predict(x), x, A, "epsilon"))
    draws = augment.draws(torch.Generator().manual_seed(7), *picture.shape[2:])
    whole = torch.stack([distance()(augment.apply(picture, draw)) for draw in draws]).mean(0)
    (truth,) = torch.autograd.grad(whole.sum(), x)
    sizes = []

    def loss_fn(images: Tensor) -> Tensor:
        sizes.append(tuple(images.shape))
        return distance()(images)

    settings, generator = LossGuidance(loss_fn, augment=augment), torch.Generator().manual_seed(7)
    loss, gradient, _ = loss_gradient(settings, networks.predict, sample, A, "epsilon", networks.decode, generator)
    assert error(loss, whole.detach()) < 1e-15 and error(gradient, truth) < 1e-14
    assert sizes == [(2, 3, 12, 10)] * 5  # one copy of the batch at a time


def steps(rule: str, gradient: Tensor, eps: Tensor, scale: float = 0.7) -> Tensor:
    return update(LossGuidance(square(), rule=rule, scale=scale), gradient, eps, A, AFTER)


def test_the_length_of_every_rule(rng: torch.Generator) -> None:
    """Float64, below 1e-14 relative; every rule goes along the gradient."""
    gradient = normal(rng, 3, 4, 6, 5) * torch.tensor([1e-3, 1.0, 1e4])[:, None, None, None]
    eps = normal(rng, 3, 4, 6, 5)
    g, e, rho = norms(gradient), norms(eps), 0.7
    rms_e, rms_g = e / 120**0.5, g / 120**0.5
    c1 = AFTER**0.5 * (1 - A / AFTER) / (1 - A)
    lengths = {
        "gradient": rho * g,
        "polyak": rho * e / g,
        "normalized": torch.full((3,), rho, dtype=torch.float64),
        "freedom": rho * rms_e * ((1 - A) / A) ** 0.5 * c1 / rms_g * g,
    }
    assert tuple(lengths) == RULES == tuple(PUBLISHED_SCALES)
    for rule, length in lengths.items():
        step = steps(rule, gradient, eps)
        assert float((norms(step) / length - 1.0).abs().max()) < 1e-14
        assert float(((step * gradient).flatten(1).sum(1) / (length * g) - 1.0).abs().max()) < 1e-14


def test_polyaks_length_does_not_depend_on_the_direction(rng: torch.Generator) -> None:
    gradient, eps = normal(rng, 1, 4, 6, 5), normal(rng, 1, 4, 6, 5)
    rotation, _ = torch.linalg.qr(normal(rng, 120, 120))
    turned = (rotation @ gradient.flatten()).view_as(gradient)
    one, other = steps("polyak", gradient, eps), steps("polyak", turned, eps)
    assert float(norms(one)) == pytest.approx(0.7 * float(norms(eps) / norms(gradient)), rel=1e-14)
    assert float(norms(other)) == pytest.approx(float(norms(one)), rel=1e-13)


@pytest.mark.parametrize("rule, power", [
    ("gradient", 1), ("polyak", -1), ("normalized", 0), ("freedom", 0),
])  # fmt: skip
@pytest.mark.parametrize("factor", [1e-30, 3.0, 1e20])
def test_a_loss_k_times_as_large(rng: torch.Generator, rule: str, power: int, factor: float) -> None:
    """Through the whole chain in float32, down to gradients whose squares underflow: 4e-7 relative."""
    networks, sample = Networks(rng, torch.float32), normal(rng, 2, 4, 6, 5).float()

    def step(k: float) -> Tensor:
        settings = LossGuidance(lambda x: k * distance()(x), rule=rule, scale=0.7)
        _, gradient, eps = loss_gradient(settings, networks.predict, sample, A, "epsilon", networks.decode, None)
        return update(settings, gradient, eps, A, AFTER)

    assert error(step(factor), step(1.0) * factor**power) < 1e-6


def test_c1_is_the_weight_of_x0_in_the_posterior_mean() -> None:
    """Regress x' on (x0, x) of unit variance: x' = sqrt(a') x0 + sqrt(1 - a') e and x = sqrt(b) x' + sqrt(1 - b) n."""
    b = A / AFTER
    covariance = torch.tensor([[1.0, A**0.5], [A**0.5, 1.0]], dtype=torch.float64)  # of (x0, x)
    with_next = torch.tensor([AFTER**0.5, b**0.5], dtype=torch.float64)  # of x' with (x0, x)
    c1, c2 = torch.linalg.solve(covariance, with_next).tolist()
    assert posterior_weight(A, AFTER) == pytest.approx(c1, rel=1e-14) == pytest.approx(0.404061017820884, rel=1e-12)
    assert c2 == pytest.approx(b**0.5 * (1 - AFTER) / (1 - A), rel=1e-14)
    assert posterior_weight(A, 1.0) == pytest.approx(1.0, rel=1e-15)
    assert posterior_weight(A, A) == 0.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_a_bad_gradient_moves_its_own_sample_by_nothing(rng: torch.Generator, rule: str, bad: float) -> None:
    gradient, eps = normal(rng, 3, 4, 6, 5).float(), normal(rng, 3, 4, 6, 5).float()
    whole = steps(rule, gradient, eps)
    gradient[1] = 0.0
    gradient[1, 2, 3, 4] = bad
    step = steps(rule, gradient, eps)
    assert bool((step[1] == 0.0).all())
    assert torch.equal(step[0], whole[0]) and torch.equal(step[2], whole[2])


@pytest.mark.parametrize("rule", ["polyak", "freedom"])
def test_noise_that_is_not_finite_moves_its_own_sample_by_nothing(rng: torch.Generator, rule: str) -> None:
    gradient, eps = normal(rng, 2, 4, 6, 5).float(), normal(rng, 2, 4, 6, 5).float()
    eps[0, 0, 0, 0] = math.nan
    step = steps(rule, gradient, eps)
    assert bool((step[0] == 0.0).all()) and bool(step[1].isfinite().all()) and float(step[1].abs().max()) > 0.0


def test_levels_out_of_order_or_of_pure_noise_are_refused(rng: torch.Generator) -> None:
    gradient, eps = normal(rng, 1, 4, 2, 2), normal(rng, 1, 4, 2, 2)
    with pytest.raises(ValueError, match="from more noise to less"):
        update(LossGuidance(square()), gradient, eps, 0.5, 0.3)
    with pytest.raises(ValueError, match=r"rule='freedom' .* begin one step later"):
        update(LossGuidance(square(), rule="freedom"), gradient, eps, 0.0, 0.3)


def test_smoothing_bounds_the_slope_as_proposition_3_2_says() -> None:
    """l = C where x > 0, smoothed with N(0, sigma^2): slope at most C / (sigma sqrt(2 pi)) = half of the proposition's
    C sqrt(2 / (pi sigma^2)). Integrated over 4001 points of noise; measured within 6e-14 of the former."""
    height, spacing = 3.0, 0.004
    noise = torch.arange(-2000, 2001, dtype=torch.float64) * spacing  # [4001], in units of sigma
    density = torch.exp(-0.5 * noise.square()) / (2.0 * math.pi) ** 0.5 * spacing
    for sigma in (0.1, 1.0, 5.0):
        at = (torch.arange(-500, 501, dtype=torch.float64) + 0.5) * spacing * sigma
        smooth = (height * (at[:, None] + sigma * noise > 0.0) * density).sum(1)
        steepest = float((smooth.diff() / at.diff()).max())
        assert steepest == pytest.approx(height / (sigma * (2.0 * math.pi) ** 0.5), rel=1e-12)
        assert steepest <= height * (2.0 / (math.pi * sigma**2)) ** 0.5


@pytest.mark.parametrize("rule, scale", [
    ("gradient", 0.02), ("polyak", 0.02), ("normalized", 0.05), ("freedom", 0.02),
])  # fmt: skip
def test_a_small_step_lowers_the_loss(rng: torch.Generator, rule: str, scale: float) -> None:
    networks, sample = Networks(rng), normal(rng, 2, 4, 6, 5)
    settings = LossGuidance(distance(), rule=rule, scale=scale)
    arguments = (A, "epsilon", networks.decode, None)
    loss, gradient, eps = loss_gradient(settings, networks.predict, sample, *arguments)
    moved = sample - update(settings, gradient, eps, A, AFTER)
    assert bool((loss_gradient(settings, networks.predict, moved, *arguments)[0] < loss).all())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("augment", [None, Augment(copies=4)])
def test_a_batch_is_each_sample_alone(rng: torch.Generator, rule: str, augment: Augment | None) -> None:
    """The published code takes one norm over the batch; here float64 below 1e-13 relative (on one thread the
    same bits), augmentation included."""
    networks, target = Networks(rng), torch.rand(2, 3, 16, 12, generator=rng, dtype=torch.float64)
    sample = normal(rng, 2, 4, 8, 6) * torch.tensor([1.0, 5.0])[:, None, None, None]

    def run(which: slice) -> tuple[Tensor, Tensor]:
        settings = LossGuidance(distance(target[which]), rule=rule, scale=0.5, augment=augment)
        generator = torch.Generator().manual_seed(settings.seed)
        loss, gradient, eps = loss_gradient(
            settings, networks.predict, sample[which], A, "epsilon", networks.decode, generator
        )
        return loss, update(settings, gradient, eps, A, AFTER)

    loss, step = run(slice(None))
    for i in range(2):
        alone = run(slice(i, i + 1))
        assert error(loss[i : i + 1], alone[0]) < 1e-14
        assert error(step[i : i + 1], alone[1]) < 1e-13


@pytest.mark.parametrize("where", ["sample", "loss", "slope"])
def test_a_mate_that_is_not_finite_changes_nothing(rng: torch.Generator, where: str) -> None:
    networks, sample = Networks(rng), normal(rng, 3, 4, 8, 6)

    def run(sample: Tensor, offset: float = 0.0, factor: float = 1.0) -> Tensor:
        offsets, factors = torch.tensor([0.0, offset, 0.0]), torch.tensor([1.0, factor, 1.0])[:, None, None, None]

        def loss_fn(images: Tensor) -> Tensor:
            return distance()(images) + (images * factors).square().flatten(1).sum(1).sqrt() + offsets

        settings = LossGuidance(loss_fn, augment=Augment(copies=3), scale=0.5)
        generator = torch.Generator().manual_seed(settings.seed)
        _, gradient, eps = loss_gradient(settings, networks.predict, sample, A, "epsilon", networks.decode, generator)
        return update(settings, gradient, eps, A, AFTER)

    truth = run(sample)
    if where == "sample":
        sample[1, 0, 0, 0] = math.nan
    # An infinite loss with a finite slope, and a finite loss with the infinite slope of a square root at zero.
    step = run(sample, offset=math.inf if where == "loss" else 0.0, factor=0.0 if where == "slope" else 1.0)
    assert bool((step[1] == 0.0).all())
    assert torch.equal(step[0], truth[0]) and torch.equal(step[2], truth[2])
    assert bool(truth.isfinite().all()) and float(truth.abs().amax((1, 2, 3)).min()) > 0.0


LEVELS = [(10.0, 7.0), (2.0, 1.5), (0.5, 0.03), (0.3, 0.0)]


def affine(sigma: float, after: float, exploding: bool) -> tuple[float, float]:
    """(factor of x', factor of the noise), read off `renoise`."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    return float(renoise(one, sigma, after, zero, exploding)), float(renoise(zero, sigma, after, one, exploding))


@pytest.mark.parametrize("sigma, after", LEVELS)
@pytest.mark.parametrize("data", [0.25, 1.0, 9.0])
def test_time_travel_arrives_at_the_marginal_of_the_earlier_level(sigma: float, after: float, data: float) -> None:
    """Exactly: data of variance v has a v + 1 - a before, a' v + 1 - a' after; exploding, v + sigma^2, v + sigma'^2."""
    a, after_a = 1 / (1 + sigma**2), 1 / (1 + after**2)
    keep, added = affine(sigma, after, False)
    assert keep**2 == pytest.approx(a / after_a, rel=1e-14) and keep**2 + added**2 == pytest.approx(1.0, rel=1e-14)
    assert keep**2 * (after_a * data + 1 - after_a) + added**2 == pytest.approx(a * data + 1 - a, rel=1e-14)
    keep, added = affine(sigma, after, True)
    assert keep == 1.0
    assert keep**2 * (data + after**2) + added**2 == pytest.approx(data + sigma**2, rel=1e-14)


@pytest.mark.parametrize("exploding", [False, True])
def test_time_travel_arrives_there_statistically_too(rng: torch.Generator, exploding: bool) -> None:
    """200000 values with data of variance 4: mean and variance within 5 standard errors."""
    count, sigma, after, data = 200_000, 2.0, 1.5, 4.0
    x0 = data**0.5 * normal(rng, 1, 1, 1, count)
    scale, scale_after = (1.0, 1.0) if exploding else ((1 + sigma**2) ** -0.5, (1 + after**2) ** -0.5)
    x = scale_after * (x0 + after * normal(rng, *x0.shape))
    x = renoise(x, sigma, after, normal(rng, *x0.shape), exploding)
    variance = scale**2 * (data + sigma**2)
    assert float(x.var()) == pytest.approx(variance, abs=5 * variance * (2 / count) ** 0.5)
    assert float(x.mean()) == pytest.approx(0.0, abs=5 * (variance / count) ** 0.5)
    # The signal inside is the earlier level's as well: its share is the scale of that level.
    share = float((x * x0).mean() / x0.square().mean())
    assert share == pytest.approx(scale, abs=5 * (variance / data / count) ** 0.5)


def test_time_travel_at_the_ends(rng: torch.Generator) -> None:
    sample, noise = normal(rng, 2, 4, 3, 3), normal(rng, 2, 4, 3, 3)
    assert torch.equal(renoise(sample, math.inf, 20.0, noise, False), noise)
    for exploding in (False, True):
        assert torch.equal(renoise(sample, 2.0, 2.0, noise, exploding), sample)
        assert renoise(sample.half(), 2.0, 1.0, noise.float(), exploding).dtype == torch.float16
        with pytest.raises(ValueError, match="0 <= next_sigma <= sigma"):
            renoise(sample, 1.0, 2.0, noise, exploding)
    with pytest.raises(ValueError, match="sigma=inf"):
        renoise(sample, math.inf, 20.0, noise, True)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        LossGuidance(
            loss_fn="clip", scale=-1.0, rule="adam", space="rgb", prediction="uncond", augment=10, repeats=0,
            travel=(0.7, 0.2), start=0.5, stop=0.1, checkpointing="yes", seed=-1,
        )  # type: ignore[arg-type]  # fmt: skip
    for word in ("loss_fn must", "scale must", "rule=", "space=", "prediction=", "augment must", "repeats must",
                 "travel must", "start and stop", "checkpointing must", "seed must", "'polyak'"):  # fmt: skip
        assert word in str(caught.value)
    with pytest.raises(ValueError, match=r"Augment\(color=0\)"):
        LossGuidance(square(), space="latents", augment=Augment())


def test_the_published_scale_goes_with_the_rule() -> None:
    assert LossGuidance(square()).rho == 0.001
    assert LossGuidance(square(), rule="freedom").rho == 0.02 * 2.0  # the constant in the code times --rho_scale 2
    assert LossGuidance(square(), scale=0.0).rho == 0.0


def test_where_the_run_is_guided_and_repeated() -> None:
    settings = LossGuidance(square(), start=0.1, stop=0.8, repeats=3, travel=[0.2, 0.7])  # type: ignore[arg-type]
    assert [settings.guides(i, 10) for i in range(10)] == [False] + [True] * 7 + [False] * 2
    assert [settings.repeats_of(i, 10) for i in range(10)] == [1, 1, 3, 3, 3, 3, 3, 1, 1, 1]
    assert [LossGuidance(square(), repeats=2, stop=0.5).repeats_of(i, 4) for i in range(4)] == [2, 2, 1, 1]


def test_the_published_windows_are_those_of_the_published_timesteps() -> None:
    """100 steps at timesteps 990, 980, ... 0: travel where 300 <= t <= 800, guidance where t > 200 or t > 100."""
    timesteps = list(range(990, -1, -10))
    travel = LossGuidance(square(), repeats=10, travel=(0.19, 0.7))
    assert [travel.repeats_of(i, 100) for i in range(100)] == [10 if 300 <= t <= 800 else 1 for t in timesteps]
    for stop, last in ((0.79, 200), (0.89, 100)):
        settings = LossGuidance(square(), stop=stop)
        assert [settings.guides(i, 100) for i in range(100)] == [t > last for t in timesteps]


@pytest.mark.parametrize("loss_fn, words", [
    (lambda x: x.square().mean(), "a scalar, a mean or a sum over the whole batch, expected one loss per sample"),
    (lambda x: x.square().flatten(1).mean(1, keepdim=True), r"shape \[2, 1\], expected .* shape \[2\]"),
    (lambda x: x.square().mean().item(), "returned a float, expected a floating tensor"),
    (lambda x: x.detach().flatten(1).mean(1), "does not depend on its input differentiably"),
    (lambda x: torch.ones(2, requires_grad=True), "does not depend on its input differentiably"),
    (lambda x: (x > 0).flatten(1).sum(1), "returned torch.int64, expected a floating dtype"),
])  # fmt: skip
def test_a_loss_that_is_not_one_per_sample_is_refused(rng: torch.Generator, loss_fn: Callable, words: str) -> None:
    networks, sample = Networks(rng), normal(rng, 2, 4, 4, 4)
    settings = LossGuidance(loss_fn, space="latents")
    with pytest.raises(ValueError, match=words):
        loss_gradient(settings, networks.predict, sample, A, "epsilon", None, None)


def test_a_scalar_is_refused_for_a_batch_of_one_too(rng: torch.Generator) -> None:
    settings = LossGuidance(lambda x: x.square().mean(), space="latents")
    with pytest.raises(ValueError, match=r"expected one loss per sample, shape \[1\]; reduce over all dimensions but"):
        loss_gradient(settings, Networks(rng).predict, normal(rng, 1, 4, 4, 4), A, "epsilon", None, None)


def test_missing_pieces_and_cut_graphs_are_refused(rng: torch.Generator) -> None:
    networks, sample = Networks(rng), normal(rng, 2, 4, 4, 4)

    def run(settings: LossGuidance, predict: Callable = networks.predict, decode: Callable | None = None) -> None:
        loss_gradient(settings, predict, sample, A, "epsilon", decode, None)

    with pytest.raises(ValueError, match=r"needs a decoder; .* augment needs a generator"):
        run(LossGuidance(distance(), augment=Augment()))
    with pytest.raises(RuntimeError, match="output of predict cannot be differentiated"):
        run(LossGuidance(distance(), space="latents"), torch.no_grad()(networks.predict))
    with pytest.raises(RuntimeError, match="output of decode cannot be differentiated"):
        run(LossGuidance(distance()), decode=lambda x: networks.decode(x.detach()))
    with pytest.raises(ValueError, match="leave out a learned variance"):
        run(LossGuidance(distance(), space="latents"), lambda x: torch.cat([x, x], dim=1))
    with pytest.raises(ValueError, match=r"decode returned shape \[1, 3, 8, 8\], expected \[2, 3, H, W\]"):
        run(LossGuidance(distance()), decode=lambda x: networks.decode(x)[:1])
