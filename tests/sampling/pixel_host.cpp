// Runs csrc/cuda/pixel_stage.h, the schedule of the CUDA kernel, on threads of the host.
#include "cuda/pixel_stage.h"

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "pixel_call.h"

namespace {

using namespace fastgen;

class Barrier {
public:
    explicit Barrier(int size) : size_(size) {}
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const int round = round_;
        if (++arrived_ == size_) {
            arrived_ = 0;
            ++round_;
            next_.notify_all();
        } else {
            next_.wait(lock, [&] { return round_ != round; });
        }
    }

private:
    const int size_;
    int arrived_ = 0, round_ = 0;
    std::mutex mutex_;
    std::condition_variable next_;
};

// What the lanes of a block share.
struct Block {
    Block(int lanes, const PixelScratch& scratch)
        : lanes(lanes), partial(scratch.partial), values(scratch.values), doubles(scratch.doubles) {}
    Barrier lanes;
    std::vector<float> partial, values;
    std::vector<double> doubles;
};

class HostTeam {
public:
    HostTeam(Barrier& all, Block& block, int rank, int size, int lane, int lanes)
        : all_(all), block_(block), rank_(rank), size_(size), lane_(lane), lanes_(lanes) {}
    int32_t rank() const { return rank_; }
    int32_t size() const { return size_; }
    int32_t lane() const { return lane_; }
    int32_t lanes() const { return lanes_; }
    void sync() { block_.lanes.wait(); }
    void arrive() {}
    void wait() { all_.wait(); }
    float* partial() const { return block_.partial.data(); }
    float* values() const { return block_.values.data(); }
    double* doubles() const { return block_.doubles.data(); }
    void fetch(const PixelStage&, const PixelStep& step, PixelRange) { fetched_ = &step; }
    void locate(const PixelStage&, const PixelBatch&, const PixelStep&, int32_t column) { located_ = column; }

    void multiply(const PixelStage& stage, const PixelBatch& batch, const PixelStep& step, PixelRange tiles,
                  PixelRange rows, int32_t column) {
        if ((fetched_ && fetched_ != &step) || located_ != column) std::abort();
        for (int32_t part = lane_; part < kPixelParts; part += lanes_) {
            const PixelRange blocks = pixel_share(step.num_blocks, part, kPixelParts);
            for (int32_t packed = 0; packed < tiles.size() * kPixelColumns; ++packed) {
                for (int32_t row = 0; row < rows.size(); ++row) {
                    float sum = 0.0f;
                    for (int32_t b = blocks.begin; b < blocks.end; ++b) {
                        const PixelBlock& block = stage.blocks[step.first_block + b];
                        const PixelPlace from = pixel_place(batch, block.operand, column);
                        if (!from.first) continue;
                        const float* a = from.of(rows.begin + row) + block.channel;
                        const int64_t tile = tiles.begin + packed / kPixelColumns;
                        for (int32_t k = 0; k < block.count; ++k) {
                            sum = scalar::fma(a[k], weight(stage, step, tile, b, k, packed % kPixelColumns), sum);
                        }
                    }
                    partial()[partial_at(part, row, packed, tiles)] = sum;
                }
            }
        }
    }

private:
    static float weight(const PixelStage& stage, const PixelStep& step, int64_t tile, int32_t block, int32_t k,
                        int32_t column) {
        const int64_t fragment = step.weight + tile * step.num_blocks + block, lane = column % 8 * 4 + k / 4;
        const int64_t at = ((fragment * 32 + lane) * 2 + column / 8) * 4 + k % 4;
        if (!stage.bfloat16) return static_cast<const float*>(stage.weights)[at];
        return scalar::as_float(static_cast<int32_t>(uint32_t{static_cast<const uint16_t*>(stage.weights)[at]} << 16));
    }

    Barrier& all_;
    Block& block_;
    const int rank_, size_, lane_, lanes_;
    const PixelStep* fetched_ = nullptr;
    int32_t located_ = -1;
};

}  // namespace

int main(int, char** arguments) {
    PixelCall call(arguments[1]);
    const PixelStage& stage = call.stage;
    PixelBatch& batch = call.batch;

    std::vector<PixelPlaced> placed;
    for (int64_t i = 0; i < stage.num_operands; ++i) placed.push_back(pixel_placed(stage, batch, i));
    batch.placed = placed.data();

    const int size = static_cast<int>(call.number("size")), lanes = static_cast<int>(call.number("lanes"));
    const int clusters = static_cast<int>(call.number("clusters"));
    const PixelScratch scratch = pixel_scratch(stage, stage.steps, lanes, size);
    std::vector<std::unique_ptr<Barrier>> all;
    std::vector<std::unique_ptr<Block>> blocks;
    for (int i = 0; i < clusters; ++i) all.push_back(std::make_unique<Barrier>(size * lanes));
    for (int i = 0; i < clusters * size; ++i) blocks.push_back(std::make_unique<Block>(lanes, scratch));
    std::vector<std::thread> threads;
    for (int i = 0; i < clusters * size * lanes; ++i) {
        threads.emplace_back([&, i] {
            const int block = i / lanes, cluster = block / size;
            HostTeam team(*all[cluster], *blocks[block], block % size, size, i % lanes, lanes);
            PixelSchedule<HostTeam>(stage, batch, pixel_rows(batch, cluster, clusters), team).run();
        });
    }
    for (std::thread& thread : threads) thread.join();
    call.write(arguments[2]);
    return 0;
}
