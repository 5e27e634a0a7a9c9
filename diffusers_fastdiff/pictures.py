"""Tensors as pictures, and pictures as labelled grids."""

import torch
from PIL import Image, ImageDraw


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1] with 1 or 3 channels -> pictures."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture) for picture in pixels]


def labelled_grid(
    pictures: list[Image.Image], labels: list[str] | None = None, columns: int = 10, magnify: int | None = None
) -> Image.Image:
    """Pictures in rows, each under its label.

    Args:
        pictures: all of one size.
        labels: one for each picture, or None.
        columns: pictures in a row.
        magnify: size of a pixel; by default small pictures are enlarged to at least 48 pixels.
    """
    width, height = pictures[0].size
    magnify = magnify or max(1, -(-48 // min(width, height)))
    cell, header = (width * magnify + 4, height * magnify + 4), 14 if labels else 0
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (min(columns, len(pictures)) * cell[0], rows * (cell[1] + header)), "white")
    draw = ImageDraw.Draw(grid)
    for index, picture in enumerate(pictures):
        left, top = (index % columns) * cell[0], (index // columns) * (cell[1] + header)
        if labels:
            draw.text((left + 3, top + 1), labels[index], fill="black")
        enlarged = picture.convert("RGB").resize((width * magnify, height * magnify), Image.Resampling.NEAREST)
        grid.paste(enlarged, (left + 2, top + header + 2))
    return grid
