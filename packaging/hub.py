"""Make the folder that Hugging Face's `kernels` loads: the losses and ops, on Triton, without anything to compile.

    python packaging/hub.py [--output dist/hub]

    from kernels import get_local_kernel          # or get_kernel, once the folder is a repository of the Hub
    losses = get_local_kernel(Path("dist/hub"))
    losses.supcon_loss(features, labels)

The folder holds one build variant, ``torch-universal``: Python alone, for every torch, and for every GPU that Triton
serves; the PyTorch reference serves the rest. Left out are the compiled backends and the trainer. `kernels` imports a
variant under a name of its own choosing, beside any installed copy, so that imports become relative and ops get a
namespace that no other build has. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "action_kernels"
VARIANT = "torch-universal"
LEFT_OUT = (
    "__main__.py", "doctor.py", "terminal.py", "trainer",
    "backends/cpu.py", "backends/cuda", "backends/_library.py", "backends/_elf.py", "backends/c_header.py",
)  # fmt: skip
COMPILED = ("cpu", "cuda")  # backends that are declared, and left out
KERNEL_VERSION = 1  # of the Hub: raised where the interface breaks
CARD = """---
library_name: kernels
license: apache-2.0
---

# {package} {version}

Exact, fused contrastive losses over every pixel, in O(n · d) memory: Triton kernels, and a PyTorch reference where
Triton is not.

```python
from kernels import get_local_kernel

losses = get_local_kernel(path_of_this_folder)
loss = losses.supcon_loss(features, labels, temperature=0.1)
```
"""


def sources(package: Path) -> Iterator[Path]:
    """The files that travel, relative to the package, in order."""
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        if not any(relative.is_relative_to(part) for part in LEFT_OUT):
            yield relative


def with_relative_imports(text: str, file: Path) -> str:
    """The text of a file of the package, its absolute imports of the package made relative."""
    dots = "." * len(file.parts)  # a file at the top is one dot from its package
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_ours(node.module):
            rest = str(node.module).removeprefix(PACKAGE).removeprefix(".")
            before = f"from {node.module} import"
            after = f"from {dots}{rest} import"
        elif isinstance(node, ast.Import) and any(_is_ours(name.name) for name in node.names):
            (name,) = node.names
            parent, _, last = name.name.rpartition(".")
            before = f"import {name.name}"
            after = f"from {dots}{parent.removeprefix(PACKAGE).removeprefix('.')} import {last}"
        else:
            continue
        number = node.lineno - 1
        if before not in lines[number]:
            raise ValueError(
                f"{file}:{node.lineno}: cannot make this import relative: {lines[number]}"
            )
        lines[number] = lines[number].replace(before, after, 1)
    return "".join(lines)


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == PACKAGE


def in_namespace(text: str, namespace: str) -> str:
    """Ops defined and called in a namespace of their own."""
    text = text.replace(f'NAMESPACE = "{PACKAGE}"', f'NAMESPACE = "{namespace}"')
    return text.replace(f"torch.ops.{PACKAGE}.", f"torch.ops.{namespace}.").replace(
        f'"{PACKAGE}::', f'"{namespace}::'
    )


def without_compiled_backends(text: str) -> str:
    """`backends/__init__.py` without the declarations of what is left out."""
    return re.sub(
        rf'^registry\.declare\("(?:{"|".join(COMPILED)})".*\n', "", text, flags=re.MULTILINE
    )


def build(output: Path) -> Path:
    """Write the folder; returns the variant's."""
    package = ROOT / PACKAGE
    version = re.search(r'"(.+)"', (package / "_version.py").read_text())
    files = {relative: (package / relative).read_text() for relative in sources(package)}
    digest = hashlib.sha256("".join(f"{path}\n{text}" for path, text in files.items()).encode())
    name = f"{PACKAGE}_{digest.hexdigest()[:12]}"
    variant = output / "build" / VARIANT
    if variant.exists():
        shutil.rmtree(variant)
    for relative, text in files.items():
        if relative == Path("backends/__init__.py"):
            text = without_compiled_backends(text)
        target = variant / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(in_namespace(with_relative_imports(text, relative), name))
    metadata = {
        "id": name,
        "name": PACKAGE.replace("_", "-"),
        "version": KERNEL_VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copy(ROOT / "LICENSE", output / "LICENSE")
    assert version is not None
    (output / "README.md").write_text(CARD.format(package=PACKAGE, version=version[1]))
    return variant


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=ROOT / "dist" / "hub", help="folder (default: dist/hub)"
    )
    variant = build(parser.parse_args().output)
    print(
        f"{sum(path.stat().st_size for path in variant.rglob('*')) / 1024:.0f} KiB  {variant}",
        file=sys.stdout,
    )


if __name__ == "__main__":
    main()
