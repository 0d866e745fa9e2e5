// Convolutions by phases with minimal filtering (Winograd), minimal_filter.h: tiles take the place of cells. They are
// transformed to their points, each point is a product of its own over all tiles, and the tiles are transformed back on
// the way to the output.
#pragma once

#include "phase_conv_items.h"

namespace fastgen::FASTGEN_ISA {
namespace {

template <class E>
struct PhaseWinograd : PhasePair<E> {
    using Pair = PhasePair<E>;
    using Pair::group, Pair::item, Pair::output_of, Pair::panel_stride, Pair::plan, Pair::slot, Pair::source, Pair::sx,
        Pair::sy;
    using T = SumOf<E>;
    using Term = typename Products<E>::Term;

    struct Tiles {
        AxisTiles y, x;
        Rectangle kinds[kTileKinds];  // in tiles
        int64_t begin[kTileKinds + 1];

        FASTGEN_INLINE int64_t kind_begin(int64_t kind, int64_t first, int64_t last) const {
            return max_of(first, min_of(last, begin[kind])) - first;
        }
    };

    Tiles tiles() const {
        const int64_t y0 = max_of(first_cell(sy), item.y0), y1 = min_of(last_cell(sy), item.y1);
        const int64_t taps = sy.taps / plan().y.in_step;
        Tiles result{{y0, max_of(0, y1 - y0), taps}, {first_cell(sx), last_cell(sx) - first_cell(sx), taps}, {}, {}};
        const AxisTiles &y = result.y, &x = result.x;
        for (int kind = 0; kind < kTileKinds; ++kind) {
            const Rectangle r{is_full(0, kind) ? 0 : y.full(), is_full(0, kind) ? y.full() : y.count(),
                              is_full(1, kind) ? 0 : x.full(), is_full(1, kind) ? x.full() : x.count()};
            result.kinds[kind] = r;
            result.begin[kind + 1] = result.begin[kind] + (item.n1 - item.n0) * (r.y1 - r.y0) * (r.x1 - r.x0);
        }
        return result;
    }

    void run(int64_t panel_begin, int64_t panel_end) const {
        const Tiles tiles = this->tiles();
        const int64_t rows = tiles.begin[kTileKinds], pieces = ceil_div(rows, item.work.most_tiles());
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const int64_t first = rows * piece / pieces, last = rows * (piece + 1) / pieces;
            transform(tiles, first, last);
            const int64_t panels = panel_end - panel_begin;
            // Filter lines are read for many points: they must stay in the second-level cache.
            const int64_t bytes = panels * panel_stride() * static_cast<int64_t>(sizeof(E));
            const int64_t count =
                max_of(blocks(panels, last - first),
                       item.work.weights.packs_points(sy, sx) ? 0 : min_of(panels, ceil_div(bytes, kWeightBytes)));
            for (int64_t block = 0; block < count; ++block) {
                const int64_t begin = panel_begin + panels * block / count;
                const int64_t end = panel_begin + panels * (block + 1) / count;
                multiply(tiles, first, last, begin, end);
                with_activation(item.work.call.activation, [&](auto tag) __attribute__((always_inline)) {
                    transform_back<decltype(tag)::value>(tiles, first, last, begin, end);
                });
            }
        }
    }

    // Calls body(row, n, y, x) for the tiles of one kind among first..last-1.
    template <class Body>
    FASTGEN_INLINE void for_tiles(const Tiles& tiles, int kind, int64_t first, int64_t last, const Body& body) const {
        const int64_t row0 = tiles.kind_begin(kind, first, last), row1 = tiles.kind_begin(kind + 1, first, last);
        if (row0 == row1) return;
        const Rectangle& rectangle = tiles.kinds[kind];
        Cell tile = rectangle.at(item.n0, first + row0 - tiles.begin[kind]);
        for (int64_t row = row0; row < row1; ++row, rectangle.advance(tile))
            body(row, tile.n, tiles.y.begin(tile.y), tiles.x.begin(tile.x));
    }

    void transform(const Tiles& tiles, int64_t first, int64_t last) const {
        transform_kind<0>(tiles, first, last);
        transform_kind<1>(tiles, first, last);
        transform_kind<2>(tiles, first, last);
        transform_kind<3>(tiles, first, last);
    }

    template <int Kind>
    void transform_kind(const Tiles& tiles, int64_t first, int64_t last) const {
        constexpr int height = is_full(0, Kind) ? kPoints : kPoints - 1,
                      width = is_full(1, Kind) ? kPoints : kPoints - 1;
        const int64_t channels = plan().in_channels, point = odd_lines<E>(item.work.weights.depth());
        const AxisPlan &py = plan().y, &px = plan().x;
        // Lines that only outputs outside the band would read need not be there.
        const int64_t end = min_of(py.in_size, (tiles.y.last() - 1) * py.in_step + sy.offsets[sy.taps - 1] + 1);
        for_tiles(tiles, Kind, first, last,
                  [&](int64_t row, int64_t n, int64_t y, int64_t x) __attribute__((always_inline)) {
                      E* to = item.gathered() + row * tile_stride<E>(item.work.weights.depth());
                      for (int64_t f = 0; f < interleaved_filters(plan()); ++f, to += channels) {
                          const E* from[height][width];
                          for (int i = 0; i < height; ++i) {
                              const int64_t at_y = (y + i) * py.in_step + sy.offsets[f / px.in_step];
                              for (int j = 0; j < width; ++j) {
                                  const int64_t at_x = (x + j) * px.in_step + sx.offsets[f % px.in_step];
                                  const bool inside = at_y >= 0 && at_y < end && at_x >= 0 && at_x < px.in_size;
                                  from[i][j] = inside ? source(n, at_y, at_x) : item.work.zeros();
                              }
                          }
                          int64_t c = 0;
                          for (; c + kLanes<T> <= channels; c += kLanes<T>)
                              transform_tile<Kind>(from, c, kLanes<T>, to + c, point);
                          if (c < channels)
                              transform_tile<Kind>(from, c, static_cast<int>(channels - c), to + c, point);
                      }
                  });
    }

    template <int Kind, int Height, int Width>
    static FASTGEN_INLINE void transform_tile(const E* const (&from)[Height][Width], int64_t c, int lanes, E* to,
                                              int64_t point) {
        Vec<T> d[kPoints][kPoints];
#pragma GCC unroll 4
        for (int i = 0; i < Height; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < Width; ++j) d[i][j] = load_some(from[i][j] + c, lanes);
            input_points<is_full(1, Kind)>(d[i], 1);
        }
#pragma GCC unroll 4
        for (int j = 0; j < kPoints; ++j) {
            if (!is_full(1, Kind) && j == kExtraPoint) continue;
            input_points<is_full(0, Kind)>(&d[0][j], kPoints);
#pragma GCC unroll 4
            for (int i = 0; i < kPoints; ++i) {
                if (is_full(0, Kind) || i != kExtraPoint) store_some(to + (i * kPoints + j) * point, d[i][j], lanes);
            }
        }
    }

    // One product for each point, of the tiles that have it.
    void multiply(const Tiles& tiles, int64_t first, int64_t last, int64_t panel_begin, int64_t panel_end) const {
        const int64_t depth = item.work.weights.depth(), panel = depth * kPanel<T>, panels = panel_end - panel_begin;
        const int64_t a_point = odd_lines<E>(depth), a_row = tile_stride<E>(depth);
        const int64_t c_point = odd_lines<T>(panels * kPanel<T>), c_row = tile_stride<T>(panels * kPanel<T>);
        constexpr int all = kPoints * kPoints;
        const E* b = item.work.call.packed + item.work.weights.packed_offset(group, slot);
        const auto with_point = [&](int p, const auto& body) __attribute__((always_inline)) {
            const bool extra_y = p / kPoints == kExtraPoint, extra_x = p % kPoints == kExtraPoint;
            const int64_t row0 = tiles.kind_begin(extra_x ? 1 : 0, first, last);
            const int64_t row1 = tiles.kind_begin(extra_y ? 2 : extra_x ? 3 : kTileKinds, first, last);
            body(item.gathered() + row0 * a_row + p * a_point, item.tile() + row0 * c_row + p * c_point, row1 - row0);
        };
        if (item.work.weights.packs_points(sy, sx)) {
            const int64_t point = item.work.weights.panels() * panel;
            b += panel_begin * panel;
            for (int p = 0; p < all; ++p, b += point) {
                with_point(p, [&](const E* a, T* c, int64_t rows) {
                    const Term term = Products<E>::term(a, a_row, depth, b);
                    Products<E>::run(&term, 1, panel, c, c_row, rows, panels, p + 1 < all ? b + point : nullptr);
                });
            }
            return;
        }
        if constexpr (kConvElement<E>.sums_filters) {
            const int64_t lines = kFilterLines * panel;
            b += panel_begin * lines;
            // The first product reads all lines; each fetches a part of those of the next panels.
            constexpr int parts = (kPoints - 1) * (kPoints - 1);  // of short tiles alone
            const bool more = panel_end < item.work.weights.panels();
            const int64_t part = panels * lines / parts;
            int fetched = 0;
            for (int i = 0; i < all; ++i) {
                const int p = static_cast<int>(with_first(kPoints + 1, i));
                with_point(p, [&](const E* a, T* c, int64_t rows) {
                    const bool fetch = more && rows > 0 && fetched < parts;
                    const E* next = fetch ? b + panels * lines + fetched++ * part : nullptr;
                    run_point(p, a, a_row, depth, b, c, c_row, rows, panels, next, fetch ? part : 0);
                });
            }
        }
    }

    template <Activation A>
    void transform_back(const Tiles& tiles, int64_t first, int64_t last, int64_t panel_begin, int64_t panel_end) const {
        if (tiles.y.taps == 3) return transform_back_kind<A, 1, 3>(tiles, first, last, panel_begin, panel_end);
        transform_back_kind<A, 0, 2>(tiles, first, last, panel_begin, panel_end);
        transform_back_kind<A, 1, 2>(tiles, first, last, panel_begin, panel_end);
        transform_back_kind<A, 2, 2>(tiles, first, last, panel_begin, panel_end);
        transform_back_kind<A, 3, 2>(tiles, first, last, panel_begin, panel_end);
    }

    template <Activation A, int Kind, int Taps>
    void transform_back_kind(const Tiles& tiles, int64_t first, int64_t last, int64_t panel_begin,
                             int64_t panel_end) const {
        constexpr int height = is_full(0, Kind) ? kPoints + 1 - Taps : 2,
                      width = is_full(1, Kind) ? kPoints + 1 - Taps : 2;
        const PhaseWork<E>& work = item.work;
        const int64_t column = panel_begin * kPanel<T>, block = (panel_end - panel_begin) * kPanel<T>;
        const int64_t columns = min_of(block, work.weights.columns() - column), point = odd_lines<T>(block);
        const T *scale = work.scale(group) + column, *shift = work.shift(group) + column;
        const Vec<T> parameter = broadcast(work.call.parameter), two = broadcast(T(2));
        const Vec<T> quarter = broadcast(T(0.25));  // of twice the outputs along either axis
        const int64_t line = plan().x.out_size * work.all_out() * plan().y.out_step;
        const int64_t step = work.all_out() * plan().x.out_step;
        for_tiles(
            tiles, Kind, first, last, [&](int64_t row, int64_t n, int64_t y, int64_t x) __attribute__((always_inline)) {
                const T* from = item.tile() + row * tile_stride<T>(block);
                E* to = output_of({n, y, x}) + column;
                const int64_t rows = min_of(height, tiles.y.last() - y), steps = min_of(width, tiles.x.last() - x);
                for (int64_t j = 0; j < columns; j += kLanes<T>) {
                    Vec<T> m[kPoints][kPoints];
#pragma GCC unroll 4
                    for (int i = 0; i < kPoints; ++i) {
                        if (!is_full(0, Kind) && i == kExtraPoint) continue;
#pragma GCC unroll 4
                        for (int k = 0; k < kPoints; ++k) {
                            if (is_full(1, Kind) || k != kExtraPoint)
                                m[i][k] = load(from + (i * kPoints + k) * point + j);
                        }
                        outputs_of_points<is_full(1, Kind), Taps>(m[i], 1, two);
                    }
                    const Vec<T> factor = load(scale + j) * quarter, offset = load(shift + j);
                    const int lanes = static_cast<int>(min_of(kLanes<T>, columns - j));
#pragma GCC unroll 4
                    for (int k = 0; k < width; ++k) {
                        outputs_of_points<is_full(0, Kind), Taps>(&m[0][k], kPoints, two);
#pragma GCC unroll 4
                        for (int i = 0; i < height; ++i) {
                            if (i >= rows || k >= steps) continue;
                            const Vec<T> value = activate<A>(fma(m[i][k], factor, offset), parameter);
                            E* p = to + i * line + k * step + j;
                            store_some(p, value, lanes);
                        }
                    }
                }
            });
    }
};

}  // namespace
}  // namespace fastgen::FASTGEN_ISA
