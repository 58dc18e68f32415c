"""Build of the shared libraries under csrc/. Everything else is in pyproject.toml.

The libraries have a plain C interface and are loaded with ctypes: building them needs neither torch
nor Python's headers, and one file serves every Python and torch.

Environment variables:
    ACTION_KERNELS_CUDA_ARCHS  CUDA architectures, for instance "80;90a" (default: those below that
                               the nvcc found knows); empty builds no CUDA library.
    ACTION_KERNELS_CUDA        "1": the CUDA library must be built; pip fetches nvcc where there is none.
    CUDA_HOME                  where nvcc is; else it is looked for on the PATH and in site-packages.
    CXX, CXXFLAGS              the C++ compiler and extra flags (sanitizers, for instance).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
LIBRARY_FOLDER = "action_kernels/_lib"
CPU_LIBRARY = "libaction_kernels_cpu.so"
CUDA_LIBRARY = "libaction_kernels_cuda.so"

CXX_FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra".split()
# An instruction set has translation units of its own, told by the end of their names.
BFLOAT16_FLAGS = (
    "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma -mf16c -mprefer-vector-width=512"
)
X86_FLAGS = {
    "_amx": BFLOAT16_FLAGS,  # tiles are written in assembly
    "_avx512bf16": BFLOAT16_FLAGS,
    "_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
    "_avx2": "-mavx2 -mfma -mf16c",
}
CUDA_ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120a")
# nvcc from the package index, into site-packages
CUDA_PACKAGES = ("nvidia-cuda-nvcc>=13", "nvidia-cuda-runtime>=13", "nvidia-cuda-cccl>=13")
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -lineinfo".split()


class Build(build_ext):
    """Compile the libraries with ninja and put them where a Python extension would go."""

    def run(self) -> None:
        self.inplace = self.inplace or self.editable_mode
        target = ROOT if self.inplace else Path(self.build_lib).resolve()  # ninja runs elsewhere
        folder = target / LIBRARY_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        self._built: list[Path] = []
        for header in sorted((SOURCES / "include").glob("*.h")):  # what ctypes is told from
            shutil.copyfile(header, folder / header.name)
            self._built.append(folder / header.name)
        ninja = [NINJA_RULES.format(cxx=_compiler(), nvcc=_nvcc() or "nvcc")]
        if _compiles_openmp(objects):
            self._built.append(folder / CPU_LIBRARY)
            ninja += _cpu_statements(folder / CPU_LIBRARY)
        ninja += self._cuda_statements(folder / CUDA_LIBRARY)
        (objects / "build.ninja").write_text("\n".join(ninja) + "\n")
        subprocess.run([*_ninja(), "-C", str(objects)], check=True)
        for path in self._built:
            _record_hash(path)

    def _cuda_statements(self, library: Path) -> list[str]:
        architectures = _cuda_architectures()
        if not architectures:
            return []
        self._built.append(library)
        return _cuda_statements(library, architectures)

    def get_outputs(self) -> list[str]:
        built = getattr(self, "_built", [])
        return [str(path) for path in [*built, *map(_record_of, built)]]

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in SOURCES.rglob("*") if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _record_hash(path: Path) -> None:
    """What loading compares with, and what `sha256sum --check` reads."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    _record_of(path).write_text(f"{digest}  {path.name}\n")


class Wheel(bdist_wheel):
    """The libraries depend on the platform, but on no Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


NINJA_RULES = """\
rule cxx
  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  description = C++ $in
rule link
  command = {cxx} -shared -fopenmp $in -o $out $flags
  description = link $out
rule nvcc
  command = {nvcc} -MD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  description = CUDA $in
rule nvlink
  command = {nvcc} -shared -cudart static $flags $in -o $out
  description = link $out
"""


def _cpu_statements(library: Path) -> list[str]:
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    statements, objects = [], []
    for source in sorted((SOURCES / "cpu").glob("*.cpp")):
        instruction_set = _instruction_set_flags(source.stem)
        if instruction_set is None:
            continue
        flags = [*CXX_FLAGS, f"-I{SOURCES / 'include'}", *instruction_set, *extra]
        objects.append(f"{source.stem}.o")
        statements += _statement(objects[-1], "cxx", [str(source)], flags)
    return statements + _statement(str(library), "link", objects, extra)


def _instruction_set_flags(stem: str) -> list[str] | None:
    """Flags of a translation unit; None if it is not for this processor's family."""
    for ending, flags in X86_FLAGS.items():
        if stem.endswith(ending):
            return shlex.split(flags) if _is_x86() else None
    return []


def _is_x86() -> bool:
    """Of the platform built for: a cross build names it in _PYTHON_HOST_PLATFORM, as CPython's own does."""
    return sysconfig.get_platform().endswith(("x86_64", "amd64"))


OPENMP_PROGRAM = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


def _compiles_openmp(folder: Path) -> bool:
    """Whether the compiler has OpenMP; says in a line what follows where it has not."""
    source = folder / "openmp.cpp"
    source.write_text(OPENMP_PROGRAM)
    command = [
        *shlex.split(_compiler()),
        "-fopenmp",
        "-c",
        str(source),
        "-o",
        str(folder / "openmp.o"),
    ]
    attempt = subprocess.run(command, capture_output=True, text=True, check=False)
    if attempt.returncode:
        print(
            f"action_kernels: no CPU library: {_compiler()} compiles no OpenMP, the PyTorch reference will serve "
            "the CPU. GCC brings OpenMP with it; for clang on Debian and Ubuntu: apt install libomp-dev"
        )
    return attempt.returncode == 0


def _cuda_statements(library: Path, architectures: list[str]) -> list[str]:
    flags = [*NVCC_FLAGS, f"-I{SOURCES / 'include'}"]
    flags += [f"-DAK_{kind.upper()}" for kind in CUDA_KINDS if _of_kind(kind, architectures)]
    statements, objects = [], []
    for source in sorted((SOURCES / "cuda").glob("*.cu")):
        targets = _cuda_targets(source.stem, architectures)
        if targets:
            objects.append(f"{source.stem}.cu.o")
            statements += _statement(objects[-1], "nvcc", [str(source)], [*flags, *targets])
    lib = (
        Path(_nvcc() or "").resolve().parent.parent / "lib"
    )  # of site-packages; others know their own
    return statements + _statement(str(library), "nvlink", objects, [f"-L{lib}"])


# A source whose name ends so has kernels for these architectures only.
CUDA_KINDS = ("sm80", "sm90a")  # mma.sync, also for what comes after 9.0; wgmma


def _of_kind(kind: str, architectures: list[str]) -> list[str]:
    if kind == "sm90a":
        return [name for name in architectures if name == "90a"]
    others = [name for name in architectures if name != "90a"]
    # code for 8.0 runs on 8.6 and 8.9, and a tile that fits the one is chosen to fit the others
    return [name for name in others if not (name in ("86", "89") and "80" in others)]


def _cuda_targets(stem: str, architectures: list[str]) -> list[str]:
    """What nvcc compiles a source for; nothing where it has no kernels for any of `architectures`."""
    kind = next((kind for kind in CUDA_KINDS if stem.endswith(f"_{kind}")), None)
    names = architectures if kind is None else _of_kind(kind, architectures)
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    if names and kind != "sm90a":  # for what comes later
        newest = re.sub(r"\D", "", names[-1])
        targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return targets


def _statement(output: str, rule: str, inputs: list[str], flags: list[str]) -> list[str]:
    def escape(path: str) -> str:
        return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    line = f"build {escape(output)}: {rule} {' '.join(map(escape, inputs))}"
    return [line, f"  flags = {shlex.join(flags)}"]


def _compiler() -> str:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["g++", "c++", "clang++"]:
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    sys.exit(
        f"error: no C++ compiler: {named or 'g++, c++ and clang++'} not found. Install one "
        "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: "
        "conda install -c conda-forge cxx-compiler) or name it in CXX."
    )


def _ninja() -> list[str]:
    """The `ninja` package of the build environment, else one on the PATH."""
    if shutil.which("ninja"):
        return ["ninja"]
    return [sys.executable, "-m", "ninja"]


def _nvcc() -> str | None:
    folders = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    found = shutil.which("nvcc")
    if found:
        folders.append(Path(found).parent)
    packages = importlib.util.find_spec("nvidia")
    for location in packages.submodule_search_locations or [] if packages else []:
        folders += sorted(Path(location).glob("cu*/bin"), reverse=True)
    return next((str(folder / "nvcc") for folder in folders if (folder / "nvcc").exists()), None)


def _cuda_is_asked_for() -> bool:
    return os.environ.get("ACTION_KERNELS_CUDA", "0") == "1"


def _cuda_architectures() -> list[str]:
    """Architectures to build for; none, with a line that says why, where there is no nvcc."""
    asked = os.environ.get("ACTION_KERNELS_CUDA_ARCHS")
    nvcc = _nvcc()
    if asked is not None and not asked.strip():
        print("action_kernels: no CUDA library: ACTION_KERNELS_CUDA_ARCHS is empty")
        return []
    if nvcc is None:
        missing = (
            "no CUDA library: nvcc is neither in CUDA_HOME nor on the PATH nor in site-packages; "
            f"with ACTION_KERNELS_CUDA=1 pip fetches it ({', '.join(CUDA_PACKAGES)})"
        )
        if _cuda_is_asked_for():
            sys.exit(f"error: {missing}")
        print(f"action_kernels: {missing}")
        return []
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = {code.removeprefix("sm_") for code in listing.stdout.split()}
    if asked is None:
        return [name for name in CUDA_ARCHITECTURES if name.rstrip("a") in known]
    names = [name.removeprefix("sm_") for name in re.split(r"[;,\s]+", asked.strip())]
    for name in names:
        if name.rstrip("af") not in known:
            sys.exit(
                f"error: ACTION_KERNELS_CUDA_ARCHS names {name!r}; {nvcc} knows "
                f"{', '.join(sorted(known))}"
            )
    return names


setup(
    # a build frontend installs these beside pyproject.toml's requirements
    setup_requires=CUDA_PACKAGES if _cuda_is_asked_for() and _nvcc() is None else (),
    ext_modules=[Extension("action_kernels._lib", sources=[])],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
