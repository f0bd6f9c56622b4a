"""CFG++ as a step weight: the identity with its published update, in float64, and what follows from it."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

from scfg_fast.guidance import CFGPlusPlus, step_levels
from scfg_fast.guidance.cfgpp import lam_for_mean_weight, mean_weight_of, step_weight

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def sd_levels(steps: int, cls=DDIMScheduler, **options) -> list[tuple[float, float]]:
    scheduler = cls(**SD, steps_offset=1, **options)
    scheduler.set_timesteps(steps)
    found = step_levels(scheduler)
    assert found is not None and not found[1]
    return found[0]


def draw(*shape: int) -> list[torch.Tensor]:
    return list(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("sigma, after, omega", [
    (10.0, 7.0, 2.0), (2.0, 1.5, 2.4), (0.5, 0.03, 0.638297872340425), (0.03, 0.0, 0.6),
])  # fmt: skip
def test_one_euler_step_of_cfgpp_is_one_step_of_cfg(sigma: float, after: float, omega: float) -> None:
    """D_g + sigma' (x - D_u) / sigma, the published update, against Euler with the weight omega.

    Both are linear in (x, D_c, D_u): factors within 3e-16, measured 1.2e-16; on normal draws two roundings apart.
    """
    lam = 0.6
    weight = step_weight(lam, sigma, after)

    def published(x: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
        return uncond + lam * (cond - uncond) + after * (x - uncond) / sigma

    def euler(x: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
        plain = uncond + weight * (cond - uncond)
        return x + (after - sigma) * (x - plain) / sigma

    assert weight == pytest.approx(omega, abs=1e-15)
    factors = torch.eye(3, dtype=torch.float64)
    assert float((euler(*factors) - published(*factors)).abs().max()) < 3e-16
    x, cond, uncond = draw(4, 8)
    assert float((euler(x, cond, uncond) - published(x, cond, uncond)).abs().max()) < 1e-15


def test_one_ddim_step_of_cfgpp_is_one_step_of_cfg() -> None:
    """x' = sqrt(a') x0_lam + sqrt(1 - a') eps_u, equations 9 to 13, against DDIM with the weight omega."""
    lam, a, after = 0.6, 0.3, 0.5
    x, cond, uncond = draw(4, 8)

    def ddim(eps: torch.Tensor, renoise: torch.Tensor) -> torch.Tensor:
        return after**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - after) ** 0.5 * renoise

    published = ddim(uncond + lam * (cond - uncond), uncond)
    weight = step_weight(lam, ((1 - a) / a) ** 0.5, ((1 - after) / after) ** 0.5)
    eps = uncond + weight * (cond - uncond)
    assert float((ddim(eps, eps) - published).abs().max()) < 1e-14


def test_one_flow_step_of_cfgpp_is_one_step_of_cfg() -> None:
    """x = (1 - t) x0 + t e with velocity v = e - x0: guided x0, unconditional e."""
    lam, t, after = 0.6, 0.7, 0.5
    x, cond, uncond = draw(4, 8)
    x0 = lambda v: x - t * v  # noqa: E731
    published = (1 - after) * x0(uncond + lam * (cond - uncond)) + after * (x + (1 - t) * uncond)
    weight = step_weight(lam, t, after, flow=True)
    assert weight == pytest.approx(1.05, rel=1e-15)
    plain = x + (after - t) * (uncond + weight * (cond - uncond))
    assert float((plain - published).abs().max()) < 1e-14


def test_lam_zero_is_unconditional_and_the_last_step_of_lam_one_is_conditional() -> None:
    assert step_weight(0.0, 2.0, 1.5) == 0.0
    assert step_weight(1.0, 0.03, 0.0) == 1.0
    assert step_weight(0.6, 0.03, 0.03) == 0.6
    assert step_weight(0.6, float("inf"), 20.0) == 0.6
    x, cond, uncond = draw(4, 8)
    assert torch.equal(euler_step(x, torch.lerp(uncond, cond, 1.0), 0.03, 0.0), cond)
    assert torch.equal(euler_step(x, torch.lerp(uncond, cond, 0.0), 2.0, 1.5), euler_step(x, uncond, 2.0, 1.5))


def euler_step(x: torch.Tensor, denoised: torch.Tensor, sigma: float, after: float) -> torch.Tensor:
    """Variance exploding, from the denoised sample."""
    return denoised + after / sigma * (x - denoised)


@pytest.mark.parametrize("sigma, after", [(10.0, 7.0), (2.0, 1.5), (0.5, 0.03), (0.03, 0.0)])
def test_the_step_is_moved_by_lam_times_the_difference_at_any_levels(sigma: float, after: float) -> None:
    """D_g - D_u = lam (D_c - D_u), whatever the weight that stands for it; measured 7e-16."""
    x, cond, uncond = draw(4, 8)
    guided = uncond + step_weight(0.6, sigma, after) * (cond - uncond)
    moved = euler_step(x, guided, sigma, after) - euler_step(x, uncond, sigma, after)
    assert float((moved - 0.6 * (cond - uncond)).abs().max()) < 2e-15


def test_a_run_in_either_scale_is_the_same() -> None:
    """Euler, variance exploding, and DDIM on x_VP = sqrt(abar) x_VE, a nonlinear denoiser; measured 1.3e-15."""
    levels = [14.0, 6.0, 2.5, 1.0, 0.3, 0.05]
    x, first, second = draw(4, 8)
    abar = lambda sigma: 1.0 / (1.0 + sigma**2)  # noqa: E731
    exploding, preserving = levels[0] * x, abar(levels[0]) ** 0.5 * levels[0] * x
    for sigma, after in zip(levels, levels[1:], strict=False):
        weight = step_weight(0.6, sigma, after)
        at = preserving / abar(sigma) ** 0.5
        assert float((at - exploding).abs().max()) < 1e-14 * levels[0]
        guided = [torch.lerp(torch.tanh(y / sigma + first), torch.sin(y + second), weight) for y in (exploding, at)]
        eps = (at - guided[1]) / sigma
        exploding = euler_step(exploding, guided[0], sigma, after)
        preserving = abar(after) ** 0.5 * guided[1] + (1.0 - abar(after)) ** 0.5 * eps
    assert float((preserving / abar(levels[-1]) ** 0.5 - exploding).abs().max()) < 1e-14


@pytest.mark.parametrize("steps, ratio", [(10, 2.9), (20, 5.1), (50, 12.0), (100, 23.6)])
def test_the_mean_weight_grows_with_the_number_of_steps(steps: int, ratio: float) -> None:
    """SD 1.5 with DDIM: lam 1.0 at 50 steps is the paper's omega 12.5, within its LPIPS matching."""
    levels = sd_levels(steps, set_alpha_to_one=False)
    assert mean_weight_of(1.0, levels) == pytest.approx(ratio, abs=0.06)


def test_levels_of_ddim_are_those_of_its_own_step() -> None:
    """Timestep t goes to t - 1000 // N; below 0 it goes to the final alpha, here that of t = 0."""
    alphas = DDIMScheduler(**SD).alphas_cumprod.double()
    sigma = ((1 - alphas) / alphas).sqrt().tolist()
    levels = sd_levels(50, set_alpha_to_one=False)
    expected = [(sigma[t], sigma[max(0, t - 20)]) for t in range(981, 0, -20)]
    assert torch.tensor(levels).allclose(torch.tensor(expected), rtol=1e-5)
    weights = [step_weight(1.0, *pair) for pair in levels]
    assert (weights[0], weights[25]) == pytest.approx((9.1, 15.7), abs=0.3)


def test_the_published_code_reads_abar_one_index_early() -> None:
    """Its table begins with a 1, so that timestep t has the abar of t - 1: SD 1.5, 50 steps of DDIM."""
    alphas = DDIMScheduler(**SD).alphas_cumprod.double()
    sigma = ((1 - alphas) / alphas).sqrt()
    ours = [sigma_now for sigma_now, _ in sd_levels(50, set_alpha_to_one=False)]
    published = [float(sigma[t - 1]) for t in range(981, 0, -20)]
    lower = [1.0 - theirs / level for theirs, level in zip(published, ours, strict=True)]
    assert lower[0] == pytest.approx(0.0059, abs=1e-4) and lower[25] == pytest.approx(0.0033, abs=1e-4)
    assert max(lower[:-1]) == pytest.approx(0.0245, abs=1e-4) and lower[-1] == pytest.approx(0.294, abs=1e-3)


def test_lam_and_mean_weight_are_inverse() -> None:
    scheduler = DDIMScheduler(**SD, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    lam = lam_for_mean_weight(7.5, scheduler, 50)
    assert lam == pytest.approx(7.5 / 12.0, abs=0.005)
    assert mean_weight_of(lam, sd_levels(50, set_alpha_to_one=False)) == pytest.approx(7.5)


def test_euler_levels_are_the_schedulers_sigmas() -> None:
    scheduler = EulerDiscreteScheduler(**SD)
    scheduler.set_timesteps(7)
    levels, flow = step_levels(scheduler)
    assert not flow and levels == list(zip(scheduler.sigmas.tolist(), scheduler.sigmas.tolist()[1:], strict=False))
    assert levels[-1][1] == 0.0


def test_other_schedulers_are_refused_by_name_with_those_that_work() -> None:
    with pytest.raises(ValueError, match=r"UniPCMultistepScheduler .* DDIMScheduler, .*DPMSolverMultistepScheduler"):
        CFGPlusPlus().check(UniPCMultistepScheduler())
    with pytest.raises(ValueError, match="lam must not be negative"):
        CFGPlusPlus(lam=-0.1)
