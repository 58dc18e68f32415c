"""What a user's machine can do to the package: damaged files, odd environments, poor terminals.

Each case runs in a process of its own, where a crash is seen and nothing is left behind.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from forks import Result, run_each
from support import ELSEWHERE

import action_kernels
from action_kernels.backends import cpu
from action_kernels.backends._library import LIBRARY_FOLDER
from action_kernels.terminal import in_ascii

LIBRARY = LIBRARY_FOLDER / "libaction_kernels_cpu.so"
ABI_VERSION = cpu.HEADER.constants["AK_ABI_VERSION"]
CLONE = Path(__file__).resolve().parent.parent
REMEDY = "reinstall the package on this machine"
USE = """
import sys, torch
from action_kernels import supcon_loss
from action_kernels.__main__ import main
features = torch.randn(8, 4, requires_grad=True)
try:
    supcon_loss(features, torch.arange(8) % 2).backward()
    print("finite:", bool(features.grad.isfinite().all()))
except Exception as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
main(["doctor"])
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not LIBRARY.exists(), reason="needs the compiled library, on Linux"
)


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, outside the clone; `options` that are upper case are its environment."""
    variables = {name: options.pop(name) for name in list(options) if name.isupper()}
    options = {"cwd": ELSEWHERE, "encoding": "utf-8", "errors": "backslashreplace", **options}
    environment = {**os.environ, **variables}
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, check=False, env=environment, **options
    )
    assert result.returncode >= 0, f"died of signal {-result.returncode}: {result.stderr}"
    return result


def doctor(**options) -> str:
    result = run("-m", "action_kernels", **options)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


@pytest.fixture
def in_each(tmp_path: Path) -> Callable[[str, Mapping[str, Mapping[str, str]]], dict[str, Result]]:
    """Runs code once for each case, a set of environment variables; none may die of a signal."""
    folders = itertools.count()

    def runs(code: str, cases: Mapping[str, Mapping[str, str]]) -> dict[str, Result]:
        results = run_each(code, cases, tmp_path / f"forks{next(folders)}", ELSEWHERE)
        for name, result in results.items():
            assert result.returncode >= 0, f"{name}: died of signal {-result.returncode}"
        return results

    return runs


def line_of(backend: str, report: str) -> str:
    lines = report[report.index("\nbackends") :].splitlines()
    return next(line for line in lines if line.strip().startswith(f"{backend} "))


# Damaged libraries ---------------------------------------------------------------------------------


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def for_arm(content: bytes) -> bytes:
    return content[:18] + (183).to_bytes(2, "little") + content[20:]


DAMAGED = {
    "empty": (lambda _: b"", "is empty"),
    "a half": (truncated, "is cut short: its headers promise"),
    "all but a byte": (lambda content: content[:-1], "is cut short: its headers promise"),
    "ten bytes": (lambda content: content[:10], "is cut short or damaged"),
    "a text file": (lambda _: b"version https://an.example/spec\n", "is no shared library"),
    "for another processor": (for_arm, "is for another machine (64-bit Arm, 64 bits"),
    "a big-endian one": (lambda c: c[:5] + b"\2" + c[6:], "is for another machine"),
    "a 32-bit one": (lambda c: c[:4] + b"\1" + c[5:], "is for another machine"),
    "a program": (lambda c: c[:16] + b"\2\0" + c[18:], "is no shared library: its ELF type is 2"),
    "a header of zeros": (lambda c: c[:16] + bytes(48) + c[64:], "is for another machine"),
    "program headers beyond every file": (lambda c: c[:39] + b"\xff" + c[40:], "is cut short or"),
    "program headers of zeros": (lambda c: c[:64] + bytes(512) + c[576:], "is damaged"),
}


def test_a_damaged_library_is_told_with_the_remedy_and_the_next_backend_serves(in_each, tmp_path):
    content = LIBRARY.read_bytes()
    cases = {}
    for kind, (damage, _) in DAMAGED.items():
        library = tmp_path / f"{kind}.so"
        library.write_bytes(damage(content))
        cases[kind] = {"ACTION_KERNELS_CPU_LIBRARY": str(library)}
    for kind, result in in_each(USE, cases).items():
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("finite: True\n")  # computed, by the reference
        line = line_of("cpu", result.stdout)
        assert "ready" not in line
        for message in (result.stderr, line):
            assert cases[kind]["ACTION_KERNELS_CPU_LIBRARY"] in message
            assert DAMAGED[kind][1] in message
            assert REMEDY in message
        assert "backend 'cpu' is not used: " in result.stderr


def test_the_doctor_reads_damage_aloud_in_an_installed_copy(tmp_path):
    """Of every kind that its record, made by the build, tells: also what no header shows."""
    package = shutil.copytree(Path(action_kernels.__file__).parent, tmp_path / "action_kernels")
    library = package / "_lib" / LIBRARY.name
    content = library.read_bytes()
    middle = len(content) // 2
    for damaged, words in (
        (truncated(content), "is cut short"),
        (content[:middle] + bytes(4096) + content[middle + 4096 :], "is not what the build made"),
        (content + b"\n", "is not what the build made"),
    ):
        library.write_bytes(damaged)
        report = doctor(PYTHONPATH=str(tmp_path))
        assert f"in {package}" in report
        line = line_of("cpu", report)
        assert "not available" in line
        assert "ready" not in line
        assert words in line
        assert REMEDY in line
        assert "fallback" in report


OPENED_IN_A_CHILD = f"""
import os, random, sys
from pathlib import Path
from action_kernels.backends import cpu
from action_kernels.backends._library import open_library

def refused(path):
    try:
        open_library(path, cpu.HEADER.functions, version_function="ak_abi_version",
                     version={ABI_VERSION}, missing="")
    except (OSError, RuntimeError) as error:
        assert str(path) in str(error) and {REMEDY!r} in str(error), error
        return True
    return False

def in_a_child(path):
    # one process each: a loader asked for a path again gives what it has loaded from there before
    child = os.fork()
    if child == 0:
        try:
            code = int(refused(path))
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            code = 2
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

content, path = Path({str(LIBRARY)!r}).read_bytes(), Path(sys.argv[1])

def damaged(case):
    if case == 0:  # no segment may be executed, which shows when a function is called
        return bytes(byte & ~1 if 64 <= at < 64 + 9 * 56 and at % 56 == 64 % 56 + 4 else byte
                     for at, byte in enumerate(content))
    changed = bytearray(content)
    if case % 3 == 0:
        del changed[random.randrange(len(content)) :]
    elif case % 3 == 1:
        changed[random.randrange(64)] = random.randrange(256)
    else:
        changed[64 + random.randrange(9 * 56)] ^= 1 << random.randrange(8)
    return changed

random.seed(int(sys.argv[2]))
codes = []
for case in range(int(sys.argv[3])):
    path.write_bytes(damaged(case))
    codes.append(in_a_child(path))
    assert codes[-1] in (0, 1), f"case {{case}}: {{codes[-1]}}"
assert codes[0] == 1
print(sum(codes))
"""


def test_no_random_damage_ends_the_process(tmp_path):
    """Bytes of the headers changed at random, cuts at random: a sentence, or a library that opens."""
    cases = 120
    result = run("-c", OPENED_IN_A_CHILD, str(tmp_path / "library.so"), "0", str(cases))
    assert result.returncode == 0, result.stderr
    assert cases / 2 < int(result.stdout) <= cases


def test_a_record_that_says_otherwise_or_nothing_refuses(tmp_path):
    code = f"""
        import sys
        from pathlib import Path
        from action_kernels.backends import cpu
        path = Path(sys.argv[1])
        path.write_bytes(Path({str(LIBRARY)!r}).read_bytes())
        record = path.with_name(path.name + ".sha256")
        for text in ("", "0" * 64, "\\xff"):
            record.write_text(text, "latin-1")
            print(cpu.unavailable("cpu"))
        record.write_text(Path({str(LIBRARY)!r} + ".sha256").read_text())
        print(cpu.unavailable("cpu"))
    """
    library = str(tmp_path / "library.so")
    result = run("-c", textwrap.dedent(code), library, ACTION_KERNELS_CPU_LIBRARY=library)
    *refused, accepted = result.stdout.splitlines()
    assert len(refused) == 3, result.stderr
    assert all("is not what the build made" in line for line in refused)
    assert accepted == "None"


def test_what_is_no_file_to_load_has_a_sentence_each(tmp_path):
    """A folder, a pipe, a file that cannot be read, none at all, another library, one that is locked."""
    os.mkfifo(tmp_path / "pipe.so")
    locked = tmp_path / "locked.so"
    shutil.copy(LIBRARY, locked)
    locked.chmod(0)
    code = """
        import os, sys
        from pathlib import Path
        from action_kernels.backends import _library
        for path in sys.argv[1:]:
            if "locked" in path and os.getuid() == 0:
                os.seteuid(65534)  # root may read all
            try:
                _library.open_library(Path(path), {}, version_function="ak_abi_version",
                                      version=0, missing="build it")
                print("loaded", path)
            except (OSError, RuntimeError) as error:
                print(error)
    """
    mathematics = next(Path("/lib").glob("*/libm.so.6"), Path("/lib64/libm.so.6"))
    expected = {
        tmp_path: "is a directory, not a file; reinstall",
        tmp_path / "pipe.so": "is no regular file; reinstall",
        Path("/proc/self/mem"): "cannot be read: ",
        tmp_path / "none.so": "does not exist: build it",
        LIBRARY / "below": "does not exist: build it",
        mathematics: "is no library of this package: it has no function ak_abi_version; reinstall",
        locked: "cannot be read: Permission denied; reinstall",
    }
    result = run("-c", textwrap.dedent(code), *map(str, expected))
    told = result.stdout.splitlines()
    assert len(told) == len(expected), result.stderr
    for line, (path, words) in zip(told, expected.items(), strict=True):
        assert line.startswith(f"{path} {words}")


def compiled(source: str, target: Path) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(target)]
    subprocess.run(command, input=source, text=True, check=True)
    return target


FAULTY = {
    "another version": (
        'extern "C" int ak_abi_version() { return 1; }',
        "has ABI 1, this package needs ",
    ),
    "fewer functions": (
        'extern "C" int ak_abi_version() { return VERSION; }',
        "has no function ak_status_message",
    ),
    "needs another library": (
        'extern "C" int nobody_has(); extern "C" int ak_abi_version() { return nobody_has(); }',
        "cannot be loaded: undefined symbol: nobody_has",
    ),
    "crashes when called": (
        'extern "C" int ak_abi_version() { return *(volatile int*)0; }',
        "is damaged: opening it ends a process with signal 11",
    ),
    "ends the process when loaded": (
        "#include <stdlib.h>\nstruct End { End() { _Exit(127); } } end;",
        "is damaged: opening it ends a process with status 127",
    ),
    "crashes when loaded": (
        "struct Crash { Crash() { *(volatile int*)0 = 1; } } crash;",
        "is damaged: opening it ends a process with signal 11",
    ),
}


def test_a_library_that_is_whole_but_does_not_serve_is_explained(in_each, tmp_path):
    cases = {}
    for number, (kind, (source, _)) in enumerate(FAULTY.items()):
        source = source.replace("VERSION", str(ABI_VERSION))
        library = compiled(source, tmp_path / f"{number}.so")
        cases[kind] = {"ACTION_KERNELS_CPU_LIBRARY": str(library)}
    for kind, result in in_each(USE, cases).items():
        assert result.stdout.startswith("finite: True\n")
        line = line_of("cpu", result.stdout)
        assert f"{cases[kind]['ACTION_KERNELS_CPU_LIBRARY']} {FAULTY[kind][1]}" in line
        assert REMEDY in line


# Environment variables -----------------------------------------------------------------------------

GARBAGE = ["garbage", "cpu,cuda", "0", "µ∞", "x" * 300, "--help", "avx512 bf16"]


def setting(variable: str, values: Iterable[str]) -> dict[str, dict[str, str]]:
    return {value: {variable: value} for value in values}


def test_an_unknown_backend_is_explained(in_each):
    cases = setting("ACTION_KERNELS_BACKEND", GARBAGE)
    for value, result in in_each(USE, cases).items():
        known = "known are: auto, cuda, triton, cpu, reference"
        message = f"ACTION_KERNELS_BACKEND is {value!r}; {known}"
        assert "ready" not in result.stdout
        assert f"every op raises: {message}" in result.stdout
        assert result.stderr == f"ValueError: {message}\n"


def test_an_unknown_instruction_set_is_explained(in_each):
    cases = setting("ACTION_KERNELS_CPU_ISA", GARBAGE)
    for value, result in in_each(USE, cases).items():
        message = f"ACTION_KERNELS_CPU_ISA is {value!r}: no such instruction set in this library"
        line = line_of("cpu", result.stdout)
        assert "ready" not in line
        assert f"its ops raise: {message}; supported here: auto, " in line
        assert re.search(r"pairwise_lse +raises", result.stdout)
        assert result.stderr.startswith(f"RuntimeError: {message}")
        assert result.stderr.count("\n") == 1


def test_an_instruction_set_that_the_processor_lacks_is_explained(in_each):
    known = ["amx", "avx512bf16", "avx512", "avx2"] if os.uname().machine == "x86_64" else []
    lacking = [name for name in known if name not in cpu.supported_instruction_sets()]
    if not lacking:
        pytest.skip("this processor has all instruction sets of the library")
    cases = setting("ACTION_KERNELS_CPU_ISA", lacking)
    for result in in_each(USE, cases).values():
        line = line_of("cpu", result.stdout)
        assert "ready" not in line
        for message in (line, result.stderr):
            assert "this processor or operating system lacks the instruction set" in message


def test_nothing_in_particular_is_automatic(in_each):
    values = ["", "   ", "\t", "AUTO", " Auto\n"]
    names = ("ACTION_KERNELS_BACKEND", "ACTION_KERNELS_CPU_ISA", "ACTION_KERNELS_CPU_LIBRARY")
    cases = {value: dict.fromkeys(names[: 3 - ("o" in value.lower())], value) for value in values}
    for result in in_each(USE, cases).values():
        assert result.stdout.startswith("finite: True\n")
        assert line_of("cpu", result.stdout).endswith("ready")
        assert "asked for: auto" in result.stdout


def test_case_and_space_around_do_not_matter():
    report = doctor(ACTION_KERNELS_BACKEND=" CPU ", ACTION_KERNELS_CPU_ISA="\tPORTABLE ")
    assert line_of("cpu", report).endswith("ready")
    assert "instruction set portable" in report
    assert "asked for: cpu" in report


def test_a_known_backend_that_cannot_be_used_is_explained(in_each):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the CUDA backend can be used")
    cases = setting("ACTION_KERNELS_BACKEND", ["cuda"])
    result = in_each(USE, cases)["cuda"]
    assert "ready" not in result.stdout
    reason = "ACTION_KERNELS_BACKEND is 'cuda', which cannot be used here"
    assert f"every op raises: {reason}" in result.stdout
    assert "asked for by ACTION_KERNELS_BACKEND, cannot serve tensors on 'cpu'" in result.stderr


def test_training_says_at_once_what_is_wrong_with_the_environment(in_each, tmp_path):
    command = ["train", "--preset", "demo", "--output", str(tmp_path / "run")]
    code = f"import sys; from action_kernels.__main__ import main; sys.exit(main({command!r}))"
    names = ("ACTION_KERNELS_BACKEND", "ACTION_KERNELS_CPU_ISA")
    for name, result in in_each(code, {name: {name: "garbage"} for name in names}).items():
        assert result.returncode == 2
        assert result.stderr.startswith(f"action-kernels: {name} is 'garbage'")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


# Terminals -----------------------------------------------------------------------------------------

POOR_TERMINALS = {
    "PYTHONIOENCODING": {"PYTHONIOENCODING": "ascii"},
    "LC_ALL": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
}


COMMANDS = [
    ["doctor"], [], ["--help"], ["train", "--help"], ["evaluate", "--help"], ["nonsense"],
    ["train", "--preset", "Ω"], ["train", "--data", "/nowhere/Ω", "--output", "/proc/Ω"],
    ["evaluate", "/nowhere/Ω"],
]  # fmt: skip


@pytest.mark.parametrize("terminal", POOR_TERMINALS)
def test_a_poor_terminal_gets_what_it_can_show(terminal):
    code = f"""
        import os
        from action_kernels.__main__ import main
        for command in {COMMANDS!a}:
            try:
                main([os.fsdecode(word.encode()) for word in command])
            except SystemExit as leaving:
                assert leaving.code in (0, 2)
    """
    encoding = "latin-1" if terminal == "latin-1" else "ascii"
    environment = {"PYTHONUTF8": "0", **POOR_TERMINALS[terminal]}
    result = run("-c", textwrap.dedent(code), **environment, encoding=encoding, errors="strict")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    # spelled, not escaped, but for bytes of the command line that are no text there
    assert re.search(r"\\u(?!dc)", result.stdout + result.stderr) is None
    assert result.stdout.count("(built for CUDA ") == 2
    assert "usage: action-kernels" in result.stdout
    trainer = all(map(importlib.util.find_spec, ("h5py", "monai", "nibabel")))
    assert ("/nowhere/" if trainer else "the trainer needs: pip install") in result.stderr


@pytest.mark.parametrize(
    ("character", "spelling"),
    [("–", "-"), ("≥", ">="), ("τ", "tau"), ("Λ", "Lambda"), ("é", "e"), ("²", "2"), ("x", "x"),
     ("ϕ", "phi"), ("漢", "\\u6f22"), ("µ", "mu"), ("ά", "alpha"), ("ς", "sigma"),
     ("⁻", "-"), ("\udcff", "\\udcff"), ("\u0301", "\\u0301")],
)  # fmt: skip
def test_spelling(character, spelling):
    assert in_ascii(character) == spelling


@pytest.mark.parametrize("shell", ["{} | head -c 1 >/dev/null", "{} | true", "{} >&-"])
def test_nobody_reads_and_no_traceback_is_seen(shell):
    """A reader who leaves early, before the first line, and no standard output at all."""
    command = shell.format(f"{sys.executable} -m action_kernels doctor")
    result = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=False, cwd=ELSEWHERE
    )
    assert result.returncode == 0
    assert result.stderr == ""


# Where the package is, and what it lists ------------------------------------------------------------


def test_a_clone_says_that_it_runs_from_its_sources(tmp_path):
    clone = tmp_path / "clone"
    for name in ("action_kernels", "csrc"):
        shutil.copytree(
            CLONE / name, clone / name, ignore=shutil.ignore_patterns("_lib", "__pycache__")
        )
    shutil.copy(CLONE / "setup.py", clone)
    report = doctor(cwd=clone)
    assert f"from the sources in {clone}, not from an installed copy" in report
    assert "they hold no compiled library" in report
    assert "python setup.py build_ext --inplace" in report
    assert "fallback: PyTorch in place of a backend that is not available" in report
    shutil.copytree(LIBRARY_FOLDER, clone / "action_kernels" / "_lib")
    report = doctor(cwd=clone)
    assert f"from the sources in {clone}" in report
    assert "they hold no compiled library" not in report
    assert line_of("cpu", report).endswith("ready")


def test_an_installed_package_says_where_it_is():
    report = doctor()
    assert f"in {Path(action_kernels.__file__).parent}" in report
    assert "sources" not in report


def test_the_doctor_lists_the_public_ops_and_where_the_reference_is_meant():
    report = doctor(ACTION_KERNELS_BACKEND="auto")
    table = report[report.index("backend of each op") :].splitlines()[2:]
    rows = {line.split()[0]: line.split()[1:] for line in table if ": " not in line}
    assert sorted(rows) == sorted(action_kernels.ops.__all__)
    assert rows["pairwise_lse"] == ["cpu", "cpu", "cpu", "reference"]
    assert "fallback" not in report
    assert "reference: PyTorch, and meant so: float64" in report


def test_without_the_trainers_packages_the_doctor_works_and_training_says_what_to_install():
    code = """
        import sys
        for name in ("monai", "nibabel", "h5py", "scipy", "matplotlib", "nrrd", "tensorboard", "tqdm"):
            sys.modules[name] = None  # as if it were not installed
        from action_kernels.__main__ import main
        assert main([]) == 0
        for command in (["train", "--preset", "demo"], ["evaluate", "somewhere"]):
            assert main(command) == 2, command
    """
    result = run("-c", textwrap.dedent(code))
    assert result.returncode == 0, result.stderr
    assert "pairwise_lse" in result.stdout
    told = result.stderr.splitlines()
    assert len(told) == 2
    for line in told:
        assert "is not installed; the trainer needs: pip install" in line
        assert "[train]" in line
