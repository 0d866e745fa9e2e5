"""Choosing a backend: by device, by reason, by force; and saying why."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import types
from contextvars import copy_context

import pytest
import torch

import fastgen
from fastgen import backends

CPU = torch.zeros(1)
META = torch.zeros(1, device="meta")  # stands for any device without a backend of its own


def only_float32(x: torch.Tensor, scale: float = 1.0) -> str | None:
    return None if x.dtype == torch.float32 else f"dtype {x.dtype}"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> dict:
    """An operation "toy" whose implementations are their own names; every backend counts as installed."""
    monkeypatch.setattr(backends, "_registry", {})
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.setattr(backends, "_environment", lambda: "auto")
    unavailable: dict[str, str] = {}
    monkeypatch.setattr(backends, "unavailable", unavailable.get)
    backends.register("toy", "reference", "reference")
    backends.register("toy", "cuda", "cuda")
    backends.register("toy", "cpu", "cpu", why_not=only_float32)
    return unavailable


def test_native_modules_are_built():
    assert backends.native_cpu().version == fastgen.__version__
    assert backends.import_error("_cpu") is None


def test_automatic_takes_the_best_for_the_device(toy):
    assert backends.select("toy", CPU) == "cpu"
    assert backends.select("toy", META) == "reference"
    assert backends.select("toy", scale=2.0, x=CPU.double()) == "reference"


def test_cuda_comes_before_triton_on_a_gpu(toy, monkeypatch):
    monkeypatch.setattr(backends, "_device_type", lambda args, kwargs: "cuda")
    backends.register("toy", "triton", "triton")
    assert backends.select("toy", CPU) == "cuda"
    toy["cuda"] = "not built"
    assert backends.select("toy", CPU) == "triton"


def test_falling_back_is_logged_once_per_reason(toy, caplog):
    for _ in range(3):
        assert backends.select("toy", CPU.double()) == "reference"
    assert [record.message for record in caplog.records] == ["toy does without the cpu backend: dtype torch.float64"]
    backends.select("toy", CPU.half())
    assert len(caplog.records) == 2
    assert all(record.name == "fastgen" and record.levelno == logging.WARNING for record in caplog.records)


def test_another_device_is_no_reason_to_log(toy, caplog):
    assert backends.select("toy", CPU) == "cpu"
    assert backends.select("toy", META) == "reference"
    assert not caplog.records


def test_a_missing_module_is_logged_and_reported(toy, caplog):
    toy["cpu"] = "fastgen._cpu is not built"
    assert backends.select("toy", CPU) == "reference"
    assert "fastgen._cpu is not built" in caplog.text
    assert backends.reasons("toy", CPU) == {
        "cuda": "it takes cuda tensors, got one on cpu",
        "triton": "toy has no triton implementation",
        "cpu": "fastgen._cpu is not built",
        "reference": None,
    }


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("cuda", CPU, "it takes cuda tensors, got one on cpu"),
        ("triton", CPU, "toy has no triton implementation"),
        ("cpu", CPU.double(), "dtype torch.float64"),
        ("cpu", META, "it takes cpu tensors, got one on meta"),
    ],
    ids=["device", "missing", "why_not", "cpu on meta"],
)
def test_forced_and_impossible_says_why(toy, name, tensor, reason):
    with fastgen.backend(name), pytest.raises(RuntimeError, match=f"toy: the backend '{name}' .*{reason}"):
        backends.select("toy", tensor)


def test_forced_blocks_nest_and_end(toy):
    with fastgen.backend("reference"):
        assert backends.select("toy", CPU) == "reference"
        with fastgen.backend("auto"):
            assert backends.select("toy", CPU) == "cpu"
        assert backends.select("toy", CPU) == "reference"
    with pytest.raises(KeyError), fastgen.backend("reference"):
        raise KeyError
    assert backends.select("toy", CPU) == "cpu"


def test_forcing_concerns_this_thread_and_context_only(toy):
    seen = []
    with fastgen.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.select("toy", CPU)))
        thread.start()
        thread.join()
        inherited = copy_context()
    assert seen == ["cpu"]
    assert inherited.run(backends.select, "toy", CPU) == "reference"


def test_the_block_outranks_the_environment(toy, monkeypatch):
    monkeypatch.setattr(backends, "_environment", lambda: "reference")
    assert backends.select("toy", CPU) == "reference"
    with fastgen.backend("auto"):
        assert backends.select("toy", CPU) == "cpu"


def test_triton_on_the_cpu_only_forced_and_interpreted(toy, monkeypatch):
    backends.register("toy", "triton", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.select("toy", CPU) == "cpu"
    with fastgen.backend("triton"):
        assert backends.select("toy", CPU) == "triton"
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(RuntimeError, match="it takes cuda tensors"):
            backends.select("toy", CPU)


def test_operations_lists_backends_by_preference(toy):
    assert backends.operations() == {"toy": ["cuda", "cpu", "reference"]}


def test_no_backend_left_lists_all_reasons(toy):
    backends.register("lonely", "cpu", "cpu", why_not=only_float32)
    with pytest.raises(RuntimeError, match=r"lonely: no backend can be used: .*dtype torch\.float64"):
        backends.select("lonely", CPU.double())


@pytest.mark.parametrize("name", ["", "gpu", "CPU", None])
def test_unknown_names_are_refused(toy, name):
    with pytest.raises(ValueError, match="backend must be one of"), fastgen.backend(name):
        pass
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.register("toy", name, "function")
    with pytest.raises(ValueError, match="op must be one of toy; got 'tog'"):
        backends.select("tog", CPU)


@pytest.mark.parametrize(
    ("value", "outcome"),
    [("reference", "reference"), ("", "auto"), ("fast", "ValueError FASTGEN_BACKEND must be one of")],
)
def test_environment_variable(value, outcome, monkeypatch):
    monkeypatch.setenv("FASTGEN_BACKEND", value)
    backends._environment.cache_clear()
    try:
        found = backends._environment()
    except ValueError as error:
        found = f"ValueError {error}"
    finally:
        monkeypatch.delenv("FASTGEN_BACKEND")
        backends._environment.cache_clear()
    assert found.startswith(outcome)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_everything_imports_without_native_modules():
    out = python(
        "import sys; sys.modules['fastgen._cpu'] = sys.modules['fastgen._cuda'] = None\n"
        "import fastgen, fastgen.ops, fastgen.models\n"
        "from fastgen import backends\n"
        "for native in backends.native_cpu, backends.native_cuda:\n"
        "    try: native()\n"
        "    except RuntimeError as error: print(error)"
    )
    assert "fastgen._cpu is not in" in out
    assert "pip install -e ." in out
    assert "fastgen._cuda is not in" in out


def test_a_module_of_another_version_is_refused():
    out = python(
        "import fastgen\nfastgen.__version__ = '99'\nfrom fastgen import backends\nprint(backends.import_error('_cpu'))"
    )
    assert "was built for version" in out
    assert "this is 99: install again" in out


@pytest.mark.parametrize(("version", "reason"), [("3.4.0", "triton 3.4.0 is too old: it takes 3.5"), ("3.10.1", None)])
def test_old_tritons_are_not_used(monkeypatch, version, reason):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    found = backends.unavailable.__wrapped__("triton")
    assert found is None if reason is None else found.startswith(reason)


def test_a_triton_that_fails_is_not_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    assert backends.unavailable.__wrapped__("triton").startswith("triton cannot be imported: ")
