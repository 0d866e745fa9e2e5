"""What the build makes: the wheel, the source distribution, what an import costs, and what setup.py decides."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastgen
from fastgen import backends
from fastgen.ops import philox

ROOT = Path(__file__).resolve().parents[1]
# Nothing that the build may not use can be imported: fastgen is built without torch, in isolated environments.
BLOCKED = "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'fastgen']));"


def run(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with the compiled objects, so that only what differs is compiled."""
    copy = tmp_path_factory.mktemp("build") / "checkout"
    copy.mkdir(parents=True)
    for name in ("bench", "csrc", "fastgen", "kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"))
    for folder in ROOT.glob("build/native-*"):
        shutil.copytree(folder, copy / folder.relative_to(ROOT))
    for path in ROOT.glob("[!.]*.*"):
        shutil.copy2(path, copy)
    for name in ("LICENSE", "Makefile"):
        shutil.copy2(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    code = f"{BLOCKED} from setuptools import build_meta; build_meta.build_wheel('dist')"
    run(code, checkout, FASTGEN_CUDA="0", FASTGEN_SANITIZE="")
    return next((checkout / "dist").glob("*.whl"))


def test_wheel_has_the_package_the_native_module_and_no_sources(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastgen").rglob("*.py")}
    modules |= {f"fastgen/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert modules <= set(names)
    assert [name.split(".")[0] for name in names if name.endswith(".so")] == ["fastgen/_cpu"]
    assert "fastgen/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastgen"}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".o"))]
    assert "none-any" not in wheel.name


def test_wheel_imports_outside_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    out = run(
        "import sys  # an editable installation in the same environment offers its native modules too\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if '__editable__' not in finder.__module__]\n"
        "import fastgen, fastgen.kernels; from fastgen import backends\n"
        "print(fastgen.__file__); print(fastgen.kernels.__file__)\n"
        "print(backends.native_cpu().__file__); print(backends.native_cpu().isa())\n"
        "print(backends.import_error('_cuda'))",
        tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
    ).splitlines()
    assert all(line.startswith(str(tmp_path / "site")) for line in out[:3])
    assert out[3] in ("baseline", "avx2", "avx512", "avx512bf16")
    assert "not built: FASTGEN_CUDA=0" in out[4]


def test_building_again_compiles_nothing(checkout, wheel):
    assert "no work to do" in run(
        "import sys, runpy; sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')",
        checkout,
        FASTGEN_CUDA="0",
        FASTGEN_SANITIZE="",
    )


def test_sdist_has_every_source(checkout):
    run(f"{BLOCKED} from setuptools import build_meta; build_meta.build_sdist('dist')", checkout)
    with tarfile.open(next((checkout / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert sources | {"setup.py", "pyproject.toml", "kernels/__init__.py", "LICENSE", "constraints.txt"} <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]


def test_imports_bring_no_heavy_package(tmp_path):
    """`import fastgen` and every public name, beyond what torch itself imports."""
    out = run(
        "import torch, sys\n"
        "def roots(): return {name.split('.')[0] for name in sys.modules}\n"
        "before = roots()\n"
        "import fastgen\n"
        "print('fastgen', *roots() - before)\n"
        "for name in fastgen.__all__: getattr(fastgen, name); print(name, *roots() - before)",
        tmp_path,
    )
    heavy = {"sklearn", "PIL", "matplotlib", "tqdm", "triton", "scipy"}
    brought = {name: heavy & set(roots) for name, *roots in map(str.split, out.splitlines())}
    assert set(brought) == {"fastgen", *fastgen.__all__}
    assert not any(brought.values()), brought


def test_top_level_names():
    assert set(fastgen.__all__) <= set(dir(fastgen))
    assert fastgen.backend is importlib.import_module("fastgen.backends").backend
    with pytest.raises(AttributeError, match="module 'fastgen' has no attribute 'bakcend'"):
        fastgen.bakcend  # noqa: B018


@pytest.fixture
def cuda() -> ModuleType:
    reason = backends.import_error("_cuda")
    if reason:
        pytest.skip(reason)
    return backends.native_cuda()


def test_cuda_module_imports_without_a_gpu(cuda):
    assert cuda.device_count() >= 0
    assert cuda.runtime_version() >= 11000
    assert cuda.archs


def test_a_failed_launch_raises(cuda):
    if cuda.device_count():
        pytest.skip("launches succeed where there is a GPU")
    cuda.philox_uint32(0, 0, 0, 0, 0, 0, 0)  # nothing to launch
    with pytest.raises(RuntimeError, match="philox_uint32: "):
        cuda.philox_uint32(0, 0, 0, 0, 1, 0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 255, 257])
def test_cuda_draws_the_same_numbers(cuda, count):
    counters = [torch.randint(2**32, (count,)) for _ in range(3)]
    on_gpu = [counter.cuda() for counter in counters]
    out = torch.empty(count, 4, dtype=torch.int64, device="cuda")
    pointers = [counter.data_ptr() for counter in on_gpu]
    cuda.philox_uint32(2**63 + 5, *pointers, count, out.data_ptr(), torch.cuda.current_stream().cuda_stream)
    assert torch.equal(out.cpu(), philox.philox_reference(2**63 + 5, *counters))


def test_other_processors_compile_the_portable_code_alone(setup, monkeypatch):
    monkeypatch.setattr(setup.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(setup, "compiles", lambda command, suffix: command[0] == "g++")
    assert setup.find_isas("g++") == {"baseline": "-fno-schedule-insns"}
    assert setup.find_isas("clang++") == {"baseline": ""}


def test_kernels_compile_for_arm(tmp_path):
    """No figure and no bit is checked here; CONTRIBUTING.md says how the tests are run on ARM."""
    cxx = shutil.which("aarch64-linux-gnu-g++")
    if cxx is None:
        pytest.skip("no aarch64-linux-gnu-g++")
    (tmp_path / "fastgen_build.h").write_text("#define FASTGEN_FOR_EACH_ISA(X) X(baseline)\n")
    includes = [f"-I{ROOT / 'csrc'}", f"-I{tmp_path}", "-DFASTGEN_ISA=baseline"]
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        command = [cxx, *"-std=c++17 -fopenmp -Wall -Wextra -Werror -fsyntax-only".split(), *includes, str(source)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout


def test_a_compiler_without_an_instruction_set_leaves_it_out(setup, monkeypatch):
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(setup, "compiles", lambda command, suffix: "-mavx512bf16" not in command)
    assert list(setup.find_isas("g++")) == ["baseline", "avx2", "avx512"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTGEN_CUDA": "yes"}, "FASTGEN_CUDA must be 0, 1 or auto, got 'yes'"),
        ({"FASTGEN_CUDA": "1", "NVCC": "no-such-nvcc"}, "FASTGEN_CUDA=1, but the CUDA module is not built: "),
        ({"FASTGEN_CUDA": "1", "FASTGEN_CUDA_ARCHS": "sm_80", "NVCC": "nvcc"}, "FASTGEN_CUDA_ARCHS must look like"),
    ],
    ids=["choice", "no nvcc", "archs"],
)
def test_impossible_cuda_requests_end_the_build(setup, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(setup.BuildError, match=message):
        setup.find_cuda("g++")


def test_without_nvcc_the_cuda_module_is_left_out_and_the_reason_kept(setup, monkeypatch):
    monkeypatch.setenv("FASTGEN_CUDA", "auto")
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    assert setup.find_cuda("g++") == (None, [], "not built: no nvcc on PATH, in $CUDA_HOME or in /usr/local/cuda")


def test_architectures_are_those_that_nvcc_knows(setup, monkeypatch):
    monkeypatch.delenv("FASTGEN_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(setup, "output", lambda command: "compute_75\ncompute_80\ncompute_90\n")
    assert setup.find_archs("nvcc") == ["80", "90"]
    monkeypatch.setenv("FASTGEN_CUDA_ARCHS", "86;90a")
    assert setup.find_archs("nvcc") == ["86", "90a"]


def test_what_takes_longest_is_compiled_first(setup, tmp_path):
    """Ninja begins edges in the order of the file."""
    file = setup.NinjaFile(tmp_path, "0")
    file.cpu()
    file.cuda_module()
    stems = [Path(edge.split(".o: ")[0]).name.split(".")[0] for edge in file.edges if ".o: " in edge]
    count = sum(stem in setup.LONGEST for stem in stems)
    assert set(stems[:count]) == set(setup.LONGEST) and not set(stems[count:]) & set(setup.LONGEST)


def test_a_missing_compiler_is_named(setup, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(setup.BuildError, match="'no-such-compiler' does not compile"):
        setup.find_cxx()
