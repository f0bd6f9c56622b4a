"""The regions of S-CFG as data, as a table and as pictures.

At every guided step each cell of the latent belongs to one token of the prompt, its region, and each latent pixel has a
rate, the factor by which S-CFG multiplies the guidance scale there. This module names, tabulates, draws and saves them.
It needs torch, numpy and PIL.

A latent pixel (row, column) lies in the cell (row // cell, column // cell); the cells at the far edges may be ragged.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True, eq=False)
class Regions:
    """Regions and rates of one denoising step.

    Attributes:
        step: index of the step in its pipeline call, from 0.
        token_index: [B, h, w] int64, the token that owns each cell.
        foreground: [B, h, w] bool, the cells whose mean guidance is the benchmark of all regions.
        rate: [B, 1, H, W] floating point, the factor on the guidance scale at each latent pixel.
    """

    step: int
    token_index: torch.Tensor
    foreground: torch.Tensor
    rate: torch.Tensor

    @property
    def cell(self) -> int:
        """Latent pixels per side of a cell: the power of two that divides H x W into h x w."""
        (h, w), (height, width) = self.token_index.shape[-2:], self.rate.shape[-2:]
        cell = 1
        while (-(-height // cell), -(-width // cell)) != (h, w):
            cell *= 2
            if cell > 2 * max(height, width):
                raise ValueError(f"no power of two divides a latent of {height}x{width} into {h}x{w} cells")
        return cell

    def clone(self) -> Regions:
        """A copy that later steps cannot change."""
        return replace(
            self, token_index=self.token_index.clone(), foreground=self.foreground.clone(), rate=self.rate.clone()
        )

    def to(self, device: torch.device | str) -> Regions:
        """The same regions on another device; tensors that are there already are shared, not copied."""
        return replace(
            self,
            token_index=self.token_index.to(device),
            foreground=self.foreground.to(device),
            rate=self.rate.to(device),
        )

    def cpu(self) -> Regions:
        """The same regions in host memory."""
        return self.to("cpu")


class RegionRow(NamedTuple):
    """One region of one sample.

    Attributes:
        token: index of the token.
        label: its name.
        share: share of all cells, in (0, 1].
        rate: mean rate over the region's latent pixels.
        foreground: share of the region's cells that are foreground, in [0, 1].
    """

    token: int
    label: str
    share: float
    rate: float
    foreground: float


def token_labels(tokenizer: Any, prompt: str, num_tokens: int) -> list[str]:
    """Human names of the tokens that a prompt becomes.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the text.
        num_tokens: length that the prompt is padded and cut to, T.

    Returns:
        T names: `<start>`, the words and word pieces as text, `<end>`, then `<pad>`.

    Raises:
        ValueError: num_tokens is below 1.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    encoded = tokenizer(prompt, padding="max_length", max_length=num_tokens, truncation=True)
    labels: list[str] = []
    for position, token in enumerate(encoded["input_ids"]):
        if labels and labels[-1] in ("<end>", "<pad>"):
            labels.append("<pad>")
        elif position == 0 and token == tokenizer.bos_token_id:
            labels.append("<start>")
        elif token == tokenizer.eos_token_id:
            labels.append("<end>")
        else:
            labels.append(_token_text(tokenizer, token))
    return labels


def _token_text(tokenizer: Any, token: int) -> str:
    """A token as text; pieces that are not whole characters keep the vocabulary's spelling."""
    text = tokenizer.decode([token]).strip()
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token)).removesuffix("</w>")


def _arrays(regions: Regions, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token_index [h, w], foreground [h, w], rate [H, W]) of one sample in host memory."""
    batch = regions.token_index.shape[0]
    if not 0 <= sample < batch:
        raise ValueError(f"sample {sample} does not exist, these regions have {batch} (counted from 0)")
    return (
        regions.token_index[sample].cpu().numpy(),
        regions.foreground[sample].cpu().numpy(),
        regions.rate[sample, 0].float().cpu().numpy(),
    )


def _per_pixel(cells: np.ndarray, cell: int, size: tuple[int, int]) -> np.ndarray:
    """[h, w] -> [H, W]: every latent pixel takes the value of its cell."""
    return cells.repeat(cell, 0).repeat(cell, 1)[: size[0], : size[1]]


def region_table(regions: Regions, labels: Sequence[str], sample: int = 0) -> list[RegionRow]:
    """The regions of one sample, largest first, equal sizes by token index.

    Args:
        regions: of one step.
        labels: T names, see `token_labels`.
        sample: index into the batch.

    Raises:
        ValueError: the sample does not exist, or a region's token has no label.
    """
    ids, foreground, rate = _arrays(regions, sample)
    if ids.max() >= len(labels):
        raise ValueError(f"token {ids.max()} owns a region, but only {len(labels)} labels were given")
    pixel_ids = _per_pixel(ids, regions.cell, rate.shape)
    rows = []
    for token in np.unique(ids):
        cells = ids == token
        rows.append(
            RegionRow(
                token=int(token),
                label=labels[token],
                share=float(cells.mean()),
                rate=float(rate[pixel_ids == token].mean()),
                foreground=float(foreground[cells].mean()),
            )
        )
    return sorted(rows, key=lambda row: (-row.share, row.token))


# Files


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when the block has ended well: whole, or not at all.

    Written under a temporary name in the same folder, which must exist. Any exception, an interrupt too, removes it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_regions_npz(
    path: str | os.PathLike,
    steps: Sequence[Regions],
    *,
    labels: Sequence[Sequence[str]] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Save the regions of several steps, whole or not at all. `numpy.load(path)` reads them, without pickle.

    The file holds, for S steps of B samples:

        step         [S] int64            index of each step, from 0
        token_index  [S, B, h, w] int64   the token that owns each cell
        foreground   [S, B, h, w] bool    the cells that are the benchmark
        rate         [S, B, 1, H, W] f32  the factor on the guidance scale
        cell         [] int64             latent pixels per side of a cell
        labels       [B, T] text          names of the tokens, if given
        metadata     [] text              a JSON object, `{}` if none was given

    Args:
        path: of the file; its folder must exist.
        steps: at least one, all of the same shapes.
        labels: for each sample, the names of its T tokens.
        metadata: anything that JSON can hold.

    Returns:
        The path.

    Raises:
        ValueError: no steps, or steps of different shapes.
    """
    if not steps:
        raise ValueError("there are no regions to save")
    shapes = {(tuple(r.token_index.shape), tuple(r.rate.shape)) for r in steps}
    if len(shapes) > 1:
        raise ValueError(f"the steps differ in shape: {sorted(shapes)}")
    arrays: dict[str, Any] = {
        "step": np.array([regions.step for regions in steps], dtype=np.int64),
        "token_index": np.stack([regions.token_index.cpu().numpy() for regions in steps]),
        "foreground": np.stack([regions.foreground.cpu().numpy() for regions in steps]),
        "rate": np.stack([regions.rate.float().cpu().numpy() for regions in steps]),
        "cell": np.array(steps[0].cell, dtype=np.int64),
        "metadata": np.array(json.dumps(dict(metadata or {}), sort_keys=True)),
    }
    if labels is not None:
        arrays["labels"] = np.array([list(names) for names in labels])
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)
    return Path(path)


# Pictures

_INK, _MUTED, _RULE, _PAPER = (27, 31, 36), (106, 115, 125), (216, 222, 228), (255, 255, 255)
_PALETTE = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (23, 190, 207),
    (227, 119, 194), (188, 189, 34), (140, 86, 75), (0, 114, 178), (230, 171, 2), (102, 166, 30),
)  # fmt: skip
_SPECIAL = {"<start>": (70, 78, 88), "<end>": (120, 128, 138), "<pad>": (168, 175, 183)}
_COLD_TO_WARM = np.array(
    [(33, 102, 172), (103, 169, 207), (209, 229, 240), (247, 247, 247), (253, 219, 199), (239, 138, 98), (178, 24, 43)],
    dtype=np.float64,
)
_WIDEST_RATE = 4.0
_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def token_color(token: int, label: str) -> tuple[int, int, int]:
    """The colour of a token in every picture: greys for start, end and padding, a colour of its own for a word."""
    if label in _SPECIAL:
        return _SPECIAL[label]
    return _PALETTE[(token - 1) % len(_PALETTE)]


def rate_range(steps: Sequence[Regions], sample: int = 0) -> float:
    """The m whose [1/m, m] holds the rates of all steps, at least 1.25 and at most 4: the ends of the colour bar."""
    rates = np.concatenate([_arrays(regions, sample)[2].ravel() for regions in steps])
    return float(np.exp(np.abs(np.log(np.clip(rates, 1 / _WIDEST_RATE, _WIDEST_RATE))).max()).clip(1.25))


def rate_colors(rate: np.ndarray, limit: float) -> np.ndarray:
    """Rates [...] -> colours [..., 3] uint8: blue below 1, white at 1, red above; equal factors are equally strong.

    Args:
        rate: any shape, not negative.
        limit: m > 1; rates outside [1/m, m] take the colour of the end.
    """
    place = np.log(np.clip(rate, 1 / limit, limit)) / np.log(limit)  # [-1, 1]
    stops = np.linspace(-1.0, 1.0, len(_COLD_TO_WARM))
    channels = [np.interp(place, stops, _COLD_TO_WARM[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _font(size: float) -> _Font:
    return ImageFont.load_default(size)


@functools.cache
def _has_glyph(character: str) -> bool:
    """Whether the built-in font can draw the character; U+FFFF is one that no font has."""
    font = _font(16)
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def _drawable(text: str) -> str:
    """The text in characters that the built-in font has: accents are dropped where it must be, the rest becomes `?`."""
    characters = []
    for character in text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"):
        base = character if _has_glyph(character) else unicodedata.normalize("NFKD", character)[0]
        characters.append(base if _has_glyph(base) else "?")
    return "".join(characters)


def _printable(label: str, token: int) -> str:
    """A label for a picture; one in another script shows as the token's number."""
    text = _drawable(label)
    return text if text.count("?") == label.count("?") else f"token {token}"


def row_name(row: RegionRow, labels: Sequence[str]) -> str:
    """The label of a region, with the token's number where several tokens have that label."""
    return row.label if labels.count(row.label) == 1 else f"{row.label} ({row.token})"


def _percent(share: float) -> str:
    """A share of at least 0 as text, the smallest ones as `<1 %`."""
    return f"{100 * share:.0f} %" if share >= 0.005 else "<1 %"


def _fit(text: str, font: _Font, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrap(text: str, font: _Font, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces."""
    lines: list[str] = []
    for word in _drawable(text).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_fit(word, font, width))
    return lines


def scaled(image: Image.Image, longest: int) -> Image.Image:
    """The picture in RGB with `longest` pixels on its longer side; smaller pictures grow, larger ones shrink."""
    factor = longest / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _spread(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W, ...] latent pixels -> [height, width, ...] picture pixels, nearest."""
    width, height = size
    rows = np.arange(height) * values.shape[0] // height
    columns = np.arange(width) * values.shape[1] // width
    return values[rows][:, columns]


def _edges(values: np.ndarray, thickness: int) -> np.ndarray:
    """[height, width] bool: a line of `thickness` pixels along every change of value."""
    line = np.zeros(values.shape, dtype=bool)
    line[:, 1:] |= values[:, 1:] != values[:, :-1]
    line[1:, :] |= values[1:, :] != values[:-1, :]
    return _grown(line, thickness - 1)


def _grown(mask: np.ndarray, times: int) -> np.ndarray:
    """The mask grown by one pixel, alternately up-left and down-right."""
    for turn in range(times):
        shift = -1 if turn % 2 == 0 else 1
        padded = np.pad(mask, 1)
        vertical = padded[1 - shift : padded.shape[0] - 1 - shift, 1:-1]
        mask = mask | vertical
        padded = np.pad(mask, 1)
        mask = mask | padded[1:-1, 1 - shift : padded.shape[1] - 1 - shift]
    return mask


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """[h, w] bool -> its largest 4-connected part."""
    todo = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    best: list[tuple[int, int]] = []
    while todo:
        part = [todo.pop()]
        for y, x in part:
            for neighbour in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if neighbour in todo:
                    todo.remove(neighbour)
                    part.append(neighbour)
        if len(part) > len(best) or (len(part) == len(best) and min(part) < min(best)):
            best = part
    largest = np.zeros_like(mask)
    largest[tuple(np.array(best).T)] = True
    return largest


def _inner_cells(mask: np.ndarray) -> list[tuple[int, int]]:
    """The cells of a part from the most inner to the outermost; ties by nearness to the part's centre."""
    depth = np.zeros(mask.shape, dtype=int)
    rest = mask
    while rest.any():
        depth += rest
        padded = np.pad(rest, 1)
        rest = rest & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    cells = np.argwhere(mask)
    distance = np.abs(cells - cells.mean(0)).sum(1)
    order = np.lexsort((distance, -depth[mask]))
    return [(int(y), int(x)) for y, x in cells[order]]


def _place_labels(
    ids: np.ndarray, rows: Sequence[RegionRow], boxes: Mapping[int, tuple[int, int]], size: tuple[int, int], step: float
) -> dict[int, tuple[int, int]]:
    """Where each region's text goes: inside the region as far as it can, inside the picture, never over another text.

    Args:
        ids: [h, w] token of each cell.
        rows: regions to name, the most important first.
        boxes: per token, (width, height) of its text in pixels.
        size: (width, height) of the picture.
        step: pixels per cell.

    Returns:
        Per token, the left top corner of its text; tokens that found no place are missing.
    """
    placed: dict[int, tuple[int, int]] = {}
    taken: list[tuple[int, int, int, int]] = []
    half = step / 2  # places are tried at twice the resolution of the cells
    for row in rows:
        width, height = boxes[row.token]
        if width + 4 > size[0] or height + 4 > size[1]:
            continue
        own = _largest_part(ids == row.token).repeat(2, 0).repeat(2, 1)
        best: tuple[float, tuple[int, int]] | None = None
        for y, x in _inner_cells(own):
            left = int(min(max((x + 0.5) * half - width / 2, 2), size[0] - width - 2))
            top = int(min(max((y + 0.5) * half - height / 2, 2), size[1] - height - 2))
            if any(left < x1 and left + width > x0 and top < y1 and top + height > y0 for x0, y0, x1, y1 in taken):
                continue
            under_rows = slice(int(top / half), int((top + height) / half) + 1)
            under_columns = slice(int(left / half), int((left + width) / half) + 1)
            score = float(own[under_rows, under_columns].mean())
            if best is None or score > best[0] + 0.05:
                best = (score, (left, top))
            if score > 0.95:
                break
        if best is not None and best[0] >= 0.3:
            placed[row.token] = best[1]
            left, top = best[1]
            taken.append((left - 3, top - 2, left + width + 3, top + height + 2))
    return placed


def _draw_overlay(
    image: Image.Image,
    regions: Regions,
    sample: int,
    labels: Sequence[str],
    longest: int,
    opacity: float,
    min_share: float,
) -> Image.Image:
    """The picture with its regions, their borders and their names; see `overlay`."""
    base = scaled(image, longest)
    size = base.size
    rows = region_table(regions, labels, sample)
    ids, _, rate = _arrays(regions, sample)
    pixels = _spread(_per_pixel(ids, regions.cell, rate.shape), size)
    color_of = np.zeros((len(labels), 3))
    for row in rows:
        color_of[row.token] = token_color(row.token, row.label)
    picture = np.asarray(base, dtype=np.float64)
    picture = 0.7 * picture.mean(-1, keepdims=True) + 0.3 * picture  # so that a region shows its own colour
    picture = picture * (1.0 - opacity) + color_of[pixels] * opacity
    line = _edges(pixels, max(1, round(longest / 256)))
    picture[_grown(line, 2)] *= 0.65
    picture[line] = 255.0
    panel = Image.fromarray(picture.round().astype(np.uint8))

    draw = ImageDraw.Draw(panel)
    font = _font(max(12, round(longest / 24)))
    stroke = max(2, round(longest / 200))
    named = [row for row in rows if row.share >= min_share]
    texts = {row.token: f"{_printable(row.label, row.token)}\n{row.rate:.2f}" for row in named}
    boxes, offsets = {}, {}
    for token, text in texts.items():
        left, top, right, bottom = draw.multiline_textbbox(
            (0, 0), text, font=font, align="center", spacing=0, stroke_width=stroke
        )
        boxes[token] = (int(right - left) + 1, int(bottom - top) + 1)
        offsets[token] = (left, top)
    places = _place_labels(ids, named, boxes, size, size[0] * regions.cell / rate.shape[1])
    for token, (x, y) in places.items():
        left, top = offsets[token]
        draw.multiline_text(
            (x - left, y - top), texts[token], font=font, align="center", spacing=0,
            fill="white", stroke_width=stroke, stroke_fill=(20, 22, 26),
        )  # fmt: skip
    return panel


def _draw_rate(regions: Regions, sample: int, size: tuple[int, int], limit: float) -> Image.Image:
    """The rate map in colours, the foreground outlined."""
    _, foreground, rate = _arrays(regions, sample)
    picture = _spread(rate_colors(rate, limit), size).copy()
    outline = _edges(_spread(_per_pixel(foreground, regions.cell, rate.shape), size), max(1, round(max(size) / 192)))
    picture[outline] = _INK
    return Image.fromarray(picture)


def _draw_rows(
    draw: ImageDraw.ImageDraw,
    rows: Sequence[RegionRow],
    labels: Sequence[str],
    *,
    left: int,
    top: int,
    width: int,
    size: int,
    count: int,
) -> None:
    """A legend: colour, name, share and rate of the first `count` regions, and a line for the rest."""
    font, line = _font(size), round(size * 1.6)
    name_left, share_right, rate_right = left + line, left + width - round(size * 3.6), left + width
    name_width = share_right - font.getlength("100 %") - name_left - 6
    shown = rows if len(rows) <= count else rows[: count - 1]
    rest = rows[len(shown) :]

    def write(place: int, name: str, share: str, rate: str, fill: tuple[int, int, int]) -> None:
        y = top + place * line
        draw.text((name_left, y), _fit(name, font, name_width), font=font, fill=fill)
        draw.text((share_right, y), share, font=font, fill=fill, anchor="ra")
        draw.text((rate_right, y), rate, font=font, fill=fill, anchor="ra")

    write(0, "", "share", "rate", _MUTED)
    for place, row in enumerate(shown, start=1):
        chip_top = top + place * line + 1
        color = token_color(row.token, row.label)
        draw.rectangle((left, chip_top, left + size, chip_top + size), fill=color, outline=_INK)
        write(place, _printable(row_name(row, labels), row.token), _percent(row.share), f"{row.rate:.2f}", _INK)
    if rest:
        share = sum(row.share for row in rest)
        rate = sum(row.share * row.rate for row in rest) / share
        write(count, f"{len(rest)} more", _percent(share), f"{rate:.2f}", _MUTED)


def overlay(
    image: Image.Image,
    regions: Regions,
    sample: int,
    labels: Sequence[str],
    *,
    size: int = 512,
    opacity: float = 0.45,
    min_share: float = 0.02,
    legend: bool = True,
) -> Image.Image:
    """The picture with its regions in colour, each named with its token and its mean rate.

    Args:
        image: the picture, of any size.
        regions: of one step.
        sample: index into the batch.
        labels: T names, see `token_labels`.
        size: pixels on the longer side of the picture.
        opacity: of the colours, 0 to 1.
        min_share: regions with a smaller share of the cells are in the legend only, as those without room for a name.
        legend: add a column with colour, name, share and rate of the regions.

    Raises:
        ValueError: the sample does not exist, or a region's token has no label.
    """
    panel = _draw_overlay(image, regions, sample, labels, size, opacity, min_share)
    if not legend:
        return panel
    text, pad, width = 16, 20, 240
    line = round(text * 1.6)
    rows = region_table(regions, labels, sample)
    count = max(3, (panel.height - 2 * pad) // line - 1)
    height = max(panel.height, 2 * pad + line * (min(count, len(rows)) + 1))
    sheet = Image.new("RGB", (panel.width + width + 2 * pad, height), _PAPER)
    sheet.paste(panel, (0, 0))
    draw = ImageDraw.Draw(sheet)
    _draw_rows(draw, rows, labels, left=panel.width + pad, top=pad, width=width, size=text, count=count)
    return sheet


def _draw_color_bar(draw: ImageDraw.ImageDraw, left: int, top: int, width: int, limit: float) -> None:
    """A horizontal bar of all rates from 1/limit to limit, with ticks."""
    height, font = 16, _font(13)
    place = np.linspace(-1.0, 1.0, width)
    for offset, color in enumerate(rate_colors(limit**place, limit)):
        draw.line((left + offset, top, left + offset, top + height), fill=tuple(int(c) for c in color))
    draw.rectangle((left, top, left + width - 1, top + height), outline=_INK)
    last = -np.inf
    for value in sorted({1 / limit, 1 / 3, 0.5, 2 / 3, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, limit}):
        text = f"{value:.2f}".rstrip("0").rstrip(".")
        x = left + (np.log(value) / np.log(limit) + 1) / 2 * (width - 1)
        half = font.getlength(text) / 2
        if not left - 1 <= x <= left + width:
            continue
        x_text = min(max(x, left + half), left + width - half)
        if x_text - half < last + 8:
            continue
        last = x_text + half
        draw.line((x, top + height, x, top + height + 5), fill=_INK)
        draw.text((x_text, top + height + 8), text, font=font, fill=_INK, anchor="ma")


def contact_sheet(
    image: Image.Image,
    steps: Sequence[Regions],
    labels: Sequence[str],
    sample: int = 0,
    *,
    num_steps: int | None = None,
    title: str = "",
    subtitle: str = "",
    panel: int = 288,
    opacity: float = 0.45,
    min_share: float = 0.02,
) -> Image.Image:
    """Regions and rates of several steps in one labelled picture: the plain image and the key, then a column per step.

    Args:
        image: the finished picture.
        steps: regions of the steps to show, at least one.
        labels: T names, see `token_labels`.
        sample: index into the batch.
        num_steps: steps of the whole call, for the headings.
        title: first line, usually the prompt.
        subtitle: second line.
        panel: pixels on the longer side of each panel.
        opacity: of the colours, 0 to 1.
        min_share: see `overlay`.

    Raises:
        ValueError: no steps, the sample does not exist, or a region's token has no label.
    """
    if not steps:
        raise ValueError("there are no regions to show")
    margin, gap, text, count = 28, 20, 13, 9
    heading, line = _font(16), round(text * 1.6)
    plain = scaled(image, panel)
    size = plain.size
    column = max(size[0], 208)
    limit = rate_range(steps, sample)
    tables = [region_table(regions, labels, sample) for regions in steps]
    list_rows = min(count, max(len(rows) for rows in tables)) + 1
    width = 2 * margin + (len(steps) + 1) * column + len(steps) * gap
    header = _Header(title, subtitle, width - 2 * margin)
    top = margin + header.height
    rates_top = top + 28 + size[1] + gap
    list_top = rates_top + size[1] + gap
    sheet = Image.new("RGB", (width, list_top + list_rows * line + margin), _PAPER)
    draw = ImageDraw.Draw(sheet)
    header.draw(draw, margin, margin)

    draw.text((margin, top), "image", font=heading, fill=_INK)
    sheet.paste(plain, (margin, top + 28))
    draw.text((margin, rates_top), "rate: factor on the guidance scale", font=_font(text), fill=_INK)
    _draw_color_bar(draw, margin, rates_top + 26, column, limit)
    notes = (
        "Top: each cell is coloured by the token that attends to it most. Bottom: the rate of each latent pixel; the "
        "dark outline encloses the foreground, whose mean guidance is the benchmark. Lists: each region's share of the "
        "cells and mean rate."
    )
    y = rates_top + 90
    for note in _wrap(notes, _font(text), column):
        draw.text((margin, y), note, font=_font(text), fill=_MUTED)
        y += line

    for index, (regions, rows) in enumerate(zip(steps, tables, strict=True)):
        left = margin + (index + 1) * (column + gap)
        of = "" if num_steps is None else f" of {num_steps}"
        draw.text((left, top), f"step {regions.step + 1}{of}", font=heading, fill=_INK)
        sheet.paste(_draw_overlay(image, regions, sample, labels, panel, opacity, min_share), (left, top + 28))
        rates = _draw_rate(regions, sample, size, limit)
        sheet.paste(rates, (left, rates_top))
        draw.rectangle((left, rates_top, left + size[0] - 1, rates_top + size[1] - 1), outline=_RULE)
        _draw_rows(draw, rows, labels, left=left, top=list_top, width=column, size=text, count=count)
    return sheet


class _Header:
    """Title and subtitle of a sheet, wrapped to its width."""

    def __init__(self, title: str, subtitle: str, width: int, size: int = 22) -> None:
        self._lines = [(line, _font(size), _INK, size + 8) for line in _wrap(title, _font(size), width)]
        self._lines += [(line, _font(14), _MUTED, 22) for line in _wrap(subtitle, _font(14), width)]
        self.height = sum(height for *_, height in self._lines) + (14 if self._lines else 0)

    def draw(self, draw: ImageDraw.ImageDraw, left: int, top: int) -> int:
        """Write the lines below `top`; returns the height they take."""
        for text, font, color, height in self._lines:
            draw.text((left, top), text, font=font, fill=color)
            top += height
        return self.height


def image_grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    captions: Sequence[Sequence[str]] = (),
    row_titles: Sequence[str] = (),
    title: str = "",
    subtitle: str = "",
) -> Image.Image:
    """Pictures of one size in a labelled grid, at their own resolution.

    Args:
        rows: rows of pictures; a row may be shorter than the others.
        captions: a line above every picture, in rows as the pictures, or none.
        row_titles: a heading above every row, or none.
        title: first line above the grid.
        subtitle: second line.

    Raises:
        ValueError: there are no pictures, or they differ in size.
    """
    sizes = {image.size for row in rows for image in row}
    if len(sizes) != 1:
        raise ValueError(f"a grid needs pictures of one size, got {sorted(sizes) or 'none'}")
    width, height = sizes.pop()
    margin, gap, font = 28, 16, _font(16)
    columns = max(len(row) for row in rows)
    total = max(2 * margin + columns * width + (columns - 1) * gap, 420)
    headers = [_Header(title, subtitle, total - 2 * margin)]
    headers += [_Header(row_title, "", total - 2 * margin, size=18) for row_title in row_titles]
    caption_height = 26 if captions else 0
    body = len(rows) * (height + caption_height + gap) - gap
    sheet = Image.new("RGB", (total, 2 * margin + sum(header.height for header in headers) + body), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = margin + headers[0].draw(draw, margin, margin)
    for index, row in enumerate(rows):
        if row_titles:
            y += headers[index + 1].draw(draw, margin, y)
        for column, image in enumerate(row):
            x = margin + column * (width + gap)
            if captions:
                draw.text((x, y), _fit(_drawable(captions[index][column]), font, width), font=font, fill=_INK)
            sheet.paste(image.convert("RGB"), (x, y + caption_height))
        y += caption_height + height + gap
    return sheet
