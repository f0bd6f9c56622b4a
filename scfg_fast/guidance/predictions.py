"""What a denoiser predicts, and what that says: conversions at one noise level.

A variance-preserving sample is x = sqrt(abar) x0 + sqrt(1 - abar) e. The denoiser predicts the noise e ("epsilon"),
v = sqrt(abar) e - sqrt(1 - abar) x0 ("v_prediction") or x0 ("sample"). All are linear in each other at a given x, so a
mix of two predictions with weights that sum to 1 is the same mix in each of them.

Arithmetic is float32, or float64 if an input is. Every function raises ValueError for an unknown type and for an abar
outside of [0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def alpha_bar_of(sigma: float) -> float:
    """abar of a noise level sigma = sqrt((1 - abar) / abar); 0 for an infinite one (pure noise)."""
    return 1.0 / (1.0 + sigma * sigma)


def denoising(alpha_bar: float, prediction_type: str) -> tuple[float, float]:
    """(p, q) of x0 = p sample + q prediction.

    Raises:
        ValueError: also for "epsilon" of pure noise (abar 0), which says nothing about x0.
    """
    signal, noise = amplitudes(alpha_bar, prediction_type)
    if prediction_type == "epsilon":
        if signal == 0.0:
            raise ValueError("pure noise (alpha_bar = 0) has no denoised estimate from 'epsilon'; begin one step later")
        return 1.0 / signal, -noise / signal
    return (signal, -noise) if prediction_type == "v_prediction" else (0.0, 1.0)


def denoised(prediction: Tensor, sample: Tensor, alpha_bar: float, prediction_type: str) -> Tensor:
    """x0, the denoised sample, [B, C, H, W].

    Args:
        prediction: [B, C, H, W], the denoiser's.
        sample: [B, C, H, W], x, its variance-preserving input.
        alpha_bar: signal power of x, in [0, 1).
        prediction_type: one of `PREDICTION_TYPES`.
    """
    of_sample, of_prediction = denoising(alpha_bar, prediction_type)
    dtype = wide(prediction, sample)
    return of_sample * sample.to(dtype) + of_prediction * prediction.to(dtype)


def noise_of(prediction: Tensor, sample: Tensor, alpha_bar: float, prediction_type: str) -> Tensor:
    """e, the predicted noise, [B, C, H, W]; arguments as for `denoised`."""
    signal, noise = amplitudes(alpha_bar, prediction_type)
    dtype = wide(prediction, sample)
    prediction, sample = prediction.to(dtype), sample.to(dtype)
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        return noise * sample + signal * prediction
    return (sample - signal * prediction) / noise


def prediction_of(noise: Tensor, sample: Tensor, alpha_bar: float, prediction_type: str) -> Tensor:
    """What the denoiser would have said for a noise e, the inverse of `noise_of`; abar above 0."""
    signal, spread = amplitudes(alpha_bar, prediction_type)
    dtype = wide(noise, sample)
    noise, sample = noise.to(dtype), sample.to(dtype)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return (noise - spread * sample) / signal
    return (sample - spread * noise) / signal


def amplitudes(alpha_bar: float, prediction_type: str) -> tuple[float, float]:
    """sqrt(abar), sqrt(1 - abar)."""
    reasons = []
    if prediction_type not in PREDICTION_TYPES:
        reasons.append(f"prediction_type={prediction_type!r} is unknown, use one of {PREDICTION_TYPES}")
    if not 0.0 <= alpha_bar < 1.0:
        reasons.append(f"alpha_bar must be in [0, 1), got {alpha_bar}")
    if reasons:
        raise ValueError("; ".join(reasons))
    return alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype that tensors are computed in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
