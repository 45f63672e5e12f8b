"""A PNG of pictures with their captions, for people to look at.

section title
┌───────┐┌───────┐┌───────┐   ┌───────┐┌───────┐┌───────┐
│       ││       ││       │   │       ││       ││       │      a card: one caption, its pictures, a label each
└───────┘└───────┘└───────┘   └───────┘└───────┘└───────┘
full stack   z_t    caption
a large red circle at the …   …
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (250, 250, 248), (32, 33, 36), (128, 130, 134)
MARGIN, GAP, INNER_GAP = 28, 26, 6
TITLE_SIZE, CAPTION_SIZE, LABEL_SIZE = 20, 14, 12
CAPTION_LINES = 4


@dataclass(frozen=True)
class Card:
    caption: str
    pictures: Sequence[tuple[str, NDArray[np.uint8]]]  # a label (it may be empty) and (H, W, 3)


@dataclass(frozen=True)
class GridSection:
    title: str
    cards: Sequence[Card]


def draw_grid(sections: Sequence[GridSection], *, columns: int, picture_size: int) -> Image.Image:
    """Cards in rows of `columns`; pictures are shown at `picture_size` pixels whatever their own size."""
    title_font, caption_font, label_font = (
        ImageFont.load_default(size) for size in (TITLE_SIZE, CAPTION_SIZE, LABEL_SIZE)
    )
    shown = [card for section in sections for card in section.cards]
    per_card = max((len(card.pictures) for card in shown), default=1)
    labelled = any(label for card in shown for label, _ in card.pictures)
    card_width = per_card * picture_size + (per_card - 1) * INNER_GAP
    columns = max(1, min(columns, max((len(section.cards) for section in sections), default=1)))
    wrapped = {card.caption: wrap(card.caption, caption_font, card_width) for card in shown}
    lines = max((len(text) for text in wrapped.values()), default=1)
    label_height = LABEL_SIZE + 8 if labelled else 0
    card_height = picture_size + label_height + 8 + lines * (CAPTION_SIZE + 5)
    width = 2 * MARGIN + columns * card_width + (columns - 1) * GAP
    heights = [
        (TITLE_SIZE + 20 if section.title else 0) + -(-len(section.cards) // columns) * (card_height + GAP)
        for section in sections
    ]
    page = Image.new("RGB", (width, 2 * MARGIN + sum(heights) - GAP), PAPER)
    canvas = ImageDraw.Draw(page)
    top = MARGIN
    for section, height in zip(sections, heights, strict=True):
        first = top
        if section.title:
            canvas.text((MARGIN, top), section.title, fill=INK, font=title_font)
            first += TITLE_SIZE + 20
        for index, card in enumerate(section.cards):
            x = MARGIN + (index % columns) * (card_width + GAP)
            y = first + (index // columns) * (card_height + GAP)
            for place, (label, pixels) in enumerate(card.pictures):
                left = x + place * (picture_size + INNER_GAP)
                page.paste(enlarged(pixels, picture_size), (left, y))
                if label:
                    canvas.text((left, y + picture_size + 4), label, fill=FAINT, font=label_font)
            for line, text in enumerate(wrapped[card.caption]):
                line_y = y + picture_size + label_height + 8 + line * (CAPTION_SIZE + 5)
                canvas.text((x, line_y), text, fill=INK, font=caption_font)
        top += height
    return page


def enlarged(pixels_HWC: NDArray[np.uint8], size: int) -> Image.Image:
    """Small pictures keep their pixels visible; large ones are reduced smoothly."""
    picture = Image.fromarray(pixels_HWC)
    if picture.width == size:
        return picture
    how = Image.Resampling.NEAREST if picture.width < size else Image.Resampling.LANCZOS
    return picture.resize((size, size), how)


def wrap(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The caption in lines that fit `width` pixels, at most four; what is cut ends in an ellipsis."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    cut = len(lines) > CAPTION_LINES
    lines = lines[:CAPTION_LINES]
    for index, line in enumerate(lines):
        if font.getlength(line) > width or (cut and index == CAPTION_LINES - 1):
            while line and font.getlength(line + "…") > width:
                line = line[:-1]
            lines[index] = line.rstrip() + "…"
    return lines


def png_bytes(picture: Image.Image | NDArray[np.uint8]) -> bytes:
    packed = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(packed, "PNG", optimize=False, compress_level=6)
    return packed.getvalue()
