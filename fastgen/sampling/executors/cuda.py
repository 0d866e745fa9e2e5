"""The plan executed by Triton kernels for whole rows and by a CUDA kernel (csrc/cuda/pixel_stage.h) for pixels."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen import backends
from fastgen.sampling.executors.pixel_tables import PixelTables
from fastgen.sampling.executors.triton import Pattern, Space, TritonExecutor, key_of
from fastgen.sampling.plan import Plan


class Strategy(Enum):
    """How many blocks a cluster has, which shares the channels of each step of some samples. Changes no sample.

    LATENCY: many, so that few samples are drawn soon. THROUGHPUT: fewer, two on a multiprocessor, so that more clusters
    draw at a time and one works while another waits. AUTOMATIC: LATENCY where each sample has a cluster of its own.
    """

    AUTOMATIC = "automatic"
    LATENCY = "latency"
    THROUGHPUT = "throughput"


# (blocks of a cluster, blocks on a multiprocessor), the first that the GPU has
_CLUSTERS = {
    Strategy.LATENCY: ((16, 1), (8, 1), (4, 1)),
    Strategy.THROUGHPUT: ((7, 2), (8, 2), (4, 2), (8, 1), (4, 1)),
}


class Cut(NamedTuple):
    """size: blocks of a cluster; share: blocks on a multiprocessor; clusters: at a time."""

    size: int
    share: int
    clusters: int


class CudaExecutor(TritonExecutor):
    """Plans on the current GPU. All pixels of an image row are one launch, a part of the row's CUDA graph.

    Products of pixel steps have the precision of float32, whatever `torch.set_float32_matmul_precision` asks for.

    Raises:
        RuntimeError: there is no GPU, or none with thread block clusters; the CUDA module was not built; or the plan
            has attention among its pixel steps, or too many steps, columns or groups for its tables, or for the memory
            that blocks share.
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
        self._cuts = {strategy: self._cut(shapes) for strategy, shapes in _CLUSTERS.items()}

    def _cut(self, shapes: tuple[tuple[int, int], ...]) -> Cut:
        for size, share in shapes:
            most = self._native.clusters(size, share)
            if most:
                return Cut(size, share, most)
        sizes = " or ".join(str(size) for size, _ in shapes)
        raise RuntimeError(f"the GPU runs no clusters of {sizes} blocks with as much memory as the plan's tables need")

    def launch_pixels(self, pattern: Pattern, space: Space) -> None:
        key = key_of(pattern)
        if key not in self._actions:  # at the first launch, which is never captured
            self._actions[key] = self._pixels.actions(pattern).to(self.device)
        actions = self._actions[key]
        if len(actions) == 0:  # rows above the image
            return
        cut = self.cut(space.count // space.streams)
        self._native.run(
            actions=actions.data_ptr(),
            num_actions=len(actions),
            **{name: tensor.data_ptr() for name, tensor in pixel_memory(space).items()},
            count=space.count,
            streams=space.streams,
            size=cut.size,
            share=cut.share,
            clusters=cut.clusters,
            stream=torch.cuda.current_stream().cuda_stream,
        )

    def cut(self, count: int) -> Cut:
        """Clusters for so many samples: no more than run at a time, with as many samples each."""
        strategy = self.strategy
        if strategy is Strategy.AUTOMATIC:
            few = count <= self._cuts[Strategy.LATENCY].clusters
            strategy = Strategy.LATENCY if few else Strategy.THROUGHPUT
        cut = self._cuts[strategy]
        samples = -(-count // cut.clusters)
        return cut._replace(clusters=-(-count // samples))


def pixel_memory(space: Space) -> dict[str, Tensor]:
    """What the pixel stage reads and writes, by the names of PixelBatch."""
    names = ("where", "state", "inverse_temperature", "top_k", "top_p", "guidance", "levels", "known", "mask")
    return {"workspace": space.planes, **{name: getattr(space, name) for name in names}}
