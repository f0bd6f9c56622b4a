"""The registered grid: which operators, at which sizes of which models, in which order. Data, no tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

BATCHES = (1, 4, 16)
ATTENTION = ("self_attention", "cross_attention")
"""A layer's output with its map: `attention_with_lse` and `attention_map`."""
HALF = ("float16", "bfloat16")
TOKENS = 77
UNROLLED_ROWS = 1024
"""Query rows from which on torch.compile unrolls the twin's loop over row blocks into hundreds of copies."""


@dataclass(frozen=True)
class Layer:
    """An attention layer: its grid of image tokens, heads, head size, and the text tokens beside it."""

    height: int
    width: int
    heads: int
    head_dim: int
    text: int = TOKENS

    @property
    def rows(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Sizes:
    """Captured layers of a model and its latent [channels, side, side]."""

    label: str
    layers: tuple[Layer, ...]
    side: int
    channels: int = 4


SD15 = Sizes("sd15", (Layer(16, 16, 8, 160),) * 5 + (Layer(8, 8, 8, 160),), 64)
SDXL = Sizes("sdxl-6of60layers", (Layer(32, 32, 20, 64),) * 6, 128)
SD15_16, SD15_8, SDXL_32 = SD15.layers[0], SD15.layers[-1], SDXL.layers[0]
SDXL_64 = Layer(64, 64, 10, 64)
# Stable Diffusion 3 medium: image tokens against 77 + 256 text tokens; its self-attention at 512x512 pixels.
SD3_32, SD3_64 = Layer(32, 32, 24, 64, 333), Layer(64, 64, 24, 64, 333)


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        op: the operator, or `"step"`: all captured layers of a step and what follows them.
        sizes: what distinguishes the case; `sizes.layers[0]` is the layer of an attention operator.
        batch: images; attention and maps have 2 * batch samples, the unconditional half first.
        dtype: of q, k, v and the predictions; maps are fp32.
    """

    op: str
    sizes: Sizes
    batch: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.op}/{self.sizes.label}/b{self.batch}/{self.dtype}"

    def reduced(self) -> Case:
        """The same at a size that a CPU computes in an instant."""
        small = tuple(
            replace(layer, height=layer.height // 4, width=layer.width // 4, heads=2, head_dim=16)
            for layer in self.sizes.layers[-3:]
        )
        sizes = replace(self.sizes, layers=small, side=self.sizes.side // 4)
        return replace(self, sizes=sizes, batch=min(2, self.batch))

    def not_compiled(self) -> str:
        """Why torch.compile is left out; empty if it is not."""
        unrolled = self.op in (*ATTENTION, "attention_map", "step")
        if unrolled and max(layer.rows for layer in self.sizes.layers) >= UNROLLED_ROWS:
            return "torch.compile unrolls the loop over blocks of rows into hundreds of copies"
        return ""


def _one(label: str, layer: Layer) -> Sizes:
    return Sizes(label, (layer,), 0)


def _per_batch(dtype: str, batch: int) -> Iterator[Case]:
    layers = {"sd15-16x16": SD15_16, "sd15-8x8": SD15_8, "sdxl-32x32": SDXL_32}
    for label, layer in {**layers, "sd3-32x32": SD3_32}.items():
        yield Case("self_attention", _one(label, layer), batch, dtype)
    for label, layer in {**layers, "sd3-64x64": SD3_64}.items():
        yield Case("cross_attention", _one(label, layer), batch, dtype)
    for label in ("sd15-16x16", "sdxl-32x32"):
        yield Case("attention_map", _one(label, layers[label]), batch, dtype)
    yield Case("complete_from_qk", _one("sdxl-64x64", SDXL_64), batch, dtype)
    yield Case("guide", SD15, batch, dtype)
    for sizes in (SD15, SDXL):
        yield Case("segment_and_guide", sizes, batch, dtype)
        yield Case("guide_pixels", sizes, batch, dtype)
    yield Case("guide_pixels", Sizes("sd3", (), 128, 16), batch, dtype)
    yield Case("step", SD15, batch, dtype)
    if batch <= 4:
        yield Case("step", SDXL, batch, dtype)
    if dtype == HALF[0]:  # operators on maps alone
        for label in ("sd15-16x16", "sdxl-32x32"):
            yield Case("complete", _one(label, layers[label]), batch, "float32")
        yield Case("segment", SD15, batch, "float32")


CASES: tuple[Case, ...] = tuple(case for dtype in HALF for batch in BATCHES for case in _per_batch(dtype, batch))
"""In the order of the run: if time is short, the last are left out."""


def select(words: str) -> list[Case]:
    """Cases whose name contains every word."""
    return [case for case in CASES if all(word in case.name for word in words.split())]
