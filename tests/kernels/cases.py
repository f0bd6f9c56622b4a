"""The settings that the operator tests share: random attention, the inputs of a step, and both ways through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scfg_kernels import complete, guide, segment
from scfg_kernels.testing import assert_masks_agree

from lab.reference import official

TOKENS = 77

ATTENTION_SHAPES = {
    # name: (batch, heads, queries, keys, head_dim)
    "one-query": (2, 3, 1, 77, 40),
    "one-key": (1, 2, 64, 1, 64),
    "two-keys": (1, 2, 63, 2, 80),
    "63-queries": (2, 2, 63, 77, 64),
    "64-queries": (1, 8, 64, 78, 160),
    "250-queries": (1, 4, 250, 78, 80),
    "256-queries": (2, 8, 256, 77, 40),
}
SELF_SHAPES = {
    # name: (batch, heads, tokens, head_dim)
    "one-token": (2, 3, 1, 40),
    "63-tokens": (2, 2, 63, 64),
    "64-tokens": (2, 8, 64, 160),
    "250-tokens": (1, 4, 250, 80),
    "256-tokens": (1, 8, 256, 40),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BATCH_NOISE = 1e-6
"""Relative difference allowed between a batch and its samples alone: matrix products block other sizes differently."""
BAND = 1e-5
"""Relative distance to a tie inside which fp32 rounding may decide: a score is near 1 and carries some 30 roundings."""
MAX_CROSSINGS = 2
"""About one cell in a thousand lies within the band of random maps, and most of those do not cross."""


def by_name(cases: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `pytest.mark.parametrize` after the name: the values, with the keys as ids."""
    return {"argvalues": list(cases.values()), "ids": list(cases)}


def with_same_keys(shape: tuple[int, int, int, int]) -> tuple[int, int, int, int, int]:
    """A case of `SELF_SHAPES` as a case of `ATTENTION_SHAPES`."""
    batch, heads, tokens, dim = shape
    return batch, heads, tokens, tokens, dim


def random_qkv(
    rng: torch.Generator,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    gain: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, H, N, d], k and v [B, H, T, d]; scores have a standard deviation of `gain`^2."""
    batch, heads, queries, keys, dim = shape
    q = gain * torch.randn(batch, heads, queries, dim, generator=rng)
    k = gain * torch.randn(batch, heads, keys, dim, generator=rng)
    v = torch.randn(batch, heads, keys, dim, generator=rng)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def reference_map(q: torch.Tensor, k: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Head-mean map of the literal reference, in the dtype of q."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    probabilities = official.attention_probabilities(official.fold_heads(q), official.fold_heads(k), scale)
    return official.head_mean(probabilities, q.shape[1])


def random_maps(
    rng: torch.Generator,
    batch: int,
    rows: int,
    columns: int,
    gain: float = 1.5,
    dtype: torch.dtype = torch.float32,
    start_bias: float = 0.0,
) -> torch.Tensor:
    """Random attention [batch, rows, columns]: softmax of normal scores, formed in fp64 and rounded once.

    `start_bias` is added to the scores of column 0, which draws attention to the start token as in trained models.
    """
    scores = gain * torch.randn(batch, rows, columns, generator=rng, dtype=torch.float64)
    scores[..., :1] += start_bias
    return scores.softmax(-1).to(dtype)


def random_layers(
    rng: torch.Generator,
    sizes: list[tuple[int, int]],
    batch: int = 2,
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Per layer: tokens [B, T, N] and start [B, N] as `complete` returns them, and both halves as [B, N, T]."""

    def layers() -> list[torch.Tensor]:
        return [
            random_maps(rng, batch, h * w, tokens, gain=0.7, dtype=dtype, start_bias=1.2 * layer)
            for layer, (h, w) in enumerate(sizes)
        ]

    cond, uncond = layers(), layers()
    return [x.mT.contiguous() for x in cond], [x[..., 0].contiguous() for x in uncond], cond, uncond


@dataclass(frozen=True)
class Step:
    """The inputs of one guided step: maps of every captured layer on [uncond; cond], and the two predictions."""

    self_maps: list[torch.Tensor]
    cross_maps: list[torch.Tensor]
    sizes: list[tuple[int, int]]
    size: tuple[int, int]
    uncond: torch.Tensor
    cond: torch.Tensor

    @property
    def batch(self) -> int:
        return self.cond.shape[0]

    @property
    def tokens(self) -> int:
        return self.cross_maps[0].shape[2]

    @property
    def d(self) -> torch.Tensor:
        return self.cond - self.uncond

    def to(self, dtype: torch.dtype) -> Step:
        """The same step in another dtype."""
        return Step(
            [x.to(dtype) for x in self.self_maps],
            [x.to(dtype) for x in self.cross_maps],
            self.sizes,
            self.size,
            self.uncond.to(dtype),
            self.cond.to(dtype),
        )

    def select(self, samples: list[int]) -> Step:
        """The step of some of the samples, in the given order."""
        both = [*samples, *(self.batch + sample for sample in samples)]
        return Step(
            [x[both] for x in self.self_maps],
            [x[both] for x in self.cross_maps],
            self.sizes,
            self.size,
            self.uncond[samples],
            self.cond[samples],
        )

    def with_difference(self, d: torch.Tensor, uncond: torch.Tensor | None = None) -> Step:
        """The same maps with cond - uncond = d; uncond is zero unless given, so that d is exact."""
        uncond = torch.zeros_like(d) if uncond is None else uncond
        return Step(self.self_maps, self.cross_maps, self.sizes, self.size, uncond, uncond + d)

    def with_cross_maps(self, cross_maps: list[torch.Tensor]) -> Step:
        """The same step with other cross-attention."""
        return Step(self.self_maps, cross_maps, self.sizes, self.size, self.uncond, self.cond)


def random_step(
    rng: torch.Generator,
    latent_hw: tuple[int, int] = (64, 64),
    batch: int = 2,
    tokens: int = TOKENS,
    layers: tuple[int, int] = (5, 1),
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Random attention with `layers[0]` maps at latent / 4 and `layers[1]` at latent / 8, as in Stable Diffusion 1.5.

    d varies by region and pixel over a wide range, so that both clamps are at work.
    """
    sizes = []
    for factor, count in zip((4, 8), layers, strict=True):
        sizes += [tuple(-(-length // factor) for length in latent_hw)] * count
    self_maps, cross_maps = [], []
    for layer, (height, width) in enumerate(sizes):
        self_maps.append(random_maps(rng, 2 * batch, height * width, height * width, dtype=dtype))
        # A share of the start token that differs from layer to layer, from 1/77 to most of the attention.
        cross_maps.append(random_maps(rng, 2 * batch, height * width, tokens, dtype=dtype, start_bias=1.2 * layer))
    uncond = torch.randn(batch, 4, *latent_hw, generator=rng)
    coarse = torch.randn(batch, 1, *sizes[0], generator=rng).mul(0.8).exp()
    strength = F.interpolate(coarse, size=latent_hw, mode="nearest")
    cond = uncond + strength * torch.randn(batch, 4, *latent_hw, generator=rng)
    return Step(self_maps, cross_maps, sizes, sizes[0], uncond.to(dtype), cond.to(dtype))


def completed_by_operators(step: Step, fidelity: str = "official") -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Token maps [B, T, N] of the conditional half and start maps [B, N] of the unconditional half, per layer."""
    pairs = [
        complete(s, c, unconditional=step.batch, fidelity=fidelity)
        for s, c in zip(step.self_maps, step.cross_maps, strict=True)
    ]
    return [tokens for tokens, _ in pairs], [start for _, start in pairs]


def segment_by_operators(step: Step, fidelity: str = "official", **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and foreground through the public operators."""
    tokens, start = completed_by_operators(step, fidelity)
    return segment(tokens, start, step.sizes, step.size, **options)


def step_by_operators(
    step: Step, guidance_scale: float | torch.Tensor = 7.5, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guided prediction and rate map through the public operators."""
    ids, foreground = segment_by_operators(step, options.get("fidelity", "official"))
    return guide(step.uncond, step.cond, ids, foreground, guidance_scale, num_tokens=step.tokens, **options)


def step_by_reference(
    step: Step, guidance_scale: float | torch.Tensor = 7.5, **options: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Guided prediction and all stages of the literal reference."""
    latent_hw = (step.cond.shape[-2], step.cond.shape[-1])
    store = official.LiteralStore(latent_hw)
    for self_map, cross_map in zip(step.self_maps, step.cross_maps, strict=True):
        store.add("self", self_map)
        store.add("cross", cross_map)
    factors = [factor for factor in (4, 8) if store.grid(factor) in step.sizes]
    noise_pred = torch.cat([step.uncond, step.cond])
    return official.literal_guidance(store, noise_pred, guidance_scale, latent_hw, factors=factors, **options)


def one_hot(ids: torch.Tensor, tokens: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Ids [B, h, w] as the reference's masks [B, T, h, w]."""
    return F.one_hot(ids, tokens).permute(0, 3, 1, 2).to(dtype)


def token_margin(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the best token is ahead of the second, relative to the best, and the second token: both [B, h, w]."""
    best = scores.topk(2, dim=1)
    return (best.values[:, 0] - best.values[:, 1]) / best.values[:, 0], best.indices[:, 1]


def assert_agrees_with_reference(
    ids: torch.Tensor,
    foreground: torch.Tensor,
    cond: list[torch.Tensor],
    uncond: list[torch.Tensor],
    sizes: list[tuple[int, int]],
    size: tuple[int, int],
    sigma: float = 0.5,
    token_mask: torch.Tensor | None = None,
) -> None:
    """Ids and foreground equal the fp64 reference's outside the band."""
    scores = official.smoothed_normalised([x.double() for x in cond], sizes, size, sigma)
    if token_mask is not None:
        scores = scores.masked_fill(~token_mask[:, :, None, None], 0.0)
    margin, second = token_margin(scores)
    expected = official.token_ids(official.token_masks(scores))
    assert_masks_agree(ids, expected, margin, band=BAND, max_crossings=MAX_CROSSINGS, runner_up=second, name="ids")
    uncond = [x.double() for x in uncond]
    two = official.foreground_scores(uncond, sizes, size, sigma)
    expected = official.foreground_mask(uncond, sizes, size, sigma)[:, 0] > 0
    margin = (two[:, 0] - two[:, 1]).abs() / two.amax(1)
    assert_masks_agree(foreground, expected, margin, band=BAND, max_crossings=MAX_CROSSINGS, name="foreground")
