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
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.gpu.python import Facts, choose
from bench.gpu.runner import Part, Row, run, seconds_of
from bench.harness import environment, report

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 580.0  # seconds for all; ten minutes with the time that it takes to end what is too slow
LOGS = Path("build/gpu")
COMPILED = "tests/kernels/test_compiled.py"  # needs no GPU
# The small cases for compute-sanitizer: forward and backward kernels of every operation, and no CUDA graphs.
SMALL = (
    "known_answers or test_layouts or weight_gradient_is_split or memory_layouts or only_the_gradients or "
    "(test_gradients and both)"
)
SPLIT = ("sampling", "acceleration")  # folders whose tests take longest: a part for each file


def kernel_tests() -> list[str]:
    """The files whose tests run on a GPU where there is one."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/kernels").glob("test_*.py"))
    return [file for file in files if file != COMPILED]


def other_tests() -> list[list[str]]:
    """All the others, in groups of about the same time."""
    folders = sorted(path.parent for path in (ROOT / "tests").glob("*/test_*.py"))
    groups = []
    for folder in dict.fromkeys(folders):
        files = sorted(str(path.relative_to(ROOT)) for path in folder.glob("test_*.py"))
        files = [file for file in files if file not in kernel_tests()]
        groups += [[file] for file in files] if folder.name in SPLIT else [files]
    return [*groups, sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))]


def find(program: str) -> str | None:
    """A program of the CUDA toolkit."""
    return shutil.which(program) or shutil.which(program, path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


def plan(python: Path, facts: Facts, results: Path, rehearse: bool, commit: str) -> list[list[Part]]:
    """What is to be run: stages, one after the other, of parts that run side by side."""
    unbuffered = {"PYTHONUNBUFFERED": "1"}  # what was printed before a part is ended is kept
    count = ["--collect-only", "-q"] if rehearse else ["-v", "--tb=short", "-o", "faulthandler_timeout=40"]
    gpu = [] if rehearse else ["--require-gpu"]
    sanitizer = find("compute-sanitizer") or "compute-sanitizer"
    memcheck, racecheck = ["--tool=memcheck", "--report-api-errors=no"], ["--tool=racecheck"]

    def tests(name: str, seconds: float, *arguments: str) -> Part:
        return Part(name, [str(python), "-m", "pytest", *count, *arguments], seconds, environment=unbuffered)

    def watched(name: str, tool: Sequence[str], *arguments: str, **variables: str) -> Part:
        command = [] if rehearse else [sanitizer, "--error-exitcode=1", *tool]
        command += [str(python), "-m", "pytest", *count, *gpu, *arguments]
        return Part(name, command, 70, environment={**unbuffered, **variables})

    def suite(seconds: float, *names: str, needs: Iterable[str] = (), compile: bool = False) -> Part:
        options = ["--results", str(results), *(["--commit", commit] if commit else [])]
        options += ["--compile"] * compile + ["--rehearse"] * rehearse
        command = [str(python), "-m", "bench.gpu.suites", *names, *options]
        name = f"bench {' '.join(names)}{' compiled' * compile}"
        return Part(name, command, seconds, [] if rehearse else [*needs], unbuffered)

    build = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation", "--no-deps"]
    archs = os.environ.get("FASTGEN_CUDA_ARCHS", facts["arch"])
    proofs = {
        "generator": "tests/kernels/test_conv_transpose2d_bn_act.py",
        "reparameterize": "tests/kernels/test_reparameterize.py",
        "logistic_mixture_nll": "tests/kernels/test_logistic_mixture_nll.py",
        "masked_conv2d": "tests/kernels/test_masked_conv2d.py",
    }
    memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor an allocation whose ends are watched
    small = [*kernel_tests(), "-k", SMALL]
    executors = ["tests/sampling", "-m", "gpu", "-k", "executors and gated"]
    stages = [
        [suite(15, "ceilings")],
        [Part("build", [*build, "-e", "."], 65, environment={"FASTGEN_CUDA": "1", "FASTGEN_CUDA_ARCHS": archs})],
        [
            tests("gpu tests of sampling", 80, *gpu, "-m", "gpu", "tests/sampling"),
            tests(
                "other gpu tests", 80, *gpu, "-m", "gpu", "tests", "--ignore=tests/kernels", "--ignore=tests/sampling"
            ),
            *(tests(file, 90, *gpu, file) for file in kernel_tests()),
        ],
        [suite(65, "sampling-cuda", needs=["gpu tests of sampling"])],
        [suite(65, "sampling-triton", needs=["gpu tests of sampling"])],
        [suite(40, "sampling-codes-triton", needs=["gpu tests of sampling"])],
        # A generator has many tiles to compile and to time.
        *([suite(35 if name == "generator" else 20, name, needs=[proof])] for name, proof in proofs.items()),
        [suite(40, "generator", needs=[proofs["generator"]], compile=True)],
        [suite(35, *list(proofs)[1:], needs=proofs.values(), compile=True)],
        [
            watched("memcheck executors", memcheck, *executors),
            watched("memcheck operations", memcheck, *small, **memory),
            watched("racecheck executors", racecheck, *executors),
            watched("racecheck operations", racecheck, *small),
            *(
                tests(group[0] if len(group) == 1 else str(Path(group[0]).parent), 70, *group)
                for group in other_tests()
            ),
        ],
    ]
    if rehearse:
        stages = [stage for stage in stages if stage[0].name != "build"]
    return stages


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def describe(stages: Sequence[Sequence[Part]], limit: float) -> str:
    lines = [f"{seconds_of(stages):.0f} s at most, {limit:.0f} s for all; parts beside each other on one line"]
    for stage in stages:
        lines.append(f"{max(part.ceiling for part in stage):4.0f} s  {', '.join(part.name for part in stage)}")
    return "\n".join(lines)


def summary(path: Path) -> str:
    """The measurements of the file, a line each; the logs have the whole tables."""
    lines = []
    for row in (json.loads(line) for line in path.read_text().splitlines()):
        if "median_s" in row:
            ratios = "".join(f"  {value['median']:.3g}x {name}" for name, value in (row["speedup"] or {}).items())
            limit = f"{row['fraction_of_limit']:6.1%} of limit"
            lines.append(f"{row['case']}: {row['provider']}  {report.seconds(row['median_s'])}  {limit}{ratios}")
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
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    python, facts = Path(sys.executable), {"gpu": "rehearsal", "arch": "none"}
    if not options.rehearse:
        try:
            if not os.environ.get("NVCC") and find("nvcc") is None:
                raise RuntimeError("no nvcc on PATH, in $CUDA_HOME or in /usr/local/cuda")
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
    print(f"{facts['gpu']}, {python}; rows go to {path.name}, logs to {LOGS}\n{describe(stages, options.seconds)}\n")
    if options.plan:
        return 0
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

    done = run(stages, options.seconds, ROOT, ROOT / LOGS, on_row)
    passed = sum(row["status"] == "passed" for row in done)
    print(f"\n{summary(path)}\n\n{path.name}: {passed} of {len(done)} parts passed")
    cut = {part.name for part in stages[-1]}  # by the limit for all: it has what time is left
    bad = [r for r in done if r["status"] == "failed" or (r["status"] == "timed out" and r["part"] not in cut)]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
