// fastgen: per-isa
#include "normal.h"

#include <cstddef>

#include "normal_tiles.h"

namespace fastgen::FASTGEN_ISA {

void normal(uint64_t seed, uint32_t draw, int64_t start, int64_t rows, int64_t columns, float* to, int64_t threads) {
    const PhiloxKeys keys(seed);
    const NormalTiles tiles(rows, columns);
    in_parallel(threads, [&](int64_t thread, int64_t team) {
        alignas(64) float numbers[kNormalTile];
        tiles.for_each_of_thread(thread, team, [&](const NormalTile& tile) {
            tiles.normals(keys, tile, start, draw, numbers);
            for (int64_t row = 0; row < tile.rows; ++row) {
                const auto bytes = static_cast<size_t>(tile.columns) * sizeof(float);
                __builtin_memcpy(to + (tile.row + row) * columns + tile.column, numbers + row * tiles.pitch, bytes);
            }
        });
    });
}

void array_normal_radius(const int32_t* k, float* radius, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes<float>) {
        Vec<int32_t> v{};
        for (int lane = 0; lane < kLanes<float> && i + lane < count; ++lane) v[lane] = k[i + lane];
        store_n(radius + i, normal_radius(v), static_cast<int>(count - i < kLanes<float> ? count - i : kLanes<float>));
    }
}

void array_cos_sin(const int32_t* k, float* cosine, float* sine, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes<float>) {
        Vec<int32_t> v{};
        Vec<float> c, s;
        for (int lane = 0; lane < kLanes<float> && i + lane < count; ++lane) v[lane] = k[i + lane];
        cos_sin(v, c, s);
        const int left = static_cast<int>(count - i < kLanes<float> ? count - i : kLanes<float>);
        store_n(cosine + i, c, left);
        store_n(sine + i, s, left);
    }
}

}  // namespace fastgen::FASTGEN_ISA
