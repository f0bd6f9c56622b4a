"""What a case computes: its inputs, the ways to compute it, and the check against an fp64 truth.

ours        the public operator; Triton on a GPU
eager       `scaled_dot_product_attention`, with the map from probabilities beside it; elsewhere the torch twin
published   the published way (`lab/reference/official.py`): the probabilities of every head in memory
compiled    `torch.compile` of the torch twin
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import scfg_kernels as ops
import torch
import torch.nn.functional as F
from scfg_kernels.guide_pixels import _guide_pixels
from scfg_kernels.segment_and_guide import _segment_and_guide
from scfg_kernels.testing import assert_as_accurate_as, assert_masks_agree

from .. import registry
from . import grid
from .grid import TOKENS, Case, Layer

Inputs = dict[str, Any]
Call = Callable[[], Any]

GAIN = 2.0
"""Scores have a standard deviation of GAIN: neither uniform nor one-hot attention."""
SCALE = registry.GUIDANCE_SCALE
PIXEL_RATES = {"rate_min": 5.0 / 7.5, "rate_max": 12.0 / 7.5}
CROSSINGS = 0.01
"""Share of cells that may differ from fp64, all of them near-ties."""


class DisagreementError(RuntimeError):
    """Ours is not the truth within the bounds; it must not be timed."""


# Inputs ---------------------------------------------------------------------------------------------------------------


def _qkv(layer: Layer, keys: int, case: Case, rng: torch.Generator) -> Inputs:
    """q [2B, H, N, d], k and v [2B, H, T, d] as layers make them, views of [2B, N, H d]."""

    def projected(tokens: int, gain: float = 1.0) -> torch.Tensor:
        shape = (2 * case.batch, tokens, layer.heads, layer.head_dim)
        values = gain * torch.randn(shape, generator=rng, device=rng.device)
        return values.to(getattr(torch, case.dtype)).transpose(1, 2)

    return {"q": projected(layer.rows, GAIN), "k": projected(keys), "v": projected(keys)}


def _map(rows: int, columns: int, case: Case, rng: torch.Generator) -> torch.Tensor:
    """A head-mean map [2B, rows, columns] in fp32, whose rows sum to 1."""
    return torch.randn(2 * case.batch, rows, columns, generator=rng, device=rng.device).mul(1.5).softmax(-1)


def _predictions(case: Case, rng: torch.Generator) -> Inputs:
    """Halves of what a denoiser returns, [B, C, H, W] each."""
    shape = (2 * case.batch, case.sizes.channels, case.sizes.side, case.sizes.side)
    values = torch.randn(shape, generator=rng, device=rng.device).to(getattr(torch, case.dtype))
    uncond, cond = values.chunk(2)
    return {"uncond": uncond, "cond": cond, "scale": torch.full((), SCALE, device=rng.device)}


def _grid(case: Case) -> Inputs:
    side = -(-case.sizes.side // registry.CELL)
    return {"sizes": [(layer.height, layer.width) for layer in case.sizes.layers], "grid": (side, side)}


def _completed(case: Case, rng: torch.Generator) -> Inputs:
    """Completed maps as the published way keeps them, [2B, N, T], and as ours does."""
    maps = [_map(layer.rows, TOKENS, case, rng) for layer in case.sizes.layers]
    return {
        "completed": maps,
        "tokens": [x[case.batch :].transpose(1, 2).contiguous() for x in maps],
        "start": [x[: case.batch, :, 0].contiguous() for x in maps],
        **_grid(case),
    }


def make_inputs(case: Case, device: torch.device | str) -> Inputs:
    """Random operands with a fixed seed."""
    rng = torch.Generator(device).manual_seed(20240331)
    layer = case.sizes.layers[0] if case.sizes.layers else None
    if case.op == "step":
        layers = case.sizes.layers
        return {
            "self": [_qkv(layer, layer.rows, case, rng) for layer in layers],
            "cross": [_qkv(layer, layer.text, case, rng) for layer in layers],
            **_grid(case), **_predictions(case, rng),
        }  # fmt: skip
    if case.op == "guide_pixels":
        return _predictions(case, rng)
    if case.op in ("segment", "segment_and_guide"):
        return {**_completed(case, rng), **(_predictions(case, rng) if case.op != "segment" else {})}
    if case.op == "guide":
        h, w = _grid(case)["grid"]
        ids = torch.randint(TOKENS, (case.batch, h, w), generator=rng, device=rng.device)
        masks = F.one_hot(ids, TOKENS).permute(0, 3, 1, 2).to(getattr(torch, case.dtype))
        foreground = (ids % 2 == 0).unsqueeze(1).to(masks.dtype)
        both = {"ids": ids, "is_foreground": foreground[:, 0].bool(), "masks": masks, "foreground": foreground}
        return {**both, **_predictions(case, rng)}
    assert layer is not None, case.op
    if case.op == "complete":
        own, cross = _map(layer.rows, layer.rows, case, rng), _map(layer.rows, TOKENS, case, rng)
        return {"self_map": own, "cross_map": cross}
    if case.op == "complete_from_qk":
        return {**_qkv(layer, layer.rows, case, rng), "cross_map": _map(layer.rows, TOKENS, case, rng)}
    return _qkv(layer, layer.rows if case.op == "self_attention" else layer.text, case, rng)


# The ways to compute it -----------------------------------------------------------------------------------------------


def _eager_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return F.scaled_dot_product_attention(q, k, v), _eager_map(q, k)


def _eager_map(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * q.shape[3] ** -0.5).softmax(-1).mean(1, dtype=torch.float32)


def guided_step(x: Inputs, attend: Callable, backend: str) -> tuple[Any, ...]:
    """Outputs of all layers and the guided prediction: guided, rate, ids, foreground, outputs."""
    batch = x["uncond"].shape[0]
    outs, tokens, start = [], [], []
    for own, cross in zip(x["self"], x["cross"], strict=True):
        out, self_map = attend(own["q"], own["k"], own["v"])
        out_cross, cross_map = attend(cross["q"], cross["k"], cross["v"])
        completed = ops.complete(self_map, cross_map, unconditional=batch, backend=backend)
        outs += [out, out_cross]
        tokens.append(completed[0])
        start.append(completed[1])
    guided = ops.segment_and_guide(
        tokens, start, x["sizes"], x["grid"], x["uncond"], x["cond"], x["scale"], backend=backend
    )
    return *guided, outs


def public_operator(op: str, x: Inputs, backend: str) -> Any:
    """The operator through its public function, or a whole step."""
    if op == "step":
        return guided_step(x, functools.partial(registry.attend_with_map, backend=backend), backend)
    if op == "attention_map":
        return ops.attention_map(x["q"], x["k"], backend=backend)
    if op in grid.ATTENTION:
        return registry.attend_with_map(x["q"], x["k"], x["v"], backend)
    if op == "complete":
        return ops.complete(x["self_map"], x["cross_map"], unconditional=len(x["self_map"]) // 2, backend=backend)
    if op == "complete_from_qk":
        half = len(x["q"]) // 2
        return ops.complete_from_qk(x["q"], x["k"], x["cross_map"], unconditional=half)
    if op == "segment":
        return ops.segment(x["tokens"], x["start"], x["sizes"], x["grid"], backend=backend)
    halves = x["uncond"], x["cond"]
    if op == "guide":
        options = {"num_tokens": TOKENS, "backend": backend}
        return ops.guide(*halves, x["ids"], x["is_foreground"], x["scale"], **options)
    if op == "guide_pixels":
        return ops.guide_pixels(*halves, x["scale"], **PIXEL_RATES, backend=backend)
    maps = x["tokens"], x["start"], x["sizes"], x["grid"]
    return ops.segment_and_guide(*maps, *halves, x["scale"], backend=backend)


def _completed_by(self_map: torch.Tensor, x: Inputs) -> Any:
    return ops.complete(self_map, x["cross_map"], unconditional=len(self_map) // 2, backend="torch")


def _eager(op: str, x: Inputs) -> Any:
    if op == "step":
        return guided_step(x, _eager_attention, "torch")
    if op == "attention_map":
        return _eager_map(x["q"], x["k"])
    if op == "complete_from_qk":
        return _completed_by(_eager_map(x["q"], x["k"]), x)
    if op in grid.ATTENTION:
        return _eager_attention(x["q"], x["k"], x["v"])
    return public_operator(op, x, "torch")


def _published_segment_and_guide(x: Inputs) -> Any:
    masks, foreground = registry.OPERATORS["segment"].providers["literal"].run(x)
    given = {"masks": masks.to(x["cond"].dtype), "foreground": foreground.to(x["cond"].dtype)}
    return registry.OPERATORS["guide"].providers["literal"].run({**x, **given})


def _published_complete_from_qk(x: Inputs) -> Any:
    self_map = registry.OPERATORS["attention_map"].providers["literal"].run(x).float()
    return registry.OPERATORS["complete"].providers["literal"].run({**x, "self_map": self_map})


def _twin_segment_and_guide(x: Inputs) -> Any:
    sizes = [length for size in x["sizes"] for length in size]
    return _segment_and_guide._init_fn(
        x["tokens"], x["start"], sizes, None, x["uncond"], x["cond"], x["scale"], registry.CELL, 0.8, 3.0, 15.0, 0.5,
        "official", "guided", "torch",
    )  # fmt: skip


def _twin_guide_pixels(x: Inputs) -> Any:
    low, high = PIXEL_RATES.values()
    return _guide_pixels._init_fn(x["uncond"], x["cond"], x["scale"], low, high, "guided", "torch")


def ways(case: Case, x: Inputs, backend: str) -> dict[str, Call]:
    """What is timed by provider, `compiled` not among them. `backend`: of ours."""
    op = case.op
    calls: dict[str, Call] = {
        "ours": functools.partial(public_operator, op, x, backend),
        "eager": functools.partial(_eager, op, x),
    }
    if op == "segment_and_guide":
        calls["published"] = functools.partial(_published_segment_and_guide, x)
    elif op == "complete_from_qk":
        calls["published"] = functools.partial(_published_complete_from_qk, x)
    elif op != "guide_pixels":  # which is not published code's
        name = "step_from_qkv" if op == "step" else op
        calls["published"] = functools.partial(registry.OPERATORS[name].providers["literal"].run, x)
    return calls


def compiled_way(case: Case, x: Inputs) -> Call:
    """`torch.compile` of the twin, not compiled yet."""
    twins = {
        "complete_from_qk": functools.partial(public_operator, "complete_from_qk", backend="torch"),
        "segment_and_guide": _twin_segment_and_guide, "guide_pixels": _twin_guide_pixels,
    }  # fmt: skip
    if case.op in twins:
        return functools.partial(torch.compile(twins[case.op], dynamic=False, fullgraph=True), x)
    name = "step_from_qkv" if case.op == "step" else case.op
    return functools.partial(registry.OPERATORS[name].providers["compiled"].run, x)


# The check ------------------------------------------------------------------------------------------------------------


def _last_image(x: Any, batch: int) -> Any:
    """The last image of a batch; of tensors with both halves its unconditional and its conditional sample."""
    if isinstance(x, dict):
        return {name: _last_image(value, batch) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(_last_image(value, batch) for value in x)
    if not isinstance(x, torch.Tensor) or x.dim() == 0:
        return x
    return x[batch - 1 :: batch] if x.shape[0] == 2 * batch else x[batch - 1 :]


def _check_attention(x: Inputs, actual: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v = x["q"], x["k"], x["v"]
    naive = registry.OPERATORS["self_attention"].providers["literal"].run(x)
    truth = registry.attend_with_map(q.double(), k.double(), v.double())
    for name, a, n, t in zip(("output", "map"), actual, naive, truth, strict=True):
        assert_as_accurate_as(a, n, t, name=name)


def _check_regions(double: Inputs, ids: torch.Tensor, foreground: torch.Tensor, reference: Inputs) -> None:
    for name, actual in (("ids", ids), ("foreground", foreground)):
        assert_masks_agree(
            actual, reference[name], reference[f"{name}_margin"], band=registry.TIE_BAND,
            max_crossings=math.ceil(CROSSINGS * actual.numel()), name=name,
        )  # fmt: skip


def _check_guided(
    x: Inputs, double: Inputs, actual: tuple[torch.Tensor, torch.Tensor], ids: torch.Tensor, foreground: torch.Tensor
) -> None:
    """Guided prediction and rate, given the regions that ours found."""
    regions = {"ids": ids, "is_foreground": foreground}
    naive = public_operator("guide", {**x, **regions}, "torch")
    truth = public_operator("guide", {**double, **regions}, "torch")
    for name, a, n, t in zip(("guided", "rate"), actual, naive, truth, strict=True):
        assert_as_accurate_as(a, n, t, name=name)


def check(case: Case, x: Inputs, result: Any) -> None:
    """Compare ours on the last image of the batch.

    Raises:
        DisagreementError: with the comparer's words.
    """
    x, actual = _last_image(x, case.batch), _last_image(result, case.batch)
    double = registry.in_double(x)
    try:
        if case.op == "attention_map":
            naive, truth = _eager(case.op, x), public_operator(case.op, double, "torch")
            assert_as_accurate_as(actual, naive, truth, name="map")
        elif case.op in grid.ATTENTION:
            _check_attention(x, actual)
        elif case.op == "segment":
            _check_regions(double, *actual, registry.OPERATORS["segment"].reference(double))
        elif case.op == "guide":
            _check_guided(x, double, actual, x["ids"], x["is_foreground"])
        elif case.op == "segment_and_guide":
            _check_regions(double, *actual[2:], registry.OPERATORS["segment"].reference(double))
            _check_guided(x, double, actual[:2], *actual[2:])
        elif case.op == "step":
            _check_regions(double, *actual[2:4], registry.OPERATORS["step_from_qkv"].reference(double))
            _check_guided(x, double, actual[:2], *actual[2:4])
            layers = (pair for layer in zip(x["self"], x["cross"], strict=True) for pair in layer)
            for index, (layer, out) in enumerate(zip(layers, actual[4], strict=True)):
                truth = F.scaled_dot_product_attention(*(layer[name].double() for name in "qkv"))
                naive = F.scaled_dot_product_attention(*(layer[name] for name in "qkv"))
                assert_as_accurate_as(out, naive, truth, name=f"output {index}")
        else:
            naive, truth = public_operator(case.op, x, "torch"), public_operator(case.op, double, "torch")
            for index, (a, n, t) in enumerate(zip(actual, naive, truth, strict=True)):
                assert_as_accurate_as(a, n, t, name=f"result {index}")
    except AssertionError as error:
        raise DisagreementError(f"{case.name}: {error}") from error
