"""The plan executed by Triton kernels for whole rows and by a CUDA kernel (csrc/cuda/pixel_stage.h) for pixels."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from fastgen import backends
from fastgen.sampling.executors.pixel_tables import PixelTables
from fastgen.sampling.executors.triton import Pattern, Space, TritonExecutor, key_of
from fastgen.sampling.plan import Plan


class Strategy(Enum):
    """How many blocks a cluster has, which shares the channels of each step of some samples. Changes no sample.

    LATENCY: many, so that few samples are drawn soon. THROUGHPUT: fewer, so that more clusters draw at a time.
    AUTOMATIC: LATENCY where all samples get a cluster of their own at the same time.
    """

    AUTOMATIC = ()
    THROUGHPUT = (7,)
    LATENCY = (16, 8)  # the first size that the GPU has


class CudaExecutor(TritonExecutor):
    """Plans on the current GPU. All pixels of an image row are one launch, a part of the row's CUDA graph.

    Products of pixel steps have the precision of float32, whatever `torch.set_float32_matmul_precision` asks for.

    Raises:
        RuntimeError: there is no GPU, or none with thread block clusters; the CUDA module was not built; or the plan's
            tables are too large for the memory that the blocks of a cluster share.
    """

    def __init__(self, plan: Plan, strategy: Strategy = Strategy.AUTOMATIC):
        native = backends.native_cuda()
        super().__init__(plan, pixel_weights=False)
        self.strategy = strategy
        self._pixels = PixelTables(plan, self._tables)
        self._actions: dict[object, Tensor] = {}
        tables = self._pixels.tensors()
        steps = tables["steps"].numpy().tobytes()
        self._on_gpu = {name: tensor.to(self.device) for name, tensor in tables.items()}
        self.weight_bytes += self._on_gpu["weights"].nbytes
        self._native = native.PixelStage(
            tables={name: tensor.data_ptr() for name, tensor in self._on_gpu.items()},
            sizes=self._pixels.sizes,
            steps=steps,
        )
        self._clusters = {size: self._native.clusters(size) for s in Strategy for size in s.value}

    def launch_pixels(self, pattern: Pattern, space: Space) -> None:
        key = key_of(pattern)
        if key not in self._actions:  # at the first launch, which is never captured
            self._actions[key] = self._pixels.actions(pattern).to(self.device)
        actions = self._actions[key]
        size, clusters = self._cut(space.count)
        self._native.run(
            actions=actions.data_ptr(),
            num_actions=len(actions),
            **{name: tensor.data_ptr() for name, tensor in pixel_memory(space).items()},
            count=space.count,
            size=size,
            clusters=clusters,
            stream=torch.cuda.current_stream().cuda_stream,
        )

    def _cut(self, count: int) -> tuple[int, int]:
        """Blocks of a cluster, and clusters: as many as run at a time, with as many samples each."""
        sizes = [self._size_of(strategy) for strategy in (Strategy.LATENCY, Strategy.THROUGHPUT)]
        if self.strategy is not Strategy.AUTOMATIC:
            size = self._size_of(self.strategy)
        else:
            size = sizes[0] if count <= self._clusters[sizes[0]] else sizes[1]
        samples = -(-count // self._clusters[size])
        return size, -(-count // samples)

    def _size_of(self, strategy: Strategy) -> int:
        sizes = [size for size in strategy.value if self._clusters[size]]
        if not sizes:
            raise RuntimeError("the cuda executor needs a GPU that runs clusters of thread blocks")
        return sizes[0]


def pixel_memory(space: Space) -> dict[str, Tensor]:
    """What the pixel stage reads and writes, by the names of PixelBatch."""
    names = ("where", "state", "inverse_temperature", "levels", "known", "mask")
    return {"workspace": space.planes, **{name: getattr(space, name) for name in names}}
