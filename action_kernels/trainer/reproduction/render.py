"""A report as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import replace_file, write_json
from .collect import MEAN, MEASURES, Result, Statistic
from .report import Report
from .tables import Setting

NOTHING = "—"
DIGITS = {"paper_dice": 1, "paper_asd": 2, "dice": 1, "assd": 2, "hd95": 2}

Column = tuple[str, Callable[[Result], str]]


def write_report(report: Report, root: Path) -> list[Path]:
    """Write all forms; returns their paths."""
    texts = {".md": markdown(report), ".csv": as_csv(report), ".tex": latex(report)}
    paths = []
    for suffix, text in texts.items():
        paths.append(root / f"{report.name}{suffix}")
        _write(paths[-1], text)
    paths.append(root / f"{report.name}.json")
    write_json(paths[-1], as_json(report))
    return paths


def _write(path: Path, text: str) -> None:
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


# Numbers


def number(statistic: Statistic | None, digits: int, between: str = " ± ") -> str:
    """Mean and spread."""
    if statistic is None:
        return NOTHING
    spread = "" if statistic.spread is None else f"{between}{statistic.spread:.{digits}f}"
    return f"{statistic.mean:.{digits}f}{spread}"


def plain(value: float | None, digits: int, sign: str = "") -> str:
    return NOTHING if value is None else f"{value:{sign}.{digits}f}"


def columns(report: Report, class_name: str = MEAN) -> list[Column]:
    """The columns of a table of means or of one class."""

    def ours(checkpoint: Any, measure: str) -> Callable[[Result], str]:
        return lambda r: number(r.statistic(checkpoint, measure, class_name), DIGITS[measure])

    def theirs(measure: str) -> Callable[[Result], str]:
        return lambda r: plain(r.published(measure, class_name), DIGITS[measure])

    def difference(measure: str) -> Callable[[Result], str]:
        return lambda r: plain(r.difference(measure, class_name), DIGITS[measure], "+")

    found: list[Column] = []
    for name, measure in (("DSC %", "paper_dice"), ("ASD", "paper_asd")):
        found += [
            (f"{name}, last", ours("last", measure)),
            ("paper", theirs(measure)),
            ("Δ", difference(measure)),
        ]
    found += [
        ("DSC %, best on val", ours("best", "paper_dice")),
        ("ASD, best on val", ours("best", "paper_asd")),
    ]
    if report.best_on_test and class_name == MEAN:
        found.append(("DSC %, BEST ON TEST (chosen on it)", ours("best_on_test", "paper_dice")))
    found += [("ASSD", ours("last", "assd")), ("HD95", ours("last", "hd95"))]
    if class_name == MEAN:
        found.append(("failures", lambda r: str(r.failures) if seeds(r) else NOTHING))
        if report.table.ablation and any(r.center_share for r in report.results):
            found.append(("λ_a's share", lambda r: _share(r.center_share)))
        found.append(("seeds", lambda r: f"{seeds(r)} of {len(r.entry.runs)}"))
    return found


def _share(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.2g}"


def seeds(result: Result) -> int:
    """How many are finished."""
    return len(result.entry.runs) - len(result.missing)


# Markdown


def markdown(report: Report) -> str:
    lines = [f"# {report.title}", ""]
    for setting in report.settings:
        lines += [f"## {setting.title}", "", report.lengths(setting) + ".", ""]
        for part, results in report.parts(setting):
            lines += [f"### {part}", ""] if part else []
            lines += [*_markdown_table(columns(report), results), ""]
        lines += [
            f"Later work: {later.method} {later.dsc:.1f} / {plain(later.asd, 2)} ({later.protocol})."
            for later in report.later(setting)
        ]
        lines += [""] if report.later(setting) else []
        if not report.table.ablation and len(report.task(setting).foreground) > 1:
            for name in report.task(setting).foreground:
                lines += [f"### {name}", ""]
                lines += [*_markdown_table(columns(report, name), report.of(setting)), ""]
    lines += [f"- {note}" for note in (*report.notes(), *report.provenance())]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: Sequence[Column], results: Sequence[Result]) -> list[str]:
    heading = ["", *(name for name, _ in columns)]
    rows = [[r.entry.row.label, *(shown(r) for _, shown in columns)] for r in results]
    lines = [heading, ["---"] * len(heading), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


# CSV


def as_csv(report: Report) -> str:
    """A line for every setting, row, class, checkpoint and measure."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(
        ["title", "scale", "setting", "part", "row", "class", "checkpoint", "measure", "mean", "spread",
         "seeds", "paper", "paper_setting", "difference"]
    )  # fmt: skip
    for result in report.results:
        entry = result.entry
        for checkpoint, by_class in result.scores.items():
            for name, measures in by_class.items():
                for measure, statistic in measures.items():
                    last = checkpoint == "last"
                    writer.writerow(
                        [report.title, report.scale.factor, entry.setting.preset, entry.row.part,
                         entry.row.label, name, checkpoint, measure, f"{statistic.mean:.6g}",
                         _maybe(statistic.spread), statistic.count,
                         _maybe(result.published(measure, name) if last else None),
                         result.reported_setting if last else "",
                         _maybe(result.difference(measure, name) if last else None)]
                    )  # fmt: skip
    return text.getvalue()


def _maybe(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


# LaTeX


def latex(report: Report) -> str:
    """A tabular (booktabs) a setting, in a table environment whose caption says what was run."""
    blocks = [_latex_table(report, setting) for setting in report.settings]
    return "\n".join([f"% {line}" for line in report.provenance()] + blocks) + "\n"


def _latex_table(report: Report, setting: Setting) -> str:
    shown = [(name, f) for name, f in columns(report) if name not in ("ASSD", "HD95")]
    rows = []
    for part, results in report.parts(setting):
        if part:
            rows.append(rf"\multicolumn{{{len(shown) + 1}}}{{l}}{{{escaped(part)}}} \\")
        for result in results:
            cells = [result.entry.row.label, *(f(result) for _, f in shown)]
            rows.append(" & ".join(map(escaped, cells)) + r" \\")
    heading = " & ".join(["", *(escaped(name) for name, _ in shown)]) + r" \\"
    caption = f"{report.title}. {setting.title}: {report.lengths(setting)}. " + " ".join(
        report.notes()
    )
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{escaped(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * len(shown)}}}",
            r"\toprule", heading, r"\midrule", *rows, r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )  # fmt: skip


_ESCAPES = {
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "±": r"$\pm$", "×": r"$\times$", "λ": r"$\lambda$", "Δ": r"$\Delta$", "ζ": r"$\zeta$",
    "ρ": r"$\rho$", "τ": r"$\tau$", "—": "---", "“": "``", "”": "''", "−": "$-$",
}  # fmt: skip


def escaped(text: str) -> str:
    """Text as LaTeX shows it."""
    return "".join(_ESCAPES.get(character, character) for character in text)


# JSON


def as_json(report: Report) -> dict[str, Any]:
    """Everything that the other forms hold, and the runs."""
    return {
        "title": report.title,
        "scale": report.scale.factor,
        "command": report.command,
        "notes": report.notes(),
        "spent": asdict(report.spent),
        "results": [_result(result) for result in report.results],
        "measures": list(MEASURES),
    }


def _result(result: Result) -> dict[str, Any]:
    entry = result.entry
    return {
        "setting": entry.setting.preset,
        "part": entry.row.part,
        "row": entry.row.key,
        "label": entry.row.label,
        "runs": {str(seed): run.digest for seed, run in entry.runs.items()},
        "unfinished_seeds": list(result.missing),
        "failures": result.failures,
        "center_share": result.center_share,
        "paper": None if result.reported is None else asdict(result.reported),
        "paper_setting": result.reported_setting,
        "scores": {
            checkpoint: {
                name: {measure: asdict(statistic) for measure, statistic in measures.items()}
                for name, measures in by_class.items()
            }
            for checkpoint, by_class in result.scores.items()
        },
    }
