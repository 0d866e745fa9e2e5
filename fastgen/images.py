"""Pictures: grids of levels as PNG files.

Arrays are uint8 [height, width, 3]. Pixels are enlarged by repetition, so what one sees is what was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ._files import atomic_path

if TYPE_CHECKING:
    from PIL import ImageFont

BACKGROUND = 255
GAP = 2  # pixels of the picture between two images
GIVEN_TINT = (40, 110, 220)
HIDDEN_GREY = 128
MARGIN = 14
CAPTION_SIZE = 15


def to_rgb(images: Tensor, levels: int) -> np.ndarray:
    """Levels [N, C, H, W] (uint8, C 1 or 3) -> uint8 [N, H, W, 3]; level 0 is black, level ``levels - 1`` is full."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [N, C, H, W] with C 1 or 3, got shape {list(images.shape)}")
    if not 2 <= levels <= 256:
        raise ValueError(f"levels must be in 2..256, got {levels}")
    if images.numel() and int(images.max()) >= levels:
        raise ValueError(f"images must lie in 0..{levels - 1}, got level {int(images.max())}")
    table = (torch.arange(256) * 255 / (levels - 1)).round().clamp(max=255).to(torch.uint8)
    pixels = table[images.cpu().long()].permute(0, 2, 3, 1)
    return pixels.expand(-1, -1, -1, 3).numpy()


def grid(images: Tensor, levels: int, columns: int | None = None, scale: int | None = None) -> np.ndarray:
    """Images side by side.

    Args:
        images: uint8 levels [N, C, H, W], C 1 or 3.
        levels: number of levels.
        columns: images per row; default: as square as possible.
        scale: side in pixels of one enlarged image pixel; default: such that an image is about 64 pixels wide.

    Returns:
        uint8 [height, width, 3].
    """
    return tile(to_rgb(images, levels), columns, scale)


def tile(pixels: np.ndarray, columns: int | None = None, scale: int | None = None) -> np.ndarray:
    """`grid` of images that are colours already: uint8 [N, H, W, 3]."""
    count, height, width, _ = pixels.shape
    if count == 0:
        raise ValueError("images must not be empty: a grid of no images has no picture")
    columns = int(np.ceil(np.sqrt(count))) if columns is None else columns
    scale = max(1, 64 // max(height, width)) if scale is None else scale
    for name, value in (("columns", columns), ("scale", scale)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    columns = min(columns, count)
    rows = -(-count // columns)
    step_y, step_x = height * scale + GAP, width * scale + GAP
    picture = np.full((rows * step_y - GAP, columns * step_x - GAP, 3), BACKGROUND, np.uint8)
    for i, image in enumerate(pixels.repeat(scale, 1).repeat(scale, 2)):
        y, x = i // columns * step_y, i % columns * step_x
        picture[y : y + step_y - GAP, x : x + step_x - GAP] = image
    return picture


def pairs(above: Tensor, below: Tensor, levels: int, columns: int = 10) -> np.ndarray:
    """Rows of images, each above a row of what was made of them: uint8 levels [N, C, H, W] twice -> as `grid`."""
    columns = min(columns, len(above))
    rows = [row for i in range(0, len(above), columns or 1) for row in (above[i : i + columns], below[i : i + columns])]
    missing = -len(above) % (columns or 1)
    rows[-2:] = [torch.nn.functional.pad(row, (0,) * 7 + (missing,)) for row in rows[-2:]]
    return grid(torch.cat(rows or [above]), levels, columns=columns)


def completions(given: Tensor, mask: Tensor, completed: Tensor, levels: int, scale: int | None = None) -> np.ndarray:
    """One row per given image: what was given (the rest grey), its completions (the given part tinted), the original.

    Args:
        given: uint8 levels [N, C, H, W], the originals.
        mask: bool [H, W], True = the pixel was given.
        completed: uint8 levels [N, M, C, H, W], M completions of each.

    Returns:
        uint8 [height, width, 3], M + 2 images wide.
    """
    count, each = completed.shape[:2]
    keep = mask.numpy()[None, :, :, None]
    originals = to_rgb(given, levels)
    shown = np.where(keep, _tinted(originals), np.uint8(HIDDEN_GREY))
    answers = to_rgb(completed.flatten(0, 1), levels)
    answers = np.where(keep, _tinted(answers), answers).reshape(count, each, *originals.shape[1:])
    rows = np.concatenate([shown[:, None], answers, originals[:, None]], axis=1)
    return tile(rows.reshape(-1, *originals.shape[1:]), each + 2, scale)


def half(which: str, height: int, width: int) -> Tensor:
    """Which pixels are in the "top", "bottom", "left" or "right" half, of odd sizes the smaller first: bool [H, W]."""
    places = {
        "top": (slice(height // 2), slice(None)),
        "bottom": (slice(height // 2, None), slice(None)),
        "left": (slice(None), slice(width // 2)),
        "right": (slice(None), slice(width // 2, None)),
    }
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[places[which]] = True
    return mask


def _tinted(pixels: np.ndarray) -> np.ndarray:
    return (pixels * 0.65 + np.array(GIVEN_TINT) * 0.35).astype(np.uint8)


def captioned(panels: Sequence[tuple[str, np.ndarray]], columns: int = 2) -> np.ndarray:
    """Pictures with a caption above each, row by row, on white.

    Args:
        panels: (caption, uint8 [height, width, 3]); a caption may have several lines.
        columns: panels per row.
    """
    from PIL import Image, ImageDraw

    if not panels:
        raise ValueError("panels must not be empty")
    letters = font()
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text_sizes = [measure.multiline_textbbox((0, 0), text, font=letters)[2:] for text, _ in panels]
    caption_height = int(max(height for _, height in text_sizes)) + 6
    widths = [max(int(size[0]) + 1, picture.shape[1]) for size, (_, picture) in zip(text_sizes, panels, strict=True)]
    column_widths = [max(widths[c::columns]) for c in range(min(columns, len(panels)))]
    row_heights = [
        caption_height + max(picture.shape[0] for _, picture in panels[i : i + columns])
        for i in range(0, len(panels), columns)
    ]
    canvas = Image.new(
        "RGB",
        (
            sum(column_widths) + MARGIN * (len(column_widths) + 1),
            sum(row_heights) + MARGIN * (len(row_heights) + 1),
        ),
        (BACKGROUND,) * 3,
    )
    draw = ImageDraw.Draw(canvas)
    for i, (text, picture) in enumerate(panels):
        row, column = divmod(i, columns)
        x = MARGIN + sum(column_widths[:column]) + MARGIN * column
        y = MARGIN + sum(row_heights[:row]) + MARGIN * row
        draw.multiline_text((x, y), text, fill=(0, 0, 0), font=letters)
        canvas.paste(Image.fromarray(picture), (x, y + caption_height))
    return np.asarray(canvas)


def font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size=CAPTION_SIZE)
    except (TypeError, OSError):  # Pillow < 10.1, or built without FreeType: its one bitmap font
        return ImageFont.load_default()


def save_png(picture: np.ndarray, path: str | Path) -> None:
    """Write uint8 [height, width] or [height, width, 3] as PNG, whole or not at all (temporary name, then renamed)."""
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(picture)).save(temporary, format="PNG")
