"""Feature maps as rows of numbers: one for each pixel of channels-last maps, or for each sample with all its planes.

A program has a tile of rows and columns, so that no element's place takes a division.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

_TILE = 1024  # elements of a program
_COLUMNS = 32  # at least, of rows that have so many: whole lines of a cache


@triton.jit
def corner(tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first row and the first column of this program, of which a row of tiles has `tiles`."""
    program = tl.program_id(0)
    return (program // tiles).to(tl.int64) * ROWS, (program % tiles).to(tl.int64) * COLUMNS


@triton.jit
def tile(first_row, first_column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows [ROWS, 1], columns [1, COLUMNS], and which of the elements exist."""
    row = first_row + tl.arange(0, ROWS)[:, None]
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def read(pointer, at, inside):
    return tl.load(pointer + at, inside, 0.0).to(tl.float32)


@triton.jit
def write(pointer, at, value, inside):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), inside)


def tiling(rows: int, columns: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and arguments: of the tiles that have the fewest elements which do not exist the widest."""
    least = min(_COLUMNS, max(4, 1 << (columns - 1).bit_length()))
    widths = [1 << power for power in range(least.bit_length() - 1, _TILE.bit_length())]

    def tiles(width: int) -> tuple[int, int]:
        return -(-rows // (_TILE // width)), -(-columns // width)

    width = min(widths, key=lambda width: (math.prod(tiles(width)), -width))
    sizes = {"rows": rows, "columns": columns, "tiles": tiles(width)[1], "ROWS": _TILE // width, "COLUMNS": width}
    return (math.prod(tiles(width)),), sizes
