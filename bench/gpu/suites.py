"""What `make gpu` measures: python -m bench.gpu.suites SUITE --results FILE.

Every row is written as soon as it is measured. What cannot run becomes a row with the reason. `ceilings` begins the
file; the other suites take their limits from its first row. `--compile` adds torch.compile's max-autotune, which takes
a minute; `--rehearse` is everything tiny and on the CPU.

Short calls are measured as they are ("eager") and as CUDA graphs, all peers alike; torch.compile brings its own graphs.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import concat_elu, gated_unit, generator, logistic_mixture_nll, masked_conv2d, reparameterize
from bench.gpu import samplers
from bench.gpu.place import Check, Place, Row, reason
from bench.harness import environment, gpu, measure, report, rows
from bench.harness.case import Case, Provider, Work
from bench.harness.ceilings import Ceilings
from bench.harness.layers import backward, without_grad
from bench.sampling import timed

SECONDS = 2.0  # for all providers of a case, without warm-up
REHEARSAL_SECONDS = 0.05
SHARE = 64  # of the sizes of ceilings, in a rehearsal

Call = Callable[[], Any]


def peers(place: Place, mode: str, calls: dict[str, Call], flops: float, bytes: float) -> Work:
    """Providers of those calls that work here; all but "fastgen" are baselines, "compile" is in its own mode only."""
    providers: dict[str, Provider] = {}
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, call in calls.items():
        if name == "compile" and mode != "compile":
            continue
        try:
            _, first = timed(call)
            run = call if mode == "eager" or name == "compile" else gpu.graphed(call, place.device)
            run()
        except Exception as error:  # one broken provider must not cost the others their turn
            (failed if name == "fastgen" else skipped)[name] = reason(error)
            continue
        providers[name] = Provider(run, name != "fastgen", extra={"first_call_s": first})
    return Work(providers, flops, bytes, skipped, failed)


def reparameterize_cases(place: Place) -> Iterator[Case]:
    size = reparameterize.Size(*((3, 5) if place.tiny else (8192, 1024)))

    def build(train: bool, mode: str) -> Work:
        mu, logvar, grad = torch.randn(3, size.samples, size.dimensions, device=place.device)
        grads = [grad, torch.randn(size.samples, device=place.device)]

        def call(function: reparameterize.Function) -> Call:
            inputs = [value.clone().requires_grad_(train) for value in (mu, logvar)]
            return partial(reparameterize.step, function, inputs, grads) if train else partial(function, *inputs)

        calls = {
            "eager": call(reparameterize.formulas),
            "compile": call(place.compiled(reparameterize.formulas)),
            "fastgen": call(reparameterize.fused),
        }
        # Forward: two read, one written. Backward: two and a gradient read, two written; the noise is made again.
        count = mu.numel()
        flops = (2 if train else 1) * reparameterize.FORWARD_FLOPS * count
        return peers(place, mode, calls, flops, 4 * (8 if train else 3) * count)

    for mode in place.modes:
        for train in (False, True):
            name = f"KL {size.name} {'forward+backward' if train else 'forward'}, {mode}"
            yield Case(name, {"mu": [size.samples, size.dimensions]}, partial(build, train, mode))


def logistic_mixture_nll_cases(place: Place) -> Iterator[Case]:
    size = logistic_mixture_nll.Size(*((2, 3, 5, 7, 2) if place.tiny else (256, 3, 32, 32, 10)))

    def build(train: bool, mode: str) -> Work:
        from fastgen import ops

        params = torch.randn(size.batch, size.params, size.height, size.width, device=place.device)
        images = torch.randint(256, (size.batch, size.channels, size.height, size.width), device=place.device).byte()
        run = logistic_mixture_nll.backward if train else logistic_mixture_nll.without_grad

        def call(function: Callable[..., Tensor], memory_format: torch.memory_format) -> Call:
            own = params.contiguous(memory_format=memory_format).clone().requires_grad_(train)
            return partial(run, function, own, images)

        formula = logistic_mixture_nll.formula
        calls = {
            "eager": call(formula, torch.contiguous_format),
            "eager channels_last": call(formula, torch.channels_last),
            "compile": call(place.compiled(formula), torch.channels_last),
            "fastgen": call(ops.logistic_mixture_nll, torch.contiguous_format),
        }
        # Forward: parameters and images read, a number per pixel written. Backward adds the gradient, written.
        bytes = 4 * params.numel() * (2 if train else 1) + images.numel() + 4 * size.pixels
        return peers(place, mode, calls, logistic_mixture_nll.flops(size, train), bytes)

    for mode in place.modes:
        for train in (False, True):
            name = f"{size.name} {'forward+backward' if train else 'forward'}, {mode}"
            yield Case(name, {"batch": size.batch, "params": size.params}, partial(build, train, mode))


def masked_conv2d_cases(place: Place) -> Iterator[Case]:
    def build(size: masked_conv2d.Size, mode: str) -> Work:
        from fastgen import ops

        def made(*shape: int) -> Tensor:
            value = torch.randn(shape, device=place.device, dtype=torch.bfloat16)
            return value.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else value

        x = made(size.batch, size.inputs, size.height, size.width)
        weight, bias = made(size.outputs, size.inputs, size.kernel, size.kernel) * 0.05, made(size.outputs)
        mask = ops.conv_mask(weight.shape, size.mask_type).to(weight)

        def call(function: Callable[..., Tensor], weight: Tensor = weight) -> Call:
            return partial(without_grad, function, (x, weight, bias))

        dense = partial(masked_conv2d.masked_weights, mask=mask)
        calls = {
            "eager": call(dense),
            "masked before": call(partial(torch.conv2d, padding=size.kernel // 2), weight * mask),  # cuDNN alone
            "compile": call(place.compiled(dense)),
            "fastgen": call(partial(ops.masked_conv2d, mask_type=size.mask_type)),
        }
        flops = masked_conv2d.useful_flops(mask.float().cpu(), size.batch, size.height, size.width)
        return peers(place, mode, calls, flops, 2 * (2 * x.numel() + int(mask.sum()) + bias.numel()))

    sizes = [(2, 8, 8, 5, 4)] if place.tiny else [(256, 128, 128, 32, 32), (16, 128, 128, 32, 32)]
    for size in [masked_conv2d.Size(*numbers, kernel=3, mask_type="B") for numbers in sizes]:
        for mode in place.modes:
            shapes = {"batch": size.batch, "channels": size.inputs, "image": [size.height, size.width]}
            yield Case(f"{size.name} bf16, {mode}", shapes, partial(build, size, mode), dtype="bfloat16")


def activations(
    place: Place, mode: str, plain: Callable[..., Tensor], fast: Callable[..., Tensor],
    inputs: Sequence[Tensor], grad: Tensor | None, flops: float, bytes: float,
) -> Work:  # fmt: skip
    """Of feature maps; with the gradients of all inputs where there is one of the output."""

    def call(function: Callable[..., Tensor], memory_format: torch.memory_format) -> Call:
        own = [x.contiguous(memory_format=memory_format).clone().requires_grad_(grad is not None) for x in inputs]
        if grad is None:
            return partial(without_grad, function, own)
        return partial(backward, function, own, grad.contiguous(memory_format=memory_format))

    calls = {
        "eager": call(plain, torch.contiguous_format),
        "eager channels_last": call(plain, torch.channels_last),
        "compile": call(place.compiled(plain), torch.channels_last),
        "fastgen": call(fast, torch.channels_last),
    }
    return peers(place, mode, calls, flops, bytes)


def concat_elu_cases(place: Place) -> Iterator[Case]:
    batch, channels, side = (2, 5, 3) if place.tiny else (64, 160, 32)

    def plain(x: Tensor) -> Tensor:
        return concat_elu.plain(x, dropout=0.5)

    def build(train: bool, mode: str) -> Work:
        from fastgen import ops

        x = torch.randn(batch, channels, side, side, device=place.device)
        grad = torch.randn(batch, 2 * channels, side, side, device=place.device) if train else None
        forward = concat_elu.ELU_FLOPS + 2 * concat_elu.DROPOUT_FLOPS
        flops = x.numel() * (2 * forward + concat_elu.BACKWARD_FLOPS if train else forward)
        # Forward: an input read, two outputs written. Backward: an input and two gradients read, one written.
        bytes = 4 * x.numel() * (7 if train else 3)
        fast = partial(ops.concat_elu, dropout=0.5, seed=1)
        return activations(place, mode, plain, fast, [x], grad, flops, bytes)

    for mode in place.modes:
        for train in (False, True):
            name = f"{channels} dropout {batch}x{side}x{side} {'forward+backward' if train else 'forward'}, {mode}"
            yield Case(name, {"batch": batch, "channels": channels, "side": side}, partial(build, train, mode))


def gated_unit_cases(place: Place) -> Iterator[Case]:
    batch, channels, side = (2, 5, 3) if place.tiny else (64, 160, 32)

    def plain(x: Tensor, residual: Tensor) -> Tensor:
        return gated_unit.plain(x, residual, activation="none")

    def build(train: bool, mode: str) -> Work:
        from fastgen import ops

        residual, output = torch.randn(2, batch, channels, side, side, device=place.device)
        x = torch.randn(batch, 2 * channels, side, side, device=place.device)
        forward = gated_unit.FUNCTION_FLOPS
        flops = output.numel() * (2 * forward + gated_unit.BACKWARD_FLOPS if train else forward)
        # Forward: halves and a residual read, an output written. Backward: halves and a gradient read, halves written.
        bytes = 4 * output.numel() * (9 if train else 4)
        fast = partial(ops.gated_unit, activation="none")
        return activations(place, mode, plain, fast, [x, residual], output if train else None, flops, bytes)

    for mode in place.modes:
        for train in (False, True):
            name = f"residual {channels} {batch}x{side}x{side} {'forward+backward' if train else 'forward'}, {mode}"
            yield Case(name, {"batch": batch, "channels": channels, "side": side}, partial(build, train, mode))


def generator_cases(place: Place) -> Iterator[Case]:
    def build(batch: int, mode: str) -> Work:
        import fastgen

        plain = generator.make(generator.DCGAN, *((2,) if place.tiny else ()))
        flops = generator.flops(plain, plain.inputs(1)) * batch
        network = plain.to(place.device, torch.bfloat16, memory_format=torch.channels_last)
        (z,) = plain.inputs(batch)
        z = z.to(place.device, torch.bfloat16).contiguous(memory_format=torch.channels_last)

        def call(module: generator.Module) -> Call:
            return partial(generator.infer, module, z)

        calls = {
            "eager": call(network),
            "folded": call(generator.fold(network)),
            "compile": call(place.compiled(copy.deepcopy(network))),
            "fastgen": call(fastgen.accelerate(network)),
        }
        numbers = sum(p.numel() for p in network.parameters()) + z.numel() + generator.infer(network, z).numel()
        return peers(place, mode, calls, flops, 2 * numbers)

    for batch in (2,) if place.tiny else (64, 1024):
        for mode in place.modes:
            name = f"DCGAN-64 bf16 channels_last, batch {batch}, {mode}"
            yield Case(name, {"batch": batch}, partial(build, batch, mode), dtype="bfloat16")


SUITES: dict[str, Callable[[Place], Iterator[Case | Check]]] = {
    "reparameterize": reparameterize_cases,
    "logistic_mixture_nll": logistic_mixture_nll_cases,
    "masked_conv2d": masked_conv2d_cases,
    "concat_elu": concat_elu_cases,
    "gated_unit": gated_unit_cases,
    "generator": generator_cases,
    **{
        f"sampling-{backend}": partial(samplers.cases, samplers.Pixels, backend)
        for backend in ("cuda", "triton", "cpu")
    },
    **{f"sampling-codes-{backend}": partial(samplers.cases, samplers.Codes, backend) for backend in ("triton", "cpu")},
}


def append(path: Path, row: Row) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write_ceilings(path: Path, place: Place, revision: Row) -> None:
    """The first row of the file."""
    found = gpu.measure_ceilings(place.device, SHARE if place.tiny else 1)
    row = {
        "environment": {**gpu.machine(place.device), "torch": torch.__version__, **revision, "date": now()},
        "copy_gbs": found.bandwidth["copy", 1] / 1e9,
        "matrix_tflops": {kind: rate / 1e12 for (_, kind, _), rate in found.flops.items()},
    }
    print(json.dumps(row, indent=1))
    append(path, row)


def read_ceilings(path: Path) -> Ceilings | None:
    """From their row, the first of the file unless the build failed sooner; None where measuring them failed."""
    with open(path) as file:
        first = next((row for row in map(json.loads, file) if "copy_gbs" in row), None)
    if first is None:
        return None
    rates = {("matrix product", kind, 1): rate * 1e12 for kind, rate in first["matrix_tflops"].items()}
    return Ceilings(rates, {("copy", 1): first["copy_gbs"] * 1e9})


class Broken(Exception):
    """A provider that failed while it was measured; the error is the cause."""


def guarded(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:
        raise Broken(name) from error


def measure_all(work: Work, place: Place, clock: Callable[..., float]) -> tuple[Row, Row]:
    """Times and peaks by provider. One that fails is taken out, and the others are measured anew."""
    while True:
        turns = {name: partial(guarded, name, clock, provider.call) for name, provider in work.providers.items()}
        try:
            times = measure.interleave(turns, REHEARSAL_SECONDS if place.tiny else SECONDS)
            peaks = {name: guarded(name, gpu.peak_bytes, p.call, place.device) for name, p in work.providers.items()}
            return times, peaks
        except Broken as broken:
            name, error = str(broken), broken.__cause__
            traceback.print_exception(error)
            provider = work.providers.pop(name)
            (work.skipped if provider.baseline else work.failed)[name] = reason(error)


def measure_case(case: Case, place: Place, limits: Ceilings, common: Row, clock: Callable[..., float]) -> list[Row]:
    """The rows of a case, with those of the providers that could not run."""
    facts = {**common, "case": case.name, "shapes": case.shapes, "dtype": case.dtype, "threads": 1}
    facts |= {"load_average": environment.load_average(), "date": now()}
    work = case.build()
    watch = environment.Watch()
    times, peaks = measure_all(work, place, clock)
    facts["others"] = watch.others()
    providers = {
        name: {"baseline": p.baseline, "scale": p.scale, "note": p.note, "extra": p.extra}
        for name, p in work.providers.items()
    }
    found = rows.make(facts, {"providers": providers, "flops": work.flops, "bytes": work.bytes}, times, peaks, limits)
    for row in found:
        rates = {"share_of_copy_bandwidth": row["bytes"] / row["median_s"] / row["peak_bandwidth"]}
        if "batch" in case.shapes:
            rates["items_per_s"] = case.shapes["batch"] / row["median_s"]
        row["extra"] = {**row["extra"], **rates}
    print(report.case_table(found) if found else f"{case.name}: nothing could run", flush=True)
    suite = {"suite": common["suite"], "case": case.name}
    found += [{**suite, "provider": name, "unavailable": why} for name, why in work.skipped.items()]
    return found + [{**suite, "provider": name, "error": why} for name, why in work.failed.items()]


class Lost(Exception):
    """The GPU, for this process: an error in a kernel, such as a wrong address, stays with it until it ends."""


def check_alive(device: str) -> None:
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise Lost from error


def run(suite: str, place: Place, path: Path, common: Row, done: set[str]) -> bool:
    """Measure a suite but for the cases that are done, "SUITE: CASE"; rows are appended to the file. Whether nothing
    failed.

    Raises:
        Lost: after a case, which is among those that are done.
    """
    limits = read_ceilings(path) or gpu.measure_ceilings(place.device, SHARE if place.tiny else 1)
    clock, failed = gpu.seconds_of(place.device), False
    common = {"suite": suite, "machine": gpu.machine(place.device), "memory_method": gpu.MEMORY_METHOD, **common}
    common["versions"] = environment.versions()
    for case in SUITES[suite](place):
        if (key := f"{suite}: {case.name}") in done:
            continue
        print(f"{time.strftime('%X')} {case.name}", flush=True)
        start = {"suite": suite, "case": case.name}
        try:
            if isinstance(case, Check):
                found = [{**start, "check": case.run()}]
                failed |= not found[0]["check"]["ok"]
            else:
                found = measure_case(case, place, limits, common, clock)
        except Exception as error:  # one broken case must not cost the others
            traceback.print_exc()
            found = [{**start, "error": reason(error)}]
        failed |= any("error" in row for row in found)
        for row in found:
            append(path, row)
            if "median_s" not in row:
                print(json.dumps(row), flush=True)
        done.add(key)
        check_alive(place.device)
    return not failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.suites", description="What make gpu measures.")
    parser.add_argument("suites", nargs="+", choices=["ceilings", *SUITES])
    parser.add_argument("--results", type=Path, required=True, metavar="FILE", help="rows are appended to it")
    parser.add_argument("--commit", help="as `git describe --always --dirty` has it, where the checkout is no clone")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--tests", default="passed", help="which tests did not pass, for the rows")
    parser.add_argument("--no-tests", action="store_true", help="no test has passed: rows carry no speed-up")
    parser.add_argument("--done", action="append", default=[], metavar="SUITE: CASE", help="to be left out")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    options = parser.parse_args(arguments)
    place = Place("cpu" if options.rehearse else "cuda", options.rehearse, options.compile)
    torch.backends.cudnn.benchmark = True  # the peers at their best
    if options.rehearse:
        torch.set_num_threads(1)
    revision = environment.revision()
    if options.commit:
        revision = {"commit": options.commit.removesuffix("-dirty"), "dirty": options.commit.endswith("-dirty")}
    tests = "not run" if options.no_tests else options.tests
    common = {"tests": tests, "command": " ".join(options.suites), **revision}
    fine, done = True, set(options.done)
    for suite in options.suites:
        if suite != "ceilings":
            try:
                fine &= run(suite, place, options.results, common, done)
            except Lost as lost:
                print(f"{reason(lost.__cause__)}\nthe rest is measured by another process", flush=True)
                words = [word for name in sorted(done) for word in ("--done", name)]
                measure_rest([*(sys.argv[1:] if arguments is None else arguments), *words])
                return 1
        elif suite not in done:
            write_ceilings(options.results, place, revision)
            done.add(suite)
    return 0 if fine else 1


def measure_rest(arguments: Sequence[str]) -> None:
    subprocess.run([sys.executable, "-m", "bench.gpu.suites", *arguments], check=False)


if __name__ == "__main__":
    raise SystemExit(main())
