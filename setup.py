"""Builds the native modules through ninja: fastgen._cpu always, fastgen._cuda where there is an nvcc.

Neither torch nor a GPU is needed. The build reads these environment variables:
    CXX                 the C++ compiler, GCC or Clang (default: g++, else c++)
    NVCC                the CUDA compiler (default: nvcc from PATH, else from $CUDA_HOME, else /usr/local/cuda)
    FASTGEN_CUDA        0: no CUDA module, 1: it must be built, auto (default): built when there is a working nvcc
    FASTGEN_CUDA_ARCHS  e.g. "80;90a" (default: those of 80;90;100 that nvcc knows)
    FASTGEN_SANITIZE    e.g. "address,undefined": instrument the C++ module (make asan)
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")  # paths are relative to ROOT, so that a moved checkout is not compiled again
PER_ISA = "// fastgen: per-isa"  # first line of the sources in csrc/cpu that are compiled once per instruction set
# Sources that take up to a minute, 48 s of a processor alone: they are compiled first, or all others would be done and
# wait for them, as tap_gemm comes last in the order of names.
LONGEST = ("tap_gemm", "tap_conv", "bind_conv", "pixel_stage")

AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
X86_ISAS = {"baseline": "", "avx2": "-mavx2 -mfma", "avx512": AVX512, "avx512bf16": f"{AVX512} -mavx512bf16"}

# -ffast-math is left out on purpose: at link time it turns on flush-to-zero for the whole process.
# Contraction is off so that products are fused into sums exactly where the source says fma: the same bits on every
# instruction set, and on a GPU.
FLAGS = (
    "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -fopenmp "
    "-ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra"
)
CUDA_FLAGS = "-std=c++17 -O3 -DNDEBUG -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -Xptxas=-v,-warn-spills"
CUDA_ARCHS = ("80", "90", "100")
HEADER = "// Written by setup.py.\n#pragma once\n"


class BuildError(SystemExit):
    """Ends the build with one readable line."""

    def __init__(self, message: str):
        super().__init__(f"fastgen: {message}")


def output(command: list[str]) -> str | None:
    """What a command prints; None if there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def compiles(command: list[str], suffix: str) -> bool:
    """Whether `command` compiles a trivial source file."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe" + suffix)
        source.write_text("#include <cmath>\nint probe() { return 0; }\n")
        return output([*command, "-c", str(source), "-o", str(source.with_suffix(".o"))]) is not None


def find_cxx() -> str:
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not cxx:
        raise BuildError("no C++ compiler found: install g++ or set CXX")
    if not compiles([*cxx.split(), *FLAGS.split()], ".cpp"):
        raise BuildError(
            f"{cxx!r} does not compile with '{FLAGS}': install GCC or Clang with C++17 and OpenMP, or set CXX"
        )
    return cxx


def find_isas(cxx: str) -> dict[str, str]:
    """Instruction sets to compile for -> compiler flags; the portable one alone on processors other than x86-64."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        # There GCC puts loads first, which need more registers than there are beside the sums of a tile.
        late_loads = "-fno-schedule-insns"
        return {"baseline": late_loads if compiles([*cxx.split(), "-Werror", late_loads], ".cpp") else ""}
    return {isa: flags for isa, flags in X86_ISAS.items() if compiles([*cxx.split(), *flags.split()], ".cpp")}


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def find_archs(nvcc: str) -> list[str]:
    """GPU architectures to compile for, oldest first."""
    asked = os.environ.get("FASTGEN_CUDA_ARCHS")
    if asked:
        archs = re.split(r"[;,\s]+", asked.strip())
        if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
            raise BuildError(f"FASTGEN_CUDA_ARCHS must look like '80;90a', got {asked!r}")
        return archs
    listing = output([nvcc, "--list-gpu-arch"]) or ""
    return [arch for arch in CUDA_ARCHS if f"compute_{arch}\n" in listing]


def find_cuda(cxx: str) -> tuple[str | None, list[str], str]:
    """(nvcc or None, architectures, what happened in words)."""
    choice = os.environ.get("FASTGEN_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise BuildError(f"FASTGEN_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return None, [], "not built: FASTGEN_CUDA=0"
    nvcc = find_nvcc()
    if nvcc is None:
        reason = "not built: no nvcc on PATH, in $CUDA_HOME or in /usr/local/cuda"
    elif not (archs := find_archs(nvcc)):
        reason = f"not built: {nvcc} knows none of the architectures {';'.join(CUDA_ARCHS)}"
    elif not compiles([nvcc, "-ccbin", cxx.split()[-1], "-std=c++17", f"-arch=sm_{archs[-1]}"], ".cu"):
        reason = f"not built: {nvcc} with {cxx} does not compile an empty file for sm_{archs[-1]}"
    else:
        return nvcc, archs, "built"
    if choice == "1":
        raise BuildError(f"FASTGEN_CUDA=1, but the CUDA module is {reason}")
    print(f"fastgen: CUDA module {reason}", file=sys.stderr)
    return None, [], reason


def find_ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = None
    ninja = (BIN_DIR and shutil.which("ninja", path=BIN_DIR)) or shutil.which("ninja")
    if not ninja:
        raise BuildError("ninja not found: pip install ninja")
    return ninja


def sources(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / CSRC).glob(pattern))


def escape(path: Path) -> str:
    """A path in a ninja build line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def include(path: Path | str) -> str:
    """An -I flag in a ninja variable that ends up in a shell command."""
    return shlex.quote(f"-I{path}").replace("$", "$$")


def build_folder() -> Path:
    """Where objects go, relative to ROOT."""
    parts = ["native", sysconfig.get_platform(), sys.implementation.cache_tag, os.environ.get("FASTGEN_SANITIZE")]
    return Path("build", "-".join(filter(None, parts)).replace(",", "-"))


def write_if_changed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def for_each(items: Iterable[str]) -> str:
    return " ".join(f"X({item})" for item in items)


class NinjaFile:
    """The text of a build.ninja, and of the headers with what the sources need to know about the build.

    The CUDA runtime is linked statically and its symbols are hidden: it must not mix with the one that torch brings.
    What nvcc reports of each kernel's registers and spills stays in a log beside the object; tests read it.
    """

    def __init__(self, folder: Path, version: str):
        self.folder = folder
        self.cxx = find_cxx()
        self.isas = find_isas(self.cxx)
        self.nvcc, self.archs, self.cuda = find_cuda(self.cxx)
        self.sanitize = os.environ.get("FASTGEN_SANITIZE", "")
        self.version = version
        self.edges: list[str] = []

    def isa_header(self) -> str:
        return HEADER + f"#define FASTGEN_FOR_EACH_ISA(X) {for_each(self.isas)}\n"

    def module_header(self) -> str:
        """Facts that change more often, apart, so that a change does not compile every kernel again."""
        compiler = (output([*self.cxx.split(), "--version"]) or "unknown").splitlines()[0]
        return f"""\
{HEADER}\
#define FASTGEN_VERSION "{self.version}"
#define FASTGEN_COMPILER "{compiler}"
#define FASTGEN_SANITIZE "{self.sanitize}"
#define FASTGEN_CUDA_BUILD "{self.cuda}"
#define FASTGEN_CUDA_ARCHS "{";".join(self.archs)}"
#define FASTGEN_FOR_EACH_BINDING(X) {for_each(source.stem for source in sources("bindings/bind_*.cpp"))}
"""

    def rules(self) -> str:
        import pybind11

        flags, link = FLAGS, "-shared -fopenmp"
        if self.sanitize:
            checks = f"-fsanitize={self.sanitize} -fno-sanitize=vptr -fno-sanitize-recover=all"
            flags = f"{FLAGS} -O1 -g1 -fno-omit-frame-pointer {checks}"  # -O3 takes minutes with sanitizers
            link += f" {checks}"
        gencode = " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs)
        if self.archs:  # intermediate code for the GPUs to come
            gencode += f" -gencode=arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}"
        python = f"{include(sysconfig.get_path('include'))} {include(pybind11.get_include())}"
        return f"""\
ninja_required_version = 1.5
builddir = {self.folder}
cxx = {self.cxx}
nvcc = {self.nvcc or ""} -ccbin {self.cxx.split()[-1]}
flags = {flags} {include(CSRC)} {include(self.folder)}
python = {python}
cuflags = {CUDA_FLAGS} {gencode} {include(CSRC)}

rule cxx
  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out
  description = $cxx $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $cuflags -MMD -MF $out.d -c $in -o $out > $out.log 2>&1; status=$$?; $
      grep -Ev 'ptxas info|bytes stack frame' $out.log; exit $$status
  description = nvcc $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx {link} $in -o $out
  description = link $out
rule cudalink
  command = $nvcc -shared -cudart static -Xlinker --exclude-libs=ALL $in -o $out
  description = link $out

"""

    def compile(self, source: Path, rule: str = "cxx", name: str | None = None, extra: str = "") -> str:
        output = escape(self.folder / f"{name or source.stem}.o")
        edge = f"build {output}: {rule} {escape(source)}\n  extra = {extra}\n"
        self.edges.insert(0 if source.stem in LONGEST else len(self.edges), edge)
        return output

    def module(self, name: str, rule: str, objects: list[str]) -> Path:
        output = self.folder / name
        self.edges.append(f"build {escape(output)}: {rule} {' '.join(objects)}\n")
        return output

    def cpu(self) -> Path:
        bindings = [source for source in sources("bindings/*.cpp") if not source.stem.startswith("cuda")]
        objects = [self.compile(source, extra="$python") for source in bindings]
        for source in sources("cpu/*.cpp"):
            if not (ROOT / source).read_text().startswith(PER_ISA):
                objects.append(self.compile(source))
                continue
            for isa, flags in self.isas.items():
                objects.append(self.compile(source, name=f"{source.stem}.{isa}", extra=f"-DFASTGEN_ISA={isa} {flags}"))
        return self.module("_cpu.so", "link", objects)

    def cuda_module(self) -> Path:
        objects = [self.compile(source, extra="$python") for source in sources("bindings/cuda*.cpp")]
        objects += [self.compile(source, rule="nvcc", name=f"{source.stem}.cu") for source in sources("cuda/*.cu")]
        return self.module("_cuda.so", "cudalink", objects)


class NinjaBuild(build_ext):
    """`build_ext` that writes a build.ninja, runs it and copies the modules to where setuptools wants them."""

    def run(self) -> None:
        folder = build_folder()
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        with open(ROOT / folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds in one checkout take turns
            self.built = self.run_ninja(folder)
            self.drop_unbuilt()
            super().run()

    def drop_unbuilt(self) -> None:
        """Leaves out the modules that were not built, and removes those of earlier builds."""
        for extension in [*self.extensions]:
            if extension.name not in self.built:
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
                self.extensions.remove(extension)

    def run_ninja(self, folder: Path) -> dict[str, Path]:
        file = NinjaFile(folder, self.distribution.get_version())
        built = {"fastgen._cpu": file.cpu()}
        if file.nvcc:
            built["fastgen._cuda"] = file.cuda_module()
        write_if_changed(ROOT / folder / "fastgen_build.h", file.isa_header())
        write_if_changed(ROOT / folder / "fastgen_module.h", file.module_header())
        write_if_changed(ROOT / folder / "build.ninja", file.rules() + "".join(file.edges))
        if subprocess.run([find_ninja(), "-f", str(folder / "build.ninja")], cwd=ROOT).returncode != 0:
            hint = "; FASTGEN_CUDA=0 leaves out the CUDA module" if file.nvcc else ""
            raise BuildError(f"the native modules did not compile, see above{hint}")
        return built

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(ROOT / self.built[ext.name]), str(target))

    def get_source_files(self) -> list[str]:
        return [str(path) for path in sources("**/*.*")]


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["fastgen", "fastgen.*"]), "fastgen.kernels"],
        package_dir={"fastgen.kernels": "kernels"},
        package_data={"fastgen": ["py.typed"]},
        ext_modules=[Extension("fastgen._cpu", []), Extension("fastgen._cuda", [])],
        cmdclass={"build_ext": NinjaBuild},
    )
