"""`make gpu` without a GPU: what it plans, what becomes of parts that fail or hang, and its suites tiny on the CPU."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import cases, progress, samplers, suites
from bench.gpu.python import choose, probe
from bench.gpu.runner import Part, run, seconds_of
from bench.harness import rows

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(command.ROOT)}
FACTS = {"gpu": "NVIDIA H200", "arch": "90", "torch": "2.6"}


def python(name: str, code: str, ceiling: float = 20, *needs: str) -> Part:
    return Part(name, [sys.executable, "-c", code], ceiling, needs)


def test_every_part_leaves_a_row(tmp_path):
    stages = [
        [
            python("good", "print('== 3 passed, 1 skipped in 0.5s ==')"),
            python("bad", "print('why'); raise SystemExit(3)"),
            python("hangs", "import time; print('begun', flush=True); time.sleep(60)", 0.8),
            Part("absent", ["no-such-program"], 5),
        ],
        [python("proven", "import sys; print(sys.argv[1:]); 1/0", 20, "good")],
        [python("unproven", "import sys; print(sys.argv[1:]); 1/0", 20, "good", "bad")],
    ]
    found, start = {}, time.monotonic()
    run(stages, 30, tmp_path, tmp_path / "logs", lambda part, row: found.update({part.name: row}))
    assert time.monotonic() - start < 25
    assert {name: row["status"] for name, row in found.items()} == {
        "good": "passed",
        "bad": "failed",
        "hangs": "timed out",
        "absent": "not run",
        "proven": "failed",
        "unproven": "failed",
    }
    assert found["good"]["tests"] == {"passed": 3, "skipped": 1}
    assert found["bad"]["error"] == "why\nexit status 3"
    assert found["hangs"]["error"].startswith("begun")
    assert "no-such-program" in found["absent"]["error"]
    assert found["proven"]["error"].startswith("[]")
    assert found["unproven"]["error"].startswith("['--tests', 'bad: failed']")


def test_a_measurement_knows_which_of_its_tests_failed(tmp_path):
    """Those that failed take no ratios from it as long as others passed, whatever ended the part."""
    (tmp_path / "test_some.py").write_text(
        "import os, pytest, time\n"
        "@pytest.mark.parametrize('i', ['one', 'the other'])\n"
        "def test_good(i): pass\n"
        "@pytest.mark.parametrize('i', ['one', 'the other'])\n"
        "def test_bad(i): print('FAILED elsewhere.py::test - by whom?'); assert False, 'too far'\n"
        "def test_dies(): os._exit(3)\n"
        "def test_hangs(): time.sleep(60)\n"
    )
    pytest_v = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "test_some.py"]
    chosen = {"fails": "good or bad", "dies": "good or dies", "hangs": "good or hangs", "all": "bad", "none": "dies"}
    tests = [Part(name, [*pytest_v, "-k", text], 8 if name == "hangs" else 60) for name, text in chosen.items()]
    needs = {name: (name,) for name in chosen} | {"several": ("fails", "dies"), "absent": ("fails", "no such part")}
    suites = [python(f"suite {name}", "import sys; print(sys.argv[1:]); 1/0", 20, *of) for name, of in needs.items()]
    found = {row["part"]: row for row in run([tests, suites], 90, tmp_path, tmp_path / "logs")}
    assert found["fails"]["tests"] == {"passed": 2, "failed": 2, "deselected": 2}
    assert found["fails"]["failures"] == [
        f"test_some.py::test_bad[{i}] - AssertionError: too far" for i in ("one", "the other")
    ]
    assert found["dies"]["tests"] == {"passed": 2} and found["hangs"]["status"] == "timed out"
    fails = "fails: failed, 2 failed, 2 passed, 2 deselected (test_bad[one], test_bad[the other])"
    expected = {
        "fails": ["--tests", fails],
        "dies": ["--tests", "dies: failed, 2 passed"],
        "hangs": ["--tests", "hangs: timed out, 2 passed, 3 deselected"],
        "all": ["--no-tests"],
        "none": ["--no-tests"],
        "several": ["--tests", f"{fails}; dies: failed, 2 passed"],
        "absent": ["--no-tests"],
    }
    assert {name: found[f"suite {name}"]["command"][3:] for name in needs} == expected


def test_time_that_is_left_goes_to_whoever_needs_it(tmp_path):
    """As long again as its own ceiling at most; what cannot run needs none, the last stage has all that is left."""
    stages = [
        [python("quick", "", 20)],
        [Part("lacking", ["no-such-program"], 30, lacks="no such thing")],
        [python("second", "", 12), python("beside", "", 1)],
        [python("last", "", 5)],
    ]
    rows = {row["part"]: row for row in run(stages, 40, tmp_path, tmp_path)}
    assert rows["lacking"]["status"] == "not run" and rows["lacking"]["error"] == "no such thing"
    assert rows["quick"]["ceiling_s"] == pytest.approx(23, abs=0.2)
    took = sum(row["seconds"] for name, row in rows.items() if name != "beside")
    assert rows["second"]["ceiling_s"] == 24 and rows["beside"]["ceiling_s"] == 2
    assert 40 - took - 1 <= rows["last"]["ceiling_s"] < 40


def test_ctrl_c_is_not_heeded(tmp_path, monkeypatch):
    """Then the part is ended at once; what comes after has no time left."""
    monkeypatch.setattr("bench.gpu.runner.GRACE_SECONDS", 0.5)
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    found = run([[python("deaf", deaf)], [python("late", "")]], 1.5, tmp_path, tmp_path)
    assert [row["status"] for row in found] == ["timed out", "not run"]
    assert found[0]["seconds"] < 10


BEGINS, ENDS = "========= COMPUTE-SANITIZER\n", "\n========= ERROR SUMMARY: 2 errors"
UNSUPPORTED = 'Error: Device not supported. Please refer to the "Supported Devices" section of the documentation'
FINDING = "========= Invalid __global__ read of size 4 bytes\n=========     at kernel+0x10\n"
RACE = "========= Error: Race reported between Write access at kernel+0x10 which is not supported\n"
COMPLAINTS = {
    "device": f"========= {UNSUPPORTED}\n",
    "debugger": "========= Error: Failed to initialize the debugger interface\n=========\n",
    "injection": "========= Error: Target application terminated before first instrumented API call\n"
    "========= Tracking kernels launched by child processes requires the --target-processes all option.\n",
    "in a line": f"tests/test_x.py::test_x ========= {UNSUPPORTED}\nPASSED [ 50%]\n",
}


@pytest.mark.parametrize("complaint", COMPLAINTS)
@pytest.mark.parametrize("tests", ["4 passed", "4 failed, 1 skipped", ""])
def test_a_sanitizer_that_cannot_work_is_no_failure(complaint, tests, stages, tmp_path):
    """Its part is not run, with the reason; tests that fail with it on a GPU that works do count."""
    said = BEGINS + COMPLAINTS[complaint] + (f"==== {tests} in 0.5s ====" if tests else "") + ENDS
    row = watched_row(stages, said, 1, tmp_path)
    assert row["status"] == "not run" and row["error"].startswith("compute-sanitizer cannot work here: Error: ")
    assert COMPLAINTS[complaint].partition("========= ")[2].splitlines()[0] in row["error"]
    assert watched_row(stages, said, 0, tmp_path)["status"] == "not run"
    for bad in (said + "\n" + FINDING, said + "\n" + RACE, said + "\n==== 1 failed, 4 passed in 0.5s ===="):
        assert watched_row(stages, bad, 1, tmp_path)["status"] == "failed"


@pytest.mark.parametrize("said", [FINDING, RACE, "", "======= 1 failed, device not supported ======="])
def test_what_a_sanitizer_finds_is_a_failure(said, stages, tmp_path):
    assert watched_row(stages, BEGINS + said + ENDS, 1, tmp_path)["status"] == "failed"
    assert watched_row(stages, BEGINS + ENDS, 0, tmp_path)["status"] == "passed"


def test_a_sanitizer_that_does_not_load(stages, tmp_path):
    said = "compute-sanitizer: error while loading shared libraries: libX.so: cannot open shared object file"
    assert watched_row(stages, said, 127, tmp_path)["error"] == said


def watched_row(stages: list[list[Part]], said: str, status: int, folder: Path) -> dict:
    """Of the first part with compute-sanitizer, which says this."""
    (part,) = (part for part in stages[-1] if part.name == "memcheck executors")
    code = f"print({said!r}); raise SystemExit({status})"
    (row,) = run([[replace(part, command=[sys.executable, "-c", code])]], 20, folder, folder)
    return row


@pytest.fixture
def stages() -> list[list[Part]]:
    return command.plan(Path("python"), FACTS, Path("results.jsonl"), False, "")


def test_it_fits_into_ten_minutes(stages):
    assert command.PROBE + seconds_of(stages) <= command.LIMIT < 600
    parts = [part for stage in stages for part in stage]
    assert len({part.name for part in parts}) == len(parts)
    done: set[str] = set()
    for stage in stages:
        assert all(set(part.needs) <= done for part in stage)
        done |= {part.name for part in stage}


def test_every_test_of_kernels_and_of_gpus_is_run(stages):
    """And those for which each file is the only one, by what pytest collects; the others are no business of a GPU."""
    tests = {part.name: part.command for stage in stages for part in stage if "-k" not in part.command}
    tests = {name: words for name, words in tests.items() if words[-1].startswith("tests/")}
    assert all("--require-gpu" in words for words in tests.values())
    whole = {words[-1] for words in tests.values() if "-m" not in words[3:]}
    kernels = {str(path.relative_to(command.ROOT)) for path in (command.ROOT / "tests/kernels").glob("test_*.py")}
    assert whole == kernels - set(command.NO_GPU)
    chosen = {words[-1] for words in tests.values() if words[3:].count("-m")}
    root = command.ROOT / "tests"
    marked = {str(path.relative_to(command.ROOT)) for path in root.rglob("test_*.py") if "mark.gpu" in path.read_text()}
    assert chosen == marked - kernels - {str(Path(__file__).relative_to(command.ROOT))}
    for file in whole:
        shares = [
            words[words.index("--share") + 1] for words in tests.values() if words[-1] == file and "--share" in words
        ]
        assert shares == [f"{i + 1}/{len(shares)}" for i in range(len(shares))]


def test_shares_are_all_tests(tmp_path, pytestconfig):
    """Of the option --share, in their order."""
    (tmp_path / "test_five.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(5))\ndef test(i): pass\n"
    )
    options = ["-q", "--collect-only", "-c", str(pytestconfig.inipath), "--rootdir", str(tmp_path)]
    found = []
    for share in ("1/3", "2/3", "3/3"):
        words = [sys.executable, "-m", "pytest", *options, "-p", "tests.conftest", "--share", share, "test_five.py"]
        done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        found.append([line for line in done.stdout.splitlines() if "::" in line])
    assert [len(part) for part in found] == [1, 2, 2]
    assert [line[-2] for part in found for line in part] == list("01234")


def test_without_nvcc_what_needs_it_is_not_run(monkeypatch, capsys):
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(command, "find", lambda program: None)
    stages = command.plan(Path("python"), FACTS, Path("results.jsonl"), False, "")
    lacking = {part.name for stage in stages for part in stage if part.lacks}
    assert lacking == {command.CUDA_EXECUTOR, "bench sampling-cuda"}
    assert command.main(["--plan"]) == 0
    assert "bench sampling-cuda (not run)" in capsys.readouterr().out


@pytest.mark.parametrize("fails", [False, True])
def test_the_build_falls_back(stages, fails, tmp_path):
    """To one without the CUDA module, where an attempt with it failed."""
    (build,) = (part for stage in stages for part in stage if part.name == "build")
    code = f"import os; print(os.environ['FASTGEN_CUDA']); exit({fails} and os.environ['FASTGEN_CUDA'] != '0')"
    shell = [*build.command[: build.command.index("build") + 1], sys.executable, "-c", code]
    (row,) = run([[Part("build", shell, 20, environment=build.environment)]], 20, tmp_path, tmp_path)
    assert row["status"] == "passed"
    assert (tmp_path / "build.log").read_text().split() == ["auto", "0"][: 1 + fails]


def test_the_clock_starts_before_a_python_is_looked_for(tmp_path, monkeypatch, capsys):
    seconds = []

    def slow(root: Path) -> tuple[Path, dict]:
        time.sleep(0.3)
        return Path(sys.executable), FACTS

    monkeypatch.setattr(command, "choose", slow)
    monkeypatch.setattr(command, "run", lambda stages, limit, *_: seconds.append(limit) or [])
    assert command.main(["--seconds", "50", "--results", str(tmp_path)]) == 0
    assert 40 < seconds[0] < 49.8


def test_the_interpreter(tmp_path):
    own, environment = Path(sys.executable), tmp_path / ".venv/bin/python"
    assert choose(tmp_path, lambda path: FACTS) == (own, FACTS)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/test.stamp").touch()
    assert choose(tmp_path, lambda path: FACTS) == (environment, FACTS)
    assert choose(tmp_path, lambda path: "blind" if path == environment else FACTS) == (own, FACTS)
    with pytest.raises(RuntimeError, match=r"\.venv: blind\n.*: blind"):
        choose(tmp_path, lambda path: "blind")


def test_the_plan_is_said(capsys):
    assert command.main(["--plan", "--rehearse", "--only", "^bench gen"]) == 0
    assert "bench generator compiled" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(command, "choose", lambda root: choose(root, lambda path: "torch sees no GPU"))
    assert command.main([]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def measured(path: Path, *arguments: str, status: int = 0) -> list[dict]:
    threads = torch.get_num_threads()
    try:
        assert suites.main([*arguments, "--rehearse", "--results", str(path), "--commit", "abc-dirty"]) == status
    finally:
        torch.set_num_threads(threads)
    return rows.read(path)


@pytest.mark.parametrize("compile", [False, True])
def test_suites_on_the_cpu(compile, tmp_path, capsys):
    names = [name for name in suites.SUITES if not name.startswith("sampling")]
    first, *found = measured(tmp_path / "rows", "ceilings", *names, *["--compile"] * compile)
    assert first["environment"]["commit"] == "abc" and first["environment"]["dirty"]
    assert first["copy_gbs"] > 0 and set(first["matrix_tflops"]) == {"float32", "tf32", "bfloat16", "float16"}
    assert {row["suite"] for row in found} == set(names)
    for row in found:
        rows.check(row)
        assert (row["provider"] == "fastgen") == bool(row["speedup"])
    assert ("compile" in {row["provider"] for row in found}) == compile
    assert "DCGAN-64" in command.summary(tmp_path / "rows")


def test_sampling_on_the_cpu(tmp_path, capsys):
    found = measured(tmp_path / "rows", "ceilings", "sampling-cpu", "sampling-codes-cpu", "sampling-cuda")
    checks = [row["check"] for row in found if "check" in row]
    assert [(check["backend"], check["precision"]) for check in checks] == [("cpu", "fp32"), ("cpu", "bf16")] * 2
    assert all(check["ok"] and check["images_equal_to_cpu"] == samplers.CHECKED_IMAGES for check in checks)
    for variant in samplers.VARIANTS:
        measurements = [row for row in found if row.get("provider") == f"fastgen cpu{variant}" and "median_s" in row]
        assert len(measurements) == 4
    assert {"naive", "forward", "cached"} <= {row.get("provider") for row in found}
    unavailable = [row for row in found if "unavailable" in row]
    assert {row["provider"] for row in unavailable} == {f"fastgen cuda{variant}" for variant in samplers.VARIANTS}
    assert all("cuda" in row["unavailable"] for row in unavailable)


@pytest.mark.parametrize("fails_at", [1, 4], ids=["first", "later"])
@pytest.mark.parametrize("provider", ["fused", "formulas"])
def test_a_provider_that_fails_takes_no_other_with_it(provider, fails_at, tmp_path, monkeypatch, capsys):
    """Not even one that fails once it is timed. It counts if it is fastgen's, and not if it is a peer."""
    function, calls = getattr(cases.reparameterize, provider), []

    def broken(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) >= fails_at:
            raise MemoryError("too much")
        return function(*arguments)

    monkeypatch.setattr(cases.reparameterize, provider, broken)
    ours = provider == "fused"
    found = measured(tmp_path / "rows", "ceilings", "reparameterize", status=int(ours))
    name, kind = ("fastgen", "error") if ours else ("eager", "unavailable")
    assert [(row["provider"], row[kind]) for row in found if kind in row] == [(name, "MemoryError: too much")] * 4
    measurements = [row for row in found if "median_s" in row]
    assert {row["provider"] for row in measurements} == {"eager", "fastgen"} - {name} and len(measurements) == 4


def test_a_sampler_that_fails_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastgen.Sampler.sample", lambda *_: 1 / 0)
    found = measured(tmp_path / "rows", "ceilings", "sampling-codes-cpu", status=1)
    errors = {row["provider"]: row["error"] for row in found if "provider" in row and "error" in row}
    assert errors == {f"fastgen cpu{variant}": "ZeroDivisionError: division by zero" for variant in samplers.VARIANTS}
    assert {row["provider"] for row in found if "median_s" in row} == {"naive", "cached"}


@pytest.mark.parametrize("told", ["passed", "test_x failed", None])
def test_rows_say_which_tests_failed(told, tmp_path, capsys):
    """And carry ratios all the same, unless none was run."""
    arguments = ["--no-tests"] if told is None else ["--tests", told]
    _, *found = measured(tmp_path / "rows", "ceilings", "reparameterize", *arguments)
    assert {row["tests"] for row in found} == {told or "not run"}
    assert all((row["speedup"] is None) == (told is None) for row in found)
    assert ("test_x failed" in command.summary(tmp_path / "rows")) == (told == "test_x failed")


# Ends two processes: as a crash in the second and third case, and after the first two as an error that the GPU keeps.
ENDED = """
import os, sys
from bench.gpu import progress, suites
ends, before = sys.argv.pop(1), sys.argv.count("--done")
count = before
def check_alive(device):
    if ends == "lost" and before < 2:
        raise SystemExit(progress.GPU_LOST)
def measure_case(case, *arguments, measure=suites.measure_case):
    global count
    count += 1
    if ends == "dies" and count in (2, 3):
        os.abort()
    return measure(case, *arguments)
suites.check_alive, suites.measure_case = check_alive, measure_case
raise SystemExit(suites.main())
"""


@pytest.mark.parametrize("ends", ["dies", "lost"])
def test_what_a_process_leaves_is_measured_by_another(ends, stages, tmp_path, capsys):
    """Without what ended it, of which there is a row all the same; the part has failed."""
    part = next(part for stage in stages for part in stage if part.name == "bench reparameterize")
    path = tmp_path / "rows"
    words = ["ceilings", "reparameterize", "gated_unit", "--rehearse", "--results", str(path)]
    again = replace(part, command=[sys.executable, "-c", ENDED, ends, *words], ceiling=60, environment=ENVIRONMENT)
    (row,) = run([[replace(again, needs=())]], 60, tmp_path, tmp_path)
    died = -signal.SIGABRT
    status = died if ends == "dies" else progress.GPU_LOST
    assert row["status"] == "failed" and row["error"].endswith(f"exit status {status}, then {status}, then 0")
    found, whole = rows.read(path), measured(tmp_path / "whole", "ceilings", "reparameterize", "gated_unit")
    names = list(dict.fromkeys(row["case"] for row in whole[1:]))
    assert list(dict.fromkeys(row["case"] for row in found[1:])) == names
    errors = {row["case"]: row["error"] for row in found if "error" in row}
    assert errors == dict.fromkeys(names[1:3] if ends == "dies" else [], f"its process was ended by signal {-died}")
    assert len(found) == len(whole) - sum(row["case"] in errors for row in whole[1:]) + len(errors)


def test_a_process_that_began_nothing_leaves_nothing(tmp_path):
    (row,) = run([[replace(python("dies", "import os; os.abort()"), rest=progress.rest)]], 20, tmp_path, tmp_path)
    assert row["status"] == "failed" and row["error"] == f"exit status {-signal.SIGABRT}"
    assert progress.rest("12:00:00 begins a: b, c\n", 1) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_python_without_a_gpu_says_why() -> None:
    assert re.fullmatch(r"torch \S+ sees no GPU: \S.*", str(probe(Path(sys.executable))))
