"""The tables of the README and the site, from bench/results/*.json: `python docs/tables.py` writes them.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, and is never written by hand. With ``--check``
nothing is written, and a table that differs from the results is an error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", ROOT / "docs" / "numbers.md"]
PLACE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OURS, BFLOAT16 = "action_kernels", "action_kernels, bfloat16"
COLUMNS = {  # of the tables of pairwise_lse
    OURS: OURS,
    "its bfloat16": BFLOAT16,
    "smart, compiled": "smart PyTorch, compiled",
    "torch.compile": "torch.compile",
    "eager": "eager",
}


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def number(value: float) -> str:
    """Three digits, and thousands in full."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value < 1 else f"{value:#.3g}"


def milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2g} ms"


def pairwise(dims: Sequence[int], memory: bool) -> str:
    rows = []
    for size in load("pairwise-cpu")["sizes"]:
        if size["d"] not in dims:
            continue
        cells = [_contender(size["contenders"].get(name, {}), memory) for name in COLUMNS.values()]
        sizes = [str(size["n"])] if len(dims) == 1 else [str(size["d"]), str(size["n"])]
        rows.append([*sizes, milliseconds(size["unit_ms"]["u"]["median"]), *cells])
    head = ["n"] if len(dims) == 1 else ["d", "n"]
    return table([*head, "u", *COLUMNS], rows)


def _contender(entry: dict[str, Any], memory: bool) -> str:
    if "ratio_to_u" not in entry:
        return "–"
    ratio = f"{number(entry['ratio_to_u'])} u"
    return f"{ratio}, {entry['peak_mib']:.0f} MiB" if memory and "peak_mib" in entry else ratio


def small_calls() -> str:
    rows = [
        [
            str(size["n"]),
            *(
                f"{1e3 * size[name]['median']:.0f} µs"
                for name in ("unit_ms", "both_ms", "nothing_ms")
            ),
            f"{number(size['ratio_to_u'])} u",
        ]
        for size in load("pairwise-cpu")["small"]
    ]
    return table(["n", "u", "action_kernels", "a function that computes nothing", ""], rows)


def whole_losses() -> str:
    compared = load("pairwise-cpu")["losses"]
    names = list(compared[0]["losses"])
    rows = []
    for name in names:
        cells = [
            f"{milliseconds(entry['both_ms']['median'])}, {number(entry['ratio_to_kernel'])} ×"
            for entry in (size["losses"][name] for size in compared)
        ]
        rows.append([f"`{name}`" if "-" not in name else f"{name}, SupConLoss", *cells])
    return table(["", *(f"n = {size['n']}" for size in compared)], rows)


def saacl() -> str:
    return _by_contender("saacl-cpu")


def saacl_avx2() -> str:
    return _by_contender("saacl-cpu-avx2")


def _by_contender(name: str) -> str:
    results = load(name)["results"]
    sizes = sorted({result["n"] for result in results})
    cells = {
        (result["contender"], result["n"]): f"{milliseconds(result['median_ms'])}, "
        f"{number(result['ratio_to_gemm'])} u, {result['peak_memory_mib']:.0f} MiB"
        for result in results
    }
    contenders = list(dict.fromkeys(result["contender"] for result in results))
    rows = [[name, *(cells.get((name, n), "–") for n in sizes)] for name in contenders]
    return table(["", *(f"n = {n}" for n in sizes)], rows)


def parts() -> str:
    """Each way of computing the parts of ACTION++, ours first."""
    rows = []
    for name in ("heads", "anatomical-contrast", "sampling"):
        for way, found in load(f"{name}-cpu")["results"].items():
            memory = f"{found['peak_memory_mib']:.0f} MiB"
            rows.append([name.replace("-", " "), way, milliseconds(found["median_ms"]), memory])
    return table(["", "way", "median", "memory beyond the inputs"], rows)


def trainer_step() -> str:
    report = load("trainer_step")
    rows = []
    for name, step in report["steps"].items():
        ratio = report["ratios"][name]
        rows.append(
            [
                name.replace("_", " "),
                f"{step['fastest_seconds']:.2f} s ({ratio['fastest_seconds']:.2f} ×)",
                f"{step['median_seconds']:.2f} s ({ratio['median_seconds']:.2f} ×)",
                f"{step['peak_bytes'] / 2**20:.0f} MiB ({ratio['peak_bytes']:.2f} ×)",
            ]
        )
    return table(["", "fastest", "median", "peak memory of the process"], rows)


def reproduced(number: int, scale: str = "0.05") -> str:
    """A table of the paper: mean Dice of the test list, last checkpoint, with the spread of the seeds."""
    results = load(f"reproduction/table{number}-scale-{scale}")["results"]
    settings = list(dict.fromkeys(result["setting"] for result in results))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        rows.setdefault((result["part"], result["label"]), {})[result["setting"]] = result
    parts = any(part for part, _ in rows)
    lines = []
    for (part, label), found in rows.items():
        start = [part, label] if parts else [label]
        cells = [cell for name in settings for cell in _beside_the_paper(found[name], parts)]
        lines.append(start + cells)
    ablation = any(result["paper_setting"] not in settings for result in results)
    where = [name.upper().replace("-", " ") + " %" for name in settings]
    paper = "paper, on LA 10 %" if ablation else "paper"
    names = [paper, "center's share"] if parts else [paper]
    head = ["part", "row"] if parts else [""]
    return table([*head, *(cell for name in where for cell in (name, *names))], lines)


def _beside_the_paper(result: dict[str, Any], with_share: bool) -> list[str]:
    dice = result["scores"].get("last", {}).get("mean", {}).get("paper_dice")
    paper, share = result["paper"], result["center_share"]
    cells = [
        _spread(dice) if dice else "–",
        f"{paper['dsc']:.1f}" if paper else "–",
    ]
    return [*cells, f"{share:.1g}" if share else "–"] if with_share else cells


def _spread(found: dict[str, Any]) -> str:
    mean = f"{found['mean']:.1f}"
    return f"{mean} ± {found['spread']:.1f}" if found["count"] > 1 else mean


TABLES: dict[str, Callable[[], str]] = {
    "paper-1": partial(reproduced, 1),
    "paper-5": partial(reproduced, 5),
    "paper-6": partial(reproduced, 6),
    "pairwise": lambda: pairwise([128], memory=True),
    "pairwise-small": small_calls,
    "pairwise-dims": lambda: pairwise([64, 256, 496], memory=False),
    "losses": whole_losses,
    "saacl": saacl,
    "saacl-avx2": saacl_avx2,
    "parts": parts,
    "trainer-step": trainer_step,
}


def filled(text: str) -> str:
    """A page with its tables as the results have them."""
    return PLACE.sub(lambda match: match[1] + "\n" + TABLES[match[2]]() + "\n" + match[4], text)


def main(arguments: Sequence[str]) -> int:
    stale = 0
    for page in PAGES:
        text = page.read_text()
        if (new := filled(text)) != text:
            stale += 1
            print(
                f"{page.relative_to(ROOT)}: {'differs from the results' if arguments else 'written'}"
            )
            if not arguments:
                page.write_text(new)
    return stale if arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
