"""The C headers as ctypes is told of them: against the compiler's own reading of them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest

from action_kernels.backends import c_header
from action_kernels.backends._library import LIBRARY_FOLDER

HEADERS = sorted(path.name for path in LIBRARY_FOLDER.glob("*.h"))


def test_the_build_puts_the_headers_beside_the_libraries():
    assert "action_kernels.h" in HEADERS


@pytest.mark.parametrize("name", HEADERS)
def test_every_function_is_understood(name):
    text = (LIBRARY_FOLDER / name).read_text()
    functions = c_header.read(name).functions
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    assert set(functions) == set(re.findall(r"(ak_\w+)\(", text))
    assert len(functions) >= 4


def c_type(kind: type) -> str:
    """How C spells a type that ctypes was told of, pointers all being `void*`."""
    if kind in (ctypes.c_void_p, ctypes.c_char_p) or hasattr(kind, "contents"):
        return "pointer"
    return {ctypes.c_float: "float", ctypes.c_double: "double"}.get(kind) or (
        ("int" if kind(-1).value < 0 else "uint") + str(8 * ctypes.sizeof(kind))
    )


PROGRAM = """
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <type_traits>
#include "HEADER"
template <class T> void say() {
  if (std::is_pointer<T>::value) std::printf("pointer ");
  else if (std::is_floating_point<T>::value) std::printf(sizeof(T) == 4 ? "float " : "double ");
  else std::printf("%sint%d ", std::is_signed<T>::value ? "" : "u", (int)(8 * sizeof(T)));
}
template <class R, class... A> void function(const char* name, R (*)(A...)) {
  std::printf("%s: ", name);
  say<R>();
  int none[] = {0, (say<A>(), 0)...};
  (void)none;
  std::printf("\\n");
}
int main() {
BODY
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("name", HEADERS)
def test_the_compiler_reads_the_same(name, tmp_path):
    header = c_header.read(name)
    lines, expected = [], []
    for function, (result, arguments) in header.functions.items():
        lines.append(f'  function("{function}", &{function});')
        expected.append(f"{function}: {' '.join(map(c_type, (result, *arguments)))}")
    for struct, kind in header.structs.items():
        lines.append(f'  std::printf("{struct} %zu\\n", sizeof({struct}));')
        expected.append(f"{struct} {ctypes.sizeof(kind)}")
        for field, _ in kind._fields_:
            lines.append(f'  std::printf("{field} %zu\\n", offsetof({struct}, {field}));')
            expected.append(f"{field} {getattr(kind, field).offset}")
    for constant, value in header.constants.items():
        lines.append(f'  std::printf("{constant} %d\\n", (int){constant});')
        expected.append(f"{constant} {value}")
    source = tmp_path / "program.cpp"
    source.write_text(PROGRAM.replace("HEADER", name).replace("BODY", "\n".join(lines)))
    # Addresses of functions are not called: nothing to link with.
    flags = ["-std=c++17", f"-I{LIBRARY_FOLDER}", "-Wl,--unresolved-symbols=ignore-all"]
    subprocess.run(["g++", *flags, str(source), "-o", str(tmp_path / "program")], check=True)
    answer = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True, check=True)
    assert [line.strip() for line in answer.stdout.splitlines()] == expected


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ("int f(struct x);", "struct"),
        ("wide g(void);", "wide"),
        ("enum e { A };", "an enumerator needs its number: +A"),
        ("int h;", "not a function: int h"),
        ("union u { int i; };", "not a function: union u"),
    ],
)
def test_what_is_not_understood_is_an_error(declaration, message):
    with pytest.raises(ValueError, match=message):
        c_header.parse(declaration)
