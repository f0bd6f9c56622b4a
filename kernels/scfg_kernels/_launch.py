"""Which backend runs, and with which launch configuration: pure functions of sizes, dtypes and device limits.

The one impure function is `accepts_cpu_tensors`, the seam for executing kernels without a GPU: while the active Triton
driver declares that it serves CPU tensors (`DriverBase.get_active_torch_device`, a simulator does), an explicit
`backend="triton"` takes them. `"auto"` never does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._triton import KERNELS
from ._trust import _index, reasons_against, say_why_torch

BACKENDS = ("auto", "triton", "torch")
OPS = (
    "attention_map",
    "attention_maps",
    "joint_attention_maps",
    "complete",
    "segment",
    "guide",
    "segment_and_guide",
    "guide_pixels",
)
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class BackendError(RuntimeError):
    """The backend that was asked for cannot run; the message lists every reason."""


def triton_reasons(op: str, device: torch.device) -> list[str]:
    """Every reason why the Triton kernel of `op` cannot run on `device`; empty if it can."""
    reasons = []
    if op not in KERNELS:
        reasons.append(f"this version has no Triton kernel for {op}")
    if not _TRITON_INSTALLED:
        reasons.append("triton is not installed")
    if device.type != "cuda":
        reasons.append(f"the tensors are on {device.type!r}, Triton kernels need a CUDA device")
    elif _TRITON_INSTALLED and torch.cuda.is_available():
        reasons += card_reasons(torch.cuda.current_device() if device.index is None else device.index)
    return reasons


MIN_TRITON = (3, 6)
"""The lowest version that the kernels were executed with."""
MIN_CAPABILITY = (8, 0)
"""Below, there are no tensor-core instructions for these products, and Triton spills thousands of registers."""
AMD_TARGETS = ("gfx942", "gfx950")
"""What the kernels are compiled for in the tests."""


@torch.compiler.assume_constant_result  # of a plain function: Dynamo looks through a cache
def card_reasons(index: int) -> list[str]:
    """Why no kernel can run on a CUDA or ROCm device: Triton's version, the card, or a driver of Triton's that cannot
    be built (which takes a C compiler and Python's headers). Asked once per device."""
    return list(_card_reasons(index))


@functools.cache
def _card_reasons(index: int) -> tuple[str, ...]:
    from ._triton import _device  # which imports triton

    reasons = version_reasons(_device.triton.__version__)
    if not reasons:
        reasons = target_reasons(torch.version.hip is not None, torch.cuda.get_device_properties(index))
        reasons += _device.driver_reasons()
    return tuple(reasons)


def version_numbers(version: str) -> tuple[int, ...]:
    """`"3.7.1+git12"` -> (3, 7, 1)."""
    return tuple(map(int, re.findall(r"\d+", version.split("+")[0])[:3]))


def version_reasons(version: str) -> list[str]:
    """Why this version of Triton cannot compile the kernels; empty if it can."""
    if version_numbers(version) >= MIN_TRITON:
        return []
    return [f"triton {version} is too old, the kernels need {'.'.join(map(str, MIN_TRITON))}"]


def target_reasons(hip: bool, properties: Any) -> list[str]:
    """Why the kernels are not for the card with these properties of torch's; empty if they are."""
    if hip:
        arch = properties.gcnArchName.split(":")[0]
        return [] if arch in AMD_TARGETS else [f"{arch} is not one of {', '.join(AMD_TARGETS)}"]
    capability = (properties.major, properties.minor)
    if capability >= MIN_CAPABILITY:
        return []
    return [f"compute capability {'.'.join(map(str, capability))} is below {'.'.join(map(str, MIN_CAPABILITY))}"]


def reasons_for_auto(device: torch.device, op: str = "") -> list[str]:
    """Why `"auto"` leaves an operator on a device to torch on which an explicit `"triton"` would run it."""
    return reasons_against(op, _index(device)) if device.type == "cuda" else []


def accepts_cpu_tensors() -> bool:
    """Whether the active Triton driver serves CPU tensors. Never imports triton: no import, no driver."""
    triton = sys.modules.get("triton")
    if triton is None:
        return False
    try:
        return triton.runtime.driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # triton is imported, but there is no GPU for it
        return False


def choose_backend(op: str, backend: str, device: torch.device, limits: Sequence[str] = ()) -> str:
    """Resolve `"auto" | "triton" | "torch"` to the backend that will run.

    Args:
        op: operator name, for example `"attention_map"`.
        backend: `"torch"` is always available; `"triton"` is taken literally; `"auto"` is Triton where it can run, else
            torch.
        device: device of the operands.
        limits: reasons why the Triton kernel cannot take these operands.

    Returns:
        `"triton"` or `"torch"`.

    Raises:
        ValueError: unknown backend name.
        BackendError: `backend="triton"` and it cannot run; lists every reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend={backend!r} is unknown; use one of {', '.join(map(repr, BACKENDS))}")
    if backend == "torch":
        return "torch"
    simulated = backend == "triton" and device.type == "cpu" and accepts_cpu_tensors()
    reasons = triton_reasons(op, torch.device("cuda") if simulated else device) + list(limits)
    if not reasons and backend == "auto":
        reasons = reasons_for_auto(device, op)
    if not reasons:
        return "triton"
    if backend == "triton":
        raise BackendError(f"{op}: backend='triton' cannot run: {'; '.join(reasons)}. Use backend='auto' or 'torch'.")
    say_why_torch(op, device, reasons)
    return "torch"


def backend_for(op: str, backend: str, device: torch.device, limits: Sequence[str] = ()) -> str:
    """`choose_backend` for a custom op, which hands the answer to `_trust.run`: `"auto"` where `"auto"` takes Triton,
    so that a launch which fails is torch's."""
    chosen = choose_backend(op, backend, device, limits)
    return "auto" if chosen == "triton" and backend == "auto" else chosen


def available_backends(
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, tuple[str, list[str]]]:
    """Per operator: the backend `"auto"` takes on `device`, and why it is not Triton (empty if it is).

    Args:
        device: of the operands.
        dtype: of the model's activations; None leaves out what depends on it. Sizes, which differ from call to call,
            are not considered: operands beyond a kernel's limits are computed by torch all the same.
    """
    device = torch.device(device)
    table = {}
    for op in OPS:
        limits = dtype_limits(op, dtype) if dtype is not None else []
        reasons = triton_reasons(op, device) + limits or reasons_for_auto(device, op)
        table[op] = ("torch" if reasons else "triton", reasons)
    return table


def outside_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A caller's autocast would run the maps' fp32 products in half precision, which moves regions; not in here."""
    return torch.autocast(device.type, enabled=False)


def may_keep(device: torch.device) -> bool:
    """Whether a tensor that is made now may serve later calls. On CUDA on the default stream alone: what is made on
    another one may belong to a CUDA graph, captured or warmed up there, whose memory is used again and whose contents
    come with its replay."""
    return device.type != "cuda" or torch.cuda.current_stream(device).cuda_stream == 0


def kept(make: Callable) -> Callable:
    """Keeps the tensors that `make(..., device)` makes from small arguments, where `may_keep` says so."""
    cached = functools.lru_cache(maxsize=64)(make)

    @functools.wraps(make)
    def made(*arguments: Any) -> Any:
        return (cached if may_keep(arguments[-1]) else make)(*arguments)

    return made


def device_guard(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` current: Triton launches on the current device, not on that of its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# Launch configurations


@dataclass(frozen=True)
class DeviceLimits:
    """What a launch configuration depends on: `"sm_80"` or `"gfx942"`, multiprocessors, shared memory per block."""

    arch: str
    multiprocessors: int
    shared_memory: int

    @property
    def family(self) -> str:
        """Architectures with the same instructions for products: `"sm_10"` of `"sm_100"` and `"sm_103"`."""
        return self.arch[:-1]


@dataclass(frozen=True)
class LaunchConfig:
    """Warps and pipeline stages, common to all kernels. Every kind has `reasons`: why it cannot serve some sizes."""

    num_warps: int
    num_stages: int

    def _unlike_a_launch(self, **blocks: int) -> list[str]:
        """Why no kernel can be launched so: `blocks` are the lengths of its tiles."""
        found = [] if self.num_stages > 0 else [f"num_stages={self.num_stages} is not positive"]
        for name, size in {"num_warps": self.num_warps, **blocks}.items():
            if size != next_power_of_2(size):
                found.append(f"{name}={size} is no power of two")
        return found

    def _unlike_products(self, precision: str, widths: tuple[int, int] = (16, 0), **blocks: int) -> list[str]:
        """The same with matrix products; `widths`: columns as two tiles, of which the second may have none."""
        blocks |= {"width": widths[0]} | ({"second width": widths[1]} if widths[1] else {})
        found = self._unlike_a_launch(**blocks)
        found += [f"{name}={size} is below the 16 of a product" for name, size in blocks.items() if size < 16]
        return found + ([] if precision in PRECISIONS else [f"precision={precision!r} is unknown"])


PRECISIONS = ("ieee", "tf32", "tf32x3")


def refuse(op: str, config: LaunchConfig, reasons: Sequence[str]) -> None:
    """What a launcher does with the reasons against a configuration that was forced on it; chosen ones are trusted.

    Raises:
        BackendError: there are reasons; lists all of them.
    """
    if reasons:
        raise BackendError(f"{op}: the forced {type(config).__name__} cannot run: {'; '.join(reasons)}.")


MAX_SAMPLES = 65535
"""Programs along the second axis of a grid."""


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


def two_widths(size: int, smallest: int = 16) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that cover `size` with less waste than one: 77 -> (64, 16)."""
    whole = max(smallest, next_power_of_2(size))
    rest = max(smallest, next_power_of_2(size - whole // 2))
    return (whole // 2, rest) if whole > smallest and rest < whole // 2 else (whole, 0)


def product_precision(limits: DeviceLimits) -> str:
    """How products of fp32 operands are formed: as three TF32 products, which is as accurate as fp32 arithmetic (11 +
    11 bits of each operand, sums in fp32), or in fp32 where a matrix core has it (AMD)."""
    return "ieee" if limits.arch.startswith("gfx") else "tf32x3"


WARP_GROUP_PRODUCTS = ("sm_9", "sm_10")
"""Families of architectures whose products of 64 rows are formed by four warps together, `wgmma` and `tcgen05`."""


def dtype_limits(op: str, dtype: torch.dtype) -> list[str]:
    """Why the kernel of `op` cannot serve a model that computes in `dtype`; empty if it can."""
    if dtype == torch.float64:
        return ["the kernel computes in fp32, fp64 needs the torch implementation"]
    return []


@dataclass(frozen=True)
class SegmentConfig(LaunchConfig):
    """Tiles of `segment`: tokens of a program, and all cells of a sample, both axes padded to powers of two."""

    block_t: int
    block_h: int
    block_w: int

    def reasons(self, h: int, w: int) -> list[str]:
        found = self._unlike_a_launch(block_t=self.block_t, block_h=self.block_h, block_w=self.block_w)
        if self.block_h < h or self.block_w < w:
            found.append(f"{self.block_h} x {self.block_w} cells do not cover {h} x {w}")
        return found


TILE = 8192
"""Values of a tile: 32 registers of each thread of eight warps. And cells, both axes padded, up to which regions and
rates are found without spills in a loop: 2560 x 1536 pixels are 80 x 48 cells, 128 x 64 padded."""
MAX_AXIS = 256
"""Cells along an axis up to which neighbours come from registers: a warp has them all."""
MAX_LAYERS = 192
"""Layers that are arguments of a launch: two pointers each, of the 4 KiB that its arguments may take."""


def segment_config(h: int, w: int) -> SegmentConfig:
    """Tiles of `segment` for h x w cells."""
    block_h, block_w = next_power_of_2(h), next_power_of_2(w)
    tokens = max(1, min(16, TILE // (block_h * block_w)))
    return SegmentConfig(num_warps=8, num_stages=1, block_t=tokens, block_h=block_h, block_w=block_w)


def _cell_limits(h: int, w: int, most: int = TILE) -> list[str]:
    """Why a grid is too large for `segment` and `guide`; empty if it is not."""
    if next_power_of_2(h) * next_power_of_2(w) <= most and max(h, w) <= MAX_AXIS:
        return []
    return [f"{h} x {w} cells, as powers of two, exceed {most} or {MAX_AXIS} along an axis"]


def segment_limits(
    tokens: Sequence[torch.Tensor], start: Sequence[torch.Tensor], token_mask: torch.Tensor | None, h: int, w: int
) -> list[str]:
    """Every reason why the segmentation kernel cannot take these maps; empty if it can."""
    maps = [*tokens, *start]
    reasons = dtype_limits("segment", torch.float64 if torch.float64 in {x.dtype for x in maps} else torch.float32)
    paired = len(start) > 0 and start[0].dim() == 3  # two start maps at once take the registers of two tiles
    reasons += _cell_limits(h, w, TILE // 2 if paired else TILE)
    if len(tokens) > MAX_LAYERS:
        reasons.append(f"{len(tokens)} layers exceed {MAX_LAYERS}")
    if len(tokens) > 0 and tokens[0].shape[1] > 2**15 - 1:
        reasons.append(f"{tokens[0].shape[1]} tokens exceed {2**15 - 1}")
    if len(tokens) > 0 and tokens[0].shape[0] > MAX_SAMPLES:
        reasons.append(f"{tokens[0].shape[0]} samples exceed {MAX_SAMPLES}")
    if not all(x.is_contiguous() for x in maps) or not (token_mask is None or token_mask.is_contiguous()):
        reasons.append("maps and mask must be contiguous")
    return reasons


@dataclass(frozen=True)
class GuideConfig(SegmentConfig):
    """Tiles of `guide`, alone or after `segment`; block_h: rows of cells of a program, all of an image's unless `held`.

    Attributes:
        held: whether both predictions of a program's cells are one tile, which stays in registers.
        block_c: channels of a tile.
        rows: rows of cells of a tile.
        lines: pixel lines of each of them.
    """

    held: bool
    block_c: int
    rows: int
    lines: int

    def reasons(self, h: int, w: int, channels: int = 1, cell: int = 1, shared: bool = False) -> list[str]:
        """shared: whether programs may share an image, which those that segment do not."""
        rows = self.block_h if self.held and shared else h
        found = super().reasons(rows, w) + self._unlike_a_launch(block_c=self.block_c, rows=self.rows, lines=self.lines)
        if self.held and self.rows != self.block_h:
            found.append(f"a held tile has all rows of its program, rows={self.rows} of block_h={self.block_h}")
        if self.held and (self.block_c < channels or self.lines < cell):
            tile = f"block_c={self.block_c}, lines={self.lines}"
            found.append(f"a held tile has {channels} channels and {cell} lines of a cell, {tile} do not cover them")
        return found


HELD_VALUES = 16384
"""Values of a prediction, padded to powers of two and with at least 4 channels, up to which a program holds both
predictions in registers: 64 of each a thread. Twice that spills more than reading them again would move."""


MAX_PARTS = 16
"""Programs that share an image. More read each other's sums so often that two reads of a large image cost less."""


def resident_programs(batch: int, limits: DeviceLimits) -> int:
    """Programs an image may have if all of a launch must be resident at once, on half the multiprocessors: the others
    are left to whatever else runs."""
    return max(1, min(MAX_PARTS, limits.multiprocessors // 2 // max(batch, 1)))


def _held_warps(itemsize: int) -> int:
    """Of a program that holds both predictions: fp32 takes a register a value, half precision half of one."""
    return 16 if itemsize >= 4 else 8


def guide_config(channels: int, height: int, width: int, cell: int, itemsize: int, programs: int = 1) -> GuideConfig:
    """Tiles of `guide`; `itemsize`: bytes of an element of the predictions, `programs`: what an image may have.

    The most rows of cells whose predictions stay in registers; if that takes more programs than there are, one passes
    over the image in tiles.
    """
    cells = segment_config(-(-height // cell), -(-width // cell))
    lines, block_c = next_power_of_2(cell), next_power_of_2(channels)
    line = cells.block_w * lines  # pixels
    rows = min(cells.block_h, HELD_VALUES // (max(4, block_c) * lines * line))
    rows = 1 << rows.bit_length() - 1 if rows else 0
    if rows and -(-height // (cell * rows)) <= programs:
        share = {"num_warps": _held_warps(itemsize), "block_h": rows}
        return GuideConfig(**vars(cells) | share, held=True, block_c=block_c, rows=rows, lines=lines)
    block_c = min(block_c, 2)
    lines_at_once = max(1, TILE // (line * block_c))
    lines = min(lines, lines_at_once)
    rows = min(cells.block_h, max(1, lines_at_once // next_power_of_2(cell)))
    return GuideConfig(**vars(cells), held=False, block_c=block_c, rows=rows, lines=lines)


def _span_limits(*predictions: torch.Tensor) -> list[str]:
    """Why offsets within a sample of [B, C, H, W] do not fit 32 bits; empty if they do."""
    if any(sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31 for x in predictions):
        return ["a sample of the predictions spans 2^31 elements or more"]
    return []


def guide_limits(uncond: torch.Tensor, cond: torch.Tensor, cell: int) -> list[str]:
    """Every reason why the guidance kernel cannot take these predictions; empty if it can."""
    grid = -(-cond.shape[2] // cell), -(-cond.shape[3] // cell)
    return dtype_limits("guide", cond.dtype) + _cell_limits(*grid) + _span_limits(uncond, cond)


@dataclass(frozen=True)
class PixelConfig(LaunchConfig):
    """Tile of `guide_pixels`: pixels, all channels of each, and whether that is all of a program, held in registers."""

    held: bool
    block_c: int
    block_p: int

    def reasons(self, channels: int) -> list[str]:
        found = self._unlike_a_launch(block_c=self.block_c, block_p=self.block_p)
        if self.block_c < channels:
            found.append(f"block_c={self.block_c} does not cover {channels} channels")
        return found


MAX_CHANNELS = 256
"""Channels up to which `guide_pixels` has all of a pixel in a tile."""


def pixel_config(channels: int, pixels: int, itemsize: int, programs: int = 1, alone: bool = False) -> PixelConfig:
    """Tile of `guide_pixels`; `itemsize`: bytes of an element of the predictions, `programs`: what an image may have,
    as in `guide_config`. `alone`: no program needs another, so there are as many as tiles."""
    block_c = next_power_of_2(channels)
    if alone:
        return PixelConfig(4, 1, True, block_c, min(next_power_of_2(pixels), TILE // 2 // block_c))
    held = min(next_power_of_2(pixels), HELD_VALUES // max(4, block_c))
    if -(-pixels // held) <= programs:
        return PixelConfig(_held_warps(itemsize), 1, True, block_c, held)
    return PixelConfig(8, 1, False, block_c, TILE // block_c)


def pixel_limits(uncond: torch.Tensor, cond: torch.Tensor) -> list[str]:
    """Every reason why the per-pixel guidance kernel cannot take these predictions; empty if it can. Any number of
    pixels: one program per image takes time in proportion to them, as the denoiser does at least."""
    reasons = dtype_limits("guide_pixels", cond.dtype) + _span_limits(uncond, cond)
    if cond.shape[1] > MAX_CHANNELS:
        reasons.append(f"{cond.shape[1]} channels exceed {MAX_CHANNELS}")
    return reasons
