"""Labelled sheets: regions of several steps, and images in a grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..regions import Regions, region_table
from .overlay import draw_legend, draw_overlay, draw_rate, scaled
from .style import INK, MUTED, PAPER, RULE, default_font, drawable, fit_text, rate_colors, rate_range, wrap_text


def _draw_color_bar(draw: ImageDraw.ImageDraw, left: int, top: int, width: int, limit: float) -> None:
    """A horizontal bar of all rates from 1/limit to limit, with ticks."""
    height, font = 16, default_font(13)
    place = np.linspace(-1.0, 1.0, width)
    for offset, color in enumerate(rate_colors(limit**place, limit)):
        draw.line((left + offset, top, left + offset, top + height), fill=tuple(int(c) for c in color))
    draw.rectangle((left, top, left + width - 1, top + height), outline=INK)
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
        draw.line((x, top + height, x, top + height + 5), fill=INK)
        draw.text((x_text, top + height + 8), text, font=font, fill=INK, anchor="ma")


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
    heading, line = default_font(16), round(text * 1.6)
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
    sheet = Image.new("RGB", (width, list_top + list_rows * line + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    header.draw(draw, margin, margin)

    draw.text((margin, top), "image", font=heading, fill=INK)
    sheet.paste(plain, (margin, top + 28))
    draw.text((margin, rates_top), "rate: factor on the guidance scale", font=default_font(text), fill=INK)
    _draw_color_bar(draw, margin, rates_top + 26, column, limit)
    notes = (
        "Top: each cell is coloured by the token that attends to it most. Bottom: the rate of each latent pixel; the "
        "dark outline encloses the foreground, whose mean guidance is the reference. Lists: each region's share of the "
        "cells and mean rate."
    )
    y = rates_top + 90
    for note in wrap_text(notes, default_font(text), column):
        draw.text((margin, y), note, font=default_font(text), fill=MUTED)
        y += line

    for index, (regions, rows) in enumerate(zip(steps, tables, strict=True)):
        left = margin + (index + 1) * (column + gap)
        of = "" if num_steps is None else f" of {num_steps}"
        draw.text((left, top), f"step {regions.step + 1}{of}", font=heading, fill=INK)
        sheet.paste(draw_overlay(image, regions, sample, labels, panel, opacity, min_share), (left, top + 28))
        rates = draw_rate(regions, sample, size, limit)
        sheet.paste(rates, (left, rates_top))
        draw.rectangle((left, rates_top, left + size[0] - 1, rates_top + size[1] - 1), outline=RULE)
        draw_legend(draw, rows, labels, left=left, top=list_top, width=column, size=text, count=count)
    return sheet


class _Header:
    """Title and subtitle of a sheet, wrapped to its width."""

    def __init__(self, title: str, subtitle: str, width: int, size: int = 22) -> None:
        large, small = default_font(size), default_font(14)
        self._lines = [(line, large, INK, size + 8) for line in wrap_text(title, large, width)]
        self._lines += [(line, small, MUTED, 22) for line in wrap_text(subtitle, small, width)]
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
    margin, gap, font = 28, 16, default_font(16)
    columns = max(len(row) for row in rows)
    total = max(2 * margin + columns * width + (columns - 1) * gap, 420)
    headers = [_Header(title, subtitle, total - 2 * margin)]
    headers += [_Header(row_title, "", total - 2 * margin, size=18) for row_title in row_titles]
    caption_height = 26 if captions else 0
    body = len(rows) * (height + caption_height + gap) - gap
    sheet = Image.new("RGB", (total, 2 * margin + sum(header.height for header in headers) + body), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = margin + headers[0].draw(draw, margin, margin)
    for index, row in enumerate(rows):
        if row_titles:
            y += headers[index + 1].draw(draw, margin, y)
        for column, image in enumerate(row):
            x = margin + column * (width + gap)
            if captions:
                draw.text((x, y), fit_text(drawable(captions[index][column]), font, width), font=font, fill=INK)
            sheet.paste(image.convert("RGB"), (x, y + caption_height))
        y += caption_height + height + gap
    return sheet
