"""Characteristic Guidance, loss guidance, CFG++ in a multistep solver, the per-pixel rule: through the public call."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    T2IAdapter,
)

import scfg_fast
from lab.rounding import relative
from lab.tiny.loops import NEGATIVES, PROMPTS, Literal
from lab.tiny.unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from scfg_fast import SCFGConfig
from scfg_fast.guidance import (
    Augment,
    CFGPlusPlus,
    CharacteristicGuidance,
    CharacteristicSolver,
    LossGuidance,
    WeightSchedule,
)
from scfg_fast.pipelines.checks import LOSS_SCHEDULERS, overflows

PLAIN = SCFGConfig(rates="none")
STEPS = 4
SCALE = 6.0
TIGHT = CharacteristicGuidance(tolerance=1e-5, solver=CharacteristicSolver("identity", memory=4))


def to_dark(x0: torch.Tensor) -> torch.Tensor:
    """A loss per picture: its mean square."""
    return x0.square().mean((1, 2, 3))


def nothing(x0: torch.Tensor) -> torch.Tensor:
    return 0.0 * x0.sum((1, 2, 3))


LATENT_LOSS = LossGuidance(to_dark, scale=0.05, space="latents")


def run(pipe, samples: tuple[int, ...] = (0, 1), **kwargs: Any) -> torch.Tensor:
    options = dict(num_inference_steps=STEPS, guidance_scale=SCALE, output_type="latent") | kwargs
    generators = [torch.Generator().manual_seed(seed) for seed in samples]
    prompts, negatives = ([texts[i] for i in samples] for texts in (PROMPTS, NEGATIVES))
    return pipe(prompts, negative_prompt=negatives, generator=generators, **options).images


# Loss guidance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, kind, repeats", [
    ("sd", "epsilon", 1), ("sd", "v_prediction", 1), ("sd", "epsilon", 3), ("sd", "v_prediction", 3),
    ("sdxl", "epsilon", 3),
])  # fmt: skip
def test_loss_guidance_is_the_published_loop(family: str, kind: str, repeats: int) -> None:
    """Algorithms 2 and 3 of 2403.12404, written out with DDIM's own formulas."""
    pipe = tiny_sd_pipeline(prediction_type=kind) if family == "sd" else tiny_sdxl_pipeline()
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.double()
    pipe.scheduler.final_alpha_cumprod = pipe.scheduler.final_alpha_cumprod.double()
    rho, random = 0.05, torch.Generator().manual_seed(7)
    loop = Literal(pipe, STEPS)
    start = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    x, alphas = start, pipe.scheduler.alphas_cumprod.double()
    for t in loop.scheduler.timesteps:
        a, before = alphas[t], int(t) - 1000 // STEPS
        after = alphas[before] if before >= 0 else pipe.scheduler.final_alpha_cumprod.double()
        for repeat in range(repeats):
            x = x.double().detach().requires_grad_(True)
            uncond, cond = loop.halves(x, x, t)
            guided = uncond + SCALE * (cond - uncond)
            if kind == "epsilon":
                eps, x0 = guided, (x - (1 - a).sqrt() * guided) / a.sqrt()
            else:
                eps, x0 = a.sqrt() * guided + (1 - a).sqrt() * x, a.sqrt() * x - (1 - a).sqrt() * guided
            (g,) = torch.autograd.grad(to_dark(x0).sum(), x)
            with torch.no_grad():
                step = after.sqrt() * x0 + (1 - after).sqrt() * eps
                norms = (eps.flatten(1).norm(dim=1) / g.flatten(1).norm(dim=1).square()).view(-1, 1, 1, 1)
                x_next = step - rho * norms * g
                if repeat + 1 < repeats:
                    fresh = torch.randn(1, 4, 16, 16, generator=random)
                    x = (a / after).sqrt() * x_next + (1 - a / after).sqrt() * fresh
        x = x_next
    settings = LossGuidance(to_dark, scale=rho, space="latents", repeats=repeats, seed=7)
    handle = scfg_fast.enable(pipe, PLAIN, loss=settings)
    assert relative(run(pipe, latents=start), x) < 5e-6
    assert len(handle.stats.losses) == STEPS * repeats
    assert handle.stats.samples == 4 * STEPS * (2 * repeats), "evaluations: one for the step, one for the gradient"
    assert relative(run(pipe, latents=start, scfg_kwargs={"loss": None}), x) > 1e-3


def test_loss_guidance_is_the_same_in_either_scale() -> None:
    """Euler (variance exploding) and DDIM (preserving) take the same step; so does the correction of it."""
    pipe = tiny_sd_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    settings = LossGuidance(to_dark, scale=0.05, space="latents", repeats=2)
    scfg_fast.enable(pipe, PLAIN, loss=settings)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    expected = run(pipe, latents=noise)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, final_sigmas_type="sigma_min")
    pipe.scheduler.set_timesteps(STEPS)
    first = float(pipe.scheduler.sigmas[0])
    unit = float(pipe.scheduler.init_noise_sigma)
    actual = run(pipe, latents=noise * (1 + first**2) ** 0.5 / unit)
    last = float(pipe.scheduler.sigmas[-1])
    assert relative(actual / (1 + last**2) ** 0.5, expected) < 2e-3
    assert relative(run(pipe, latents=noise, scfg_kwargs={"loss": None}), expected) > 1e-2


@pytest.mark.parametrize("config", [PLAIN, SCFGConfig()], ids=["plain", "scfg"])
def test_without_a_gradient_no_bit_changes(pipe, config: SCFGConfig) -> None:
    handle = scfg_fast.enable(pipe, config)
    expected = run(pipe)
    handle.loss = LossGuidance(nothing)
    assert torch.equal(run(pipe), expected)
    assert handle.stats.loss_curve == [[0.0, 0.0]] * STEPS


@pytest.mark.parametrize("config", [PLAIN, SCFGConfig()], ids=["plain", "scfg"])
@pytest.mark.parametrize("space", ["latents", "pixels"])
def test_the_loss_falls(pipe, space: str, config: SCFGConfig) -> None:
    """Against the same run whose gradient is thrown away; normalised steps, so that strengths are alike."""
    losses = {}
    for scale in (0.0, 20.0):
        settings = LossGuidance(to_dark, scale=scale, rule="normalized", space=space)
        handle = scfg_fast.enable(pipe, config, loss=settings)
        run(pipe, guidance_scale=3.0)
        losses[scale] = handle.stats.loss_curve[-1]
        assert handle.stats.steps_applied == (0 if config is PLAIN else STEPS)
    assert all(after < 0.95 * before for after, before in zip(losses[20.0], losses[0.0], strict=True))


def test_rates_hold_in_the_gradient() -> None:
    """With S-CFG the loss looks through u + s r d: the first step's gradient, from the regions that the hook found."""
    pipe = tiny_sd_pipeline()
    rates, seen = [], []
    handle = scfg_fast.enable(pipe, on_regions=lambda step, regions: rates.append(regions.rate.clone()))
    handle.loss = LossGuidance(lambda x0: _keep(x0, seen), scale=0.0, space="latents")
    run(pipe, num_inference_steps=1)
    loop = Literal(pipe, 1)
    t = loop.scheduler.timesteps[0]
    with torch.no_grad():
        uncond, cond = loop.halves(loop.start, loop.start, t)
        a = pipe.scheduler.alphas_cumprod[t]
        x0 = (loop.start - (1 - a).sqrt() * (uncond + SCALE * rates[0] * (cond - uncond))) / a.sqrt()
    assert relative(seen[0], x0) < 1e-5


def _keep(x0: torch.Tensor, into: list[torch.Tensor]) -> torch.Tensor:
    into.append(x0.detach().clone())
    return to_dark(x0)


@pytest.mark.parametrize("settings", [
    LossGuidance(to_dark, scale=2.0, rule="normalized", augment=Augment(copies=2), repeats=2),
    LossGuidance(to_dark, scale=2.0, rule="freedom", space="latents", prediction="conditional"),
], ids=["augmented", "conditional"])  # fmt: skip
@pytest.mark.parametrize("config", [PLAIN, SCFGConfig()], ids=["plain", "scfg"])
def test_batch_mates_do_not_meet_in_the_loss(config: SCFGConfig, settings: LossGuidance) -> None:
    pipe = tiny_sd_pipeline()
    scfg_fast.enable(pipe, config, loss=settings)
    together = run(pipe)
    assert relative(torch.cat([run(pipe, (0,)), run(pipe, (1,))]), together) < 2e-4


def test_the_conditional_prediction_costs_half() -> None:
    pipe = tiny_sd_pipeline()
    handle = scfg_fast.enable(pipe, PLAIN, loss=LossGuidance(to_dark, space="latents", prediction="conditional"))
    run(pipe)
    assert handle.stats.samples == (4 + 2) * STEPS


def test_loss_guidance_without_text_guidance(recwarn) -> None:
    pipe = tiny_sd_pipeline()
    handle = scfg_fast.enable(pipe, PLAIN)
    handle.loss = LossGuidance(to_dark, scale=20.0, rule="normalized", space="latents")
    guided = run(pipe, guidance_scale=1.0)
    assert handle.stats.samples == (2 + 2) * STEPS and len(handle.stats.losses) == STEPS
    assert not [w for w in recwarn if issubclass(w.category, scfg_fast.SCFGWarning)]
    assert relative(run(pipe, guidance_scale=1.0, scfg_kwargs={"enabled": False}), guided) > 1e-2


def test_a_part_of_the_run() -> None:
    pipe = tiny_sd_pipeline()
    settings = LossGuidance(to_dark, space="latents", start=0.25, stop=0.75, repeats=3, travel=(0.5, 1.0))
    handle = scfg_fast.enable(pipe, PLAIN, loss=settings)
    run(pipe)
    assert len(handle.stats.losses) == 0 + 1 + 3 + 0


def test_gradient_checkpointing_changes_memory_alone() -> None:
    pipe = tiny_sd_pipeline()
    handle = scfg_fast.enable(pipe, PLAIN, loss=LATENT_LOSS)
    expected = run(pipe)
    handle.loss = LossGuidance(to_dark, scale=0.05, space="latents", checkpointing=True)
    assert relative(run(pipe), expected) < 1e-6
    assert not pipe.unet.is_gradient_checkpointing
    pipe.unet.enable_gradient_checkpointing()
    run(pipe)
    assert pipe.unet.is_gradient_checkpointing


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_time_travel_takes_back_the_history(scheduler) -> None:
    """A repeated step without a correction, from the very noise that the first one ended in, is the step itself."""
    pipe = tiny_sd_pipeline()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    handle = scfg_fast.enable(pipe, PLAIN, loss=LossGuidance(nothing, space="latents", repeats=3, travel=(0.5, 1.0)))
    travelled = run(pipe)
    assert handle.stats.samples == 4 * (2 + 2 + 6 + 6)
    assert torch.isfinite(travelled).all()
    handle.loss = LossGuidance(nothing, space="latents")
    assert torch.equal(run(pipe), run(pipe, scfg_kwargs={"loss": None}))


# Characteristic Guidance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, kind", [("sd", "epsilon"), ("sd", "v_prediction"), ("sdxl", "epsilon")])
@pytest.mark.parametrize("config", [PLAIN, SCFGConfig()], ids=["plain", "scfg"])
def test_characteristic_guidance_solves_its_equation(family: str, kind: str, config: SCFGConfig) -> None:
    """Every step's result satisfies dx = sqrt(1 - abar) (eps_u(x2) - eps_c(x1)), checked with the denoiser alone."""
    pipe = tiny_sd_pipeline(prediction_type=kind) if family == "sd" else tiny_sdxl_pipeline()
    rates: list[torch.Tensor] = []
    # At the noise, random weights that predict v make a shift of v / sqrt(abar): too steep to solve for.
    first = 0 if kind == "epsilon" else STEPS // 2
    settings = dataclasses.replace(TIGHT, start=first / STEPS)
    handle = scfg_fast.enable(
        pipe, config, characteristic=settings, on_regions=lambda step, regions: rates.append(regions.rate.clone())
    )
    inputs: list[tuple[torch.Tensor, ...]] = []
    predictions: list[torch.Tensor] = []
    unet_inputs = pipe.unet.register_forward_pre_hook(lambda m, args: inputs.append(args[0].chunk(2)))
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda p, *args, **kwargs: predictions.append(p) or step(p, *args, **kwargs)
    run(pipe)
    unet_inputs.remove()
    del pipe.scheduler.step

    assert len(handle.stats.characteristic) == STEPS - first
    loop, at = Literal(pipe, STEPS), first
    for index, solved in enumerate(handle.stats.characteristic, first):
        assert solved.converged.all() and solved.step == index
        x = inputs[at][0]
        evaluations = int(solved.iterations.max())
        x2, x1 = inputs[at + evaluations]
        at += 1 + evaluations
        t = loop.scheduler.timesteps[index]
        a = pipe.scheduler.alphas_cumprod[t]
        with torch.no_grad():
            u, c = loop.halves(x2, x1, t)
        if kind == "v_prediction":
            u, c = (a.sqrt() * p + (1 - a).sqrt() * y for p, y in ((u, x2), (c, x1)))
        dx = x2 - x1
        residual = dx - (1 - a).sqrt() * (u - c)
        assert residual.square().mean((1, 2, 3)).sqrt().max() < 5e-5
        weight = SCALE * rates[index] if rates else SCALE
        assert relative(weight * x1 - (weight - 1) * x2, x) < 1e-5, "the two inputs mix to the sample"
        guided = weight * c - (weight - 1) * u
        if kind == "v_prediction":
            guided = (guided - (1 - a).sqrt() * x) / a.sqrt()
        assert relative(predictions[index], guided) < 1e-4
    assert relative(run(pipe, scfg_kwargs={"characteristic": None}), run(pipe)) > 1e-3


@pytest.mark.parametrize("config", [PLAIN, SCFGConfig()], ids=["plain", "scfg"])
def test_where_it_does_not_converge_no_bit_changes(pipe, config: SCFGConfig) -> None:
    handle = scfg_fast.enable(pipe, config)
    expected = run(pipe)
    handle.characteristic = CharacteristicGuidance(max_iterations=1, tolerance=1e-12)
    assert torch.equal(run(pipe), expected)
    assert not any(step.converged.any() for step in handle.stats.characteristic)


def test_one_that_does_not_converge_leaves_its_mate_alone() -> None:
    """The second sample's denoiser is made to jump; the first is what it is alone."""
    pipe = tiny_sd_pipeline()
    handle = scfg_fast.enable(pipe, PLAIN, characteristic=dataclasses.replace(TIGHT, max_iterations=20))
    alone = run(pipe, (0,))
    calls = []

    def jump(module, args, output):
        calls.append(None)
        wild = output[0].clone()
        wild[-1] += math.sin(1e3 * len(calls)) * wild[-1].std()  # the conditional half of the second sample
        return (wild,)

    jumping = pipe.unet.register_forward_hook(jump)
    together = run(pipe)
    jumping.remove()
    assert relative(together[:1], alone) < 1e-4
    assert all(bool(step.converged[0]) and not bool(step.converged[1]) for step in handle.stats.characteristic)


def test_a_part_of_the_run_is_shifted_and_the_rest_is_stock() -> None:
    pipe = tiny_sd_pipeline()
    handle = scfg_fast.enable(pipe, PLAIN, characteristic=CharacteristicGuidance(stop=0.5))
    run(pipe)
    assert [step.step for step in handle.stats.characteristic] == [0, 1]
    handle.schedule = WeightSchedule(interval=(0.0, 0.25))
    run(pipe)
    assert [step.step for step in handle.stats.characteristic] == [0], "no guidance, no exaggeration of it"


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_regularisation_is_that_of_the_level_wherever_the_run_begins(
    monkeypatch: pytest.MonkeyPatch, start: float
) -> None:
    """As published, anchored at the trained table's last level: a later start changes no other step's."""
    pipe, seen = tiny_sd_pipeline(), []
    original = CharacteristicGuidance.regularization_at

    def recorded(settings: CharacteristicGuidance, *levels: float) -> float:
        seen.append((levels[0], original(settings, *levels)))
        return seen[-1][1]

    monkeypatch.setattr(CharacteristicGuidance, "regularization_at", recorded)
    scfg_fast.enable(pipe, PLAIN, characteristic=CharacteristicGuidance(start=start))
    run(pipe)
    abar = pipe.scheduler.alphas_cumprod
    levels = abar[pipe.scheduler.timesteps].tolist()[int(start * STEPS) :]
    assert [level for level, _ in seen] == pytest.approx(levels, rel=1e-5)
    assert [reg for _, reg in seen] == pytest.approx([float(abar[-1]) / level for level in levels], rel=1e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.6])
def test_characteristic_guidance_through_the_documented_rescale(rescale: float) -> None:
    """With guidance_rescale the pipeline reads the conditional half again, which stays what it was."""
    pipe = tiny_sdxl_pipeline()
    scfg_fast.enable(pipe, PLAIN, characteristic=TIGHT)
    assert torch.isfinite(run(pipe, guidance_rescale=rescale)).all()


# The per-pixel rule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SCFGConfig.pixels(), SCFGConfig.pixels(rate_min=0.4, rate_max=1.0)])
def test_the_per_pixel_rule_in_the_pipeline(pipe, config: SCFGConfig) -> None:
    loop = Literal(pipe, STEPS)
    x = loop.start
    with torch.no_grad():
        for t in loop.scheduler.timesteps:
            uncond, cond = loop.halves(x, x, t)
            energy = (cond - uncond).square().mean(1, keepdim=True)
            low, high = energy.amin((2, 3), keepdim=True), energy.amax((2, 3), keepdim=True)
            share = (energy - low) / (high - low + 1e-8)
            weight = SCALE * (config.rate_max - share * (config.rate_max - config.rate_min))
            x = loop.scheduler.step(uncond + weight * (cond - uncond), t, x).prev_sample
    handle = scfg_fast.enable(pipe, config)
    assert relative(run(pipe), x) < 5e-6
    assert handle.stats.layers == () and handle.stats.steps_applied == STEPS
    assert relative(run(pipe, guidance_rescale=1e-9), x) < 1e-4, "where the conditional half is read again"


def test_the_per_pixel_rule_needs_a_range() -> None:
    with pytest.raises(ValueError, match="needs both rate_min and rate_max"):
        SCFGConfig.pixels(rate_max=None)


# CFG++ in DPM-Solver++ -----------------------------------------------------------------------------------------------


def two_m_cfgpp(pipe, lam: float) -> torch.Tensor:
    """DPM-Solver++ 2M with CFG++ in the consistent form, in denoised samples, as the solver's paper writes steps."""
    loop = Literal(pipe, STEPS)
    sigmas = loop.scheduler.sigmas.double()
    x, old, steps = loop.start, None, len(loop.scheduler.timesteps)
    with torch.no_grad():
        for i, t in enumerate(loop.scheduler.timesteps):
            sigma, after = sigmas[i], sigmas[i + 1]
            signal, next_signal = 1 / (1 + sigma**2).sqrt(), 1 / (1 + after**2).sqrt()
            eps_u, eps_c = loop.halves(x, x, t)
            d_u, d_c = ((x - sigma * signal * eps) / signal for eps in (eps_u, eps_c))
            guided = d_u + lam * (d_c - d_u)
            ratio = after / sigma  # e^-h
            step = guided - ratio * d_u + ratio * x / signal
            if old is not None and after > 0 and not (i == steps - 1 and loop.scheduler.config.lower_order_final):
                h, before = -(ratio.log()), -(sigma / sigmas[i - 1]).log()
                step = step + (1 - ratio) * (d_u - old) / (2 * before / h)
            x, old = next_signal * step, d_u
    return x


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("options", [{}, {"final_sigmas_type": "sigma_min", "lower_order_final": False}])
def test_cfgpp_in_a_multistep_solver(pipe, lam: float, options: dict) -> None:
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **options)
    expected = two_m_cfgpp(pipe, lam)
    handle = scfg_fast.enable(pipe, PLAIN, schedule=CFGPlusPlus(lam))
    assert relative(run(pipe), expected) < 2e-5
    assert handle.stats.samples == 4 * STEPS and "step" not in vars(pipe.scheduler)


class Constant(torch.nn.Module):
    """D_u and D_c that never change: what it predicts is the noise that leads to them."""

    def __init__(self, unet: torch.nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.inner, self.scheduler = unet, scheduler
        random = torch.Generator().manual_seed(3)
        self.register_buffer("targets", torch.randn(2, 4, 16, 16, generator=random, dtype=torch.float64))

    def denoise(self, sample: torch.Tensor, t: Any) -> torch.Tensor:
        a = self.scheduler.alphas_cumprod[int(t)].double()
        return (sample.double() - a.sqrt() * self.targets.repeat_interleave(sample.shape[0] // 2, 0)) / (1 - a).sqrt()


def with_constant_denoiser(monkeypatch, pipe) -> Constant:
    """The tiny pipeline with its UNet's answer replaced, so that everything else is as it was."""
    constant = Constant(pipe.unet, pipe.scheduler)

    def forward(sample, timestep, encoder_hidden_states=None, **kwargs):
        return (constant.denoise(sample, timestep).to(sample.dtype),)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    return constant


def test_the_multistep_form_is_consistent(monkeypatch) -> None:
    """Constant denoised samples: 2M extrapolates nothing and equals its first-order form. The published form that mixes
    guided and unconditional in the difference does not, by lam d / 2r a step."""
    pipe = tiny_sd_pipeline()
    images = {}
    for order in (1, 2):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=order)
        constant = with_constant_denoiser(monkeypatch, pipe)
        scfg_fast.enable(pipe, PLAIN, schedule=CFGPlusPlus(0.8))
        images[order] = run(pipe)
    assert relative(images[2], images[1]) < 2e-6
    uncond, cond = constant.targets
    guided = uncond + 0.8 * (cond - uncond)
    sigmas = pipe.scheduler.sigmas.double()
    x = Literal(pipe, STEPS).start.double() * (1 + sigmas[0] ** 2).sqrt()
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        x = guided + after / sigma * (x - uncond)  # Euler CFG++
    assert relative(images[2], x / (1 + sigmas[-1] ** 2).sqrt()) < 2e-6
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    # The inconsistent form, on numbers: D_g - D_u,old instead of D_u - D_u,old.
    d_u, d_c, lam, h, r = 0.3, 1.1, 0.8, 0.5, 1.0
    d_g = d_u + lam * (d_c - d_u)
    extra = -math.expm1(-h) * (d_g - d_u) / (2 * r)
    assert extra == pytest.approx(-math.expm1(-h) * lam * (d_c - d_u) / (2 * r)) and extra > 0.1


@pytest.mark.parametrize("config", [PLAIN, SCFGConfig()], ids=["plain", "scfg"])
def test_cfgpp_in_the_solvers_first_order_is_its_weights(pipe, config: SCFGConfig) -> None:
    """Renoised and added up, or plain guidance with the weight of the identity in every step: the same."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    handle = scfg_fast.enable(pipe, config, schedule=CFGPlusPlus(1.2))
    actual = run(pipe)
    weights = handle.stats.weights
    assert handle.stats.steps_applied == (0 if config is PLAIN else STEPS) and min(weights) > 1.05

    def set_next(pipe, step, timestep, tensors):
        pipe._guidance_scale = weights[min(step + 1, STEPS - 1)]
        return tensors

    handle.schedule = None
    expected = run(pipe, guidance_scale=weights[0], callback_on_step_end=set_next)
    assert relative(actual, expected) < 2e-5


# What composes: a neutral part changes nothing of the other ----------------------------------------------------------

OTHERS: dict[str, dict[str, Any]] = {
    "linear": dict(schedule=WeightSchedule("linear")),
    "interval": dict(schedule=WeightSchedule(interval=(0.0, 0.5))),
    "cfg++": dict(schedule=CFGPlusPlus(0.9)),
    "characteristic": dict(characteristic=TIGHT),
    "characteristic, linear": dict(characteristic=TIGHT, schedule=WeightSchedule("linear")),
    "loss": dict(loss=LATENT_LOSS),
    "loss, cfg++": dict(loss=LATENT_LOSS, schedule=CFGPlusPlus(0.9)),
}


@pytest.mark.parametrize("name", list(OTHERS))
@pytest.mark.parametrize("rates, rescale", [("regions", 0.5), ("pixels", 0.0)])
def test_rates_of_one_change_nothing_of_the_other(rates: str, name: str, rescale: float) -> None:
    pipe = tiny_sd_pipeline()
    neutral = SCFGConfig(rates=rates, rate_min=1.0, rate_max=1.0, max_scale=None, blur_sigma=0.0)
    options = dict(guidance_rescale=rescale, num_inference_steps=2)
    scfg_fast.enable(pipe, PLAIN, **OTHERS[name])
    expected = run(pipe, **options)
    handle = scfg_fast.enable(pipe, neutral, **OTHERS[name])
    assert relative(run(pipe, **options), expected) < 1e-4
    assert handle.stats.steps_applied > 0


NEUTRAL: dict[str, dict[str, Any]] = {
    "interval, all of it": dict(schedule=WeightSchedule(interval=(0.0, 1.0))),
    "interval in sigma, all of it": dict(schedule=WeightSchedule(interval=(0.0, 1e9), interval_in="sigma")),
    "table of one": dict(schedule=WeightSchedule([1.0])),
    "per pixel, rates of one": dict(config=SCFGConfig.pixels(rate_min=1.0, rate_max=1.0)),
    "characteristic, no part of the run": dict(characteristic=CharacteristicGuidance(stop=0.0)),
    "loss, no part of the run": dict(loss=LossGuidance(to_dark, stop=0.0)),
    "loss, steps of nothing": dict(loss=LossGuidance(to_dark, scale=0.0)),
}


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("name", list(NEUTRAL))
def test_neutral_parameters_change_no_bit(pipe, name: str, rescale: float) -> None:
    """Of the stock pipeline; but rates of one are multiplied in another order, the stock formula within 1e-6."""
    options = dict(num_inference_steps=3, guidance_rescale=rescale)
    expected = run(pipe, **options)
    scfg_fast.enable(pipe, **({"config": PLAIN} | NEUTRAL[name]))
    actual = run(pipe, **options)
    exact = name != "per pixel, rates of one" or rescale > 0.0
    assert torch.equal(actual, expected) if exact else relative(actual, expected) < 1e-6


def test_omega_zero_is_the_conditional_prediction(pipe) -> None:
    """Characteristic Guidance has nothing to exaggerate then: bit by bit the stock run at guidance_scale 1."""
    expected = run(pipe, guidance_scale=1.0)
    handle = scfg_fast.enable(pipe, PLAIN, schedule=WeightSchedule([0.0]), characteristic=TIGHT)
    assert torch.equal(run(pipe), expected)
    assert handle.stats.weights == [1.0] * STEPS and not handle.stats.characteristic
    strong = CharacteristicGuidance(regularization=1e9)
    handle = scfg_fast.enable(pipe, PLAIN, characteristic=strong)
    actual = run(pipe)
    assert len(handle.stats.characteristic) == STEPS and all(s.converged.all() for s in handle.stats.characteristic)
    assert relative(actual, run(pipe, scfg_kwargs={"enabled": False})) < 1e-4


@pytest.mark.parametrize("options", [
    dict(config=SCFGConfig.pixels()), dict(config=PLAIN, characteristic=TIGHT), dict(characteristic=TIGHT),
    dict(config=PLAIN, loss=LATENT_LOSS), dict(loss=LATENT_LOSS), dict(config=SCFGConfig.pixels(), loss=LATENT_LOSS),
], ids=["pixels", "characteristic", "scfg+characteristic", "loss", "scfg+loss", "pixels+loss"])  # fmt: skip
def test_a_constant_schedule_changes_no_bit_of_the_other(options) -> None:
    pipe = tiny_sd_pipeline()
    scfg_fast.enable(pipe, **options)
    expected = run(pipe, num_inference_steps=2)
    scfg_fast.enable(pipe, **options, schedule=WeightSchedule())
    assert torch.equal(run(pipe, num_inference_steps=2), expected)


def test_cfgpp_and_loss_in_a_multistep_solver() -> None:
    """A loss without a gradient leaves the renoised step alone, and repeats of it renoise anew."""
    pipe = tiny_sd_pipeline()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    handle = scfg_fast.enable(pipe, PLAIN, schedule=CFGPlusPlus(0.8))
    expected = run(pipe)
    handle.loss = LossGuidance(nothing, space="latents")
    assert torch.equal(run(pipe), expected)
    handle.loss = LossGuidance(nothing, space="latents", repeats=2)
    assert torch.isfinite(run(pipe)).all() and handle.stats.samples == 4 * STEPS * 4


# What goes with what, and what is left behind ------------------------------------------------------------------------

CORRECTIONS = {
    "loss": dict(loss=LATENT_LOSS),
    "loss in pixels, travelling": dict(loss=LossGuidance(to_dark, scale=0.05, repeats=2)),
    "characteristic": dict(characteristic=CharacteristicGuidance(max_iterations=3)),
}

METHODS: dict[str, dict[str, Any]] = CORRECTIONS | {
    "schedule": dict(schedule=WeightSchedule("linear")),
    "interval": dict(schedule=WeightSchedule(interval=(0.3, 1.0))),
    "interval in sigma": dict(schedule=WeightSchedule(interval=(0.0, 5.0), interval_in="sigma")),
    "cfg++": dict(schedule=CFGPlusPlus(0.6)),
    "cfg++ in a multistep solver": dict(schedule=CFGPlusPlus(0.6)),
    "per pixel": dict(config=SCFGConfig.pixels()),
    "rescale": dict(config=SCFGConfig()),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_an_exception_leaves_a_stock_pipeline(pipe, monkeypatch, name: str) -> None:
    """In the third call of the denoiser, of the scheduler's step and of the callback, one after the other."""
    if name == "cfg++ in a multistep solver":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    options: dict[str, Any] = dict(num_inference_steps=3, guidance_rescale=0.7 if name == "rescale" else 0.0)
    expected = run(pipe, **options)
    before = dict(pipe.unet.attn_processors)
    scfg_fast.enable(pipe, **METHODS[name])
    for failing in ("denoiser", "scheduler", "callback"):
        fail = _third_call_fails()
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
            if failing == "denoiser":
                patch.setattr(pipe.unet, "forward", _first(fail, pipe.unet.forward))
            elif failing == "scheduler":
                patch.setattr(type(pipe.scheduler), "step", _first(fail, type(pipe.scheduler).step))
            else:
                options["callback_on_step_end"] = lambda pipe, step, t, tensors, fail=fail: (fail(), tensors)[1]
            run(pipe, **options)
        assert torch.is_grad_enabled() and "step" not in vars(pipe.scheduler)
        assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks
        assert all(pipe.unet.attn_processors[key] is processor for key, processor in before.items())
    del options["callback_on_step_end"]
    assert torch.equal(run(pipe, scfg_kwargs={"enabled": False}, **options), expected)
    scfg_fast.disable(pipe)
    assert torch.equal(run(pipe, **options), expected)


def _third_call_fails() -> Callable[[], None]:
    calls = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("on purpose")

    return fail


def _first(before: Callable, then: Callable) -> Callable:
    @functools.wraps(then)
    def both(*args: Any, **kwargs: Any) -> Any:
        before()
        return then(*args, **kwargs)

    return both


def test_inpainting_moves_the_latents_alone() -> None:
    base = tiny_sd_pipeline(in_channels=9)
    pipe = StableDiffusionInpaintPipeline.from_pipe(base, torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 128, 128)
    mask[..., 32:96, 32:96] = 1.0
    seen = []
    pipe.unet.register_forward_pre_hook(lambda m, args: seen.append(args[0][:, 4:].clone()))
    for settings in CORRECTIONS.values():
        scfg_fast.enable(pipe, **settings)
        seen.clear()
        assert torch.isfinite(run(pipe, image=picture, mask_image=mask, strength=1.0)).all()
        assert len(seen) > STEPS and all(torch.equal(rest, seen[0]) for rest in seen)


@pytest.mark.parametrize(
    "options", [dict(loss=LATENT_LOSS), dict(characteristic=TIGHT)], ids=["loss", "characteristic"]
)
def test_every_evaluation_has_the_residuals_of_an_adapter(options) -> None:
    """The denoiser pops them from their list: further evaluations must get lists of their own."""
    base = tiny_sd_pipeline(uniform=True)
    network = T2IAdapter(3, [16, 16, 32, 32], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter").eval()
    pipe = StableDiffusionAdapterPipeline(
        vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer, unet=base.unet, adapter=network,
        scheduler=base.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    handle = scfg_fast.enable(pipe, PLAIN, **options)
    found: list[int] = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(len(kwargs["down_intrablock_additional_residuals"])), with_kwargs=True
    )
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    pipe("a red cat", image=picture, num_inference_steps=2, guidance_scale=SCALE, output_type="latent")
    assert len(found) > 2 and set(found) == {4} and handle.stats.samples == 2 * len(found)


@pytest.mark.parametrize("name", LOSS_SCHEDULERS)
def test_a_correction_stays_in_the_sample(name: str) -> None:
    """What is added to a sample is there one step later, in every step: the scheduler starts from what it is given."""
    for place in range(4):
        ends = []
        for added in (0.0, 0.5):
            scheduler = getattr(diffusers, name).from_config(tiny_sd_pipeline().scheduler.config)
            scheduler.set_timesteps(6)
            sample = torch.ones(1, 4, 2, 2) * scheduler.init_noise_sigma
            for index, t in enumerate(scheduler.timesteps[: place + 2]):
                scheduler.scale_model_input(sample, t)
                options = {"generator": torch.Generator().manual_seed(index)} if "DDIM" not in name else {}
                options = options if "generator" in inspect.signature(scheduler.step).parameters else {}
                sample = scheduler.step(torch.full_like(sample, 0.3), t, sample, **options).prev_sample
                sample = sample + (added if index == place else 0.0)
            ends.append(sample)
        assert (ends[1] - ends[0]).min() > 0.3 * 0.5


def test_loss_guidance_looks_at_the_picture_that_cfgpp_denoises() -> None:
    """D_u + lam (D_c - D_u), of which the step weight is a multiple."""
    pipe, seen, lam = tiny_sd_pipeline(), [], 0.6
    scfg_fast.enable(
        pipe,
        PLAIN,
        schedule=CFGPlusPlus(lam),
        loss=LossGuidance(lambda x0: _keep(x0, seen), scale=0.0, space="latents"),
    )
    run(pipe)
    loop = Literal(pipe, STEPS)
    t = loop.scheduler.timesteps[0]
    with torch.no_grad():
        uncond, cond = loop.halves(loop.start, loop.start, t)
    a = pipe.scheduler.alphas_cumprod[t]
    x0 = (loop.start - (1 - a).sqrt() * (uncond + lam * (cond - uncond))) / a.sqrt()
    assert relative(seen[0], x0) < 1e-5


def test_pure_noise_has_no_picture_to_look_at() -> None:
    pipe = tiny_sd_pipeline(prediction_type="v_prediction")
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    handle = scfg_fast.enable(pipe, PLAIN, loss=LossGuidance(to_dark, rule="freedom", space="latents"))
    assert torch.isfinite(run(pipe)).all() and len(handle.stats.losses) == STEPS - 1


def test_a_vae_that_its_own_pipeline_upcasts_is_refused_in_half_precision() -> None:
    pipe = tiny_sdxl_pipeline()
    scfg_fast.enable(pipe, loss=LossGuidance(to_dark))
    pipe.vae.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    with pytest.raises(ValueError, match="this vae overflows in fp16"):
        run(pipe)
    base = tiny_sd_pipeline()
    base.vae.register_to_config(force_upcast=True)
    base.vae.to(torch.float16)
    assert not overflows(base), "Stable Diffusion 1.x decodes in fp16"


@pytest.mark.parametrize("options, message", [
    (dict(loss=LATENT_LOSS, characteristic=CharacteristicGuidance()), "use one at a time"),
    (dict(loss="dark"), "loss must be a LossGuidance"),
    (dict(characteristic=3), "characteristic must be a CharacteristicGuidance"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(options, message: str) -> None:
    pipe = tiny_sd_pipeline()
    with pytest.raises((ValueError, TypeError), match=message):
        scfg_fast.enable(pipe, **options)
        run(pipe)
    scfg_fast.disable(pipe)
    assert torch.isfinite(run(pipe)).all()


@pytest.mark.parametrize("scheduler, options, message", [
    (FlowMatchEulerDiscreteScheduler, dict(loss=LATENT_LOSS), "not a variance-preserving"),
    (HeunDiscreteScheduler, dict(loss=LATENT_LOSS), "would discard corrections"),
    (DPMSolverMultistepScheduler, dict(schedule=CFGPlusPlus(), characteristic=TIGHT), "use one at a time"),
])  # fmt: skip
def test_schedulers_that_do_not_fit_are_refused(scheduler, options, message: str) -> None:
    pipe = tiny_sd_pipeline()
    config = {} if scheduler is FlowMatchEulerDiscreteScheduler else pipe.scheduler.config
    pipe.scheduler = scheduler.from_config(config)
    scfg_fast.enable(pipe, **options)
    with pytest.raises(ValueError, match=message):
        run(pipe)


@pytest.mark.parametrize("options", [dict(loss=LATENT_LOSS), dict(characteristic=TIGHT)])
def test_perturbed_attention_is_refused(options) -> None:
    pipe = StableDiffusionPAGPipeline.from_pipe(tiny_sd_pipeline(), torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    scfg_fast.enable(pipe, **options)
    with pytest.raises(ValueError, match="set pag_scale=0"):
        run(pipe, pag_scale=2.0)
    assert torch.isfinite(run(pipe, pag_scale=0.0)).all()


def test_group_offloading_and_a_backward_pass_are_refused() -> None:
    pipe = tiny_sd_pipeline()
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    scfg_fast.enable(pipe, loss=LATENT_LOSS)
    with pytest.raises(ValueError, match="its backward pass needs all weights"):
        run(pipe)
