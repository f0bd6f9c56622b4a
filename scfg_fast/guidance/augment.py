r"""Random, differentiable changes of a picture, over which loss guidance averages its gradient.

A loss built on a network has steep, misleading directions; its mean over small random changes A of the picture,

    l_hat(x) = (1 / |T|) sum_{A in T} l(A(x)),

is smoother: for l <= C and changes with density p, l_hat is C * integral ||grad p|| -Lipschitz (proposition 4.1).

One copy A, in this order, on images x [B, C, H, W]:

    color       x + b;  mean_c + s (x - mean_c), mean over channels;  mean + k (x - mean), mean over the picture
    translate   whole pixels, `fill` moves in
    resize      bilinear to int(z n) pixels a side, then the middle n of them, or a border of `fill` around them
    cutout      a box of `fill`

`fill` is 0.5, the grey that is 0 in the range [-1, 1] of the published code; 0 in latents. One zoom z is shared by all
copies of an evaluation, as there; everything else is drawn for each.

The draws are host numbers from a CPU generator, one set per copy, shared by all samples of a batch: a batch is each
sample alone, and the device changes nothing. The zoom is two matrix products and the rest slices, so the backward pass
has no atomics and repeats bit by bit.

Source: Shen et al., "Understanding and Improving Training-free Loss-based Diffusion Guidance", NeurIPS 2024 (arXiv
2403.12404), algorithm 1, with the kinds and strengths of Zhao et al., "Differentiable Augmentation for Data-Efficient
GAN Training" (arXiv 2006.10738); the brightness is half of theirs, for a range of [0, 1] in the place of [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """The random numbers of one copy; the defaults change nothing.

    Attributes:
        brightness: b, added.
        saturation: s, factor on the distance to the pixel's mean over channels.
        contrast: k, factor on the distance to the picture's mean.
        shift: pixels (down, right).
        zoom: z, above 1 enlarges; a side of n pixels becomes one of int(z n).
        box: (top, bottom, left, right), half open and inside the picture, or None.
    """

    brightness: float = 0.0
    saturation: float = 1.0
    contrast: float = 1.0
    shift: tuple[int, int] = (0, 0)
    zoom: float = 1.0
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Augment:
    """Which random changes, how strong, and over how many copies the loss is averaged. A strength of 0 leaves one out.

    Args:
        copies: |T|; 10 in the paper, 20 in its code. The loss sees one copy of the batch at a time: time grows with
            the copies, memory does not.
        translate: largest shift as a fraction of each side, in [0, 0.5], rounded to whole pixels.
        resize: zoom in [1 - resize, 1 + resize], in [0, 1).
        color: in [0, 1]; brightness within +- color / 4, saturation in 1 +- color, contrast in 1 +- color / 2. For RGB
            in [0, 1] only: 0 for latents.
        cutout: side of the box as a fraction of the picture's, in [0, 1). Its centre is anywhere in the picture, so
            boxes may stick out.

    Raises:
        ValueError: a value is out of range; the message lists every one.
    """

    copies: int = 10
    translate: float = 0.125
    resize: float = 0.2
    color: float = 1.0
    cutout: float = 0.5

    def __post_init__(self) -> None:
        reasons = []
        if not isinstance(self.copies, int) or isinstance(self.copies, bool) or self.copies < 1:
            reasons.append(f"copies must be an integer of at least 1, got {self.copies!r}")
        for name, top, closed in (
            ("translate", 0.5, True), ("resize", 1.0, False), ("color", 1.0, True), ("cutout", 1.0, False),
        ):  # fmt: skip
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0.0 <= value <= top and (closed or value < top)):
                reasons.append(f"{name} must be a number in [0, {top:g}{']' if closed else ')'}, got {value!r}")
        if reasons:
            raise ValueError("Augment: " + "; ".join(reasons))

    def draws(self, generator: torch.Generator, height: int, width: int) -> list[Draw]:
        """The random numbers of all copies, for pictures of H x W.

        Every copy takes eight uniforms, whatever is left out: leaving one out changes no other. The zoom is that of the
        first copy for all.

        Raises:
            ValueError: the generator is not on the CPU.
        """
        if generator.device.type != "cpu":
            raise ValueError(
                f"Augment: draws come from a CPU generator, so that they are the same on every device; got one on "
                f"{generator.device}. Use torch.Generator().manual_seed(seed)"
            )
        uniforms = torch.rand(self.copies, 8, generator=generator, dtype=torch.float64).tolist()
        zoom = 1.0 + self.resize * (2.0 * uniforms[0][5] - 1.0)
        return [self._draw(row, zoom, height, width) for row in uniforms]

    def _draw(self, u: list[float], zoom: float, height: int, width: int) -> Draw:
        rows, columns = (_span(self.cutout, side, place) for side, place in ((height, u[6]), (width, u[7])))
        return Draw(
            brightness=self.color * (u[0] - 0.5) / 2.0,
            saturation=1.0 + self.color * (2.0 * u[1] - 1.0),
            contrast=1.0 + self.color * (u[2] - 0.5),
            shift=(_shift(self.translate, height, u[3]), _shift(self.translate, width, u[4])),
            zoom=zoom,
            box=(*rows, *columns) if rows[0] < rows[1] and columns[0] < columns[1] else None,
        )

    def apply(self, images: Tensor, draw: Draw, fill: float = 0.5) -> Tensor:
        """One copy of a batch, differentiable.

        Args:
            images: [B, C, H, W], floating, RGB in about [0, 1] for `color`; values outside are kept.
            draw: one of `draws`.
            fill: the value outside of the picture and in the box; 0.5 is grey, for latents take 0.

        Returns:
            [B, C, H, W] of the same dtype; `images` itself where the draw changes nothing.

        Raises:
            ValueError: not a floating [B, C, H, W], or `color` for other than 3 channels.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                f"Augment: expected floating images [B, C, H, W], got {images.dtype} of shape {list(images.shape)}"
            )
        if self.color:
            if images.shape[1] != 3:
                raise ValueError(
                    f"Augment: color needs RGB, 3 channels, got {images.shape[1]}; for latents use Augment(color=0)"
                )
            images = _recolor(images, draw)
        if draw.shift != (0, 0):
            down, right = draw.shift
            images = F.pad(images, (right, -right, down, -down), value=fill)
        height, width = images.shape[2:]
        if _zoomed(height, draw.zoom) != height or _zoomed(width, draw.zoom) != width:
            rows, columns = _zoom_matrix(height, draw.zoom, images), _zoom_matrix(width, draw.zoom, images)
            images = rows @ (images - fill) @ columns.mT + fill  # rows of zeros, outside of the picture, give the fill
        if draw.box is not None:
            top, bottom, left, right = draw.box
            images = images.clone()
            images[:, :, top:bottom, left:right] = fill
        return images


def _shift(strength: float, side: int, uniform: float) -> int:
    """A whole number of pixels, each of -most .. most equally likely."""
    most = int(strength * side + 0.5)
    return int(uniform * (2 * most + 1)) - most


def _span(strength: float, side: int, uniform: float) -> tuple[int, int]:
    """Where a box of round(strength * side) pixels begins and ends, cut off at the border."""
    length = int(strength * side + 0.5)
    begin = int(uniform * (side + 1 - length % 2)) - length // 2
    return max(0, begin), min(side, begin + length)


def _recolor(images: Tensor, draw: Draw) -> Tensor:
    if draw.brightness != 0.0:
        images = images + draw.brightness
    if draw.saturation != 1.0:
        grey = images.mean(1, keepdim=True)
        images = grey + draw.saturation * (images - grey)
    if draw.contrast != 1.0:
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + draw.contrast * (images - mean)
    return images


def _zoomed(side: int, zoom: float) -> int:
    """Pixels of a resized side."""
    return max(1, int(zoom * side))


def _zoom_matrix(side: int, zoom: float, like: Tensor) -> Tensor:
    """[side, side]: bilinear weights of the source pixels (columns) in each pixel of the result (rows).

    The side is resized to n = int(zoom side) pixels, whose source is (i + 1/2) side / n - 1/2, held at the border; the
    result has the middle of them, or zeros around them.
    """
    size = _zoomed(side, zoom)
    pixels = torch.arange(side, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    place = pixels + (size - side) // 2 if size >= side else pixels - (side - size) // 2
    source = ((place + 0.5) * (side / size) - 0.5).clamp(0.0, side - 1.0)
    weights = (1.0 - (source[:, None] - pixels).abs()).clamp(min=0.0)
    inside = (place >= 0) & (place < size)
    return torch.where(inside[:, None], weights, 0.0).to(like.dtype)  # [side, side]
