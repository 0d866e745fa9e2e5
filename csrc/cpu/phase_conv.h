// Convolutions by phases on the tap-GEMM; the plan is that of phase_plan.h.
//
// The work is cut into items of some images and lines, and, where these are few, of columns (phase_conv_items.h). Each is a
// set of products (phase_conv_products.h), with minimal filtering where the plan says so (phase_conv_winograd.h). Every
// output is one chain of sums whatever the cut: threads and batch do not change the bits.
#pragma once

#include <omp.h>

#include "phase_conv_items.h"
#include "phase_conv_packing.h"
#include "phase_conv_products.h"
#include "phase_conv_winograd.h"

namespace fastgen::FASTGEN_ISA {
namespace {

template <class E>
struct PhaseConv {
    using T = SumOf<E>;

    const ConvPlan& plan;
    const TapConvCall<E>& call;
    T* scratch;

    int64_t packed_size() const { return PhaseWeights<E>{plan}.packed_size(); }
    int64_t scratch_size() const { return PhaseWork<E>{plan, call, scratch}.scratch_size(); }
    void pack(const ConvWeight<E>& weight, E* packed) const {
        PhaseWeights<E>{plan}.pack(weight, packed, call.threads);
    }

    void run() const {
        const PhaseWork<E> work{plan, call, scratch};
        work.fill_shared();
        const int64_t images = work.image_blocks(), bands = work.bands(), splits = work.splits();
        const int64_t items = images * bands * splits, units = work.units();
#pragma omp parallel num_threads(call.threads)
        {
            const int64_t thread = omp_get_thread_num();
            T* own = scratch + work.shared_size() + thread * work.thread_size();
            for (int64_t i = next_item(work, thread, items); i < items; i = next_item(work, thread, items)) {
                const int64_t split = i % splits, band = i / splits % bands, block = i / splits / bands;
                const int64_t cells = work.cells(plan.y);
                PhaseItem<E> item{work,
                                  own,
                                  call.batch * block / images,
                                  call.batch * (block + 1) / images,
                                  cells * band / bands,
                                  cells * (band + 1) / bands,
                                  call.input};
                if (work.staged()) item.stage();
                run_units(item, units * split / splits, units * (split + 1) / splits);
            }
        }
    }

    // Each thread takes the items of a part of its own, in order, then what is left of the others'. Threads that write
    // neighbours, such as the phases of one line, would wait for each other's cache lines, a seventh of a layer's time.
    static int64_t next_item(const PhaseWork<E>& work, int64_t thread, int64_t items) {
        const int64_t threads = work.call.threads;
        for (int64_t i = 0; i < threads; ++i) {
            const int64_t part = (thread + i) % threads;
            const int64_t begin = items * part / threads, end = items * (part + 1) / threads;
            const int64_t item = begin + __atomic_fetch_add(work.taken(part), 1, __ATOMIC_RELAXED);
            if (item < end) return item;
        }
        return items;
    }

    // Panels begin..end-1, counted through all groups and pairs of slots.
    void run_units(const PhaseItem<E>& item, int64_t begin, int64_t end) const {
        const PhaseWeights<E>& weights = item.work.weights;
        const int64_t panels = weights.panels(), per_group = weights.slots() * panels;
        while (begin < end) {
            const int64_t next = min_of(end, begin / panels * panels + panels);
            const int64_t slot = begin % per_group / panels, group = begin / per_group, first = begin % panels;
            const AxisSlot& sy = plan.y.slots[slot / plan.x.num_slots];
            const AxisSlot& sx = plan.x.slots[slot % plan.x.num_slots];
            const PhasePair<E> pair{item, sy, sx, group, slot};
            if (is_minimal(plan, sy, sx))
                PhaseWinograd<E>{pair}.run(first, first + next - begin);
            else
                PhaseProducts<E>{pair}.run(first, first + next - begin);
            begin = next;
        }
    }
};

}  // namespace
}  // namespace fastgen::FASTGEN_ISA
