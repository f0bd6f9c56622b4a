"""The benchmark cases: each one described once, with its inputs, its providers, its check, and what it must move.

A case is an operator (or a whole step) at one size. Its providers are

    literal    the published way, written out: the oracle of `lab/reference/official.py`, in fp32
    ours       the operators of `scfg_kernels`, torch implementation, through their public functions
    compiled   `torch.compile` of the same torch implementation

`check` compares a provider's result with the oracle in fp64 on the same inputs and raises `DisagreementError`. Nothing
here takes a time; `run.py`, `test_ops.py` and `verify.py` call `prepare` and `check` first.

Inputs are random with a fixed seed, and shaped like attention: queries and keys are projections of a smooth random
field over the image, so that self-attention is regional; scores have a standard deviation of SHARPNESS, so that maps
have peaks; the start token takes a large share of cross-attention. These are choices, not measurements of a model.
Layout is that of the attention processors: [B, N, H, d] in memory, seen as [B, H, N, d].
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import scfg_kernels
import torch
import torch.nn.functional as F
from scfg_kernels.attention_map import head_mean_map
from scfg_kernels.complete import _complete
from scfg_kernels.guide import _guide
from scfg_kernels.segment import _segment

from lab.reference import official as oracle

TOKENS = 77
GUIDANCE_SCALE = 7.5
CELL = 4
SHARPNESS = 2.5  # standard deviation of the scaled scores
START_BIAS = 3.0  # what the start token's scores have on top

# Largest error against the fp64 oracle, relative to the largest entry of the reference. One limit for every case.
RELATIVE_LIMIT = 3e-5
# A cell whose two best tokens (or whose two foreground channels) differ by less than this, relative to the better, is a
# near-tie: there, and only there, a provider may choose differently from the oracle.
TIE_BAND = 1e-4
TIES_ALLOWED = 0.01

Inputs = dict[str, Any]
Result = dict[str, torch.Tensor]


class DisagreementError(RuntimeError):
    """A provider's result is not the reference's; it must not be timed."""


@dataclass(frozen=True)
class Layer:
    """A captured transformer block: its token grid and its heads."""

    height: int
    width: int
    heads: int
    head_dim: int

    @property
    def n(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Model:
    """The sizes of a model that guidance sees: its captured layers and its latent [channels, side, side]."""

    label: str
    layers: tuple[Layer, ...]
    side: int
    channels: int = 4

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.side // CELL), -(-self.side // CELL)


SD15 = Model("sd15", (Layer(16, 16, 8, 160),) * 5 + (Layer(8, 8, 8, 160),), 64)
SDXL = Model("sdxl-6of60layers", (Layer(32, 32, 20, 64),) * 6, 128)
TINY = Model("tiny", (Layer(4, 4, 2, 8),) * 2 + (Layer(2, 2, 2, 8),), 16)


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        run: what is timed.
        view: brings the raw result into the form that the check compares; not timed.
    """

    run: Callable[[Inputs], Any]
    view: Callable[[Any], Result]


@dataclass(frozen=True)
class Operator:
    """What all cases of one operator share.

    Attributes:
        inputs: makes a case's inputs, in fp32 and from its seed alone.
        providers: by name; `literal` is the baseline.
        reference: the expected result from inputs in fp64.
        flops, bytes: arithmetic the formula needs and bytes that must move at least, in fp32; one for all providers.
        compare: `(result, reference, inputs)` -> reasons why they disagree.
    """

    inputs: Callable[[Case], Inputs]
    providers: Mapping[str, Provider]
    reference: Callable[[Inputs], Result]
    flops: Callable[[Case], int]
    bytes: Callable[[Case], int]
    compare: Callable[[Result, Result, Inputs], list[str]]


@dataclass(frozen=True)
class Case:
    """An operator at one size.

    Attributes:
        op: name in `OPERATORS`.
        sizes: how the size is called in the case's name.
        model: whose sizes these are.
        layers: the layers that take part; one for an operator on a single layer.
        batch: images; attention runs on 2 * batch samples, the unconditional half first.
    """

    op: str
    sizes: str
    model: Model
    layers: tuple[Layer, ...]
    batch: int

    @property
    def name(self) -> str:
        return f"{self.op}/{self.sizes}/b{self.batch}"

    @property
    def operator(self) -> Operator:
        return OPERATORS[self.op]

    def unavailable(self, provider: str) -> str:
        """Why a provider cannot be run on this case; empty if it can."""
        if provider != "compiled":
            return ""
        if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            return "torch.compile needs a C++ compiler"
        if self.op in UNROLLED and max(layer.n for layer in self.layers) >= 1024:
            return "torch.compile unrolls the loop over blocks of rows into hundreds of copies"
        return ""


# Inputs ---------------------------------------------------------------------------------------------------------------


def _generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(case.name)) % 2**31)


def _smooth_field(batch: int, layer: Layer, channels: int, rng: torch.Generator) -> torch.Tensor:
    """[B, N, channels], unit variance: a coarse random field, interpolated over the image, with some noise."""
    coarse = torch.randn(batch, channels, max(2, layer.height // 4), max(2, layer.width // 4), generator=rng)
    field = F.interpolate(coarse, (layer.height, layer.width), mode="bilinear", align_corners=False)
    field = field.flatten(2).transpose(1, 2) + 0.3 * torch.randn(batch, layer.n, channels, generator=rng)
    return field / field.std()


def _sharpened(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q, scaled so that the scores of the first sample have the standard deviation SHARPNESS."""
    scores = q[0] @ k[0].transpose(-1, -2) / math.sqrt(q.shape[-1])
    return q * (SHARPNESS / (scores - scores.mean(-1, keepdim=True)).std())


def _heads(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """[B, N, H * d] -> [B, H, N, d], a view."""
    return x.unflatten(2, (layer.heads, layer.head_dim)).transpose(1, 2)


def self_attention_inputs(layer: Layer, batch: int, rng: torch.Generator) -> Inputs:
    """q, k, v [2 * batch, H, N, d] whose attention prefers cells with similar features."""
    channels, width = 32, layer.heads * layer.head_dim
    field = _smooth_field(2 * batch, layer, channels, rng)
    shared = torch.randn(channels, width, generator=rng) / math.sqrt(channels)
    own = torch.randn(channels, width, generator=rng) / math.sqrt(channels)
    q, k = _heads(field @ shared, layer), _heads(field @ (shared + 0.5 * own), layer)
    v = _heads(torch.randn(2 * batch, layer.n, width, generator=rng), layer)
    return {"q": _sharpened(q, k), "k": k, "v": v}


def cross_attention_inputs(layer: Layer, batch: int, rng: torch.Generator) -> Inputs:
    """q [2 * batch, H, N, d], k, v [2 * batch, H, TOKENS, d] with a start token that attracts much of the attention."""
    channels, width = 32, layer.heads * layer.head_dim
    field = _smooth_field(2 * batch, layer, channels, rng)
    q = _heads(field @ torch.randn(channels, width, generator=rng) / math.sqrt(channels), layer)
    k = _heads(torch.randn(2 * batch, TOKENS, width, generator=rng), layer)
    q = _sharpened(q, k)
    towards_start = F.normalize(torch.randn(layer.heads, 1, layer.head_dim, generator=rng), dim=-1)
    q = q + towards_start
    start = torch.zeros(TOKENS, 1)
    start[0] = START_BIAS * math.sqrt(layer.head_dim)
    k = k + start * towards_start
    layout = functools.partial(torch.empty, (2 * batch, layer.n, layer.heads, layer.head_dim))
    q = layout().transpose(1, 2).copy_(q)
    k = torch.empty(2 * batch, TOKENS, layer.heads, layer.head_dim).transpose(1, 2).copy_(k)
    v = _heads(torch.randn(2 * batch, TOKENS, width, generator=rng), layer)
    return {"q": q, "k": k, "v": v}


def _probability_maps(x: Inputs) -> torch.Tensor:
    """Head-mean map [B, N, T] by the oracle, one sample at a time."""
    return torch.cat([_literal_map({"q": x["q"][i : i + 1], "k": x["k"][i : i + 1]}) for i in range(x["q"].shape[0])])


def _noise(case: Case, rng: torch.Generator) -> Inputs:
    """Predictions whose difference is stronger in some places than in others, as a model's is."""
    side = case.model.side
    uncond = torch.randn(case.batch, case.model.channels, side, side, generator=rng)
    strength = F.interpolate(torch.rand(case.batch, 1, 4, 4, generator=rng), (side, side), mode="bilinear")
    cond = uncond + (0.1 + strength) * torch.randn(uncond.shape, generator=rng)
    return {"uncond": uncond, "cond": cond}


def _one_self_layer(case: Case) -> Inputs:
    return self_attention_inputs(case.layers[0], case.batch, _generator(case))


def _one_cross_layer(case: Case) -> Inputs:
    return cross_attention_inputs(case.layers[0], case.batch, _generator(case))


def _qkv_inputs(case: Case) -> Inputs:
    rng = _generator(case)
    return {
        "self": [self_attention_inputs(layer, case.batch, rng) for layer in case.layers],
        "cross": [cross_attention_inputs(layer, case.batch, rng) for layer in case.layers],
        "sizes": [(layer.height, layer.width) for layer in case.layers],
        "grid": case.model.grid,
        **_noise(case, rng),
    }


def _maps_inputs(case: Case) -> Inputs:
    rng = _generator(case)
    maps: Inputs = {"self_maps": [], "cross_maps": []}
    for layer in case.layers:
        maps["self_maps"].append(_probability_maps(self_attention_inputs(layer, case.batch, rng)))
        maps["cross_maps"].append(_probability_maps(cross_attention_inputs(layer, case.batch, rng)))
    sizes = [(layer.height, layer.width) for layer in case.layers]
    return {**maps, "sizes": sizes, "grid": case.model.grid, **_noise(case, rng)}


def _completed_inputs(case: Case) -> Inputs:
    """Completed maps in both layouts: [2B, N, T] for the literal way; [B, T, N] and [B, N] for ours."""
    inputs = _maps_inputs(case)
    batch = case.batch
    inputs["completed"], inputs["tokens"], inputs["start"] = [], [], []
    for self_map, cross_map in zip(inputs.pop("self_maps"), inputs.pop("cross_maps"), strict=True):
        completed = oracle.official_completion(self_map, cross_map)
        inputs["completed"].append(completed)
        inputs["tokens"].append(completed[batch:].transpose(1, 2).contiguous())
        inputs["start"].append(completed[:batch, :, 0].contiguous())
    return inputs


def _regions_inputs(case: Case) -> Inputs:
    inputs = _completed_inputs(case)
    masks, foreground = _literal_segment(inputs)
    keep = {name: inputs[name] for name in ("uncond", "cond")}
    ids = oracle.token_ids(masks)
    return {**keep, "masks": masks, "foreground": foreground, "ids": ids, "is_foreground": foreground[:, 0].bool()}


# The literal way ------------------------------------------------------------------------------------------------------


def _literal_map(x: Inputs) -> torch.Tensor:
    heads, scale = x["q"].shape[1], 1.0 / math.sqrt(x["q"].shape[-1])
    probabilities = oracle.attention_probabilities(oracle.fold_heads(x["q"]), oracle.fold_heads(x["k"]), scale)
    return oracle.head_mean(probabilities, heads)


def _literal_attention(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    heads, scale = x["q"].shape[1], 1.0 / math.sqrt(x["q"].shape[-1])
    probabilities = oracle.attention_probabilities(oracle.fold_heads(x["q"]), oracle.fold_heads(x["k"]), scale)
    out = torch.bmm(probabilities, oracle.fold_heads(x["v"]))
    return out.unflatten(0, (-1, heads)), oracle.head_mean(probabilities, heads)


def _literal_complete(x: Inputs) -> torch.Tensor:
    return oracle.official_completion(x["self_map"], x["cross_map"])


def _literal_segment(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-hot token masks of the conditional half, foreground mask of the unconditional half; all tokens of both."""
    halves = [completed.chunk(2) for completed in x["completed"]]
    scores = oracle.smoothed_normalised([cond for _, cond in halves], x["sizes"], x["grid"])
    foreground = oracle.foreground_mask([uncond for uncond, _ in halves], x["sizes"], x["grid"])
    return oracle.token_masks(scores), foreground


def _literal_guide(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    rate = oracle.rates(x["uncond"], x["cond"], x["masks"], x["foreground"], GUIDANCE_SCALE, cell=CELL)
    return oracle.guided(x["uncond"], x["cond"], rate, GUIDANCE_SCALE), rate


def literal_step_from_maps(x: Inputs) -> tuple[torch.Tensor, ...]:
    """`oracle.literal_guidance` without the stages that it computes a second time for its report.

    Returns:
        guided, rate, token masks, foreground mask.
    """
    completed = [oracle.official_completion(s, c) for s, c in zip(x["self_maps"], x["cross_maps"], strict=True)]
    masks, foreground = _literal_segment({**x, "completed": completed})
    guided, rate = _literal_guide({**x, "masks": masks, "foreground": foreground})
    return guided, rate, masks, foreground


def _literal_step_from_qkv(x: Inputs) -> tuple[Any, ...]:
    outs, maps = [], {"self_maps": [], "cross_maps": []}
    for own, cross in zip(x["self"], x["cross"], strict=True):
        for name, qkv in (("self_maps", own), ("cross_maps", cross)):
            out, head_mean = _literal_attention(qkv)
            outs.append(out)
            maps[name].append(head_mean)
    return *literal_step_from_maps({**x, **maps}), outs


# Ours, as public functions and as the bare torch implementation to compile --------------------------------------------


@dataclass(frozen=True)
class Operators:
    """The operators that a step is composed of, with the same arguments in both sets."""

    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    attention_map: Callable[..., torch.Tensor]
    complete: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    segment: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    guide: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def torch_implementation(op: Any) -> Callable[..., Any]:
    """The Python function under a `torch.library` custom op of `scfg_kernels`."""
    return op._init_fn


def _bare_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return F.scaled_dot_product_attention(q, k, v), head_mean_map(q, k, None, 1.0 / math.sqrt(q.shape[3]))


def _bare_complete(self_map: torch.Tensor, cross_map: torch.Tensor, unconditional: int):
    return torch_implementation(_complete)(self_map, cross_map, unconditional, "official", 4, "torch")


def _bare_segment(tokens, start, sizes, grid):
    flat = [length for size in sizes for length in size]
    return torch_implementation(_segment)(tokens, start, flat, *grid, 0.5, None, "torch")


def _bare_guide(uncond, cond, ids, foreground, scale):
    return torch_implementation(_guide)(
        uncond, cond, ids, foreground, scale, TOKENS, CELL, 0.8, 3.0, 15.0, 0.5, "official", "guided", "torch"
    )


def attend_with_map(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's output and its map, as a captured layer has them."""
    out, lse = scfg_kernels.attention_with_lse(q, k, v)
    return out, scfg_kernels.attention_map(q, k, lse, backend=backend)


PUBLIC = Operators(
    attend=attend_with_map,
    attention_map=functools.partial(scfg_kernels.attention_map, backend="torch"),
    complete=lambda s, c, b: scfg_kernels.complete(s, c, unconditional=b, backend="torch"),
    segment=functools.partial(scfg_kernels.segment, backend="torch"),
    guide=lambda u, t, ids, fore, scale: scfg_kernels.guide(
        u, t, ids, fore, scale, num_tokens=TOKENS, cell=CELL, backend="torch"
    ),
)
BARE = Operators(
    attend=_bare_attention,
    attention_map=lambda q, k: head_mean_map(q, k, None, 1.0 / math.sqrt(q.shape[3])),
    complete=_bare_complete,
    segment=_bare_segment,
    guide=_bare_guide,
)


def _scale_tensor() -> torch.Tensor:
    return torch.tensor(GUIDANCE_SCALE)


def _step(ops: Operators, x: Inputs) -> tuple[torch.Tensor, ...]:
    """Maps to guided noise: guided, rate, token index, foreground."""
    batch = x["uncond"].shape[0]
    completed = [ops.complete(s, c, batch) for s, c in zip(x["self_maps"], x["cross_maps"], strict=True)]
    tokens, start = [t for t, _ in completed], [s for _, s in completed]
    ids, foreground = ops.segment(tokens, start, x["sizes"], x["grid"])
    guided, rate = ops.guide(x["uncond"], x["cond"], ids, foreground, x["scale"])
    return guided, rate, ids, foreground


def _step_from_qkv(ops: Operators, x: Inputs) -> tuple[Any, ...]:
    """The same from queries, keys and values, block by block: a self map is dropped before the next block runs."""
    batch = x["uncond"].shape[0]
    outs, tokens, start = [], [], []
    for own, cross in zip(x["self"], x["cross"], strict=True):
        out, self_map = ops.attend(own["q"], own["k"], own["v"])
        out_cross, cross_map = ops.attend(cross["q"], cross["k"], cross["v"])
        outs += [out, out_cross]
        t, s = ops.complete(self_map, cross_map, batch)
        tokens.append(t)
        start.append(s)
    ids, foreground = ops.segment(tokens, start, x["sizes"], x["grid"])
    guided, rate = ops.guide(x["uncond"], x["cond"], ids, foreground, x["scale"])
    return guided, rate, ids, foreground, outs


def _ways(body: Callable[[Operators, Inputs], Any]) -> dict[str, Callable[[Inputs], Any]]:
    """`body` with the public operators, and compiled with the bare ones."""

    def run(x: Inputs) -> Any:
        return body(PUBLIC, x)

    @functools.cache
    def compiled() -> Callable[[Inputs], Any]:
        return torch.compile(functools.partial(body, BARE), dynamic=False, fullgraph=True)

    return {"ours": run, "compiled": lambda x: compiled()(x)}


# Views: raw results in one form ---------------------------------------------------------------------------------------


def _view_attention(raw: tuple[torch.Tensor, torch.Tensor]) -> Result:
    return {"out": raw[0], "map": raw[1]}


def _view_map(raw: torch.Tensor) -> Result:
    return {"map": raw}


def _view_pair(raw: tuple[torch.Tensor, torch.Tensor]) -> Result:
    return {"tokens": raw[0], "start": raw[1]}


def _view_completed(raw: torch.Tensor) -> Result:
    uncond, cond = raw.chunk(2)
    return {"tokens": cond.transpose(1, 2), "start": uncond[:, :, 0]}


def _view_masks(raw: tuple[torch.Tensor, torch.Tensor]) -> Result:
    return {"ids": oracle.token_ids(raw[0]), "foreground": raw[1][:, 0].bool()}


def _view_ids(raw: tuple[torch.Tensor, torch.Tensor]) -> Result:
    return {"ids": raw[0], "foreground": raw[1]}


def _view_guided(raw: tuple[torch.Tensor, torch.Tensor]) -> Result:
    return {"guided": raw[0], "rate": raw[1]}


def _view_outs(outs: list[torch.Tensor]) -> Result:
    return {f"out{index}": out for index, out in enumerate(outs)}


def _view_literal_step(raw: tuple[Any, ...]) -> Result:
    return {**_view_guided(raw[:2]), **_view_masks(raw[2:4]), **_view_outs(raw[4] if len(raw) > 4 else [])}


def _view_our_step(raw: tuple[Any, ...]) -> Result:
    return {**_view_guided(raw[:2]), **_view_ids(raw[2:4]), **_view_outs(raw[4] if len(raw) > 4 else [])}


def _providers(literal: Callable, body: Callable, view_literal: Callable, view_ours: Callable) -> dict[str, Provider]:
    ways = {name: Provider(run, view_ours) for name, run in _ways(body).items()}
    return {"literal": Provider(literal, view_literal), **ways}


# References and comparison --------------------------------------------------------------------------------------------


def _segment_reference(x: Inputs) -> Result:
    """Regions and their margins: how far, relative to the winner, the runner-up is behind."""
    halves = [completed.chunk(2) for completed in x["completed"]]
    scores = oracle.smoothed_normalised([cond for _, cond in halves], x["sizes"], x["grid"])
    best, second = scores.topk(2, dim=1).values.unbind(1)
    channels = oracle.foreground_scores([uncond for uncond, _ in halves], x["sizes"], x["grid"])
    return {
        "ids": scores.argmax(1),
        "ids_margin": (best - second) / best,
        "foreground": channels[:, 0] < channels[:, 1],
        "foreground_margin": (channels[:, 0] - channels[:, 1]).abs() / channels.amax(1),
    }


def _maps_reference(x: Inputs) -> Result:
    completed = [oracle.official_completion(s, c) for s, c in zip(x["self_maps"], x["cross_maps"], strict=True)]
    return _segment_reference({**x, "completed": completed})


def _qkv_reference(x: Inputs) -> Result:
    """Outputs of every layer, and the regions; sample by sample, because fp64 probabilities are large."""
    outs, maps = [], {"self_maps": [], "cross_maps": []}
    for own, cross in zip(x["self"], x["cross"], strict=True):
        for name, qkv in (("self_maps", own), ("cross_maps", cross)):
            out, head_mean = _attention_reference(qkv).values()
            outs.append(out)
            maps[name].append(head_mean)
    return {**_maps_reference({**x, **maps}), **_view_outs(outs)}


def _attention_reference(x: Inputs) -> Result:
    samples = [{name: x[name][i : i + 1] for name in ("q", "k", "v")} for i in range(x["q"].shape[0])]
    parts = [_literal_attention(sample) for sample in samples]
    return {"out": torch.cat([out for out, _ in parts]), "map": torch.cat([m for _, m in parts])}


def _close(name: str, got: torch.Tensor, expected: torch.Tensor) -> list[str]:
    if got.shape != expected.shape:
        return [f"{name} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"]
    error = (got.double() - expected).abs().max() / expected.abs().max()
    return [] if error <= RELATIVE_LIMIT else [f"{name} is off by {error:.2e} of its largest entry"]


def _same_regions(name: str, got: torch.Tensor, expected: torch.Tensor, margin: torch.Tensor) -> list[str]:
    """Equal outside the band of near-ties, and few differences inside it."""
    if got.shape != expected.shape:
        return [f"{name} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"]
    differ = got != expected
    clear = int((differ & (margin > TIE_BAND)).sum())
    if clear:
        return [f"{name} differs in {clear} of {differ.numel()} cells that are no near-tie"]
    few = differ.float().mean() <= TIES_ALLOWED
    return [] if few else [f"{name} differs in {differ.float().mean():.1%} of the cells, all near-ties"]


def _compare(result: Result, reference: Result, x: Inputs) -> list[str]:
    """Numbers against the reference, regions with their band, guided noise against the oracle given those regions."""
    reasons = []
    for name, expected in reference.items():
        if name.endswith("_margin"):
            continue
        if f"{name}_margin" in reference:
            reasons += _same_regions(name, result[name], expected, reference[f"{name}_margin"])
        else:
            reasons += _close(name, result[name], expected)
    if not reasons and "guided" in result and "guided" not in reference:
        masks = F.one_hot(result["ids"], TOKENS).permute(0, 3, 1, 2).double()
        foreground = result["foreground"].unsqueeze(1).double()
        guided, rate = _literal_guide({**x, "masks": masks, "foreground": foreground})
        reasons += _close("guided", result["guided"], guided) + _close("rate", result["rate"], rate)
    return reasons


# Work -----------------------------------------------------------------------------------------------------------------


def _attention_flops(layer: Layer, batch: int, keys: int, products: int = 2) -> int:
    """`products` matrix products per head (scores; output), and five operations per score: softmax and head mean."""
    scores = 2 * batch * layer.heads * layer.n * keys
    return scores * (2 * layer.head_dim * products + 5)


def _attention_bytes(layer: Layer, batch: int, keys: int, outputs: bool = True) -> int:
    image = layer.n * layer.heads * layer.head_dim
    text = keys * layer.heads * layer.head_dim
    moved = (2 * image + 2 * text if outputs else image + text) + layer.n * keys
    return 4 * 2 * batch * moved


def _complete_flops(layer: Layer, batch: int) -> int:
    """Two products S X per conditional sample, two products S x per unconditional one."""
    return 2 * 2 * batch * layer.n * layer.n * (TOKENS + 1)


def _complete_bytes(layer: Layer, batch: int) -> int:
    """S twice for both halves, the used columns of C and the result once."""
    return 4 * batch * (2 * 2 * layer.n * layer.n + 2 * layer.n * (TOKENS + 1))


def _segment_flops(case: Case) -> int:
    """Mean and division of every entry, smoothing and argmax on the grid."""
    entries = sum(layer.n for layer in case.layers) * (TOKENS + 1)
    sizes = len({(layer.height, layer.width) for layer in case.layers})
    return case.batch * (4 * entries + math.prod(case.model.grid) * (TOKENS + 1) * (10 * sizes + 1))


def _segment_bytes(case: Case) -> int:
    entries = sum(layer.n for layer in case.layers) * (TOKENS + 1)
    return case.batch * (4 * entries + 9 * math.prod(case.model.grid))


def _guide_flops(case: Case) -> int:
    """Difference, norm and combination per channel, smoothing per pixel, sums over regions per cell and token."""
    pixels = case.model.side**2
    return case.batch * (pixels * (6 * case.model.channels + 12) + 2 * TOKENS * math.prod(case.model.grid))


def _guide_bytes(case: Case) -> int:
    pixels = case.model.side**2
    return case.batch * (4 * pixels * (3 * case.model.channels + 1) + 9 * math.prod(case.model.grid))


def _maps_flops(case: Case) -> int:
    return sum(_complete_flops(layer, case.batch) for layer in case.layers) + _segment_flops(case) + _guide_flops(case)


def _maps_bytes(case: Case) -> int:
    """The maps once, both predictions once, the guided noise once: everything between is internal."""
    maps = sum(2 * layer.n * layer.n + layer.n * (TOKENS + 1) for layer in case.layers)
    return 4 * case.batch * maps + _guide_bytes(case)


def _qkv_flops(case: Case) -> int:
    attention = sum(_attention_flops(layer, case.batch, keys) for layer in case.layers for keys in (layer.n, TOKENS))
    return attention + _maps_flops(case)


def _qkv_bytes(case: Case) -> int:
    tensors = sum(layer.heads * layer.head_dim * (6 * layer.n + 2 * TOKENS) for layer in case.layers)
    return 4 * 2 * case.batch * tensors + _guide_bytes(case)


def _one_complete(case: Case) -> Inputs:
    maps = _maps_inputs(case)
    return {"self_map": maps["self_maps"][0], "cross_map": maps["cross_maps"][0]}


def _attention_operator(cross: bool) -> Operator:
    def body(ops: Operators, x: Inputs) -> Any:
        return ops.attend(x["q"], x["k"], x["v"])

    def keys(case: Case) -> int:
        return TOKENS if cross else case.layers[0].n

    return Operator(
        inputs=_one_cross_layer if cross else _one_self_layer,
        providers=_providers(_literal_attention, body, _view_attention, _view_attention),
        reference=_attention_reference,
        flops=lambda case: _attention_flops(case.layers[0], case.batch, keys(case)),
        bytes=lambda case: _attention_bytes(case.layers[0], case.batch, keys(case)),
        compare=_compare,
    )


OPERATORS: dict[str, Operator] = {
    "self_attention": _attention_operator(cross=False),
    "cross_attention": _attention_operator(cross=True),
    "attention_map": Operator(
        inputs=_one_self_layer,
        providers=_providers(_literal_map, lambda ops, x: ops.attention_map(x["q"], x["k"]), _view_map, _view_map),
        reference=lambda x: {"map": _attention_reference(x)["map"]},
        flops=lambda case: _attention_flops(case.layers[0], case.batch, case.layers[0].n, products=1),
        bytes=lambda case: _attention_bytes(case.layers[0], case.batch, case.layers[0].n, outputs=False),
        compare=_compare,
    ),
    "complete": Operator(
        inputs=_one_complete,
        providers=_providers(
            _literal_complete,
            lambda ops, x: ops.complete(x["self_map"], x["cross_map"], x["self_map"].shape[0] // 2),
            _view_completed,
            _view_pair,
        ),
        reference=lambda x: _view_completed(_literal_complete(x)),
        flops=lambda case: _complete_flops(case.layers[0], case.batch),
        bytes=lambda case: _complete_bytes(case.layers[0], case.batch),
        compare=_compare,
    ),
    "segment": Operator(
        inputs=_completed_inputs,
        providers=_providers(
            _literal_segment,
            lambda ops, x: ops.segment(x["tokens"], x["start"], x["sizes"], x["grid"]),
            _view_masks,
            _view_ids,
        ),
        reference=_segment_reference,
        flops=_segment_flops,
        bytes=_segment_bytes,
        compare=_compare,
    ),
    "guide": Operator(
        inputs=lambda case: {**_regions_inputs(case), "scale": _scale_tensor()},
        providers=_providers(
            _literal_guide,
            lambda ops, x: ops.guide(x["uncond"], x["cond"], x["ids"], x["is_foreground"], x["scale"]),
            _view_guided,
            _view_guided,
        ),
        reference=lambda x: _view_guided(_literal_guide(x)),
        flops=_guide_flops,
        bytes=_guide_bytes,
        compare=_compare,
    ),
    "step_from_maps": Operator(
        inputs=lambda case: {**_maps_inputs(case), "scale": _scale_tensor()},
        providers=_providers(literal_step_from_maps, _step, _view_literal_step, _view_our_step),
        reference=_maps_reference,
        flops=_maps_flops,
        bytes=_maps_bytes,
        compare=_compare,
    ),
    "step_from_qkv": Operator(
        inputs=lambda case: {**_qkv_inputs(case), "scale": _scale_tensor()},
        providers=_providers(_literal_step_from_qkv, _step_from_qkv, _view_literal_step, _view_our_step),
        reference=_qkv_reference,
        flops=_qkv_flops,
        bytes=_qkv_bytes,
        compare=_compare,
    ),
}
SINGLE_LAYER = ("self_attention", "cross_attention", "attention_map", "complete")
WHOLE = ("segment", "guide", "step_from_maps", "step_from_qkv")
# Operators whose torch implementation loops over blocks of rows.
UNROLLED = ("self_attention", "cross_attention", "attention_map", "step_from_qkv")
BASELINE = "literal"
PROVIDERS = ("literal", "ours", "compiled")


def cases_of(model: Model, batches: tuple[int, ...] = (1, 4)) -> list[Case]:
    """Every case of a model: single-layer operators at each of its layer sizes, the others over all its layers."""
    found = []
    for op in SINGLE_LAYER:
        for layer in dict.fromkeys(model.layers):
            sizes = f"{model.label.split('-')[0]}-{layer.height}x{layer.width}"
            found += [Case(op, sizes, model, (layer,), batch) for batch in batches]
    for op in WHOLE:
        found += [Case(op, model.label, model, model.layers, batch) for batch in batches]
    return found


_MODELS_CASES = cases_of(SD15) + cases_of(SDXL)
CASES: tuple[Case, ...] = tuple(case for op in OPERATORS for case in _MODELS_CASES if case.op == op)
QUICK_CASES: tuple[Case, ...] = tuple(cases_of(TINY, (1, 2)))


def select(pattern: str = "", quick: bool = False) -> list[Case]:
    """Cases whose name contains every word of `pattern`; the tiny ones if `quick`."""
    return [case for case in (QUICK_CASES if quick else CASES) if all(word in case.name for word in pattern.split())]


# Preparing and checking -----------------------------------------------------------------------------------------------


def in_double(x: Any) -> Any:
    """The same inputs with every floating-point tensor in fp64."""
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, dict):
        return {name: in_double(value) for name, value in x.items()}
    if isinstance(x, list):
        return [in_double(value) for value in x]
    return x


@dataclass(frozen=True)
class Prepared:
    """A case with its inputs and its fp64 reference."""

    case: Case
    inputs: Inputs
    double: Inputs
    reference: Result

    def call(self, provider: str) -> Callable[[], Any]:
        """What is timed."""
        return functools.partial(self.case.operator.providers[provider].run, self.inputs)

    def check(self, provider: str) -> None:
        """Run a provider once and compare.

        Raises:
            DisagreementError: with every difference found.
        """
        way = self.case.operator.providers[provider]
        reasons = self.case.operator.compare(way.view(way.run(self.inputs)), self.reference, self.double)
        if reasons:
            raise DisagreementError(f"{self.case.name}: {provider} disagrees with the reference: {'; '.join(reasons)}")


def prepare(case: Case) -> Prepared:
    """Inputs and reference of a case."""
    inputs = case.operator.inputs(case)
    double = in_double(inputs)
    return Prepared(case, inputs, double, case.operator.reference(double))
