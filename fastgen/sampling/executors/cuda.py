"""The plan executed by one persistent CUDA kernel (csrc/cuda/plan_executor.h): tables, memory, the stream."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from fastgen import backends
from fastgen.sampling.executors import Batch
from fastgen.sampling.executors.tables import PlanTables
from fastgen.sampling.heads import Head
from fastgen.sampling.plan import Plan

HEADS = ("categorical", "bernoulli", "logisticmixture")  # enum PlanHead


class Strategy(IntEnum):
    """How steps are cut, see csrc/cuda/plan_schedule.h. Changes no sample."""

    AUTOMATIC = 0
    LATENCY = 1
    THROUGHPUT = 2


class CudaExecutor:
    """Plans on the current GPU in float32, a batch in one launch on the current stream.

    Raises:
        RuntimeError: there is no GPU, or the CUDA module was not built; the text says so.
    """

    def __init__(self, plan: Plan, strategy: Strategy = Strategy.AUTOMATIC):
        native = backends.native_cuda()
        if not native.device_count():
            raise RuntimeError("the cuda executor needs a GPU: the CUDA runtime sees no device")
        self.plan, self.strategy = plan, strategy
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._tables = PlanTables(plan, filtered=False)
        self.flops = self._tables.flops
        # The kernel uses the tables in place; its launch looks at some of those on the host.
        self._host = self._tables.tensors()
        self._device = {name: tensor.to(self.device) for name, tensor in self._host.items()}
        self.weight_bytes = self._device["weights"].nbytes
        self._host["weights"] = self._host["weights"][:0]
        self._native = native.PlanExecutor(
            host=_pointers(self._host), device=_pointers(self._device), sizes=plan_sizes(self._tables)
        )

    def sample(self, batch: Batch) -> Tensor:
        """Levels [count, C, H, W], on the CPU."""
        plan = self.plan
        with torch.cuda.device(self.device):
            space = self._tables.fill(batch, 0, batch.count, self.device)
            levels = torch.zeros(batch.count, *plan.image_shape, dtype=torch.int32, device=self.device)
            known = None if batch.known is None else batch.known.to(self.device, torch.int32).contiguous()
            mask = None if batch.mask is None else batch.mask.to(self.device).contiguous()
            arrivals = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._native.sample(
                count=batch.count,
                seed=batch.seed,
                start=batch.start,
                temperature=batch.temperature,
                workspace=space.data_ptr(),
                levels=levels.data_ptr(),
                known=0 if known is None else known.data_ptr(),
                mask=0 if mask is None else mask.data_ptr(),
                arrivals=arrivals.data_ptr(),
                strategy=int(self.strategy),
                row_begin=plan.first_row,
                row_end=plan.image_shape[1],
                stream=torch.cuda.current_stream().cuda_stream,
            )
            finished = levels.to("cpu", plan.head.dtype)
        batch.on_rows(plan.image_shape[1])
        return finished


def plan_sizes(tables: PlanTables) -> dict[str, int]:
    """The sizes that csrc/common/plan_tables.h names."""
    return {**tables.sizes(), "head": HEADS.index(_name(tables.plan.head))}


def why_not_cuda(like: Tensor) -> str | None:
    """Measured against no other executor yet, so it is no automatic choice."""
    return None if backends.asked() == "cuda" else "its kernel runs where it is asked for: backend='cuda'"


def _name(head: Head) -> str:
    return type(head).__name__.lower()


def _pointers(tables: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {name: (tensor.data_ptr(), len(tensor)) for name, tensor in tables.items()}
