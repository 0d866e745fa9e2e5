#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
    static unsigned block_rank() { return blockIdx.x - cuda_on_host::block.cluster->rank_of_first; }
    static unsigned num_blocks() { return cuda_on_host::block.cluster->blocks; }
};

}  // namespace cooperative_groups
