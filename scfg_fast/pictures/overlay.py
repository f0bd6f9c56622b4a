"""Regions drawn on their image: colours, borders, names and a legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..regions import RegionRow, Regions, per_pixel, region_table, row_name, sample_arrays
from .style import INK, MUTED, PAPER, default_font, fit_text, percent, printable, rate_colors, token_color


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


def draw_overlay(
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
    ids, _, rate = sample_arrays(regions, sample)
    pixels = _spread(per_pixel(ids, regions.cell, rate.shape), size)
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
    font = default_font(max(12, round(longest / 24)))
    stroke = max(2, round(longest / 200))
    named = [row for row in rows if row.share >= min_share]
    texts = {row.token: f"{printable(row.label, row.token)}\n{row.rate:.2f}" for row in named}
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


def draw_rate(regions: Regions, sample: int, size: tuple[int, int], limit: float) -> Image.Image:
    """The rate map in colours, the foreground outlined."""
    _, foreground, rate = sample_arrays(regions, sample)
    picture = _spread(rate_colors(rate, limit), size).copy()
    outline = _edges(_spread(per_pixel(foreground, regions.cell, rate.shape), size), max(1, round(max(size) / 192)))
    picture[outline] = INK
    return Image.fromarray(picture)


def draw_legend(
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
    font, line = default_font(size), round(size * 1.6)
    name_left, share_right, rate_right = left + line, left + width - round(size * 3.6), left + width
    name_width = share_right - font.getlength("100 %") - name_left - 6
    shown = rows if len(rows) <= count else rows[: count - 1]
    rest = rows[len(shown) :]

    def write(place: int, name: str, share: str, rate: str, fill: tuple[int, int, int]) -> None:
        y = top + place * line
        draw.text((name_left, y), fit_text(name, font, name_width), font=font, fill=fill)
        draw.text((share_right, y), share, font=font, fill=fill, anchor="ra")
        draw.text((rate_right, y), rate, font=font, fill=fill, anchor="ra")

    write(0, "", "share", "rate", MUTED)
    for place, row in enumerate(shown, start=1):
        chip_top = top + place * line + 1
        color = token_color(row.token, row.label)
        draw.rectangle((left, chip_top, left + size, chip_top + size), fill=color, outline=INK)
        write(place, printable(row_name(row, labels), row.token), percent(row.share), f"{row.rate:.2f}", INK)
    if rest:
        share = sum(row.share for row in rest)
        rate = sum(row.share * row.rate for row in rest) / share
        write(count, f"{len(rest)} more", percent(share), f"{rate:.2f}", MUTED)


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
    panel = draw_overlay(image, regions, sample, labels, size, opacity, min_share)
    if not legend:
        return panel
    text, pad, width = 16, 20, 240
    line = round(text * 1.6)
    rows = region_table(regions, labels, sample)
    count = max(3, (panel.height - 2 * pad) // line - 1)
    height = max(panel.height, 2 * pad + line * (min(count, len(rows)) + 1))
    sheet = Image.new("RGB", (panel.width + width + 2 * pad, height), PAPER)
    sheet.paste(panel, (0, 0))
    draw = ImageDraw.Draw(sheet)
    draw_legend(draw, rows, labels, left=panel.width + pad, top=pad, width=width, size=text, count=count)
    return sheet
