// What the work on a convolution by phases is cut into, and its scratch memory.
//
// An item is some images and lines of cells, and, where these are few, a part of the columns. It goes through pairs of
// slots, one of either axis: each is a set of products with the same weights.
#pragma once

#include "phase_conv_packing.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int64_t kTileRows = 56;   // of a product: four times the tallest tile in registers
constexpr int64_t kTallPanels = 4;  // panels of a product of many rows: the tile stays in the first-level cache
constexpr int64_t kFlatPanels = 8;  // of a product of few rows, which wants wide tiles
constexpr int64_t kFlatRows = 14;   // up to which a product is flat
constexpr int64_t kWeightBytes = kL2Bytes / 2;  // of panels at work together, where rows are few

struct Cell {
    int64_t n, y, x;
};

// The cells of a rectangle in all images of the item, in order.
struct Rectangle {
    int64_t y0, y1, x0, x1;

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

// Into how many blocks the panels of a product of so many rows are split.
FASTGEN_INLINE int64_t blocks(int64_t panels, int64_t rows) {
    return ceil_div(panels, rows > kFlatRows ? kTallPanels : kFlatPanels);
}

// Number i where one comes first and the others follow in order.
FASTGEN_INLINE int64_t with_first(int64_t first, int64_t i) { return i == 0 ? first : i <= first ? i - 1 : i; }

// Tiles of minimal filtering: their points, and then the tiles, lie one after the other.
template <class X>
FASTGEN_INLINE int64_t tile_stride(int64_t depth) {
    return kPoints * kPoints * odd_lines<X>(depth) + kLine<X>;
}

// A call: the sizes of its items, and where things are in scratch memory.
template <class E>
struct PhaseWork {
    using T = SumOf<E>;
    using Term = typename Products<E>::Term;

    static constexpr int64_t kGatherBytes = 256 << 10;  // of gathered rows: a part of the second-level cache
    static constexpr int64_t kItemCells = 256;  // of an item: enough rows for the gathered rectangles of small maps
    static constexpr int64_t kMinimalItemCells = 1024;   // the same, of tiles
    static constexpr int64_t kMinimalBytes = 512 << 10;  // of transformed tiles

    const ConvPlan& plan;
    const TapConvCall<E>& call;
    T* scratch;
    PhaseWeights<E> weights{plan};

    FASTGEN_INLINE int64_t units() const { return plan.groups * weights.slots() * weights.panels(); }
    FASTGEN_INLINE int64_t all_in() const { return plan.groups * plan.in_channels; }
    FASTGEN_INLINE int64_t all_out() const { return plan.groups * plan.out_channels; }

    static int64_t most_taps(const AxisPlan& axis) {
        int64_t most = 0;
        for (int64_t s = 0; s < axis.num_slots; ++s) most = max_of(most, axis.slots[s].taps);
        return most;
    }
    FASTGEN_INLINE int64_t most_taps() const { return most_taps(plan.y) * most_taps(plan.x); }

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

    FASTGEN_INLINE int64_t affine_size() const { return 2 * plan.groups * weights.panels() * kPanel<T>; }
    FASTGEN_INLINE int64_t shared_size() const {
        return affine_size() + aligned<T>(plan.in_channels) + call.threads * kPanel<T>;
    }
    // Of a group, for every column of its panels.
    FASTGEN_INLINE T* scale(int64_t group) const { return scratch + 2 * group * weights.panels() * kPanel<T>; }
    FASTGEN_INLINE T* shift(int64_t group) const { return scale(group) + weights.panels() * kPanel<T>; }
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
        const int64_t tiles = plan.minimal ? most_tiles() * tile_stride<E>(weights.depth()) : 0;
        return lines_for<T, E>(max_of(gather_capacity(), tiles));
    }

    // Of minimal filtering: tiles that are at work together, and panels of their products.
    FASTGEN_INLINE int64_t most_tiles() const {
        const int64_t fitting = kMinimalBytes / static_cast<int64_t>(sizeof(E)) / tile_stride<E>(weights.depth());
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
            repeat(call.scale, group, T(1), scale(group));
            repeat(call.shift, group, T(0), shift(group));
        }
    }

    // The values of a group's channels, or `missing`, for every column of its panels.
    void repeat(const T* values, int64_t group, T missing, T* to) const {
        const int64_t channels = plan.out_channels, total = weights.panels() * kPanel<T>;
        for (int64_t done = 0; done < total; done += channels) {
            const int64_t count = min_of(channels, total - done);
            for (int64_t j = 0; j < count; ++j) to[done + j] = values ? values[group * channels + j] : missing;
        }
    }
};

// What one thread does at a time: images n0..n1-1, lines of cells y0..y1-1.
template <class E>
struct PhaseItem {
    using T = SumOf<E>;
    using Term = typename Products<E>::Term;

    const PhaseWork<E>& work;
    T* own;  // the thread's part of scratch
    int64_t n0, n1, y0, y1;
    Image<E> source;  // channels are neighbours

    FASTGEN_INLINE Term* taps() const { return reinterpret_cast<Term*>(own); }
    FASTGEN_INLINE T* tile() const { return own + work.taps_size(); }
    FASTGEN_INLINE E* gathered() const { return reinterpret_cast<E*>(tile() + work.tile_size()); }
    FASTGEN_INLINE E* staged() const { return reinterpret_cast<E*>(tile() + work.tile_size() + work.gather_size()); }

    // Copies the lines that the item reads, where their channels are not neighbours.
    void stage() {
        const AxisPlan& y = work.plan.y;
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
        const int64_t width = work.plan.x.in_size, channels = work.all_in(), size = (last - first) * width * channels;
        for (int64_t n = n0; n < n1; ++n) {
            fetch_rows(source, n, first, last, width, channels,
                       DenseLines<E>{staged() + (n - n0) * size, first, width, channels});
        }
        source = {staged() - n0 * size - first * width * channels, size, 1, width * channels, channels};
    }
};

// One group of channels and a slot of either axis: a set of products with the same weights.
template <class E>
struct PhasePair {
    using T = SumOf<E>;

    const PhaseItem<E>& item;
    const AxisSlot& sy;
    const AxisSlot& sx;
    int64_t group, slot;

    FASTGEN_INLINE const ConvPlan& plan() const { return item.work.plan; }
    FASTGEN_INLINE const E* weights(int64_t panel) const {
        return item.work.call.packed + item.work.weights.packed_offset(group, slot) + panel * panel_stride();
    }
    FASTGEN_INLINE int64_t panel_stride() const { return item.work.weights.panel_stride(sy, sx); }

    FASTGEN_INLINE const E* source(int64_t n, int64_t y, int64_t x) const {
        const Image<E>& image = item.source;
        return image.data + n * image.n + y * image.h + x * image.w + group * plan().in_channels;
    }
    // Of a single phase.
    FASTGEN_INLINE E* output_of(const Cell& cell) const {
        const int64_t y = cell.y * plan().y.out_step + sy.base, x = cell.x * plan().x.out_step + sx.base;
        return item.work.call.output +
               ((cell.n * plan().y.out_size + y) * plan().x.out_size + x) * item.work.all_out() +
               group * plan().out_channels;
    }
};

}  // namespace
}  // namespace fastgen::FASTGEN_ISA
