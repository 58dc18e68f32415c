"""`pairwise_lse(features, scale=…)` on the CPU: time, share of the processor's peak, memory, beside its peers.

    python bench/bench_pairwise.py [--quick] [--save]    the whole table
    pytest bench/bench_pairwise.py --benchmark           a short run

Symmetric form, unit rows, τ = 0.1; forward, backward and both. On each size every contender's lse and
gradient are first compared with the float64 reference on the inputs that are then timed: where they are
off, no time. Times are medians over rounds in which all contenders take turns. u is one float32
product n × n × d (`torch.mm(F, F.T, out=…)`), in the same turns. Our work is 4 n² d floating-point
operations, half a product forward and one and a half backward; its rate is given as a share of the peak
of multiply-adds, which fma_peak.cpp measures first. Small calls follow (with the product alone in turns, and beside them
what PyTorch's autograd takes for a function that computes nothing), the whole losses and the queue form.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import outputs
import peers
import plot_pairwise
import pytest
import torch
from peak_memory import peak_memory
from torch import Tensor

from action_kernels import class_centers, saacl_loss, supcon_loss, use_backend
from action_kernels.ops import pairwise_lse

NAME = "pairwise-cpu"
OURS = "action_kernels"
UNITS = {"u": torch.float32, "u in bfloat16": torch.bfloat16}
LARGEST_BYTES = 24 << 30
# Of lse and gradient. bfloat16 is compared with float64 on the same rounded rows: its weights round by 2⁻⁹.
LARGEST_ERROR = {torch.float32: (2e-6, 5e-5), torch.bfloat16: (1e-4, 1e-2)}


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long. Peers that compile for each d: at `main_d` only."""

    sizes: tuple[int, ...] = (512, 2048, 8192, 16384)
    dims: tuple[int, ...] = (128, 64, 256, 496)
    contenders: tuple[str, ...] = tuple(peers.CONTENDERS)
    main_d: int = 128
    memory: bool = True
    seconds_a_size: float = 4.0
    largest_seconds: float = 6.0  # of one call, of at least five; of peers at other d a quarter
    small: tuple[int, ...] = (64, 128, 256, 512)
    losses: tuple[int, ...] = (2048, 8192)
    queue: tuple[int, int] = (1024, 12288)


QUICK = Plan(
    sizes=(512, 2048), dims=(128, 64), seconds_a_size=1.0, largest_seconds=2.0, losses=(2048,)
)

Times = dict[str, dict[str, float]]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "median": 1e3 * statistics.median(seconds),
        "fastest": 1e3 * min(seconds),
        "slowest": 1e3 * max(seconds),
    }


def in_turns(
    calls: dict[str, Callable[[], Sequence[float]]], seconds: float, rounds: int = 25
) -> dict[str, list]:
    """What each call returns, over 3 to `rounds` rounds of turns that take about `seconds` in all."""
    found: dict[str, list] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    for done in range(1, rounds + 1):
        for name, call in calls.items():
            found[name].append(call())
        if done >= 3 and time.perf_counter() - start > seconds:
            break
    return found


def forward_backward(loss: Callable[[Tensor], Tensor], features: Tensor, grad: Tensor):
    """A call that returns the seconds of forward, backward and both."""

    def call() -> tuple[float, float, float]:
        features.grad = None
        start = time.perf_counter()
        value = loss(features)
        middle = time.perf_counter()
        value.backward(grad)
        end = time.perf_counter()
        return middle - start, end - middle, end - start

    return call


def product(rows: Tensor, columns: Tensor) -> Callable[[], tuple[float]]:
    """A call that returns the seconds of one product of all rows with all columns."""
    out = rows.new_empty(len(rows), len(columns))

    def call() -> tuple[float]:
        start = time.perf_counter()
        torch.mm(rows, columns.T, out=out)
        return (time.perf_counter() - start,)

    return call


# One size ----------------------------------------------------------------------------------------


def reference(name: str, n: int, d: int) -> tuple[Tensor, Tensor]:
    """lse and gradient in float64, of the rows as they are rounded for the contender."""
    features, grad = peers.inputs(name, n, d)
    exact = features.detach().double().requires_grad_()
    with use_backend("reference"):
        lse = pairwise_lse(exact, scale=peers.SCALE)
        lse.backward(grad.double())
    return lse.detach(), exact.grad


def gate(name: str, n: int, d: int, expected: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Relative errors and the seconds of a call once compiled; "left_out" where an error is too large."""
    features, grad = peers.inputs(name, n, d)
    peers.warm_up(name, n, d)
    start = time.perf_counter()
    lse = peers.CONTENDERS[name](features, peers.SCALE)
    lse.backward(grad)
    seconds = time.perf_counter() - start
    errors = [
        float((mine.double() - exact).norm() / exact.norm())
        for mine, exact in zip((lse.detach(), features.grad), expected, strict=True)
    ]
    entry: dict[str, Any] = {"errors": dict(zip(("lse", "gradient"), errors, strict=True))}
    limits = LARGEST_ERROR[features.dtype]
    if not all(error < limit for error, limit in zip(errors, limits, strict=True)):
        entry["left_out"] = f"wrong: errors of lse and gradient {errors[0]:.1e}, {errors[1]:.1e}"
    return {**entry, "seconds": seconds}


def why_not(name: str, n: int, d: int, plan: Plan, before: dict[str, tuple[int, float]]) -> str:
    """Why a contender is left out at this size; empty where it is not."""
    if reason := peers.missing(name):
        return reason
    if name in peers.COMPILED_A_SIZE and d != plan.main_d:
        return f"needs a compilation of its own: measured at d = {plan.main_d}"
    needed = peers.BYTES_A_PAIR.get(name, 0) * n * n
    if needed > min(LARGEST_BYTES, machine.available_bytes()):
        return f"needs about {needed / 2**30:.0f} GiB"
    if name in before:
        smaller, seconds = before[name]
        whole = d == plan.main_d or name.startswith(OURS)
        limit = plan.largest_seconds if whole else plan.largest_seconds / 4
        if (predicted := seconds * (n / smaller) ** 2) > limit:
            return f"would take about {predicted:.0f} s a call"
    return ""


def measure_size(
    n: int, d: int, plan: Plan, before: dict[str, tuple[int, float]], peak: float | None
) -> dict[str, Any]:
    """All contenders at one size; `before` holds the last size and seconds of each, and is updated."""
    entries: dict[str, dict[str, Any]] = {}
    expected: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
    for name in plan.contenders:
        if reason := why_not(name, n, d, plan, before):
            entries[name] = {"left_out": reason}
            continue
        dtype = peers.inputs(name, 1, 1)[0].dtype
        if dtype not in expected:
            expected[dtype] = reference(name, n, d)
        entries[name] = gate(name, n, d, expected[dtype])
        before[name] = n, entries[name].pop("seconds")
    units = time_size(n, d, entries, plan.seconds_a_size)
    add_ratios(entries, units["u"]["median"], 4.0 * n * n * d, peak)
    if plan.memory:
        add_memory(n, d, entries, plan)
    return {"n": n, "d": d, "unit_ms": units, "contenders": entries}


def time_size(n: int, d: int, entries: dict[str, dict[str, Any]], seconds: float) -> Times:
    """Adds times to all entries that passed the gate; returns those of the products."""
    calls: dict[str, Callable[[], Sequence[float]]] = {}
    for name, dtype in UNITS.items():
        rows = peers.inputs(OURS, n, d)[0].detach().to(dtype)
        calls[name] = product(rows, rows)
    for name in timed(entries):
        features, grad = peers.inputs(name, n, d)
        calls[name] = forward_backward(
            lambda x, f=peers.CONTENDERS[name]: f(x, peers.SCALE), features, grad
        )
    found = in_turns(calls, seconds)
    for name in timed(entries):
        for part, values in zip(
            ("forward", "backward", "both"), zip(*found[name], strict=True), strict=True
        ):
            entries[name][f"{part}_ms"] = spread(values)
        entries[name]["rounds"] = len(found[name])
    return {name: spread([call[0] for call in found[name]]) for name in UNITS}


def timed(entries: dict[str, dict[str, Any]]) -> Iterable[str]:
    return [name for name, entry in entries.items() if "left_out" not in entry]


def add_ratios(
    entries: dict[str, dict[str, Any]], unit: float, work: float, peak: float | None
) -> None:
    """Ratios to u, the contender's time as a multiple of ours, and our share of the peak."""
    ours = entries.get(OURS, {}).get("both_ms")
    for name in timed(entries):
        entry = entries[name]
        both = entry["both_ms"]["median"]
        entry["ratio_to_u"] = both / unit
        if ours:
            entry["times_ours"] = both / ours["median"]
        if name == OURS and peak:
            entry["share_of_fma_peak"] = work / (both * 1e-3) / (peak * 1e9)


def add_memory(n: int, d: int, entries: dict[str, dict[str, Any]], plan: Plan) -> None:
    """Peak memory beyond the inputs: ours at all sizes, the others at one d (a process each: seconds)."""
    for name in timed(entries):
        if name == OURS or d == plan.main_d:
            entries[name]["peak_mib"] = peak_memory(peers.step, name, n, d) / 2**20


# Small calls -------------------------------------------------------------------------------------


class Nothing(torch.autograd.Function):
    """Of the form of `pairwise_lse`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return features.new_empty(len(features))

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def measure_small(n: int, d: int, seconds: float) -> dict[str, Any]:
    """Ours, the product and a function that computes nothing, in turns: caches stay warm, as in a loop of their own."""
    features, grad = peers.inputs(OURS, n, d)
    rows = features.detach()
    calls = {
        "u": product(rows, rows),
        OURS: forward_backward(lambda x: peers.fused(x, peers.SCALE), features, grad),
        "nothing": forward_backward(Nothing.apply, features, grad),
    }
    found = in_turns(calls, seconds, rounds=1000)
    unit, ours, nothing = (spread([call[-1] for call in found[name]]) for name in calls)
    return {
        "n": n, "d": d, "unit_ms": unit, "both_ms": ours, "nothing_ms": nothing,
        "ratio_to_u": ours["median"] / unit["median"],
    }  # fmt: skip


# Whole losses ------------------------------------------------------------------------------------

CLASSES, DIM, TEMPERATURE = 4, 128, 0.1
PEER = "pytorch-metric-learning"


def loss_inputs(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(n, DIM, generator=generator).requires_grad_()
    return features, torch.randint(CLASSES, (n,), generator=generator)


def whole_losses(labels: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Losses of raw features; the last, where it is installed, is another library's `supcon_loss`."""
    centers = class_centers(CLASSES, DIM)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "saacl_loss": lambda x: saacl_loss(x, labels, centers.to(x.dtype), temperature=TEMPERATURE),
        "supcon_loss": lambda x: supcon_loss(
            x, labels, temperature=TEMPERATURE, num_classes=CLASSES
        ),
    }
    with contextlib.suppress(ImportError):
        from pytorch_metric_learning.losses import SupConLoss

        losses[PEER] = lambda x: SupConLoss(temperature=TEMPERATURE)(x, labels)
    return losses


def gradient_error(loss: Callable[[Tensor], Tensor], exact_loss, features: Tensor) -> float:
    """Of a loss's gradient, relative to that of `exact_loss` by the reference in float64."""
    exact = features.detach().double().requires_grad_()
    with use_backend("reference"):
        exact_loss(exact).backward()
    features.grad = None
    loss(features).backward()
    return float((features.grad.double() - exact.grad).norm() / exact.grad.norm())


def compare_losses(n: int, seconds: float) -> dict[str, Any]:
    """`saacl_loss` and `supcon_loss` as a whole against the bare kernel, and another library's SupCon."""
    features, labels = loss_inputs(n)
    losses = whole_losses(labels)
    entries: dict[str, dict[str, Any]] = {"pairwise_lse": {}}
    for name, loss in losses.items():
        exact_loss = losses["supcon_loss"] if name == PEER else loss
        error = gradient_error(loss, exact_loss, features)
        entries[name] = {"errors": {"gradient": error}}
        if not error < LARGEST_ERROR[torch.float32][1]:
            entries[name]["left_out"] = f"wrong: error of the gradient {error:.1e}"
    calls = {
        "pairwise_lse": forward_backward(
            lambda x: peers.fused(x, peers.SCALE), *peers.inputs(OURS, n, DIM)
        )
    }
    for name in set(losses).intersection(timed(entries)):
        calls[name] = forward_backward(losses[name], features, None)
    found = in_turns(calls, seconds)
    bare = statistics.median(call[2] for call in found["pairwise_lse"])
    for name, values in found.items():
        both = spread([call[2] for call in values])
        entries[name].update(both_ms=both, ratio_to_kernel=1e-3 * both["median"] / bare)
    if PEER not in losses:
        entries[PEER] = {"left_out": "pytorch-metric-learning is not installed"}
    return {"n": n, "d": DIM, "losses": entries}


def compare_queue(n: int, m: int, seconds: float) -> dict[str, Any]:
    """The queue form of `saacl_loss` (keys without gradient) against one product of its shape: it needs three."""
    features, labels = loss_inputs(n)
    keys, key_labels = (tensor.detach() for tensor in loss_inputs(m))
    centers = class_centers(CLASSES, DIM)

    def loss(x: Tensor) -> Tensor:
        return saacl_loss(
            x, labels, centers.to(x.dtype), temperature=TEMPERATURE,
            keys=keys.to(x.dtype), key_labels=key_labels,
        )  # fmt: skip

    error = gradient_error(loss, loss, features)
    assert error < LARGEST_ERROR[torch.float32][1], f"queue form: error of the gradient {error:.1e}"
    calls = {
        "u": product(features.detach(), keys),
        "saacl_loss": forward_backward(loss, features, None),
    }
    found = in_turns(calls, seconds)
    unit, both = (spread([call[-1] for call in found[name]]) for name in calls)
    return {
        "anchors": n, "keys": m, "d": DIM, "unit_ms": unit, "both_ms": both,
        "ratio_to_u": both["median"] / unit["median"],
    }  # fmt: skip


# The report --------------------------------------------------------------------------------------


def run(plan: Plan) -> dict[str, Any]:
    start = time.monotonic()
    peak, reason = machine.fma_peak()
    report: dict[str, Any] = {
        "title": "pairwise_lse",
        "scale": peers.SCALE,
        "machine": {**machine.describe(), "fma_peak_gflops": peak, "fma_peak_left_out": reason},
        "sizes": [],
    }
    print(json.dumps(report["machine"], indent=1), flush=True)
    for d in plan.dims:
        before: dict[str, tuple[int, float]] = {}
        for n in plan.sizes:
            report["sizes"].append(measure_size(n, d, plan, before, peak))
            show_size(report["sizes"][-1])
    seconds = plan.seconds_a_size
    report["small"] = [measure_small(n, plan.main_d, seconds / 4) for n in plan.small]
    show_small(report["small"])
    report["losses"] = [compare_losses(n, seconds) for n in plan.losses]
    report["queue"] = compare_queue(*plan.queue, seconds)
    show_losses(report)
    report["load_average_after"] = list(os.getloadavg())
    report["seconds"] = time.monotonic() - start
    print(f"\n{report['seconds']:.0f} s in all, load average {report['load_average_after'][0]:.1f}")
    return report


def show_size(size: dict[str, Any]) -> None:
    unit, half = (size["unit_ms"][name]["median"] for name in UNITS)
    print(f"\nn = {size['n']}, d = {size['d']}: u = {unit:.2f} ms, in bfloat16 {half:.2f} ms")
    for name, entry in size["contenders"].items():
        if "left_out" in entry:
            print(f"  {name:26} left out: {entry['left_out']}", flush=True)
            continue
        forward, backward, both = (entry[f"{part}_ms"] for part in ("forward", "backward", "both"))
        share = entry.get("share_of_fma_peak")
        print(
            f"  {name:26}{forward['median']:9.2f} +{backward['median']:9.2f} ={both['median']:9.2f} ms"
            f" ({both['fastest']:.2f} to {both['slowest']:.2f})  {entry['ratio_to_u']:6.2f} u"
            f"{entry.get('times_ours', float('nan')):7.2f} × ours"
            + (f"  {share:.0%} of peak" if share else "")
            + (f"  {entry['peak_mib']:.1f} MiB" if "peak_mib" in entry else ""),
            flush=True,
        )


def show_small(small: Sequence[dict[str, Any]]) -> None:
    print("\nsmall calls in microseconds: ours, the product, a function that computes nothing")
    for size in small:
        times = [1e3 * size[name]["median"] for name in ("both_ms", "unit_ms", "nothing_ms")]
        print(
            f"  n = {size['n']:<5}{times[0]:9.0f}{times[1]:9.0f}{times[2]:9.0f}  {size['ratio_to_u']:6.2f} u"
        )


def show_losses(report: dict[str, Any]) -> None:
    for compared in report["losses"]:
        print(f"\nwhole losses, n = {compared['n']}, d = {compared['d']}, forward and backward")
        for name, entry in compared["losses"].items():
            if "left_out" in entry:
                print(f"  {name:26} left out: {entry['left_out']}")
            else:
                print(
                    f"  {name:26}{entry['both_ms']['median']:9.2f} ms {entry['ratio_to_kernel']:6.2f} × the kernel"
                )
    queue = report["queue"]
    print(
        f"\nsaacl_loss, {queue['anchors']} anchors, {queue['keys']} keys without gradient, d = {queue['d']}:"
        f" {queue['both_ms']['median']:.2f} ms, {queue['ratio_to_u']:.2f} × the one product"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    outputs.add_save(parser)
    options = parser.parse_args(arguments)
    output = outputs.results(options.save) / f"{NAME}.json"
    picture = outputs.pictures(options.save) / f"{NAME}.png"
    save(run(QUICK if options.quick else Plan()), output, picture)


def save(report: dict[str, Any], output: Path, picture: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    plot_pairwise.draw(report, picture)
    print(f"{output}\n{picture}")


# The short run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [512, 2048])
def test_pairwise_lse(benchmark, n):
    size = measure_size(n, 128, QUICK, {}, machine.fma_peak()[0])
    show_size(size)
    assert OURS in timed(size["contenders"])
    benchmark.extra_info.update(size)
    benchmark.pedantic(peers.step(OURS, n, 128), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("n", [2048, 8192])
def test_whole_losses(benchmark, n):
    benchmark.extra_info.update(benchmark.pedantic(compare_losses, (n, 2.0)))


def test_queue_form(benchmark):
    benchmark.extra_info.update(benchmark.pedantic(compare_queue, (*QUICK.queue, 2.0)))


if __name__ == "__main__":
    main()
