"""`Sampler`: a causal network, compiled once, sampled in the work of about one forward pass."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastgen import backends
from fastgen._arguments import integer
from fastgen._float32 import convolutions_like_products, float32_products
from fastgen._memory import total_memory
from fastgen.sampling.executors import Batch
from fastgen.sampling.executors.cpu import CpuExecutor
from fastgen.sampling.executors.reference import ReferenceExecutor
from fastgen.sampling.fuse import live
from fastgen.sampling.graph import Constant, Embedding, Graph, Linear, Pointwise
from fastgen.sampling.heads import Head
from fastgen.sampling.pack import compile_graph
from fastgen.sampling.plan import Plan
from fastgen.sampling.precision import check_precision, weights_in
from fastgen.sampling.request import Condition, Request, check_condition, make_request
from fastgen.sampling.subject import evaluating, host_defaults, host_device, make_subject, no_autocast
from fastgen.sampling.tape import TRACE_BATCH
from fastgen.sampling.trace import trace

LARGEST_BATCH = 256  # beyond it the caches only grow
MEMORY_SHARE = 0.25  # of the memory of the machine, or of the GPU that draws, for the caches of one batch
MAX_KNOWN_BYTES = 1 << 26  # of what labels became, kept for later calls
_COMPILING = threading.RLock()


def _triton_executor(plan: Plan) -> Any:
    """Imported when it is asked for: not everybody has Triton."""
    from fastgen.sampling.executors.triton import TritonExecutor

    return TritonExecutor(plan)


def _cuda_executor(plan: Plan) -> Any:
    """Imports Triton, too."""
    from fastgen.sampling.executors.cuda import CudaExecutor

    return CudaExecutor(plan)


def _why_not_triton(like: Tensor) -> str | None:
    """Whatever the model's dtype, the executor computes in float32."""
    return backends.why_not_triton(like.new_empty(0, dtype=torch.float32))


def _why_not_cuda(like: Tensor) -> str | None:
    """Measured against no other executor on a GPU yet, so it is no automatic choice."""
    if backends.asked() != "cuda":
        return "its kernel for pixels runs where it is asked for: backend='cuda'"
    if torch.cuda.get_device_capability(like.device) < (9, 0):
        return "it takes GPUs of compute capability 9.0 and newer, which have clusters of thread blocks"
    return backends.unavailable("triton") or _why_not_triton(like)


backends.register("sample_plan", "reference", ReferenceExecutor)
backends.register("sample_plan", "cpu", CpuExecutor)
backends.register("sample_plan", "triton", _triton_executor, why_not=_why_not_triton)
backends.register("sample_plan", "cuda", _cuda_executor, why_not=_why_not_cuda)


class Sampler:
    """Draws images from a causal network, caching every feature map that later pixels need again.

    The network is compiled at construction: its `forward` is traced once, proved to be causal, and turned into a plan
    of row and pixel steps (`plan`, printable).  Weights are taken as they are then; make a new sampler when they
    change.

    Memory: the weights of products once, packed (`weight_bytes`), biases and masks of attention [heads, positions,
    keys] unless each position sees all keys from one to another, and during `sample` the planes of a batch
    (`sample_bytes` for each of its samples, twice with guidance; Triton keeps those of two batch sizes); rows of fewer
    than 16 channels or columns are padded to 16. Where the CPU filters rows of r taps with fewer multiplications
    (`fastgen.sampling.executors.winograd`), their weights are r + 1 float32 in place of r.

    A sample is a function of (weights, seed, index, labels, condition, temperature, top_k, top_p, guidance, known
    pixels): not of the batch size, the number of threads or the other samples drawn with it, bit for bit.

    Args:
        model: maps encoded images [N, C, H, W] (and labels [N], and conditions [N, ...], in this order) to head
            parameters [N, head.num_params(C), H, W] or, for `Categorical`, [N, levels, C, H, W], or to a tuple with one
            such tensor, or a mapping or dataclass whose `logits` are one. They are logits; log-probabilities do, too,
            probabilities do not. Any module; a copy that shares its tensors is traced, in eval mode and without
            autocast, so that other threads may use it. Whatever its dtype, sampling computes in float32.
        image_shape: (C, H, W), or (H, W) for a model that reads [N, H, W], as priors over codes do; images are
            [N, 1, H, W] all the same. Default: ``model.image_shape``.
        head: default: ``model.head``.
        num_classes: labels are 0..num_classes-1; default: ``model.num_classes``, else there are none.
        condition: for a model that reads a tensor for each sample besides the image: a latent, a feature map, the codes
            of a coarser level, a text. An example of that of one sample, without the batch dimension: its shape and
            dtype are those of all others, its values need only be valid; where they say what attention sees, as the
            padding of a text does, they should hide as little as possible. Floats reach the model in its own dtype.
            For several tensors a tuple, or a dict by the names of the model's arguments.
        precision: "fp32"; "bf16": the weights of products are rounded to bfloat16; or "int8": to integers of 8 bits
            times a power of two, one for each output channel. Activations and sums stay float32. A half and a quarter
            of the memory traffic of a pixel on the CPU (on a GPU a half with either); the samples are exactly those of
            the model with rounded weights, which is not quite the same model: see `fastgen.bits_per_dim`.
        backend: "reference", "cpu", "triton" or "cuda" (for a model on a GPU), or "auto": what `fastgen.backend` or
            FASTGEN_BACKEND asks for, else Triton for a model on a GPU, else the CPU.
        max_batch: most samples drawn at a time; default: what fits a quarter of the memory of the machine, or of
            the GPU that draws, at most 256. Changes no sample.

    Raises:
        NotCausal: the model sees the pixel it predicts, or a later one; the text names the module.
        UnsupportedModel: an operator without a lowering, Python code that reads values of the image, the labels or the
            condition, or an error in the model's forward; the text names the module and what it ran into.
        ValueError, TypeError: bad arguments, or weights that are not finite.
        RuntimeError: the backend asked for cannot be used; the text says why.

    Paper: the caching goes back to Ramachandran et al. 2017, "Fast Generation for Convolutional Autoregressive Models".
    """

    def __init__(
        self,
        model: nn.Module,
        image_shape: tuple[int, ...] | None = None,
        head: Head | None = None,
        *,
        num_classes: int | None = None,
        condition: Condition | None = None,
        precision: str = "fp32",
        backend: str = "auto",
        max_batch: int | None = None,
    ):
        self._subject = make_subject(model, image_shape, head, num_classes)
        max_batch = None if max_batch is None else integer("max_batch", max_batch, 1, 2**31 - 1)
        check_precision(precision)
        self._precision = precision
        self._known_labels: dict[tuple[str, int], list[Tensor]] = {}
        self._examples = check_condition(self._subject, condition)
        for example in self._examples.values():
            if not example.numel():
                raise ValueError(f"condition must not be empty, got shape {tuple(example.shape)}")
        # "auto" leaves the choice to the environment and to an enclosing `with fastgen.backend(...)`.
        with contextlib.nullcontext() if backend == "auto" else backends.backend(backend):
            executor = _select(self._subject.like)
        with _one_thread():
            self._compile()
            self.plan.round_weights(precision)
            with host_defaults(), _device(self._subject.like):
                self._executor = executor(self.plan)
        self.max_batch = max_batch or _batch_that_fits(self._executor.sample_bytes, _memory_of(self._executor))
        if not isinstance(self._executor, ReferenceExecutor):
            self.plan.drop_weights()

    plan: Plan

    def __reduce__(self) -> Any:
        raise TypeError("a Sampler cannot be copied or pickled: make a new one of its model")

    def __repr__(self) -> str:
        shape = "x".join(map(str, self._subject.image_shape))
        executor = type(self._executor).__name__.removesuffix("Executor").lower()
        return f"Sampler({type(self._subject.module).__name__}, {shape}, {self.plan.head}, {executor})"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of products, as they are kept."""
        return self._executor.weight_bytes

    @property
    def sample_bytes(self) -> int:
        """Bytes of planes, as they are kept, for each sample of a batch."""
        return self._executor.sample_bytes

    @property
    def flops(self) -> int:
        """Floating point operations that products and attention of a sample take, two per multiply-add; `plan.flops`
        are those of the model as it is.
        """
        return self._executor.flops

    def _compile(self) -> None:
        subject = self._subject
        with host_defaults():
            generator = torch.Generator().manual_seed(0)
            levels = torch.randint(subject.head.levels, (TRACE_BATCH, *subject.image_shape), generator=generator)
            image = subject.encode(levels)
            labels = None
            if subject.num_classes is not None:
                labels = (torch.arange(TRACE_BATCH) % subject.num_classes).to(subject.like.device)
            conditions = {key: torch.stack([example] * TRACE_BATCH) for key, example in self._examples.items()}
        with evaluating(subject.module):
            graph, self._tape = trace(subject, image, labels, conditions, self._precision)
        _check_finite(graph)
        with host_defaults():
            self.plan, self._conditions = compile_graph(graph, subject.head)

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        start: int = 0,
        labels: Tensor | int | None = None,
        condition: Condition | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        guidance_scale: float = 1.0,
        null_labels: Tensor | int | None = None,
        null_condition: Condition | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw samples start..start+n-1 of the sequence of `seed`.

        Args:
            n: number of samples; 0 gives an empty tensor.
            seed: 0..2^64-1.
            start: index of the first sample.
            labels: integers [n], or one for all; for models with classes.
            condition: [n, *shape], or [*shape] for all; a tensor, tuple or dict, as the sampler's example is.
            temperature: divides the logits; below 1 for more likely images.
            top_k, top_p: draw from the `top_k` likeliest levels alone, and of these from the fewest whose probabilities
                sum to at least `top_p` of theirs; for `Categorical` heads.
            known, mask: levels [n, C, H, W] or [C, H, W], and bool [n, H, W] or [H, W]: where the mask is True
                the pixel is given, the others are drawn in raster order, each after all pixels before it.
            guidance_scale: classifier-free guidance; draws from logits null + guidance_scale * (logits - null), null
                being those for `null_labels` or `null_condition`, in about the time of two samples, or for a single one
                in less; for heads of logits (not `LogisticMixture`), by all executors but `cuda`. Ho and Salimans 2022,
                "Classifier-Free Diffusion Guidance", equation 6, with 1 + w.
            null_labels, null_condition: those that the model knows as nothing, like `labels` and `condition`; where one
                of them is not given, it is as for the samples.
            progress: show a progress bar.

        Returns:
            levels [n, C, H, W], uint8 (int64 for heads with more than 256 levels).
        """
        subject = self._subject
        if (condition is None) == bool(self._examples):
            shapes = " and ".join(str((n, *example.shape)) for example in self._examples.values())
            raise ValueError(
                f"the model is conditional: a condition of shape {shapes} is needed"
                if self._examples
                else "condition was given, but no example of it to the Sampler: Sampler(model, ..., condition=example)"
            )
        request = make_request(
            subject,
            n,
            seed=seed,
            start=start,
            labels=labels,
            condition=condition,
            examples=self._examples,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            known=known,
            mask=mask,
            guidance_scale=guidance_scale,
            null_labels=null_labels,
            null_condition=null_condition,
        )
        n = request.n
        batches = -(-n // max(1, self.max_batch // len(request.inputs())))
        images = torch.empty(n, *subject.image_shape, dtype=subject.head.dtype, device="cpu")
        rows = batches * subject.image_shape[1]
        with host_device(), no_autocast(), tqdm(total=rows, desc="sampling", unit="row", disable=not progress) as bar:
            for i in range(batches):
                # Batches of nearly the same size: the last one is no straggler.
                part = slice(i * n // batches, (i + 1) * n // batches)
                with _device(subject.like):
                    images[part] = self._executor.sample(self._batch(request, part, bar))
        return images

    def _batch(self, request: Request, part: slice, bar: tqdm) -> Batch:
        return Batch(
            count=part.stop - part.start,
            seed=request.seed,
            start=request.start + part.start,
            temperature=request.temperature,
            truncation=request.truncation,
            guidance=request.guidance,
            conditions=self._replay(request, part) if self._conditions else [],
            known=None if request.known is None else request.known[part],
            mask=None if request.mask is None else request.mask[part],
            on_rows=bar.update,
        )

    def _replay(self, request: Request, part: slice) -> list[Tensor]:
        """What the model makes of labels and conditions: a plane for each of `plan.conditions`."""
        each = []
        for labels, conditions in request.inputs():
            inputs = [t[part] for t in (labels, *conditions.values()) if t is not None]
            each.append(self._run_tape(inputs) if conditions else self._of_labels(inputs[0]))
        planes = each[0] if len(each) == 1 else [torch.stack(p, 1).flatten(0, 1) for p in zip(*each, strict=True)]
        if any(p.isnan().any() for p in planes):
            raise ValueError(f"the model makes NaN of {self._tape.names}")
        return planes

    def _of_labels(self, labels: Tensor) -> list[Tensor]:
        """`_run_tape`, once for each label: a small network takes longer for that than for its images."""
        distinct, index = labels.unique(return_inverse=True)
        keys = [(float32_products(), label) for label in distinct.tolist()]
        kept = self._known_labels  # other threads put another dict in its place
        known = {key: kept[key] for key in keys if key in kept}
        new = [i for i, key in enumerate(keys) if key not in known]
        if new:
            planes = self._run_tape([distinct[new]])
            known |= {keys[i]: values for i, *values in zip(new, *planes, strict=True)}
            room = len(kept) * sum(value.nbytes for value in known[keys[0]]) <= MAX_KNOWN_BYTES
            self._known_labels = kept | known if room else dict(known)
        rows = zip(*(known[key] for key in keys), strict=True)
        return [torch.stack(values).index_select(0, index) for values in rows]  # on one thread, see `PlanTables.fill`

    def _run_tape(self, inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad(), _one_thread(), convolutions_like_products(), weights_in(self._precision):
            try:
                return [_as_plane(values) for values in self._tape.replay(inputs, self._conditions)]
            except IndexError as error:  # a code that no table has
                raise ValueError(f"the model raised IndexError for {self._tape.names}: {error}") from error


def _select(like: Tensor) -> Callable[[Plan], Any]:
    """The executor that is asked for; else Triton for models on a GPU where it can run, else the CPU for them, too."""
    asked = backends.asked()
    if asked == "auto" and like.is_cuda:
        reason = backends.reasons("sample_plan", like)["triton"]
        if reason is None:
            with backends.backend("triton"):
                return backends.select("sample_plan", like)
        backends.log_once("sample_plan", "triton", reason)
    return backends.select("sample_plan", *((like,) if asked in ("triton", "cuda") else ()))


def _device(like: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For one caller at a time: the number of threads and the default dtype are those of the process.

    Compiling makes thousands of small tensors; handing parts of them to other threads costs more than it saves. What
    is replayed must not depend on the number of threads, as the last bits of PyTorch's convolutions do.
    """
    with _COMPILING, no_autocast():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _as_plane(value: Tensor) -> Tensor:
    """float32 [n, channels, height, width]."""
    value = value.to("cpu", torch.float32)
    return value if value.dim() == 4 else value.reshape(len(value), -1, 1, 1)


def _check_finite(graph: Graph) -> None:
    """Before anything is concluded from the weights: not a number is not zero, and so seems to be seen. What nobody
    needs may be anything, as memory is before it is written to.
    """
    for node in itertools.compress(graph.nodes, live(graph)):
        weights: list[Tensor | None] = []
        if isinstance(node, Linear):
            weights = [*(tap.weight for tap in node.taps), node.bias]
        elif isinstance(node, Embedding):
            weights = [node.table]
        elif isinstance(node, Pointwise) and any(isinstance(o, float) and math.isnan(o) for o in node.operands):
            raise ValueError(f"module {node.name!r} computes with NaN")
        elif isinstance(node, Constant) and node.data.isnan().any():  # infinities have their uses: -inf forbids a level
            raise ValueError(f"a constant of module {node.name!r} holds NaN")
        if any(w is not None and not w.sum(dtype=torch.float64).isfinite() for w in weights):
            raise ValueError(f"the weights of module {node.name!r} are not finite")


def _memory_of(executor: Any) -> int:
    """Bytes of the GPU that it runs on, or of the machine."""
    device = getattr(executor, "device", None)
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return total_memory()


def _batch_that_fits(sample_bytes: int, memory: int) -> int:
    return int(max(1, min(LARGEST_BATCH, MEMORY_SHARE * memory // max(1, sample_bytes))))
