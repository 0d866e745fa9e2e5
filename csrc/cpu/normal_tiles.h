// Rows of normal numbers cut into tiles that stay in the first-level cache: several whole rows, or a part of one.
#pragma once

#include <omp.h>

#include "vec_normal.h"

namespace fastgen::FASTGEN_ISA {

inline constexpr int64_t kNormalTile = 1024;  // numbers of a tile, padding included; whole vectors of blocks

// Calls function(thread, threads) on each of so many threads, or of as many as OpenMP gives; on one without the cost of a
// parallel region.
template <class Function>
FASTGEN_INLINE void in_parallel(int64_t threads, Function function) {
    if (threads == 1) return function(int64_t{0}, int64_t{1});
#pragma omp parallel num_threads(threads)
    function(int64_t{omp_get_thread_num()}, int64_t{omp_get_num_threads()});
}

struct NormalTile {
    int64_t row, rows;        // the first one, and how many
    int64_t column, columns;  // columns is that of a row, without padding
};

struct NormalTiles {
    int64_t rows, columns;
    int64_t pitch;         // numbers from one row of a tile to the next: whole blocks
    int64_t rows_of_tile;  // 1 where a row has several tiles
    NormalGrid grid;

    NormalTiles(int64_t rows, int64_t columns)
        : rows(rows),
          columns(columns),
          pitch((columns + 3) / 4 * 4),
          rows_of_tile(pitch < kNormalTile ? kNormalTile / (pitch ? pitch : 1) : 1),
          grid(pitch ? pitch / 4 : 1) {
        if (rows_of_tile > kLanes<float>) rows_of_tile -= rows_of_tile % kLanes<float>;  // whole vectors of blocks
    }

    // Calls function(tile) for the tiles of a thread, in order. All tiles of a row are those of one thread.
    template <class Function>
    FASTGEN_INLINE void for_each_of_thread(int64_t thread, int64_t threads, Function function) const {
        const int64_t groups = (rows + rows_of_tile - 1) / rows_of_tile;
        for (int64_t group = groups * thread / threads; group < groups * (thread + 1) / threads; ++group) {
            const int64_t row = group * rows_of_tile;
            const int64_t count = rows - row < rows_of_tile ? rows - row : rows_of_tile;
            for (int64_t column = 0; column == 0 || column < columns; column += kNormalTile) {
                function(
                    NormalTile{row, count, column, columns - column < kNormalTile ? columns - column : kNormalTile});
            }
        }
    }

    // The numbers of a tile, rows of `pitch`.
    FASTGEN_INLINE void normals(const PhiloxKeys& keys, const NormalTile& tile, int64_t start, uint32_t draw,
                                float* to) const {
        constexpr int64_t vector = 4 * kLanes<float>;
        const int64_t padded = (tile.columns + 3) / 4 * 4;
        const NormalStream stream(grid, start + tile.row, tile.column / 4);
        FASTGEN_ISA::normals(keys, grid, stream, draw, (tile.rows * padded + vector - 1) / vector, to);
    }
};

}  // namespace fastgen::FASTGEN_ISA
