r"""Loss guidance without training: every step also goes down the gradient of a loss of the denoised picture.

x = sqrt(abar) x0 + sqrt(1 - abar) eps is the sample in variance-preserving units, D the denoised estimate, ' the end of
the step, all norms and means those of one sample, over C, H and W:

    D = (x - sqrt(1 - abar) eps) / sqrt(abar)        g = d loss(decode(D(x))) / dx        x' <- step(x) - u(g)

    rule         u(g)                                                        length of u; under loss -> k loss
    gradient     rho g                                                       rho ||g||; k
    polyak       rho ||eps|| / ||g||^2 g          (algorithm 2)              rho ||eps|| / ||g||; 1 / k
    normalized   rho g / ||g||                                               rho; 1
    freedom      rho RMS(eps) sqrt(1 - abar) / sqrt(abar) c1 / RMS(g) g      as said, with RMS(g) gone; 1
                 c1 = sqrt(abar') (1 - abar / abar') / (1 - abar)

c1 is the weight of x0 in the mean of q(x' | x, x0). Time travel (algorithm 3) goes back from x' to x's noise level and
repeats the step: x = sqrt(b) x' + sqrt(1 - b) n, b = abar / abar'.

The gradient is taken backwards in three pieces, loss, decoder, denoiser, whose arithmetic outside of the models is
float32 (float64 for float64 samples). Between them the gradient is scaled to a largest entry of 1 per sample: a
denoiser in half precision neither loses a small gradient nor overflows on a large one. One augmented copy at a time is
in memory, and the decoder's graph is gone before the denoiser is differentiated.

Other than published: norms are per sample, so that a batch is each sample alone, where the published code takes one
norm over batch and copies; a gradient of exactly zero moves nothing, where that code's guard has no effect. Polyak's
length grows as the gradient vanishes: use a loss whose slope stays above zero at its minimum, as an unsquared distance.

Source: Shen et al., "Understanding and Improving Training-free Loss-based Diffusion Guidance", NeurIPS 2024 (arXiv
2403.12404); freedom is the step length of Yu et al., "FreeDoM", ICCV 2023 (arXiv 2303.09833), as the former's code has
it for text, normalized is its code for motion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .augment import Augment, Draw
from .predictions import denoised, denoising, noise_of, wide
from .steps import in_part

RULES = ("gradient", "polyak", "normalized", "freedom")
SPACES = ("pixels", "latents")
PREDICTIONS = ("guided", "conditional")
PUBLISHED_SCALES = {"gradient": 1.0, "polyak": 0.001, "normalized": 1.0, "freedom": 0.04}
"""rho of the published commands: motion (gradient, normalized), faces by text (polyak), ImageNet by text (freedom).

That code multiplies 0.02 with `--rho_scale` for freedom: 2 with augmentation and time travel (0.04, here), 0.1 without,
its baseline (0.002). The scales of gradient and polyak go with the units of the loss: find them for another loss."""


@dataclass(frozen=True)
class LossGuidance:
    """Settings of loss guidance.

    Args:
        loss_fn: x0_hat [B, C, H, W], float32 -> [B], one loss per sample, differentiable. In pixels x0_hat is RGB in
            about [0, 1], not clamped; in latents it is what the denoiser works on. Samples must not see each other.
        scale: rho of the rule; None for `PUBLISHED_SCALES`.
        rule: step length, one of `RULES`.
        space: `"pixels"`, decoded, or `"latents"`, which saves the decoder.
        prediction: x0_hat from the `"guided"` prediction or from the `"conditional"` one, at half the cost.
        augment: average over random changes of x0_hat; None for x0_hat itself.
        repeats: how often each step inside `travel` is run; the published code has 1 for faces, 10 for ImageNet.
        travel: (start, stop), fractions of the run with time travel; (0.19, 0.7) in the published code, where 100 steps
            have it at timesteps 800 to 300.
        start: fraction of the run after which loss guidance begins.
        stop: fraction at which it ends; 0.79 (segmentation) or 0.89 (sketch) in the published code, where 100
            steps are guided above timestep 200 or 100.
        checkpointing: recompute the denoiser's blocks in the backward pass, for less memory. For whoever runs the
            denoiser: `loss_gradient` does not read it.
        seed: of the augmentations' and time travel's random numbers.

    Raises:
        ValueError: a value is out of range; the message lists every one.
    """

    loss_fn: Callable[[Tensor], Tensor]
    scale: float | None = None
    rule: str = "polyak"
    space: str = "pixels"
    prediction: str = "guided"
    augment: Augment | None = None
    repeats: int = 1
    travel: tuple[float, float] = (0.0, 1.0)
    start: float = 0.0
    stop: float = 1.0
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.travel, list):
            object.__setattr__(self, "travel", tuple(self.travel))
        reasons = list(self._reasons())
        if reasons:
            raise ValueError("LossGuidance: " + "; ".join(reasons))

    def _reasons(self):
        if not callable(self.loss_fn):
            yield f"loss_fn must be a function of x0_hat [B, C, H, W], got {self.loss_fn!r}"
        if self.scale is not None and not (_is_number(self.scale) and 0.0 <= self.scale < math.inf):
            yield f"scale must be a number of at least 0, or None for the published one, got {self.scale!r}"
        for name, known in (("rule", RULES), ("space", SPACES), ("prediction", PREDICTIONS)):
            if getattr(self, name) not in known:
                yield f"{name}={getattr(self, name)!r} is unknown, use one of {known}"
        if self.augment is not None and not isinstance(self.augment, Augment):
            yield f"augment must be an Augment or None, got {self.augment!r}"
        elif self.augment is not None and self.augment.color and self.space == "latents":
            yield "augment's color is for RGB, latents have none: use Augment(color=0) or space='pixels'"
        if not _is_int(self.repeats) or self.repeats < 1:
            yield f"repeats must be an integer of at least 1, got {self.repeats!r}"
        if not (isinstance(self.travel, tuple) and len(self.travel) == 2 and _is_interval(*self.travel)):
            yield f"travel must be (start, stop) with 0 <= start <= stop <= 1, got {self.travel!r}"
        if not _is_interval(self.start, self.stop):
            yield f"start and stop must satisfy 0 <= start <= stop <= 1, got {self.start!r} and {self.stop!r}"
        if not isinstance(self.checkpointing, bool):
            yield f"checkpointing must be True or False, got {self.checkpointing!r}"
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            yield f"seed must be an integer in [0, 2**63), got {self.seed!r}"

    @property
    def rho(self) -> float:
        """`scale`, or the rule's published one."""
        return PUBLISHED_SCALES[self.rule] if self.scale is None else self.scale

    def guides(self, index: int, count: int) -> bool:
        """Whether step `index` (from 0) of `count` has loss guidance."""
        return in_part(index, count, self.start, self.stop)

    def repeats_of(self, index: int, count: int) -> int:
        """How often step `index` (from 0) of `count` is run: `repeats` where guided and inside `travel`, else 1."""
        return self.repeats if self.guides(index, count) and in_part(index, count, *self.travel) else 1


def loss_gradient(
    settings: LossGuidance,
    predict: Callable[[Tensor], Tensor],
    sample: Tensor,
    alpha_bar: float,
    prediction_type: str,
    decode: Callable[[Tensor], Tensor] | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the denoised sample, and its gradient with respect to the sample, through the denoiser.

    Works whatever the caller's gradient mode, except in `torch.inference_mode`. No weight receives a gradient.

    Args:
        settings: `loss_fn`, `space` and `augment` are read.
        predict: sample -> prediction, both [B, C, H, W]; called once, with gradients on, in the sample's dtype.
        sample: [B, C, H, W], variance preserving.
        alpha_bar: its signal power, in [0, 1).
        prediction_type: "epsilon", "v_prediction" or "sample".
        decode: x0_hat [B, C, H, W] in float32 -> pixels [B, 3, 8H, 8W] or the like, in [0, 1], differentiable; None if
            and only if the space is latents.
        generator: on the CPU, for the augmentations' draws; None without any.

    Returns:
        loss [B] (the mean over augmented copies), gradient [B, C, H, W] and eps_hat [B, C, H, W], all detached and in
        float32, or float64 if the sample is. The gradient of a sample whose loss is not finite is zero.

    Raises:
        RuntimeError: in inference mode, or `predict` or `decode` has cut the graph.
        ValueError: `decode` or `generator` is missing, a shape is wrong, or `loss_fn` returned something else than one
            differentiable loss per sample.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "loss guidance differentiates the denoiser, which torch.inference_mode() rules out for all tensors made in "
            "it; call the pipeline outside (it turns gradients off itself) or under torch.no_grad()"
        )
    reasons = []
    if settings.space == "pixels" and decode is None:
        reasons.append("space='pixels' needs a decoder; use space='latents' for a model without one")
    if settings.augment is not None and generator is None:
        reasons.append("augment needs a generator")
    if reasons:
        raise ValueError("loss_gradient: " + "; ".join(reasons))
    of_sample, of_prediction = denoising(alpha_bar, prediction_type)
    with torch.enable_grad():
        # A copy, since a sample may itself be an inference tensor, which cannot be differentiated.
        x = sample.detach().clone().requires_grad_(True)
        prediction = predict(x)
        _require_graph(prediction, "predict")
        if prediction.shape != x.shape:
            raise ValueError(
                f"loss_gradient: predict returned shape {list(prediction.shape)} for a sample of {list(x.shape)}; "
                "leave out a learned variance, and combine the guidance halves"
            )
        values = prediction.detach()
        x0 = denoised(values, x.detach(), alpha_bar, prediction_type)
        loss, gradient = _gradient_of_x0(settings, x0, decode if settings.space == "pixels" else None, generator)
        through = _pull_back(prediction, x, gradient)  # [B, C, H, W]
    gradient = of_sample * gradient + of_prediction * through
    gradient = torch.where(_column(loss.isfinite()), gradient, 0.0)
    return loss, gradient, noise_of(values, x.detach(), alpha_bar, prediction_type)


def update(settings: LossGuidance, gradient: Tensor, eps: Tensor, alpha_bar: float, next_alpha_bar: float) -> Tensor:
    """What to subtract from the sample that the step led to, in variance-preserving units; see the module's formulas.

    Args:
        settings: `rule` and `scale` are read.
        gradient: [B, C, H, W], of the loss with respect to the sample before the step.
        eps: [B, C, H, W], the noise in that sample, as predicted.
        alpha_bar: signal power before the step.
        next_alpha_bar: after it.

    Returns:
        [B, C, H, W], float32, or float64 if an input is. Exactly zero for a sample whose gradient is zero, or with any
        entry that is not finite in what it would be; the others are what they would be without it.

    Raises:
        ValueError: not 0 <= alpha_bar <= next_alpha_bar <= 1, or the freedom rule at alpha_bar 0 or 1.
    """
    if not 0.0 <= alpha_bar <= next_alpha_bar <= 1.0:
        raise ValueError(
            f"a step goes from more noise to less, 0 <= alpha_bar <= next_alpha_bar <= 1, got {alpha_bar} and "
            f"{next_alpha_bar}"
        )
    dtype = wide(gradient, eps)
    gradient, eps = gradient.to(dtype), eps.to(dtype)
    if settings.rule == "gradient":
        step = settings.rho * gradient
    else:
        # Divided by its largest entry first: squares of a small gradient would underflow.
        largest = gradient.abs().amax((1, 2, 3), keepdim=True)
        direction = gradient / largest
        length = _norm(direction)
        if settings.rule == "polyak":
            step = settings.rho * _norm(eps) / largest / length**2 * direction
        elif settings.rule == "normalized":
            step = settings.rho * direction / length
        else:  # freedom; a ratio of RMS is a ratio of norms
            step = settings.rho * _freedom_rate(alpha_bar, next_alpha_bar) * _norm(eps) / length * direction
    usable = step.isfinite().flatten(1).all(1)
    return torch.where(_column(usable), step, 0.0)


def renoise(sample_prev: Tensor, sigma: float, next_sigma: float, noise: Tensor, variance_exploding: bool) -> Tensor:
    """Time travel: from the end of a step back to the noise level that it began with.

    sqrt(b) x' + sqrt(1 - b) n with b = abar / abar' = (1 + sigma'^2) / (1 + sigma^2), or, variance exploding,
    x' + sqrt(sigma^2 - sigma'^2) n.

    Args:
        sample_prev: [B, C, H, W], x'.
        sigma: level at the beginning of the step, sqrt((1 - abar) / abar); inf for pure noise.
        next_sigma: level at its end.
        noise: [B, C, H, W], standard normal.
        variance_exploding: the sample's units, x0 + sigma eps.

    Returns:
        [B, C, H, W], in the dtype of `sample_prev`; computed in float32, or float64 if an input is.

    Raises:
        ValueError: not 0 <= next_sigma <= sigma, or inf in a variance-exploding sample.
    """
    if not 0.0 <= next_sigma <= sigma or next_sigma == math.inf:
        raise ValueError(f"renoise: expected 0 <= next_sigma <= sigma, got {next_sigma} and {sigma}")
    dtype = wide(sample_prev, noise)
    sample, noise = sample_prev.to(dtype), noise.to(dtype)
    if variance_exploding:
        if sigma == math.inf:
            raise ValueError("renoise: a variance-exploding sample has no level of pure noise, got sigma=inf")
        keep, added = 1.0, (sigma**2 - next_sigma**2) ** 0.5
    elif sigma == math.inf:
        keep, added = 0.0, 1.0
    else:
        keep = ((1.0 + next_sigma**2) / (1.0 + sigma**2)) ** 0.5
        added = ((sigma**2 - next_sigma**2) / (1.0 + sigma**2)) ** 0.5
    return (keep * sample + added * noise).to(sample_prev.dtype)


def _gradient_of_x0(
    settings: LossGuidance,
    x0: Tensor,
    decode: Callable[[Tensor], Tensor] | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """loss [B] and its gradient with respect to x0_hat, like it."""
    if decode is None:
        return _gradient_of_picture(settings, x0, generator)
    x0 = x0.requires_grad_(True)
    picture = decode(x0)
    _require_graph(picture, "decode")
    if picture.ndim != 4 or picture.shape[0] != x0.shape[0]:
        raise ValueError(
            f"loss_gradient: decode returned shape {list(picture.shape)}, expected [{x0.shape[0]}, 3, H, W]"
        )
    loss, gradient = _gradient_of_picture(settings, picture.detach().to(x0.dtype), generator)
    return loss, _pull_back(picture, x0, gradient)


def _gradient_of_picture(
    settings: LossGuidance, picture: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Mean over the copies, one at a time so that one graph is in memory; `loss_fn` always sees the batch in order."""
    if settings.augment is None or generator is None:
        return _gradient_of_copy(settings, picture, None)
    draws = settings.augment.draws(generator, picture.shape[2], picture.shape[3])
    loss = picture.new_zeros(picture.shape[0])
    gradient = torch.zeros_like(picture)
    for draw in draws:
        one, slope = _gradient_of_copy(settings, picture, draw)
        loss, gradient = loss + one, gradient + slope
    return loss / len(draws), gradient / len(draws)


def _gradient_of_copy(settings: LossGuidance, picture: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
    leaf = picture.detach().requires_grad_(True)
    fill = 0.5 if settings.space == "pixels" else 0.0  # grey in RGB, the mean in latents
    loss = settings.loss_fn(
        leaf if settings.augment is None or draw is None else settings.augment.apply(leaf, draw, fill)
    )
    _check_loss(loss, picture.shape[0])
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss), allow_unused=True)
    if gradient is None:
        raise ValueError(f"LossGuidance: {_NO_GRADIENT}")
    return loss.detach().to(picture.dtype), gradient


_NO_GRADIENT = (
    "loss_fn returned a tensor that does not depend on its input differentiably; compute it from the input with torch "
    "operations, without detach(), .item(), numpy or torch.no_grad()"
)


def _check_loss(loss: Tensor, batch: int) -> None:
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"LossGuidance: loss_fn returned a {type(loss).__name__}, expected a floating tensor of shape [{batch}], "
            "one loss per sample"
        )
    reasons = []
    if loss.shape != (batch,):
        what = "a scalar, a mean or a sum over the whole batch" if loss.ndim == 0 else f"shape {list(loss.shape)}"
        reasons.append(
            f"loss_fn returned {what}, expected one loss per sample, shape [{batch}]; reduce over all dimensions but "
            "the first, for example (x0_hat - target).square().flatten(1).mean(1)"
        )
    if not loss.is_floating_point():
        reasons.append(f"loss_fn returned {loss.dtype}, expected a floating dtype")
    elif not loss.requires_grad:
        reasons.append(_NO_GRADIENT)
    if reasons:
        raise ValueError("LossGuidance: " + "; ".join(reasons))


def _require_graph(output: Tensor, name: str) -> None:
    if not output.requires_grad:
        raise RuntimeError(
            f"loss_gradient: the output of {name} cannot be differentiated; run the model with gradients enabled, not "
            "under torch.no_grad() or torch.inference_mode() and not on detached inputs"
        )


def _pull_back(output: Tensor, leaf: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at `leaf` from that at `output`, which is scaled per sample so that any dtype can hold it."""
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    unit = torch.where((largest > 0.0) & largest.isfinite(), largest, 1.0)
    (back,) = torch.autograd.grad(output, leaf, (gradient / unit).to(output.dtype))
    return unit * back.to(gradient.dtype)


def _freedom_rate(alpha_bar: float, next_alpha_bar: float) -> float:
    """sqrt(1 - abar) / sqrt(abar) c1."""
    if not 0.0 < alpha_bar < 1.0:
        raise ValueError(
            f"rule='freedom' divides by alpha_bar and 1 - alpha_bar, got {alpha_bar}; begin one step later"
        )
    return ((1.0 - alpha_bar) / alpha_bar) ** 0.5 * posterior_weight(alpha_bar, next_alpha_bar)


def posterior_weight(alpha_bar: float, next_alpha_bar: float) -> float:
    """c1, the weight of x0 in the mean of q(x' | x, x0); 1 for a last step, to next_alpha_bar = 1."""
    return next_alpha_bar**0.5 * (1.0 - alpha_bar / next_alpha_bar) / (1.0 - alpha_bar)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)  # [B, 1, 1, 1]


def _column(per_sample: Tensor) -> Tensor:
    return per_sample[:, None, None, None]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_interval(start: object, stop: object) -> bool:
    return _is_number(start) and _is_number(stop) and 0.0 <= start <= stop <= 1.0  # type: ignore[operator]
