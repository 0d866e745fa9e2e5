"""python -m bench.gpu: what `make gpu` does. Needs nothing but Python itself; what it runs needs torch and a GPU.

The file in bench/results begins with the environment and what the GPU can do at most; a row follows for each part that
was run, and one for each measurement, written as soon as there is one. The most valuable parts come first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import progress, sanitizer
from bench.gpu.python import Facts, choose
from bench.gpu.runner import Part, Row, run, seconds_of
from bench.harness import environment, report

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 580.0  # seconds for all; ten minutes with the time that it takes to end what is too slow
PROBE = 15.0  # of them, for `choose`, which imports torch
LOGS = Path("build/gpu")
NO_GPU = ("tests/kernels/test_compiled.py", "tests/kernels/test_launch.py")  # compile for a minute, and need none
# Of the files that compile most kernels, each in a process of its own.
SHARES = {"tests/kernels/test_sample_plan.py": 3, "tests/kernels/test_conv_transpose2d_bn_act.py": 3}
EXECUTORS, CUDA_EXECUTOR = "tests/sampling/test_gpu_executors.py", "tests/sampling/test_cuda_plan.py"
NO_NVCC = "no nvcc on PATH, in $CUDA_HOME or in /usr/local/cuda"
GPU_MARK = re.compile(r"^(pytestmark = |@)pytest\.mark\.gpu$", re.MULTILINE)
# The small cases for compute-sanitizer: forward and backward kernels of every operation, and no CUDA graphs.
SMALL = (
    "known_answers or test_layouts or weight_gradient_is_split or memory_layouts or only_the_gradients or "
    "(test_gradients and both)"
)


def kernel_tests() -> list[str]:
    """The files whose tests run on a GPU where there is one."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/kernels").glob("test_*.py"))
    return [file for file in files if file not in NO_GPU]


def gpu_tests() -> list[str]:
    """The other files with tests that need a GPU."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if GPU_MARK.search(path.read_text()))
    return [str(path.relative_to(ROOT)) for path in files if path.parent.name != "kernels"]


def find(program: str) -> str | None:
    """A program of the CUDA toolkit."""
    return shutil.which(program) or shutil.which(program, path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


def plan(python: Path, facts: Facts, results: Path, rehearse: bool, commit: str) -> list[list[Part]]:
    """What is to be run: stages, one after the other, of parts that run side by side."""
    # What was printed before a part is ended is kept; lines that name failed tests have room for what these say.
    unbuffered = {"PYTHONUNBUFFERED": "1", "COLUMNS": "300"}
    count = ["--collect-only", "-q"] if rehearse else ["-v", "--tb=short", "-o", "faulthandler_timeout=40"]
    gpu = [] if rehearse else ["--require-gpu"]
    no_nvcc = "" if rehearse or os.environ.get("NVCC") or find("nvcc") else NO_NVCC
    watcher = find("compute-sanitizer") or "compute-sanitizer"
    memcheck, racecheck = ["--tool=memcheck", "--report-api-errors=no"], ["--tool=racecheck"]

    def tests(file: str, *arguments: str, share: str = "", lacks: str = "") -> Part:
        command = [str(python), "-m", "pytest", *count, *gpu, *arguments, *(["--share", share] if share else []), file]
        return Part(f"{file} {share}".strip(), command, 130, environment=unbuffered, lacks=lacks)

    def shared(file: str) -> list[Part]:
        count = SHARES.get(file, 1)
        return [tests(file, share=f"{i}/{count}" if count > 1 else "") for i in range(1, count + 1)]

    def watched(name: str, tool: Sequence[str], *arguments: str, **variables: str) -> Part:
        command = [] if rehearse else [watcher, "--error-exitcode=1", *tool]
        command += [str(python), "-m", "pytest", *count, *gpu, *arguments]
        # Ten seconds, but the last stage has all that is left.
        return Part(name, command, 10, environment={**unbuffered, **variables}, why_not=sanitizer.why_not)

    def suite(seconds: float, name: str, needs: Sequence[Part] = (), compile: bool = False, lacks: str = "") -> Part:
        options = ["--results", str(results), *(["--commit", commit] if commit else [])]
        options += ["--compile"] * compile + ["--rehearse"] * rehearse
        command = [str(python), "-m", "bench.gpu.suites", name, *options]
        proofs = [] if rehearse else [part.name for part in needs]
        title = f"bench {name}{' compiled' * compile}"
        return Part(title, command, seconds, proofs, unbuffered, lacks, rest=progress.rest)

    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation", "--no-deps"]
    # An nvcc that fails takes nothing else with it: the CUDA module is left out then.
    build = ["sh", "-c", '"$@" || FASTGEN_CUDA=0 "$@"', "build", *install, "-e", "."]
    archs = os.environ.get("FASTGEN_CUDA_ARCHS", facts["arch"])
    kernels = {file: shared(file) for file in kernel_tests()}
    others = {file: tests(file, "-m", "gpu", lacks=no_nvcc if file == CUDA_EXECUTOR else "") for file in gpu_tests()}
    sampling = [others[EXECUTORS], *kernels["tests/kernels/test_sample_plan.py"]]
    generator = kernels["tests/kernels/test_conv_transpose2d_bn_act.py"]
    operations = {
        "logistic_mixture_nll": kernels["tests/kernels/test_logistic_mixture_nll.py"],
        "reparameterize": kernels["tests/kernels/test_reparameterize.py"],
        "masked_conv2d": kernels["tests/kernels/test_masked_conv2d.py"],
    }
    memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor an allocation whose ends are watched
    small = [*kernel_tests(), "-k", SMALL]
    executors = [EXECUTORS, "-k", "gated"]
    stages = [
        [
            suite(40, "ceilings"),  # the best of ten runs, so that it may be measured beside the compilers
            Part("build", build, 150, environment={"FASTGEN_CUDA": "auto", "FASTGEN_CUDA_ARCHS": archs}),
        ],
        [*others.values(), *(part for parts in kernels.values() for part in parts)],
        [suite(70, "sampling-cuda", needs=[others[CUDA_EXECUTOR], others[EXECUTORS]], lacks=no_nvcc)],
        [suite(50, "sampling-triton", needs=sampling)],
        [suite(30, "generator", needs=generator)],  # which has many tiles to compile and to time
        *([suite(15, name, needs=proofs)] for name, proofs in operations.items()),
        [suite(35, "generator", needs=generator, compile=True)],
        *([suite(10, name, needs=proofs, compile=True)] for name, proofs in operations.items()),
        [suite(15, "sampling-codes-triton", needs=sampling)],
        [
            watched("memcheck executors", memcheck, *executors),
            watched("memcheck operations", memcheck, *small, **memory),
            watched("racecheck executors", racecheck, *executors),
            watched("racecheck operations", racecheck, *small),
        ],
    ]
    if rehearse:
        stages = [[part for part in stage if part.name != "build"] for stage in stages]
    return stages


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def describe(stages: Sequence[Sequence[Part]], limit: float) -> str:
    lines = [
        f"{PROBE + seconds_of(stages):.0f} s by the ceilings of parts, {limit:.0f} s for all; side by side what is on "
        "one line; a part may take as long again of what those before it left",
        f"{PROBE:4.0f} s  to find a Python that sees the GPU",
    ]
    for stage in stages:
        names = (part.name + (" (not run)" if part.lacks else "") for part in stage)
        lines.append(f"{seconds_of([stage]):4.0f} s  {', '.join(names)}")
    return "\n".join(lines)


def summary(path: Path) -> str:
    """The measurements of the file, a line each; the logs have the whole tables."""
    lines = []
    for row in (json.loads(line) for line in path.read_text().splitlines()):
        if "median_s" in row:
            ratios = "".join(f"  {value['median']:.3g}x {name}" for name, value in (row["speedup"] or {}).items())
            limit = f"{row['fraction_of_limit']:6.1%} of limit"
            tests = "" if row["tests"] == "passed" else f"  (tests: {row['tests'][:100]})"
            lines.append(f"{row['case']}: {row['provider']}  {report.seconds(row['median_s'])}  {limit}{ratios}{tests}")
        elif "suite" in row:
            lines.append(json.dumps({key: value for key, value in row.items() if key != "suite"})[:300])
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 when a part failed, 2 where nothing could be run."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Build, test and measure on a GPU.")
    parser.add_argument("--only", default="", metavar="TEXT", help="the parts whose name matches this expression")
    parser.add_argument("--seconds", type=float, default=LIMIT, metavar="S", help="for all (default: %(default)g)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="(default: bench/results)")
    parser.add_argument("--commit", default="", help="as `git describe --always --dirty` has it, without a clone")
    parser.add_argument("--plan", action="store_true", help="say what would be run, and run nothing")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny, on the CPU; tests are collected, nothing is built"
    )
    begin = time.monotonic()
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    python, facts = Path(sys.executable), {"gpu": "rehearsal", "arch": "none"}
    if not options.rehearse and not options.plan:
        try:
            python, facts = choose(ROOT)
        except RuntimeError as error:
            print(f"make gpu: {error}", file=sys.stderr)
            return 2
    commit = options.commit or environment.revision()["commit"]
    name = f"{slug(facts['gpu'])}-{slug(commit.removesuffix('-dirty'))}{'-part' if options.only else ''}.jsonl"
    folder = options.results or (ROOT / LOGS if options.rehearse else ROOT / "bench/results")
    path = (folder / name).resolve()
    stages = plan(python, facts, path, options.rehearse, options.commit)
    first, wanted = stages[0][0].name, re.compile(options.only)  # the ceilings begin the file
    stages = [[part for part in stage if part.name == first or wanted.search(part.name)] for stage in stages]
    stages = [stage for stage in stages if stage]
    if options.plan:
        print(describe(stages, options.seconds))
        return 0
    print(f"{facts['gpu']}, {python}; rows go to {path.name}, logs to {LOGS}\n{describe(stages, options.seconds)}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # rows of an earlier run, which may be better than what is to come
        path.replace(path.with_name(path.name + ".before"))
    path.touch()

    def on_row(part: Part, row: Row) -> None:
        text = json.dumps(row).replace(str(python), "python").replace(f"{python.parent.parent}/", "")
        with open(path, "a") as file:
            file.write(text.replace(f"{ROOT}/", "") + "\n")  # where the checkout lies is nobody's business
        counts = ", ".join(f"{number} {kind}" for kind, number in row.get("tests", {}).items())
        print(f"{time.strftime('%X')} {row['status']:9} {row['seconds']:6.1f} s  {part.name}  {counts}", flush=True)
        if row["status"] != "passed":
            print("  " + row["error"][-1200:].replace("\n", "\n  "), flush=True)

    done = run(stages, options.seconds - (time.monotonic() - begin), ROOT, ROOT / LOGS, on_row)
    passed = sum(row["status"] == "passed" for row in done)
    print(f"\n{summary(path)}\n\n{path.name}: {passed} of {len(done)} parts passed")
    cut = {part.name for part in stages[-1]}  # by the limit for all: it has what time is left
    bad = [r for r in done if r["status"] == "failed" or (r["status"] == "timed out" and r["part"] not in cut)]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
