// fastgen: per-isa
// Convolutions by phases on the tap-GEMM; the plan is that of phase_plan.h, the formula that of tap_conv.h.
//
// A product has a row for each cell of a rectangle of cells that read the same taps, and a column for each output
// channel of a phase (or of all phases, side by side). Its rows are read where they are, along x, if they are many; on
// small maps the rows of all lines and images of the rectangle are gathered, so that 4x4 maps fill the registers too.
// Either way the result is a tile in the first-level cache, from which the epilogue writes each row to its place:
// scale, shift, activation.
//
// Where the plan says minimal filtering, tiles take the place of cells: they are transformed to their points, each point is
// a product of its own over all tiles, and the tiles are transformed back on the way to the output.
//
// The work is cut into items of some images and lines, and, where these are few, of columns. Every output is one chain of
// sums whatever the cut: threads and batch do not change the bits.

#include "tap_conv.h"

#include <omp.h>

#include "conv_products.h"
#include "depthwise_conv.h"
#include "minimal_filter.h"
#include "overlap_add.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int64_t kTileRows = 56;   // of a product: four times the tallest tile in registers
constexpr int64_t kTallPanels = 4;  // panels of a product of many rows: the tile stays in the first-level cache
constexpr int64_t kFlatPanels = 8;  // of a product of few rows, which wants wide tiles
constexpr int64_t kFlatRows = 14;   // up to which a product is flat
constexpr int64_t kDirectRows = 7;  // enough rows of one line to read them where they are
constexpr int64_t kGatherBytes = 256 << 10;   // of gathered rows: a part of the second-level cache
constexpr int64_t kWeightBytes = 256 << 10;   // of panels at work together, where rows are few
constexpr int64_t kPackChannels = 16;         // packed together
constexpr int64_t kItemCells = 256;           // of an item: enough rows for the gathered rectangles of small maps
constexpr int64_t kMinimalItemCells = 1024;   // the same, of tiles
constexpr int64_t kMinimalBytes = 512 << 10;  // of transformed tiles: half of the second-level cache

struct Cell {
    int64_t n, y, x;
};

// The cells of a rectangle in all images of the item, in order.
struct Rectangle {
    int64_t y0, y1, x0, x1;

    FASTGEN_INLINE int64_t index(int64_t n0, const Cell& cell) const {
        return ((cell.n - n0) * (y1 - y0) + cell.y - y0) * (x1 - x0) + cell.x - x0;
    }
    FASTGEN_INLINE Cell at(int64_t n0, int64_t index) const {
        const int64_t line = index / (x1 - x0);
        return {n0 + line / (y1 - y0), y0 + line % (y1 - y0), x0 + index % (x1 - x0)};
    }
    FASTGEN_INLINE void advance(Cell& cell) const {
        if (++cell.x < x1) return;
        cell.x = x0;
        if (++cell.y < y1) return;
        cell.y = y0;
        ++cell.n;
    }
};

// Tiles of minimal filtering: their points, and then the tiles, lie one after the other.
template <class X>
FASTGEN_INLINE int64_t tile_stride(int64_t depth) {
    return kPoints * kPoints * odd_lines<X>(depth) + kLine<X>;
}

template <class E>
struct TapConv {
    using T = SumOf<E>;
    using Term = typename Products<E>::Term;

    const ConvPlan& plan;
    const TapConvCall<E>& call;
    T* scratch;

    FASTGEN_INLINE int64_t phases() const { return plan.y.phases * plan.x.phases; }
    FASTGEN_INLINE int64_t columns() const { return phases() * plan.out_channels; }
    FASTGEN_INLINE int64_t panels() const { return panels_of<T>(columns()); }
    FASTGEN_INLINE int64_t slots() const { return plan.y.num_slots * plan.x.num_slots; }
    FASTGEN_INLINE int64_t units() const { return plan.groups * slots() * panels(); }
    FASTGEN_INLINE int64_t all_in() const { return plan.groups * plan.in_channels; }
    FASTGEN_INLINE int64_t all_out() const { return plan.groups * plan.out_channels; }

    static int64_t most_taps(const AxisPlan& axis) {
        int64_t most = 0;
        for (int64_t s = 0; s < axis.num_slots; ++s) most = max_of(most, axis.slots[s].taps);
        return most;
    }
    FASTGEN_INLINE int64_t most_taps() const { return most_taps(plan.y) * most_taps(plan.x); }

    FASTGEN_INLINE bool packs_points(const AxisSlot& sy, const AxisSlot& sx) const {
        return is_minimal(plan, sy, sx) && !(kConvElement<E>.sums_filters && sy.taps == 2 * plan.y.in_step);
    }

    // Of the packed weights of a pair of slots.
    FASTGEN_INLINE int64_t panel_stride(const AxisSlot& sy, const AxisSlot& sx) const {
        return plan.element_row ? slice() : panel_size(sy, sx);
    }
    FASTGEN_INLINE int64_t tap_offset(const AxisSlot& sy, const AxisSlot& sx, int64_t ty, int64_t tx) const {
        if (!plan.element_row || phases() > 1) return (ty * sx.taps + tx) * slice();
        return (sy.kernel[ty] * plan.element_row + sx.kernel[tx]) * panels() * slice();
    }
    FASTGEN_INLINE int64_t slice() const { return plan.in_channels * kPanel<T>; }  // of a tap in a panel

    // Elements of one panel of the packed weights of a pair of slots.
    FASTGEN_INLINE int64_t panel_size(const AxisSlot& sy, const AxisSlot& sx) const {
        const int64_t slices = packs_points(sy, sx) ? kPoints * kPoints * interleaved_filters(plan) : sy.taps * sx.taps;
        return slices * slice();
    }

    // Where the packed weights of a pair of slots start.
    int64_t packed_offset(int64_t group, int64_t slot) const {
        int64_t sum = 0, offset = 0;
        for (int64_t s = 0; s < slots(); ++s) {
            if (s == slot && !plan.element_row) offset = sum;
            sum += panels() * panel_size(plan.y.slots[s / plan.x.num_slots], plan.x.slots[s % plan.x.num_slots]);
        }
        return slot == slots() ? sum * plan.groups : group * sum + offset;
    }

    int64_t packed_size() const { return packed_offset(0, slots()); }

    // A few channels of a panel at a time, for all slots: they read the same cache lines.
    void pack(const ConvWeight<E>& weight, E* packed) const {
        const int64_t blocks = ceil_div(plan.in_channels, kPackChannels);
#pragma omp parallel for schedule(static) num_threads(call.threads)
        for (int64_t unit = 0; unit < plan.groups * panels() * blocks; ++unit) {
            const int64_t group = unit / blocks / panels(), panel = unit / blocks % panels(), block = unit % blocks;
            const Packing part{weight, group, panel, block * kPackChannels,
                               min_of(plan.in_channels, (block + 1) * kPackChannels)};
            for (int64_t slot = 0; slot < slots(); ++slot) {
                const AxisSlot& sy = plan.y.slots[slot / plan.x.num_slots];
                const AxisSlot& sx = plan.x.slots[slot % plan.x.num_slots];
                E* to = packed + packed_offset(group, slot);
                if (packs_points(sy, sx))
                    pack_points(part, sy, sx, to);
                else if (is_minimal(plan, sy, sx))
                    pack_lines(part, sy, sx, to + panel * panel_stride(sy, sx));
                else
                    pack_panel(part, sy, sx, to + panel * panel_stride(sy, sx));
            }
        }
    }

    // Input channels first..last-1 of a panel.
    struct Packing {
        const ConvWeight<E>& weight;
        int64_t group, panel, first, last;
    };

    // The weights of a tap for the columns of a panel: channel 0, or null where a column does not read the tap.
    struct Columns {
        const E* from[kPanel<T>];

        Columns(const TapConv& conv, const Packing& part, const AxisSlot& sy, const AxisSlot& sx, int64_t tap) {
            for (int64_t j = 0; j < kPanel<T>; ++j)
                from[j] = conv.first_weight(part.weight, part.group, sy, sx, tap, part.panel, j);
        }
        FASTGEN_INLINE E at(int64_t j, int64_t offset) const { return from[j] ? from[j][offset] : E{}; }
    };

    // As FilterLines; those of the next interleaved filter follow.
    void pack_lines(const Packing& part, const AxisSlot& sy, const AxisSlot& sx, E* to) const {
        if constexpr (kConvElement<E>.sums_filters) {
            for (int64_t f = 0; f < interleaved_filters(plan); ++f, to += plan.in_channels * kFilterLines * kPanel<T>) {
                for (int64_t t = 0; t < kFilterLines; ++t) {
                    const Columns columns(*this, part, sy, sx, filter_tap(sx, f, t / 2, t % 2));
                    for (int64_t c = part.first; c < part.last; ++c) {
                        for (int64_t j = 0; j < kPanel<T>; ++j)
                            to[filter_line_at(c, t, j)] = columns.at(j, c * part.weight.in_channel);
                    }
                }
            }
        }
    }

    // The tap of element (y, x) of an interleaved filter.
    FASTGEN_INLINE int64_t filter_tap(const AxisSlot& sx, int64_t filter, int64_t y, int64_t x) const {
        const int64_t steps = plan.x.in_step;
        return (y * plan.y.in_step + filter / steps) * sx.taps + x * steps + filter % steps;
    }

    // For minimal filtering the points come one after the other, each with all of its panels.
    void pack_points(const Packing& part, const AxisSlot& sy, const AxisSlot& sx, E* to) const {
        const int64_t taps = sy.taps / plan.y.in_step;
        for (int64_t f = 0; f < interleaved_filters(plan); ++f) {
            // Of a few channels all taps, before the next ones: in double, so that the points are rounded once.
            double filters[9][kPackChannels * kPanel<T>];
            for (int64_t t = 0; t < taps * taps; ++t) {
                const Columns columns(*this, part, sy, sx, filter_tap(sx, f, t / taps, t % taps));
                for (int64_t c = part.first; c < part.last; ++c) {
                    for (int64_t j = 0; j < kPanel<T>; ++j)
                        filters[t][(c - part.first) * kPanel<T> + j] =
                            Products<E>::value(columns.at(j, c * part.weight.in_channel));
                }
            }
            for (int64_t c = part.first; c < part.last; ++c) {
                const double* filter = &filters[0][(c - part.first) * kPanel<T>];
                E* lines = to + part.panel * depth() * kPanel<T>;
                if (taps == 3)
                    point_lines<3>(filter, lines, f * plan.in_channels + c);
                else
                    point_lines<2>(filter, lines, f * plan.in_channels + c);
            }
        }
    }

    // The points of one channel's filters, whose taps are kPackChannels * kPanel elements apart.
    template <int kTaps>
    void point_lines(const double* filter, E* to, int64_t channel) const {
        constexpr int64_t kTap = kPackChannels * kPanel<T>, kVec = kLanes<double>;
        const int64_t point = panels() * depth() * kPanel<T>;
        for (int64_t j = 0; j < kPanel<T>; j += kVec) {
            Vec<double> taps[kTaps * kTaps], rows[kPoints * kTaps], points[kPoints * kPoints];
            for (int64_t t = 0; t < kTaps * kTaps; ++t) taps[t] = load(filter + t * kTap + j);
            for (int64_t t = 0; t < kTaps; ++t) filter_points(kTaps, taps + t, kTaps, rows + t, kTaps);
            for (int64_t p = 0; p < kPoints; ++p) filter_points(kTaps, rows + p * kTaps, 1, points + p * kPoints, 1);
            for (int64_t p = 0; p < kPoints * kPoints; ++p) {
                for (int64_t l = 0; l < kVec; ++l)
                    to[p * point + Products<E>::weight_at(channel, j + l)] = Products<E>::rounded(points[p][l]);
            }
        }
    }

    void pack_panel(const Packing& part, const AxisSlot& sy, const AxisSlot& sx, E* to) const {
        for (int64_t tap = 0; tap < sy.taps * sx.taps; ++tap) {
            const Columns columns(*this, part, sy, sx, tap);
            E* slice = to + tap_offset(sy, sx, tap / sx.taps, tap % sx.taps);
            for (int64_t c = part.first; c < part.last; ++c) {
                for (int64_t j = 0; j < kPanel<T>; ++j)
                    slice[Products<E>::weight_at(c, j)] = columns.at(j, c * part.weight.in_channel);
            }
        }
    }

    // The weight of input channel 0 for column j of a panel, through a tap.
    const E* first_weight(const ConvWeight<E>& weight, int64_t group, const AxisSlot& sy, const AxisSlot& sx,
                          int64_t tap, int64_t panel, int64_t j) const {
        const int64_t column = panel * kPanel<T> + j;
        if (column >= columns()) return nullptr;
        const int64_t phase = column / plan.out_channels, o = column % plan.out_channels;
        const int64_t ky = sy.kernel[tap / sx.taps * plan.y.phases + phase / plan.x.phases];
        const int64_t kx = sx.kernel[tap % sx.taps * plan.x.phases + phase % plan.x.phases];
        if (ky < 0 || kx < 0) return nullptr;
        return weight.data + group * weight.group + o * weight.out_channel + ky * weight.kernel_y +
               kx * weight.kernel_x;
    }

    // Items

    // Cells begin at 0; side by side, one may stick out at either end.
    FASTGEN_INLINE int64_t cells(const AxisPlan& axis) const { return ceil_div(axis.out_size, axis.out_step) + 1; }
    FASTGEN_INLINE int64_t item_cells() const { return plan.minimal ? kMinimalItemCells : kItemCells; }
    FASTGEN_INLINE int64_t item_images() const {
        return max_of(1, min_of(call.batch, item_cells() / (cells(plan.y) * cells(plan.x))));
    }
    FASTGEN_INLINE int64_t item_lines() const {  // of cells
        return min_of(cells(plan.y), max_of(1, item_cells() / cells(plan.x)));
    }
    FASTGEN_INLINE int64_t image_blocks() const { return ceil_div(call.batch, item_images()); }
    FASTGEN_INLINE int64_t bands() const { return ceil_div(cells(plan.y), item_lines()); }
    FASTGEN_INLINE int64_t splits() const {
        const int64_t items = image_blocks() * bands();
        return items >= 2 * call.threads ? 1 : min_of(units(), ceil_div(2 * call.threads, items));
    }

    // Scratch: scale and shift of every column; channels of zeros, around the image; the number of items taken of each
    // thread's part; then for each thread the taps of a product, its tile, gathered rows or transformed tiles, and the
    // item's input where its channels are not neighbours.

    FASTGEN_INLINE int64_t affine_size() const { return 2 * plan.groups * panels() * kPanel<T>; }
    FASTGEN_INLINE int64_t shared_size() const {
        return affine_size() + aligned<T>(plan.in_channels) + call.threads * kPanel<T>;
    }
    FASTGEN_INLINE E* zeros() const { return reinterpret_cast<E*>(scratch + affine_size()); }
    FASTGEN_INLINE int64_t* taken(int64_t part) const {
        return reinterpret_cast<int64_t*>(scratch + shared_size() - (part + 1) * kPanel<T>);
    }
    FASTGEN_INLINE int64_t taps_size() const { return lines_for<T, Term>(most_taps()); }
    FASTGEN_INLINE int64_t tile_size() const {
        return max_of(kTileRows * kTallPanels * kPanel<T>, plan.minimal ? most_products() : 0);
    }
    FASTGEN_INLINE int64_t gather_capacity() const {  // elements
        return max_of(kGatherBytes / static_cast<int64_t>(sizeof(E)),
                      kFlatRows * odd_lines<E>(most_taps() * plan.in_channels));
    }
    FASTGEN_INLINE int64_t gather_size() const {
        const int64_t tiles = plan.minimal ? most_tiles() * tile_stride<E>(depth()) : 0;
        return lines_for<T, E>(max_of(gather_capacity(), tiles));
    }

    // Of the products of minimal filtering.
    FASTGEN_INLINE int64_t depth() const { return interleaved_filters(plan) * plan.in_channels; }
    // Tiles that are at work together, and panels of their products.
    FASTGEN_INLINE int64_t most_tiles() const {
        const int64_t fitting = kMinimalBytes / static_cast<int64_t>(sizeof(E)) / tile_stride<E>(depth());
        return max_of(kFlatRows, min_of(kTileRows, fitting / kFlatRows * kFlatRows));
    }
    FASTGEN_INLINE int64_t most_products() const {
        return max_of(most_tiles() * tile_stride<T>(kTallPanels * kPanel<T>),
                      kFlatRows * tile_stride<T>(kFlatPanels * kPanel<T>));
    }

    FASTGEN_INLINE int64_t staged_lines() const {
        int64_t first = 0, last = 0;
        for (int64_t s = 0; s < plan.y.num_slots; ++s) {
            const AxisSlot& slot = plan.y.slots[s];
            if (slot.taps == 0) continue;
            first = min_of(first, slot.offsets[0]);
            last = max_of(last, slot.offsets[slot.taps - 1]);
        }
        return min_of(plan.y.in_size, item_lines() * plan.y.in_step + last - first);
    }
    FASTGEN_INLINE int64_t staged_size() const {
        return lines_for<T, E>(item_images() * staged_lines() * plan.x.in_size * all_in());
    }
    FASTGEN_INLINE bool staged() const { return call.input.c != 1 && all_in() > 1; }
    FASTGEN_INLINE int64_t thread_size() const {
        return taps_size() + tile_size() + gather_size() + (staged() ? staged_size() : 0);
    }
    FASTGEN_INLINE int64_t scratch_size() const { return shared_size() + call.threads * thread_size(); }

    void fill_shared() const {
        for (int64_t c = 0; c < plan.in_channels; ++c) zeros()[c] = E{};
        for (int64_t part = 0; part < call.threads; ++part) *taken(part) = 0;
        for (int64_t group = 0; group < plan.groups; ++group) {
            T* scale = scratch + 2 * group * panels() * kPanel<T>;
            T* shift = scale + panels() * kPanel<T>;
            repeat(call.scale, group, T(1), scale);
            repeat(call.shift, group, T(0), shift);
        }
    }

    // The values of a group's channels, or `missing`, for every column of its panels.
    void repeat(const T* values, int64_t group, T missing, T* to) const {
        const int64_t channels = plan.out_channels, total = panels() * kPanel<T>;
        for (int64_t done = 0; done < total; done += channels) {
            const int64_t count = min_of(channels, total - done);
            for (int64_t j = 0; j < count; ++j) to[done + j] = values ? values[group * channels + j] : missing;
        }
    }

    // Each thread takes the items of a part of its own, in order, then what is left of the others'. Threads that write
    // neighbours, such as the phases of one line, would wait for each other's cache lines, a seventh of a layer's time.
    int64_t next_item(int64_t thread, int64_t items) const {
        for (int64_t i = 0; i < call.threads; ++i) {
            const int64_t part = (thread + i) % call.threads;
            const int64_t begin = items * part / call.threads, end = items * (part + 1) / call.threads;
            const int64_t item = begin + __atomic_fetch_add(taken(part), 1, __ATOMIC_RELAXED);
            if (item < end) return item;
        }
        return items;
    }

    void run() const {
        fill_shared();
        const int64_t items = image_blocks() * bands() * splits();
#pragma omp parallel num_threads(call.threads)
        {
            const int64_t thread = omp_get_thread_num();
            T* own = scratch + shared_size() + thread * thread_size();
            for (int64_t i = next_item(thread, items); i < items; i = next_item(thread, items)) {
                const int64_t split = i % splits(), band = i / splits() % bands(), block = i / splits() / bands();
                Item item{*this, own};
                item.n0 = call.batch * block / image_blocks();
                item.n1 = call.batch * (block + 1) / image_blocks();
                item.y0 = cells(plan.y) * band / bands();
                item.y1 = cells(plan.y) * (band + 1) / bands();
                item.source = call.input;
                if (staged()) item.stage();
                item.units(units() * split / splits(), units() * (split + 1) / splits());
            }
        }
    }

    struct Item {
        const TapConv& conv;
        T* own;
        int64_t n0 = 0, n1 = 0, y0 = 0, y1 = 0;  // images n0..n1-1, lines of cells y0..y1-1
        Image<E> source{};                       // channels are neighbours

        FASTGEN_INLINE Term* taps() const { return reinterpret_cast<Term*>(own); }
        FASTGEN_INLINE T* tile() const { return own + conv.taps_size(); }
        FASTGEN_INLINE E* gathered() const { return reinterpret_cast<E*>(tile() + conv.tile_size()); }
        FASTGEN_INLINE E* staged() const {
            return reinterpret_cast<E*>(tile() + conv.tile_size() + conv.gather_size());
        }

        // Copies the lines that the item reads.
        void stage() {
            const AxisPlan& y = conv.plan.y;
            int64_t first = y.in_size, last = 0;
            for (int64_t s = 0; s < y.num_slots; ++s) {
                const AxisSlot& slot = y.slots[s];
                for (int64_t i = 0; i < slot.num_spans; ++i) {
                    const AxisSpan& span = slot.spans[i];
                    const int64_t begin = max_of(span.first, y0), end = min_of(span.last, y1);
                    if (begin >= end || span.tap_begin == span.tap_end) continue;
                    first = min_of(first, begin * y.in_step + slot.offsets[span.tap_begin]);
                    last = max_of(last, (end - 1) * y.in_step + slot.offsets[span.tap_end - 1] + 1);
                }
            }
            if (first >= last) return;
            const int64_t width = conv.plan.x.in_size, channels = conv.all_in(),
                          size = (last - first) * width * channels;
            for (int64_t n = n0; n < n1; ++n) {
                fetch_rows(source, n, first, last, width, channels,
                           DenseLines<E>{staged() + (n - n0) * size, first, width, channels});
            }
            source = {staged() - n0 * size - first * width * channels, size, 1, width * channels, channels};
        }

        void units(int64_t begin, int64_t end) const {
            const int64_t panels = conv.panels(), per_group = conv.slots() * panels;
            while (begin < end) {
                const int64_t next = min_of(end, begin / panels * panels + panels);
                const int64_t slot = begin % per_group / panels, x_slots = conv.plan.x.num_slots;
                const SlotPair pair{*this, conv.plan.y.slots[slot / x_slots], conv.plan.x.slots[slot % x_slots],
                                    begin / per_group, slot};
                pair.run(begin % panels, begin % panels + next - begin);
                begin = next;
            }
        }
    };

    // One group of channels and a slot of either axis: a set of products with the same weights.
    struct SlotPair {
        const Item& item;
        const AxisSlot& sy;
        const AxisSlot& sx;
        int64_t group, slot;

        FASTGEN_INLINE const ConvPlan& plan() const { return item.conv.plan; }

        void run(int64_t panel_begin, int64_t panel_end) const {
            if (is_minimal(plan(), sy, sx)) return minimal(panel_begin, panel_end);
            // Where all gathered rows fit, they are gathered once, and a few panels at a time meet the rows of all
            // rectangles: weights come from memory once instead of once for each rectangle.
            int64_t all = 0;
            for_rectangles([&](const Part& part) { all += part.size(); });
            const bool fits = all <= item.conv.gather_capacity();
            const int64_t panel_bytes = max_of(1, item.conv.panel_size(sy, sx) * static_cast<int64_t>(sizeof(E)));
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

        // Number i where one comes first and the others follow in order.
        static int64_t with_first(int64_t first, int64_t i) { return i == 0 ? first : i <= first ? i - 1 : i; }

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
                    const bool gathers = lines > 1 && depth > 0 && columns < kDirectRows;
                    body(Part{y, x, gathers ? lines * columns : 0, odd_lines<E>(depth)});
                }
            }
        }

        FASTGEN_INLINE int64_t blocks(int64_t panels, int64_t rows) const {
            return ceil_div(panels, rows > kFlatRows ? kTallPanels : kFlatPanels);
        }

        FASTGEN_INLINE const E* weights(int64_t panel) const {
            return item.conv.call.packed + item.conv.packed_offset(group, slot) + panel * panel_stride();
        }
        FASTGEN_INLINE int64_t panel_stride() const { return item.conv.panel_stride(sy, sx); }

        FASTGEN_INLINE const E* source(int64_t n, int64_t y, int64_t x) const {
            const Image<E>& image = item.source;
            return image.data + n * image.n + y * image.h + x * image.w + group * plan().in_channels;
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
                                                      b + item.conv.tap_offset(sy, sx, ty, tx));
                }
            }
            return count;
        }

        void product(int64_t taps, int64_t rows, int64_t panels) const {
            Products<E>::run(item.taps(), taps, panel_stride(), item.tile(), panels * kPanel<T>, rows, panels, nullptr);
        }

        void direct(const AxisSpan& y, const AxisSpan& x, int64_t panel_begin, int64_t panel_end) const {
            const int64_t pieces = ceil_div(x.last - x.first, kTileRows);
            const int64_t count = blocks(panel_end - panel_begin, ceil_div(x.last - x.first, pieces));
            for (int64_t block = 0; block < count; ++block) {
                const int64_t begin = panel_begin + (panel_end - panel_begin) * block / count;
                const int64_t end = panel_begin + (panel_end - panel_begin) * (block + 1) / count;
                for (int64_t n = item.n0; n < item.n1; ++n) {
                    for (int64_t line = y.first; line < y.last; ++line) {
                        for (int64_t piece = 0; piece < pieces; ++piece) {
                            const int64_t first = x.first + (x.last - x.first) * piece / pieces;
                            const int64_t last = x.first + (x.last - x.first) * (piece + 1) / pieces;
                            const Cell cell{n, line, first};
                            const Rectangle cells{y.first, y.last, x.first, x.last};
                            const int64_t index = cells.index(item.n0, cell);
                            prefetch(cells, index, last - first, begin, end);
                            product(list_taps(y, x, cell, weights(begin)), last - first, end - begin);
                            epilogue(cells, index, last - first, begin, end);
                        }
                    }
                }
            }
        }

        // `present`: all rows of the part are there already, else a piece of them at a time is gathered.
        void gathered(const Part& part, int64_t panel_begin, int64_t panel_end, E* rows, bool present) const {
            const Rectangle cells = part.cells();
            const int64_t capacity = item.conv.gather_capacity() / part.stride;
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

        // Minimal filtering. Tiles in this order, because then those that have a point are neighbours.
        static constexpr bool kFullY[] = {true, true, false, false};
        static constexpr bool kFullX[] = {false, true, true, false};
        static constexpr int kKinds = 4;

        struct Tiles {
            AxisTiles y, x;
            Rectangle kinds[kKinds];  // in tiles
            int64_t begin[kKinds + 1];

            FASTGEN_INLINE int64_t kind_begin(int64_t kind, int64_t first, int64_t last) const {
                return max_of(first, min_of(last, begin[kind])) - first;
            }
        };

        Tiles tiles() const {
            const int64_t y0 = max_of(first_cell(sy), item.y0), y1 = min_of(last_cell(sy), item.y1);
            const int64_t taps = sy.taps / plan().y.in_step;
            Tiles result{
                {y0, max_of(0, y1 - y0), taps}, {first_cell(sx), last_cell(sx) - first_cell(sx), taps}, {}, {}};
            const AxisTiles &y = result.y, &x = result.x;
            for (int kind = 0; kind < kKinds; ++kind) {
                const Rectangle r{kFullY[kind] ? 0 : y.full(), kFullY[kind] ? y.full() : y.count(),
                                  kFullX[kind] ? 0 : x.full(), kFullX[kind] ? x.full() : x.count()};
                result.kinds[kind] = r;
                result.begin[kind + 1] = result.begin[kind] + (item.n1 - item.n0) * (r.y1 - r.y0) * (r.x1 - r.x0);
            }
            return result;
        }

        void minimal(int64_t panel_begin, int64_t panel_end) const {
            const Tiles tiles = this->tiles();
            const int64_t rows = tiles.begin[kKinds], pieces = ceil_div(rows, item.conv.most_tiles());
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const int64_t first = rows * piece / pieces, last = rows * (piece + 1) / pieces;
                transform(tiles, first, last);
                const int64_t panels = panel_end - panel_begin;
                // Filter lines are read for many points: they must stay in the second-level cache.
                const int64_t bytes = panels * panel_stride() * static_cast<int64_t>(sizeof(E));
                const int64_t count =
                    max_of(blocks(panels, last - first),
                           item.conv.packs_points(sy, sx) ? 0 : min_of(panels, ceil_div(bytes, kWeightBytes)));
                for (int64_t block = 0; block < count; ++block) {
                    const int64_t begin = panel_begin + panels * block / count;
                    const int64_t end = panel_begin + panels * (block + 1) / count;
                    multiply(tiles, first, last, begin, end);
                    with_activation(item.conv.call.activation, [&](auto tag) __attribute__((always_inline)) {
                        transform_back<decltype(tag)::value>(tiles, first, last, begin, end);
                    });
                }
            }
        }

        // Calls body(row, n, y, x) for the tiles of one kind among first..last-1.
        template <class Body>
        FASTGEN_INLINE void for_tiles(const Tiles& tiles, int kind, int64_t first, int64_t last,
                                      const Body& body) const {
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
            constexpr int height = kFullY[Kind] ? kPoints : kPoints - 1, width = kFullX[Kind] ? kPoints : kPoints - 1;
            const int64_t channels = plan().in_channels, point = odd_lines<E>(item.conv.depth());
            const AxisPlan &py = plan().y, &px = plan().x;
            // Lines that only outputs outside the band would read need not be there.
            const int64_t end = min_of(py.in_size, (tiles.y.last() - 1) * py.in_step + sy.offsets[sy.taps - 1] + 1);
            for_tiles(tiles, Kind, first, last, [&](int64_t row, int64_t n, int64_t y, int64_t x) {
                E* to = item.gathered() + row * tile_stride<E>(item.conv.depth());
                for (int64_t f = 0; f < interleaved_filters(plan()); ++f, to += channels) {
                    const E* from[height][width];
                    for (int i = 0; i < height; ++i) {
                        const int64_t at_y = (y + i) * py.in_step + sy.offsets[f / px.in_step];
                        for (int j = 0; j < width; ++j) {
                            const int64_t at_x = (x + j) * px.in_step + sx.offsets[f % px.in_step];
                            const bool inside = at_y >= 0 && at_y < end && at_x >= 0 && at_x < px.in_size;
                            from[i][j] = inside ? source(n, at_y, at_x) : item.conv.zeros();
                        }
                    }
                    int64_t c = 0;
                    for (; c + kLanes<T> <= channels; c += kLanes<T>)
                        transform_tile<Kind>(from, c, kLanes<T>, to + c, point);
                    if (c < channels) transform_tile<Kind>(from, c, static_cast<int>(channels - c), to + c, point);
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
                for (int j = 0; j < Width; ++j) d[i][j] = load_lanes(from[i][j] + c, lanes);
                input_points<kFullX[Kind]>(d[i], 1);
            }
#pragma GCC unroll 4
            for (int j = 0; j < kPoints; ++j) {
                if (!kFullX[Kind] && j == kExtraPoint) continue;
                input_points<kFullY[Kind]>(&d[0][j], kPoints);
#pragma GCC unroll 4
                for (int i = 0; i < kPoints; ++i) {
                    if (kFullY[Kind] || i != kExtraPoint) store_lanes(to + (i * kPoints + j) * point, d[i][j], lanes);
                }
            }
        }

        // One product for each point, of the tiles that have it.
        void multiply(const Tiles& tiles, int64_t first, int64_t last, int64_t panel_begin, int64_t panel_end) const {
            const int64_t depth = item.conv.depth(), panel = depth * kPanel<T>, panels = panel_end - panel_begin;
            const int64_t a_point = odd_lines<E>(depth), a_row = tile_stride<E>(depth);
            const int64_t c_point = odd_lines<T>(panels * kPanel<T>), c_row = tile_stride<T>(panels * kPanel<T>);
            constexpr int all = kPoints * kPoints;
            const E* b = item.conv.call.packed + item.conv.packed_offset(group, slot);
            const auto with_point = [&](int p, const auto& body) __attribute__((always_inline)) {
                const bool extra_y = p / kPoints == kExtraPoint, extra_x = p % kPoints == kExtraPoint;
                const int64_t row0 = tiles.kind_begin(extra_x ? 1 : 0, first, last);
                const int64_t row1 = tiles.kind_begin(extra_y ? 2 : extra_x ? 3 : kKinds, first, last);
                body(item.gathered() + row0 * a_row + p * a_point, item.tile() + row0 * c_row + p * c_point,
                     row1 - row0);
            };
            if (item.conv.packs_points(sy, sx)) {
                const int64_t point = item.conv.panels() * panel;
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
                const bool more = panel_end < item.conv.panels();
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
        void transform_back(const Tiles& tiles, int64_t first, int64_t last, int64_t panel_begin,
                            int64_t panel_end) const {
            if (tiles.y.taps == 3) return transform_back_kind<A, 1, 3>(tiles, first, last, panel_begin, panel_end);
            transform_back_kind<A, 0, 2>(tiles, first, last, panel_begin, panel_end);
            transform_back_kind<A, 1, 2>(tiles, first, last, panel_begin, panel_end);
            transform_back_kind<A, 2, 2>(tiles, first, last, panel_begin, panel_end);
            transform_back_kind<A, 3, 2>(tiles, first, last, panel_begin, panel_end);
        }

        template <Activation A, int Kind, int Taps>
        void transform_back_kind(const Tiles& tiles, int64_t first, int64_t last, int64_t panel_begin,
                                 int64_t panel_end) const {
            constexpr int height = kFullY[Kind] ? kPoints + 1 - Taps : 2, width = kFullX[Kind] ? kPoints + 1 - Taps : 2;
            const TapConv& conv = item.conv;
            const int64_t column = panel_begin * kPanel<T>, block = (panel_end - panel_begin) * kPanel<T>;
            const int64_t columns = min_of(block, conv.columns() - column), point = odd_lines<T>(block);
            const T* scale = conv.scratch + 2 * group * conv.panels() * kPanel<T> + column;
            const T* shift = scale + conv.panels() * kPanel<T>;
            const Vec<T> parameter = broadcast(conv.call.parameter), two = broadcast(T(2));
            const Vec<T> quarter = broadcast(T(0.25));  // of twice the outputs along either axis
            const int64_t line = plan().x.out_size * conv.all_out() * plan().y.out_step;
            const int64_t step = conv.all_out() * plan().x.out_step;
            for_tiles(tiles, Kind, first, last, [&](int64_t row, int64_t n, int64_t y, int64_t x) {
                const T* from = item.tile() + row * tile_stride<T>(block);
                E* to = output_of({n, y, x}) + column;
                const int64_t rows = min_of(height, tiles.y.last() - y), steps = min_of(width, tiles.x.last() - x);
                for (int64_t j = 0; j < columns; j += kLanes<T>) {
                    Vec<T> m[kPoints][kPoints];
#pragma GCC unroll 4
                    for (int i = 0; i < kPoints; ++i) {
                        if (!kFullY[Kind] && i == kExtraPoint) continue;
#pragma GCC unroll 4
                        for (int k = 0; k < kPoints; ++k) {
                            if (kFullX[Kind] || k != kExtraPoint) m[i][k] = load(from + (i * kPoints + k) * point + j);
                        }
                        outputs_of_points<kFullX[Kind], Taps>(m[i], 1, two);
                    }
                    const Vec<T> factor = load(scale + j) * quarter, offset = load(shift + j);
                    const int lanes = static_cast<int>(min_of(kLanes<T>, columns - j));
#pragma GCC unroll 4
                    for (int k = 0; k < width; ++k) {
                        outputs_of_points<kFullY[Kind], Taps>(&m[0][k], kPoints, two);
#pragma GCC unroll 4
                        for (int i = 0; i < height; ++i) {
                            if (i >= rows || k >= steps) continue;
                            const Vec<T> value = activate<A>(fma(m[i][k], factor, offset), parameter);
                            E* p = to + i * line + k * step + j;
                            store_lanes(p, value, lanes);
                        }
                    }
                }
            });
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
                                                           b + item.conv.tap_offset(sy, sx, ty, tx));
                }
            }
            return count;
        }

        void epilogue(const Rectangle& cells, int64_t first, int64_t rows, int64_t panel_begin,
                      int64_t panel_end) const {
            with_activation(item.conv.call.activation, [&](auto tag) __attribute__((always_inline)) {
                finish<decltype(tag)::value>(cells, first, rows, panel_begin, panel_end);
            });
        }

        template <Activation A>
        void finish(const Rectangle& cells, int64_t first, int64_t rows, int64_t panel_begin, int64_t panel_end) const {
            const TapConv& conv = item.conv;
            const int64_t width = (panel_end - panel_begin) * kPanel<T>, column = panel_begin * kPanel<T>;
            const int64_t columns = min_of(width, conv.columns() - column);
            const T* scale = conv.scratch + 2 * group * conv.panels() * kPanel<T> + column;
            const T* shift = scale + conv.panels() * kPanel<T>;
            const Vec<T> parameter = broadcast(conv.call.parameter);
            const bool one_phase = conv.phases() == 1;
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

        // Of a single phase.
        FASTGEN_INLINE E* output_of(const Cell& cell) const {
            return output(cell.n, cell.y * plan().y.out_step + sy.base, cell.x * plan().x.out_step + sx.base);
        }

        // The lines that the epilogue writes arrive while the product is computed.
        void prefetch(const Rectangle& cells, int64_t first, int64_t rows, int64_t panel_begin,
                      int64_t panel_end) const {
            if (item.conv.phases() > 1) return;
            Cell cell = cells.at(item.n0, first);
            for (int64_t r = 0; r < rows; ++r, cells.advance(cell)) {
                const E* to = output_of(cell);
                for (int64_t column = panel_begin * kPanel<T>; column < panel_end * kPanel<T>; column += kLine<E>)
                    __builtin_prefetch(to + column, 1);
            }
        }

        FASTGEN_INLINE E* output(int64_t n, int64_t y, int64_t x) const {
            return item.conv.call.output + ((n * plan().y.out_size + y) * plan().x.out_size + x) * item.conv.all_out() +
                   group * plan().out_channels;
        }

        // Writes columns column..column+columns-1 of the phases side by side to their places.
        void scatter(const Rectangle cells, int64_t first, int64_t rows, int64_t width, int64_t column,
                     int64_t columns) const {
            // Copies, because the compiler must assume that a store changes the plan.
            const AxisPlan py = plan().y, px = plan().x;
            const int64_t channels = plan().out_channels, all_channels = item.conv.all_out();
            const int64_t run = plan().groups == 1 ? px.phases * channels : channels;  // columns that stay together
            for (int64_t done = 0, count; done < columns; done += count) {
                const int64_t at = column + done, phase = at / channels, channel = at % channels;
                count = min_of(run - at % run, columns - done);
                const int64_t y0 = sy.base + phase / px.phases, x0 = sx.base + phase % px.phases;
                const T* from = item.tile() + done;
                E* output = item.conv.call.output + group * channels + channel;
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
};

// Calls body with what computes the calls of a plan.
template <class E, class Body>
FASTGEN_INLINE auto with_kernel(const ConvPlan& plan, const TapConvCall<E>& call, SumOf<E>* scratch, const Body& body) {
    if constexpr (kConvElement<E>.by_channel) {
        if (plan.depthwise) return body(DepthwiseConv<E>{plan, call, scratch});
    }
    if (plan.overlap_add) return body(OverlapAdd<E>{plan, call, scratch});
    return body(TapConv<E>{plan, call, scratch});
}

}  // namespace

#define FASTGEN_DEFINE_TAP_CONV(T)                                                                        \
    int64_t tap_conv_packed_size(const ConvPlan& plan, const T*) {                                        \
        return with_kernel<T>(plan, {}, nullptr, [](const auto& conv) { return conv.packed_size(); });    \
    }                                                                                                     \
    int64_t tap_conv_scratch_size(const ConvPlan& plan, const TapConvCall<T>& call) {                     \
        return with_kernel<T>(plan, call, nullptr, [](const auto& conv) { return conv.scratch_size(); }); \
    }                                                                                                     \
    void tap_conv_pack(const ConvPlan& plan, const ConvWeight<T>& weight, T* packed, int64_t threads) {   \
        TapConvCall<T> call{};                                                                            \
        call.threads = threads;                                                                           \
        with_kernel<T>(plan, call, nullptr, [&](const auto& conv) { conv.pack(weight, packed); });        \
    }                                                                                                     \
    void tap_conv(const ConvPlan& plan, const TapConvCall<T>& call, SumOf<T>* scratch) {                  \
        with_kernel<T>(plan, call, scratch, [](const auto& conv) { conv.run(); });                        \
    }

FASTGEN_DEFINE_TAP_CONV(BFloat16)
FASTGEN_DEFINE_TAP_CONV(float)
FASTGEN_DEFINE_TAP_CONV(double)

}  // namespace fastgen::FASTGEN_ISA
