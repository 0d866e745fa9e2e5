"""The benchmark harness on invented timings and suites; no test here depends on how fast anything is."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
import types

import pytest

from bench import __main__ as command
from bench.harness import ceilings, environment, gate, measure, memory, report, revisions, rows, run, session, stats
from bench.harness.case import Case, Provider, Work
from fastgen import _memory

CEILINGS = ceilings.Ceilings(
    flops={("avx2", "float32", 1): 50e9, ("avx512", "float32", 1): 100e9, ("avx512", "float32", 2): 200e9},
    bandwidth={("read", 1): 20e9, ("copy", 1): 10e9, ("read", 2): 30e9, ("copy", 2): 40e9},
)


needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (environment.CHECKOUT / ".git").exists(), reason="not a clone, or no git"
)


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def provider(self, seconds):
        """A turn that lets `seconds()` pass per call."""

        def turn(calls):
            each = seconds()
            self.now += each * calls
            return each

        return turn


# --- statistics


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([3.0], 0.5, 3.0),
        ([1, 2], 0.5, 1.5),
        ([5, 1, 3], 0.5, 3),
        (range(11), 0.2, 2),
        (range(11), 0.8, 8),
        ([4, 2], 1, 4),
    ],
)
def test_quantile(values, q, expected):
    assert stats.quantile(list(values), q) == pytest.approx(expected)


def test_quantile_agrees_with_numpy():
    np = pytest.importorskip("numpy")
    values = [random.Random(1).random() for _ in range(37)]
    for q in (0.0, 0.2, 0.33, 0.8, 1.0):
        assert stats.quantile(values, q) == pytest.approx(np.quantile(values, q))


@pytest.mark.parametrize(("values", "q"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
def test_quantile_refuses(values, q):
    with pytest.raises(ValueError, match=r"values is empty|q must be"):
        stats.quantile(values, q)


def test_median_error_covers_the_true_median():
    """The interval holds the true median in at least 93 of 100 trials, whatever the distribution."""
    source = random.Random(7)
    hits = 0
    for _ in range(400):
        values = sorted(source.expovariate(1.0) for _ in range(40))
        reach = 0.98 * math.sqrt(40)
        low, high = values[math.floor(20 - reach)], values[math.ceil(20 + reach) - 1]
        assert stats.median_error(values) == pytest.approx((high - low) / 2 / stats.quantile(values, 0.5))
        hits += low <= math.log(2) <= high
    assert hits >= 0.93 * 400
    assert stats.median_error([1.0] * 5) == math.inf
    assert stats.median_error([2.0] * 6) == 0


def test_paired_speedup_cancels_load():
    """Load that slows both providers of a round alike leaves the ratio alone."""
    load = [1.0, 3.0, 1.0, 7.0, 2.0]
    assert stats.paired_speedup([6 * s for s in load], [2 * s for s in load]) == {"median": 3, "p20": 3, "p80": 3}
    with pytest.raises(ValueError, match="one time per round"):
        stats.paired_speedup([1.0], [1.0, 2.0])


# --- measuring


def test_interleave_on_a_synthetic_clock():
    """Quick providers repeat their call; a noisy one is measured until the budget ends; all have the same rounds."""
    clock, noise = Clock(), random.Random(3)
    turns = {
        "steady": clock.provider(lambda: 0.001),
        "noisy": clock.provider(lambda: 0.02 * (1 + noise.random())),
    }
    times = measure.interleave(turns, budget=2.0, clock=clock)
    assert times["steady"].calls == math.ceil(measure.MIN_TURN_SECONDS / 0.001)
    assert times["noisy"].calls == 1
    rounds = len(times["noisy"].seconds)
    assert rounds == len(times["steady"].seconds)
    assert 2.0 / (0.04 + 0.01) - 1 <= rounds <= 2.0 / (0.02 + 0.01) + 1
    assert stats.quantile(times["steady"].seconds, 0.5) == pytest.approx(0.001)


def test_interleave_stops_when_sure():
    clock = Clock()
    times = measure.interleave({"a": clock.provider(lambda: 0.5), "b": clock.provider(lambda: 1.0)}, 1e9, clock=clock)
    assert len(times["a"].seconds) == 6  # the fewest that bound a median


def test_interleave_runs_some_rounds_whatever_they_take():
    clock = Clock()
    times = measure.interleave({"slow": clock.provider(lambda: 100.0)}, budget=1.0, clock=clock)
    assert len(times["slow"].seconds) == measure.MIN_ROUNDS


def test_interleave_alternates():
    order = []
    clock = Clock()

    def turn(name):
        def run(calls):
            order.append(name)
            clock.now += 1.0
            return 1.0

        return run

    measure.interleave({"a": turn("a"), "b": turn("b")}, budget=1.0, clock=clock)
    assert "".join(order[-6:]) == "abbaab"


def test_peak_memory_sees_the_peak():
    """A call that fills 64 MiB and drops it again; what is allocated before does not count."""
    before = bytearray(b"x") * (32 << 20)
    peak = memory.peak_bytes(lambda: bytearray(b"x") * (64 << 20))
    if peak is None:
        pytest.skip("this system does not tell the peak resident set")
    assert 60 << 20 <= peak <= 80 << 20
    assert len(before) == 32 << 20


def test_peak_memory_sees_the_memory_of_the_pool():
    def fill():
        _memory.zeros(16 << 20).fill_(1)

    fill()
    peak = memory.peak_bytes(fill)
    if peak is None:
        pytest.skip("this system does not tell the peak resident set")
    assert peak >= 60 << 20


# --- ceilings


def test_ceilings_of_this_machine():
    """Plausible numbers only: every loop of every instruction set runs and reports a positive rate."""
    from fastgen import backends

    found = ceilings.measure([1], rounds=1)
    assert {isa for isa, _, _ in found.flops} == set(backends.native_cpu().ceilings.isas())
    assert all(rate > 1e6 for rate in found.flops.values())
    assert all(rate > 1e6 for rate in found.bandwidth.values())
    json.dumps(found.rows())


def test_ceilings_pick_the_best():
    assert CEILINGS.peak_flops("float32", 1) == ("avx512", 100e9)
    assert CEILINGS.peak_bandwidth(1) == 20e9
    assert CEILINGS.peak_bandwidth(2) == 40e9
    with pytest.raises(ValueError, match="no ceiling was measured for float64 on 1 threads"):
        CEILINGS.peak_flops("float64", 1)


@pytest.mark.parametrize(
    ("flops", "traffic", "seconds", "by"),
    [(100e9, 20e9, 1.0, "flops"), (1e9, 20e9, 1.0, "bytes"), (0, 2e9, 0.1, "bytes")],
)
def test_limit_is_the_longer_floor(flops, traffic, seconds, by):
    found = rows.limit(flops, traffic, "float32", 1, CEILINGS)
    assert found["limit_s"] == pytest.approx(seconds)
    assert found["limited_by"] == by


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.flops("pentium", "float32"), "isa must be one of"),
        (lambda c: c.flops("baseline", "int8"), "dtype must be"),
        (lambda c: c.compute("baseline", "bfloat16", 1, 1), "has no bfloat16"),
        (lambda c: c.compute("baseline", "float32", 1, 0), "threads must be at least 1, got 0"),
    ],
)
def test_native_ceilings_refuse(call, message):
    from fastgen import backends

    with pytest.raises(ValueError, match=message):
        call(backends.native_cpu().ceilings)


# --- others on the machine


@pytest.fixture
def processors(monkeypatch):
    """[seconds not idle, seconds in all] of invented processors."""
    state = [100.0, 1000.0]
    monkeypatch.setattr(environment, "_processor_seconds", lambda: tuple(state))
    return state


def test_watch_counts_what_is_not_ours(processors):
    own = [7.0]
    watch = environment.Watch(lambda: own[0])
    processors[:], own[0] = (160.0, 1100.0), 27.0  # of 100 seconds 60 were used, 20 of them by us
    assert watch.others() == 0.4


def test_watch_on_a_system_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(environment, "_processor_seconds", lambda: (0.0, 0.0))
    assert environment.Watch().others() == 0.0


def test_quietest_attempt_wins(monkeypatch):
    monkeypatch.setattr(environment, "wait_until_quiet", lambda patience: None)
    shares = iter([0.5, 0.2, 0.01, 0.0])
    rows_of_it, _ = run.quietest(lambda: ([{"others": next(shares)}], {}))
    assert rows_of_it == [{"others": 0.01}]
    assert next(shares) == 0.0  # quiet enough: no further attempt
    shares = iter([0.5, 0.2, 0.3, 0.4, 0.1])
    assert run.quietest(lambda: ([{"others": next(shares)}], {}))[0] == [{"others": 0.2}]


# --- a suite of one case, run for real


def invented_suite(tests=("tests/bench/conftest.py",)):
    def build():
        providers = {
            "slow": Provider(lambda: sum(range(20000)), baseline=True),
            "fast": Provider(lambda: sum(range(2000)), extra={"workspace_bytes": 5}),
            "guess": Provider(lambda: sum(range(2000)), baseline=True, scale=10.0, note="a tenth, times 10"),
        }
        return Work(providers, flops=2e4, bytes=8.0, skipped={"other": "not installed"})

    case = Case("adding", {"n": [20000]}, build, threads=1)
    return types.SimpleNamespace(TESTS=tests, cases=lambda quick: [case])


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.setitem(sys.modules, "bench.invented", invented_suite())
    monkeypatch.setattr(command, "suites", lambda: ["invented"])
    monkeypatch.setattr(gate, "run_tests", lambda paths, checkout: None)
    monkeypatch.setattr(ceilings, "measure", lambda threads, rounds: CEILINGS)
    return "invented"


def test_rows_of_a_run(suite):
    skipped = {}
    found, failed = run.run_suite(
        suite, quick=True, command="python -m bench invented", on_case=lambda rows, reasons: skipped.update(reasons)
    )
    assert failed == []
    assert [row["provider"] for row in found] == ["slow", "fast", "guess"]
    assert skipped == {"other": "not installed"}
    for row in found:
        rows.check(json.loads(json.dumps(row)))
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["fraction_of_limit"] == pytest.approx(row["limit_s"] / row["median_s"])
        assert row["load_average"] >= 0
        assert 0 <= row["others"] <= 1
    slow, fast, guess = found
    assert set(fast["speedup"]) == {"slow", "guess"}
    assert slow["speedup"] == guess["speedup"] == {}
    assert fast["speedup"]["slow"]["median"] > 2  # ten times the work
    assert guess["scale"] == 10.0


def test_an_estimate_is_scaled():
    """A loop of which one pass was measured: its times and the speed-up over it are those of all passes."""
    times = {"loop": measure.Timing(1, [0.5, 0.5, 0.5]), "fast": measure.Timing(1, [0.25, 0.25, 0.25])}
    providers = {"loop": {"baseline": True, "scale": 64.0}, "fast": {"baseline": False, "scale": 1.0}}
    assert rows.timing(times["loop"], 64.0)["median_s"] == 32.0
    assert rows.speedups("fast", times, providers)["loop"]["median"] == 128.0
    assert rows.speedups("loop", times, providers) == {}


def test_rows_without_tests_carry_no_speedup(suite):
    found, _ = run.run_suite(suite, quick=True, tests=False)
    assert {row["tests"] for row in found} == {"not run"}
    assert all(row["speedup"] is None for row in found)
    assert "no speed-ups" in report.table(found)


def test_a_broken_case_costs_no_other(suite, monkeypatch, capsys):
    module = sys.modules["bench.invented"]
    good = module.cases(True)[0]
    broken = Case("broken", {}, lambda: 1 / 0, threads=1)
    monkeypatch.setattr(module, "cases", lambda quick: [broken, good])
    found, failed = run.run_suite(suite, quick=True)
    assert failed == ["broken"]
    assert {row["case"] for row in found} == {"adding"}
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"), [("median_s", "fast"), ("speedup", 2.0), ("dirty", None), ("invented", 1), ("commit", ...)]
)
def test_row_schema_refuses(suite, field, value):
    row, *_ = run.run_suite(suite, quick=True)[0]
    if value is ...:
        del row[field]
    else:
        row[field] = value
    with pytest.raises(ValueError, match=field):
        rows.check(row)


def test_rows_tell_nothing_about_the_host(suite):
    text = json.dumps(run.run_suite(suite, quick=True)[0])
    assert str(environment.CHECKOUT) not in text
    assert environment.platform.node() not in text or len(environment.platform.node()) < 4


# --- the gate


def write_tests(folder, body):
    (folder / "test_op.py").write_text(body)
    return ("test_op.py",)


def test_gate_passes(tmp_path):
    gate.run_tests(write_tests(tmp_path, "def test_right(): assert 1 + 1 == 2\n"), tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def test_wrong(): assert 1 + 1 == 3\n", "assert"),
        ("", "status 5"),
        ("import no_such_module\n", "no_such_module"),
    ],
    ids=["fails", "empty", "does not import"],
)
def test_gate_refuses(tmp_path, body, message):
    with pytest.raises(gate.TestsFailed, match=message):
        gate.run_tests(write_tests(tmp_path, body), tmp_path)


@pytest.mark.parametrize("paths", [(), ("tests/none_such.py",)])
def test_gate_refuses_missing_tests(tmp_path, paths):
    with pytest.raises(gate.TestsFailed, match="no such tests"):
        gate.run_tests(paths, tmp_path)


def test_failing_tests_stop_the_run(suite, monkeypatch, tmp_path, capsys):
    def fail(paths, checkout):
        raise gate.TestsFailed("1 failed")

    monkeypatch.setattr(gate, "run_tests", fail)
    assert command.main([suite, "--quick", "--results", str(tmp_path)]) == 1
    assert "no benchmark: the tests of invented did not pass" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- reports


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.5 s"), (0.01234, "12.3 ms"), (4.56e-5, "45.6 us"), (7e-9, "7 ns"), (1234.0, "1234 s")]
)
def test_seconds(value, text):
    assert report.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (12, "12 B"), (1.5e6, "1.5 MB"), (2.36e11, "236 GB")])
def test_count(value, text):
    assert report.count(value, "B") == text


def test_command_writes_rows_table_and_plot(suite, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = [suite, "--quick", "--results", str(tmp_path), "--plot"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "invented-quick.png").stat().st_size > 1000
    found = rows.read(tmp_path / "invented-quick.jsonl")
    for text in ("adding: n 20000; 1 thread", "x slow", "guess: a tenth, times 10", "other skipped: not installed"):
        assert text in printed
    assert f"reproduce: python -m bench {' '.join(arguments)}" in printed
    assert report.case_table(found) in printed

    assert command.main([suite, "--quick", "--results", str(tmp_path), "--report"]) == 0
    assert capsys.readouterr().out.strip() == report.table(found)


def test_table_layout():
    """The block of a case, letter by letter."""
    facts = {"baseline": True, "scale": 1.0, "note": "", "extra": {}}
    description = {
        "providers": {"dense": facts, "fastgen": {**facts, "baseline": False, "extra": {"workspace_bytes": 4096}}},
        "flops": 1e9,
        "bytes": 1e6,
    }
    times = {"dense": measure.Timing(1, [0.04, 0.05, 0.06]), "fastgen": measure.Timing(3, [0.02, 0.02, 0.02])}
    common = dict.fromkeys(("suite", "commit", "command", "date"), "")
    common |= {"case": "3x3", "shapes": {"x": [2, 8], "n": 3}, "dtype": "float32", "threads": 1, "tests": "passed"}
    common |= {"machine": {}, "versions": {}, "dirty": False, "load_average": 0.5, "others": 0.02}
    found = rows.make(common, description, times, {"dense": 2 << 20, "fastgen": None}, CEILINGS)
    assert report.case_table(found).splitlines() == [
        "3x3: x 2x8, n 3; 1 thread, float32; 1 GFLOP, 1 MB; limit 10 ms (flops); others 2%",
        "  provider   best  median    p20    p80  FLOP/s  of limit  memory        x dense",
        "  dense     40 ms   50 ms  44 ms  56 ms    20 G     20.0%  2.1 MB",
        "  fastgen   20 ms   20 ms  20 ms  20 ms    50 G     50.0%       -  2.5 (2.2-2.8)",
        "  fastgen: workspace_bytes 4096",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "none"], "no case of invented has 'none' in its name"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--seconds", "-1"], "--seconds must be positive, got -1"),
        (["--report", "--name", "none"], "none.jsonl"),
        pytest.param(["--base", "no-such-revision"], "no-such-revision", marks=needs_git),
    ],
)
def test_bad_usage_is_one_line(suite, tmp_path, capsys, arguments, message):
    assert command.main([suite, "--quick", "--results", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_write_leaves_no_partial_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.write(path, [{"a": 1}])
    with pytest.raises(TypeError):
        rows.write(path, [{"a": 2}, {"a": object()}])
    assert rows.read(path) == [{"a": 1}]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


# --- revisions


def test_remote_session_answers_from_another_process():
    """The protocol, and that errors of the child arrive here."""
    remote = session.RemoteSession("masked_conv2d", True, environment.CHECKOUT)
    try:
        with pytest.raises(RuntimeError, match="before a case was prepared"):
            remote.turn("fastgen", 1)
        with pytest.raises(RuntimeError, match="KeyError"):
            remote.prepare("no such case", 1)
    finally:
        remote.close()


def test_a_checkout_without_git_is_marked(tmp_path):
    assert environment.revision(tmp_path) == {"commit": "unknown", "dirty": True}


def test_merge_takes_only_fastgen_from_the_base():
    base = revisions.Revision("main", "0123456789ab")
    facts = {"baseline": False, "scale": 1.0, "note": "", "extra": {}}
    description = {"providers": {"torch": {**facts, "baseline": True}, "fastgen": facts}, "flops": 1, "bytes": 1}
    merged, where = run.merge({"": description, base.label: description}, base)
    assert list(merged["providers"]) == ["torch", "fastgen", "fastgen @ main (0123456789ab)"]
    row = merged["providers"]["fastgen @ main (0123456789ab)"]
    assert row["baseline"]
    assert row["revision"] == {"commit": "0123456789ab", "dirty": False}
    assert where["fastgen @ main (0123456789ab)"] == (base.label, "fastgen")


@needs_git
def test_worktree_is_removed(tmp_path, monkeypatch):
    """A worktree of a repository of its own; building is not what is tested."""

    def git(*arguments):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    (tmp_path / "file").write_text("two")
    real = environment.git
    monkeypatch.setattr(revisions, "git", lambda *arguments, **options: real(*arguments, cwd=tmp_path))
    monkeypatch.setattr(revisions, "build", lambda root: None)
    with revisions.worktree("HEAD") as root:
        assert (root / "file").read_text() == "one"
    assert not root.exists()
    assert str(root) not in real("worktree", "list", cwd=tmp_path)
