// Products by phases: a row for each cell of a rectangle of cells that read the same taps, a column for each output
// channel of a phase (or of all phases, side by side).
//
// Rows are read where they are, along x, if they are many, and through all lines and images where these follow on each
// other, as they do for kernels of one element; on small maps the rows of all lines and images of the rectangle are
// gathered, so that 4x4 maps fill the registers too. Either way the result is a tile in the first-level cache, from which
// the epilogue writes each row to its place: scale, shift, activation.
#pragma once

#include "phase_conv_items.h"

namespace fastgen::FASTGEN_ISA {
namespace {

template <class E>
struct PhaseProducts : PhasePair<E> {
    using Pair = PhasePair<E>;
    using Pair::group, Pair::item, Pair::output_of, Pair::panel_stride, Pair::plan, Pair::source, Pair::sx, Pair::sy,
        Pair::weights;
    using T = SumOf<E>;
    using Term = typename Products<E>::Term;

    static constexpr int64_t kDirectRows = 7;  // enough rows of one line to read them where they are

    void run(int64_t panel_begin, int64_t panel_end) const {
        // Where all gathered rows fit, they are gathered once, and a few panels at a time meet the rows of all
        // rectangles: weights come from memory once instead of once for each rectangle.
        int64_t all = 0;
        for_rectangles([&](const Part& part) { all += part.size(); });
        const bool fits = all <= item.work.gather_capacity();
        const int64_t panel_bytes = max_of(1, item.work.weights.panel_size(sy, sx) * static_cast<int64_t>(sizeof(E)));
        const int64_t step = fits ? max_of(1, kWeightBytes / panel_bytes) : panel_end - panel_begin;
        for (int64_t begin = panel_begin; begin < panel_end; begin += step) {
            const int64_t end = min_of(panel_end, begin + step);
            E* gathered_rows = item.gathered();
            for_rectangles([&](const Part& part) {
                if (part.rows == 0) return direct(part.y, part.x, begin, end);
                if (fits && begin == panel_begin) gather(part, 0, part.rows, gathered_rows);
                gathered(part, begin, end, gathered_rows, fits);
                if (fits) gathered_rows += part.size();
            });
        }
    }

    // A rectangle of cells, and the rows of depth `stride` that are gathered for it, if any.
    struct Part {
        AxisSpan y, x;
        int64_t rows, stride;
        FASTGEN_INLINE int64_t size() const { return rows * stride; }
        FASTGEN_INLINE Rectangle cells() const { return {y.first, y.last, x.first, x.last}; }
    };

    static int64_t longest_span(const AxisSlot& slot) {
        int64_t longest = 0;
        for (int64_t i = 1; i < slot.num_spans; ++i) {
            const AxisSpan &span = slot.spans[i], &most = slot.spans[longest];
            if (span.last - span.first > most.last - most.first) longest = i;
        }
        return longest;
    }

    // The largest one first: its many rows are at work while the weights come from memory.
    template <class Body>
    void for_rectangles(const Body& body) const {
        const int64_t longest_y = longest_span(sy), longest_x = longest_span(sx);
        for (int64_t i = 0; i < sy.num_spans; ++i) {
            AxisSpan y = sy.spans[with_first(longest_y, i)];
            y.first = max_of(y.first, item.y0);
            y.last = min_of(y.last, item.y1);
            if (y.first >= y.last) continue;
            for (int64_t j = 0; j < sx.num_spans; ++j) {
                const AxisSpan& x = sx.spans[with_first(longest_x, j)];
                const int64_t lines = (item.n1 - item.n0) * (y.last - y.first), columns = x.last - x.first;
                const int64_t depth = (y.tap_end - y.tap_begin) * (x.tap_end - x.tap_begin) * plan().in_channels;
                const bool gathers = lines > 1 && depth > 0 && columns < kDirectRows && !lines_join(y, x);
                body(Part{y, x, gathers ? lines * columns : 0, odd_lines<E>(depth)});
            }
        }
    }

    // Whether the cells of a line read one tap, of all pixels of a line of the input, and of the next line the next ones.
    bool lines_join(const AxisSpan& y, const AxisSpan& x) const {
        const AxisPlan &py = plan().y, &px = plan().x;
        return y.tap_end - y.tap_begin == 1 && x.tap_end - x.tap_begin == 1 && py.in_step == 1 && px.in_step == 1 &&
               x.first + sx.offsets[x.tap_begin] == 0 && x.last - x.first == px.in_size &&
               item.source.h == px.in_size * item.source.w;
    }

    // The taps that a row of cells reads from cell (n, y, x) on; what is contiguous in memory is one tap.
    int64_t list_taps(const AxisSpan& y, const AxisSpan& x, const Cell& cell, const E* b) const {
        const int64_t channels = plan().in_channels;
        Term* taps = item.taps();
        int64_t count = 0;
        for (int64_t ty = y.tap_begin; ty < y.tap_end; ++ty) {
            for (int64_t tx = x.tap_begin; tx < x.tap_end; ++tx) {
                const E* a = source(cell.n, cell.y * plan().y.in_step + sy.offsets[ty],
                                    cell.x * plan().x.in_step + sx.offsets[tx]);
                if (tx > x.tap_begin && !plan().element_row && a == taps[count - 1].a + taps[count - 1].k) {
                    taps[count - 1].k += channels;
                    continue;
                }
                taps[count++] = Products<E>::term(a, item.source.w * plan().x.in_step, channels,
                                                  b + item.work.weights.tap_offset(sy, sx, ty, tx));
            }
        }
        return count;
    }

    void product(int64_t taps, int64_t rows, int64_t panels) const {
        Products<E>::run(item.taps(), taps, panel_stride(), item.tile(), panels * kPanel<T>, rows, panels, nullptr);
    }

    void direct(const AxisSpan& y, const AxisSpan& x, int64_t panel_begin, int64_t panel_end) const {
        const Rectangle cells{y.first, y.last, x.first, x.last};
        const int64_t lines = y.last - y.first, images = item.n1 - item.n0;
        int64_t run = x.last - x.first, runs = images * lines;  // of rows that follow on each other in memory
        if (lines_join(y, x)) {
            const bool images_join = images == 1 || item.source.n == lines * item.source.h;
            run *= images_join ? runs : lines;
            runs = images_join ? 1 : images;
        }
        const int64_t pieces = ceil_div(run, kTileRows);
        const int64_t count = blocks(panel_end - panel_begin, ceil_div(run, pieces));
        for (int64_t block = 0; block < count; ++block) {
            const int64_t begin = panel_begin + (panel_end - panel_begin) * block / count;
            const int64_t end = panel_begin + (panel_end - panel_begin) * (block + 1) / count;
            for (int64_t i = 0; i < runs; ++i) {
                for (int64_t piece = 0; piece < pieces; ++piece) {
                    const int64_t first = i * run + run * piece / pieces, last = i * run + run * (piece + 1) / pieces;
                    prefetch(cells, first, last - first, begin, end);
                    product(list_taps(y, x, cells.at(item.n0, first), weights(begin)), last - first, end - begin);
                    epilogue(cells, first, last - first, begin, end);
                }
            }
        }
    }

    // `present`: all rows of the part are there already, else a piece of them at a time is gathered.
    void gathered(const Part& part, int64_t panel_begin, int64_t panel_end, E* rows, bool present) const {
        const Rectangle cells = part.cells();
        const int64_t capacity = item.work.gather_capacity() / part.stride;
        const int64_t most = min_of(kTileRows, max_of(kFlatRows, capacity / kFlatRows * kFlatRows));
        const int64_t pieces = ceil_div(part.rows, most);
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const int64_t first = part.rows * piece / pieces, last = part.rows * (piece + 1) / pieces;
            const E* from = present ? rows + first * part.stride : rows;
            if (!present) gather(part, first, last - first, rows);
            const int64_t count = blocks(panel_end - panel_begin, last - first);
            for (int64_t block = 0; block < count; ++block) {
                const int64_t begin = panel_begin + (panel_end - panel_begin) * block / count;
                const int64_t end = panel_begin + (panel_end - panel_begin) * (block + 1) / count;
                prefetch(cells, first, last - first, begin, end);
                product(list_gathered(part, from, weights(begin)), last - first, end - begin);
                epilogue(cells, first, last - first, begin, end);
            }
        }
    }

    // Copies what `rows` cells from number `first` on read.
    void gather(const Part& part, int64_t first, int64_t rows, E* to) const {
        const Rectangle cells = part.cells();
        Cell cell = cells.at(item.n0, first);
        const int64_t channels = plan().in_channels;
        for (int64_t r = 0; r < rows; ++r, cells.advance(cell)) {
            E* tap = to + r * part.stride;
            for (int64_t ty = part.y.tap_begin; ty < part.y.tap_end; ++ty) {
                const int64_t line = cell.y * plan().y.in_step + sy.offsets[ty];
                for (int64_t tx = part.x.tap_begin; tx < part.x.tap_end; ++tx, tap += channels) {
                    copy(source(cell.n, line, cell.x * plan().x.in_step + sx.offsets[tx]), channels, tap);
                }
            }
        }
    }

    // Gathered rows hold the taps one after the other; a line of taps is a slice of the weights, unless those are packed
    // by kernel elements.
    int64_t list_gathered(const Part& part, const E* rows, const E* b) const {
        const AxisSpan &y = part.y, &x = part.x;
        const int64_t together = plan().element_row ? 1 : x.tap_end - x.tap_begin;
        const int64_t depth = together * plan().in_channels;
        int64_t count = 0;
        for (int64_t ty = y.tap_begin; ty < y.tap_end; ++ty) {
            for (int64_t tx = x.tap_begin; tx < x.tap_end; tx += together, ++count) {
                item.taps()[count] = Products<E>::term(rows + count * depth, part.stride, depth,
                                                       b + item.work.weights.tap_offset(sy, sx, ty, tx));
            }
        }
        return count;
    }

    void epilogue(const Rectangle& cells, int64_t first, int64_t rows, int64_t panel_begin, int64_t panel_end) const {
        with_activation(item.work.call.activation, [&](auto tag) __attribute__((always_inline)) {
            finish<decltype(tag)::value>(cells, first, rows, panel_begin, panel_end);
        });
    }

    template <Activation A>
    void finish(const Rectangle& cells, int64_t first, int64_t rows, int64_t panel_begin, int64_t panel_end) const {
        const PhaseWork<E>& work = item.work;
        const int64_t width = (panel_end - panel_begin) * kPanel<T>, column = panel_begin * kPanel<T>;
        const int64_t columns = min_of(width, work.weights.columns() - column);
        const T *scale = work.scale(group) + column, *shift = work.shift(group) + column;
        const Vec<T> parameter = broadcast(work.call.parameter);
        const bool one_phase = work.weights.phases() == 1;
        Cell cell = cells.at(item.n0, first);
        for (int64_t r = 0; r < rows; ++r) {
            T* from = item.tile() + r * width;
            const auto write = [&](auto* to) __attribute__((always_inline)) {
                const auto value = [&](int64_t j) __attribute__((always_inline)) {
                    return activate<A>(fma(load(from + j), load(scale + j), load(shift + j)), parameter);
                };
                int64_t j = 0;
                for (; j + kLanes<T> <= columns; j += kLanes<T>) store(to + j, value(j));
                if (j < columns) store_n(to + j, value(j), static_cast<int>(columns - j));
            };
            if (one_phase) {
                write(output_of(cell) + column);
                cells.advance(cell);
            } else {
                write(from);
            }
        }
        if (!one_phase) scatter(cells, first, rows, width, column, columns);
    }

    // The lines that the epilogue writes arrive while the product is computed.
    void prefetch(const Rectangle& cells, int64_t first, int64_t rows, int64_t panel_begin, int64_t panel_end) const {
        if (item.work.weights.phases() > 1) return;
        Cell cell = cells.at(item.n0, first);
        for (int64_t r = 0; r < rows; ++r, cells.advance(cell)) {
            const E* to = output_of(cell);
            for (int64_t column = panel_begin * kPanel<T>; column < panel_end * kPanel<T>; column += kLine<E>)
                __builtin_prefetch(to + column, 1);
        }
    }

    // Writes columns column..column+columns-1 of the phases side by side to their places.
    void scatter(const Rectangle cells, int64_t first, int64_t rows, int64_t width, int64_t column,
                 int64_t columns) const {
        // Copies, because the compiler must assume that a store changes the plan.
        const AxisPlan py = plan().y, px = plan().x;
        const int64_t channels = plan().out_channels, all_channels = item.work.all_out();
        const int64_t run = plan().groups == 1 ? px.phases * channels : channels;  // columns that stay together
        for (int64_t done = 0, count; done < columns; done += count) {
            const int64_t at = column + done, phase = at / channels, channel = at % channels;
            count = min_of(run - at % run, columns - done);
            const int64_t y0 = sy.base + phase / px.phases, x0 = sx.base + phase % px.phases;
            const T* from = item.tile() + done;
            E* output = item.work.call.output + group * channels + channel;
            Cell cell = cells.at(item.n0, first);
            for (int64_t r = 0; r < rows; ++r, cells.advance(cell), from += width) {
                const int64_t y = cell.y * py.out_step + y0, x = cell.x * px.out_step + x0;
                if (y < 0 || y >= py.out_size) continue;
                // From the line's first output to its last.
                const int64_t begin = max_of(0, -x * channels - channel);
                const int64_t end = min_of(count, (px.out_size - x) * channels - channel);
                E* to = output + ((cell.n * py.out_size + y) * px.out_size + x) * all_channels;
                for (int64_t j = begin; j < end; j += kLanes<T>)
                    store_n(to + j, load(from + j), static_cast<int>(min_of(kLanes<T>, end - j)));
            }
        }
    }
};

}  // namespace
}  // namespace fastgen::FASTGEN_ISA
