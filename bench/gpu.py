"""Times and memory on one GPU, after a look at correctness: JSON and a picture, in under 8 minutes.

    python bench/gpu.py [--save]            on a machine with a CUDA GPU
    python bench/gpu.py --dry-run           the whole script on tiny sizes in Triton's interpreter

For each size the batch form ``lse_i = log Σ_{j≠i} exp(a_i·a_j / τ)`` of unit rows in bfloat16 is compared
with float64 on the inputs that are then timed; where it fails nothing is timed. Times are medians over
calls that alternate between us and the peers, on inputs that rotate past the cache. Their unit is
u = one cuBLAS bfloat16 product n × n × d in the same run: materialising needs 3 of them and n² memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

if __name__ == "__main__" and "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import outputs
import torch
from torch import Tensor
from torch.nn.functional import normalize

import action_kernels
from action_kernels.ops import pairwise_lse, registry, sample_pixels, sampled_features

MIB = 1 << 20
SCALE = 10.0  # τ = 0.1
LARGEST_ERROR = {
    "lse": 1e-5,
    "gradient": 1e-2,
}  # bfloat16 weights round by 2⁻⁹; PyTorch's own: ~5e-3
CHECKED_ROWS = 256
RESERVE = 120.0  # seconds kept for us at all sizes: peers are left out first
QUEUE_CYCLES = 4_000_000  # about 2 ms
PYRAMID = ((256, 16), (128, 32), (64, 64), (32, 128), (16, 256))  # channels and side of each level


@dataclass(frozen=True)
class Plan:
    """What is measured: sizes, how long, and where."""

    device: str
    sizes: tuple[tuple[int, int], ...]
    headline: tuple[int, int]
    peer_sizes: frozenset[tuple[int, int]]
    seconds_per_size: float
    seconds_in_all: float


GPU_PLAN = Plan(
    device="cuda",
    sizes=tuple((n, d) for d in (128, 64, 256, 496) for n in (4096, 16384, 65536, 131072)),
    headline=(524288, 128),
    # Compiling a peer takes 10 to 20 s a shape: all sizes at d = 128, one of the others.
    peer_sizes=frozenset(
        [(n, 128) for n in (4096, 16384, 65536, 131072)] + [(16384, d) for d in (64, 256, 496)]
    ),
    seconds_per_size=4.0,
    seconds_in_all=450.0,
)
DRY_PLAN = Plan(
    device="cpu",
    sizes=((40, 16), (64, 32)),
    headline=(96, 16),
    peer_sizes=frozenset([(40, 16)]),
    seconds_per_size=0.0,
    seconds_in_all=300.0,
)


@dataclass
class Timing:
    """Milliseconds of one candidate: medians, and the quartiles of forward and backward together."""

    name: str
    forward: float | None = None
    backward: float | None = None
    both: float | None = None
    quartiles: tuple[float, float] | None = None
    peak_mib: float | None = None
    why_not: str | None = None


@dataclass
class Size:
    """All that is known of one (n, d)."""

    n: int
    d: int
    unit_ms: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)

    @property
    def ours(self) -> Timing | None:
        return next((timing for timing in self.timings if timing.name == "action_kernels"), None)


class Clock:
    """Milliseconds of calls on the device, and how much of the plan's time is left."""

    def __init__(self, plan: Plan) -> None:
        self.gpu = plan.device == "cuda"
        self._end = time.monotonic() + plan.seconds_in_all

    def left(self) -> float:
        return self._end - time.monotonic()

    def time(self, call: Callable[[], object]) -> float:
        if not self.gpu:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The GPU waits until the launches are queued: its own work is timed, not Python's.
        torch.cuda._sleep(QUEUE_CYCLES)
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def peak_mib(self, call: Callable[[], object]) -> float | None:
        """Largest memory that `call` had beyond what was there before, its results included."""
        if not self.gpu:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB


Loss = Callable[[Tensor], Tensor]

CUDA_CPP = "action_kernels, CUDA C++"  # the same op by its other kernels, where they were built


def backend_of(contender: str) -> str:
    return "cuda" if contender == CUDA_CPP else "triton"


def ours(rows: Tensor) -> Tensor:
    return pairwise_lse(rows, scale=SCALE, normalized=True)


def eager(rows: Tensor) -> Tensor:
    s = (rows @ rows.T).float() * SCALE
    return s.fill_diagonal_(-torch.inf).logsumexp(1)


def peers(plan: Plan) -> Iterator[tuple[str, Loss]]:
    """Those that are installed. Each gives one value a row whose gradient costs the same work."""
    yield "eager", eager
    torch.compiler.reset()  # past eight shapes of one function it falls back to eager
    backend = "inductor" if plan.device == "cuda" else "eager"
    yield "torch.compile", torch.compile(_eager_out_of_place, backend=backend, dynamic=False)
    yield "FlexAttention", _flex_attention(plan)
    if importlib.util.find_spec("inf_cl"):
        yield "inf-cl", _inf_cl
    if importlib.util.find_spec("cut_cross_entropy"):
        yield "cut-cross-entropy", _cut_cross_entropy


def _eager_out_of_place(rows: Tensor) -> Tensor:
    s = (rows @ rows.T).float() * SCALE
    position = torch.arange(len(rows), device=rows.device)
    return s.masked_fill(position[:, None] == position, -torch.inf).logsumexp(1)


def _flex_attention(plan: Plan) -> Loss:
    from torch.nn.attention.flex_attention import flex_attention

    def off_diagonal(score: Tensor, _b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(q == k, -torch.inf, score)

    attend = (
        torch.compile(flex_attention, dynamic=False) if plan.device == "cuda" else flex_attention
    )

    def lse(rows: Tensor) -> Tensor:
        x = rows[None, None]
        return attend(x, x, x, score_mod=off_diagonal, scale=SCALE, return_lse=True)[1].flatten()

    return lse


def _inf_cl(rows: Tensor) -> Tensor:
    """Its loss leaves the diagonal in and subtracts it: the same products."""
    from inf_cl import cal_flash_loss

    labels = torch.arange(len(rows), device=rows.device)
    return cal_flash_loss(rows, rows, labels, torch.tensor(SCALE, device=rows.device))


def _cut_cross_entropy(rows: Tensor) -> Tensor:
    """Likewise: cross-entropy of row i against class i of n."""
    from cut_cross_entropy import linear_cross_entropy

    labels = torch.arange(len(rows), device=rows.device)
    return linear_cross_entropy(rows * SCALE, rows, labels, reduction="none")


def make_rows(n: int, d: int, plan: Plan) -> list[Tensor]:
    """Sets of unit rows, as many as pass a 50 MB cache, two at least and eight at most."""
    sets = max(2, min(8, 2 + (100 * MIB) // (n * d * 2))) if plan.device == "cuda" else 2
    generator = torch.Generator(plan.device).manual_seed(n + d)
    made = []
    for _ in range(sets):
        rows = torch.randn(n, d, device=plan.device, generator=generator)
        made.append(normalize(rows).bfloat16().requires_grad_())
    return made


def check(rows: Tensor, upstream: Tensor) -> dict[str, float]:
    """Relative errors against float64 at some rows; every row's lse enters the gradient of each."""
    lse = ours(rows)
    (gradient,) = torch.autograd.grad(lse, rows, upstream)
    n = len(rows)
    chosen = torch.randperm(n, device=rows.device)[:CHECKED_ROWS]
    weights = []
    exact_lse = []
    for part in chosen.split(32):
        s = _products(rows.detach(), part) * SCALE
        s[torch.arange(len(part), device=s.device), part] = -torch.inf
        exact_lse.append(s.logsumexp(1))
        own = upstream.double()[part, None] * (s - exact_lse[-1][:, None]).exp()
        weights.append(own + upstream.double() * (s - lse.detach().double()).exp())
    exact = torch.cat([SCALE * _weighted_sum(w, rows.detach()) for w in weights])
    return {
        "lse": _relative(lse[chosen], torch.cat(exact_lse)),
        "gradient": _relative(gradient[chosen], exact),
    }


def _products(rows: Tensor, part: Tensor) -> Tensor:
    chosen = rows[part].double()
    return torch.cat([chosen @ chunk.double().T for chunk in rows.split(1 << 16)], 1)


def _weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    sums = [
        w @ chunk.double()
        for w, chunk in zip(weights.split(1 << 16, 1), rows.split(1 << 16), strict=True)
    ]
    return torch.stack(sums).sum(0)


def _relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual.detach().double() - exact).norm() / exact.norm())


def time_unit(rows: Sequence[Tensor], clock: Clock) -> float:
    """Milliseconds of the product n × n × d, in blocks of rows where n² does not fit."""
    a = rows[0].detach()
    block = min(len(a), max(1, (8 << 30) // (2 * len(a)))) if clock.gpu else len(a)
    out = torch.empty(block, len(a), dtype=a.dtype, device=a.device)

    def product(x: Tensor) -> None:
        for part in x.split(block):
            torch.mm(part, x.T, out=out[: len(part)])

    product(a)
    return statistics.median(clock.time(lambda x=x: product(x.detach())) for x in (*rows, *rows))


def measure(n: int, d: int, plan: Plan, clock: Clock, with_peers: bool) -> Size:
    """Check, then time us and the peers in turn."""
    size = Size(n, d)
    rows = make_rows(n, d, plan)
    upstream = torch.rand(n, device=plan.device) / n
    size.errors = check(rows[0], upstream)
    wrong = {name: e for name, e in size.errors.items() if not e <= LARGEST_ERROR[name]}
    if wrong:
        print(f"wrong by {wrong}", file=sys.stderr)
        size.timings.append(Timing("action_kernels", why_not=f"not timed, errors: {wrong}"))
        return size
    size.unit_ms = time_unit(rows, clock)
    candidates = [("action_kernels", ours), *(peers(plan) if with_peers else ())]
    why_not = _why_not_cuda_cpp(plan, rows[0], upstream)
    if why_not is None:
        candidates.insert(1, (CUDA_CPP, ours))
    ready = []
    for name, loss in candidates:
        timing = Timing(name)
        size.timings.append(timing)
        if clock.left() < RESERVE and clock.gpu and name != "action_kernels":
            timing.why_not = "no time left"
        elif _warm_up(timing, loss, rows[0], upstream, clock):
            ready.append((timing, loss))
    _alternate(ready, rows, upstream, plan, clock)
    if why_not is not None:
        size.timings.append(Timing(CUDA_CPP, why_not=why_not))
    return size


def _why_not_cuda_cpp(plan: Plan, rows: Tensor, upstream: Tensor) -> str | None:
    """Why the CUDA C++ kernels are not timed, or None: they are there, and right."""
    missing = registry.unavailable("cuda", plan.device)
    if missing is not None:
        return missing
    with action_kernels.use_backend("cuda"):
        errors = check(rows, upstream)
    wrong = {name: e for name, e in errors.items() if not e <= LARGEST_ERROR[name]}
    return f"not timed, errors: {wrong}" if wrong else None


def _gradient(value: Tensor, rows: Tensor, upstream: Tensor) -> Tensor:
    # A peer may give a mean only: then one number weighs it.
    weight = upstream if value.shape == upstream.shape else torch.ones_like(value)
    (gradient,) = torch.autograd.grad(value, rows, weight.to(value.dtype))
    return gradient


def _step(loss: Loss, rows: Tensor, upstream: Tensor) -> Tensor:
    return _gradient(loss(rows), rows, upstream)


def _warm_up(timing: Timing, loss: Loss, rows: Tensor, upstream: Tensor, clock: Clock) -> bool:
    try:
        with action_kernels.use_backend(backend_of(timing.name)):
            _step(loss, rows, upstream)
            timing.peak_mib = clock.peak_mib(lambda: _step(loss, rows, upstream))
    except Exception as error:  # a peer that cannot is a result, not a failure
        if timing.name == "action_kernels":
            raise
        timing.why_not = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        if clock.gpu:
            torch.cuda.empty_cache()
        return False
    return True


def _alternate(
    ready: Sequence[tuple[Timing, Loss]],
    rows: Sequence[Tensor],
    upstream: Tensor,
    plan: Plan,
    clock: Clock,
) -> None:
    samples: dict[str, list[tuple[float, float, float]]] = {timing.name: [] for timing, _ in ready}
    end = time.monotonic() + plan.seconds_per_size
    for repeat in range(30):
        if repeat >= 3 and time.monotonic() > end:
            break
        x = rows[repeat % len(rows)]
        for timing, loss in ready:
            with action_kernels.use_backend(backend_of(timing.name)):
                samples[timing.name].append(_sample(loss, x, upstream, clock))
    for timing, _ in ready:
        forward, backward, both = zip(*samples[timing.name], strict=True)
        timing.forward, timing.backward = statistics.median(forward), statistics.median(backward)
        timing.both = statistics.median(both)
        low, _, high = statistics.quantiles(both, n=4)
        timing.quartiles = (low, high)


def _sample(loss: Loss, x: Tensor, upstream: Tensor, clock: Clock) -> tuple[float, float, float]:
    """Milliseconds of forward, backward and both, the last as one call: no wait in between."""
    values: list[Tensor] = []
    forward = clock.time(lambda: values.append(loss(x)))
    backward = clock.time(lambda: _gradient(values.pop(), x, upstream))
    return forward, backward, clock.time(lambda: _step(loss, x, upstream))


def time_sampling(plan: Plan, clock: Clock) -> dict[str, float]:
    """Microseconds of the two sampling ops; on a GPU as replays of a CUDA graph."""
    side = 256 if clock.gpu else 16
    levels = PYRAMID if clock.gpu else tuple((4, max(1, s // 16)) for _, s in PYRAMID)
    logits = torch.randn(8 if clock.gpu else 2, 4, side, side, device=plan.device)
    # Quarters: no confidence is so near the threshold that its rounding decides who is drawn.
    logits = (4 * logits).round() / 4
    labels = logits.argmax(1)
    maps = [torch.randn(len(logits), c, s, s, device=plan.device) for c, s in levels]
    index = torch.randint(labels.numel(), (1024 if clock.gpu else 8,), device=plan.device)
    draws = 256 if clock.gpu else 4

    def drawn(seed: int | None = None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return sample_pixels(
            logits, labels, draws, num_classes=4, threshold=0.97, generator=generator
        )[0]

    def near() -> list[Tensor]:
        return [sampled_features(m, index, (side, side)) for m in maps]

    calls: dict[str, tuple[Callable[[], object], bool]] = {
        "sample_pixels": (drawn, _same_pixels(drawn)),
        "sampled_features": (near, _same_features(near)),
    }
    for name in (name for name, (_, right) in calls.items() if not right):
        print(f"{name} is wrong: not timed")
    return {name: _replayed(call, clock) * 1e3 for name, (call, right) in calls.items() if right}


def _same_pixels(drawn: Callable[[int], Tensor]) -> bool:
    ours = drawn(7)
    with action_kernels.use_backend("reference"):
        return torch.equal(ours, drawn(7))


def _same_features(near: Callable[[], list[Tensor]]) -> bool:
    ours = near()
    with action_kernels.use_backend("reference"):
        pairs = zip(ours, near(), strict=True)
        return all(_relative(mine, right.double()) < 1e-6 for mine, right in pairs)


def _replayed(call: Callable[[], object], clock: Clock) -> float:
    if not clock.gpu:
        return clock.time(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    repeats = 20
    times = [clock.time(lambda: [graph.replay() for _ in range(repeats)]) for _ in range(10)]
    return statistics.median(times) / repeats


def judge(
    sizes: Sequence[Size], headline: Size, sampling: dict[str, float]
) -> list[dict[str, Any]]:
    """Each goal, what was measured, and whether it was met."""
    goals = []

    def goal(what: str, measured: float | None, limit: float) -> None:
        met = measured is not None and measured <= limit
        goals.append({"goal": what, "measured": measured, "limit": limit, "met": met})

    for size in sizes:
        mine, where = size.ours, f"n={size.n}, d={size.d}"
        if mine is None or mine.both is None or size.unit_ms is None:
            goal(f"correct at {where}", None, 0)
            continue
        if size.n >= 16384 and size.d == 128:
            goal(f"forward+backward in u, {where}", mine.both / size.unit_ms, 4.0)
        if mine.peak_mib is not None:
            goal(f"MiB, {where}", mine.peak_mib, 6 * size.n * size.d * 4 / MIB + 64)
        others = [t for t in size.timings if t is not mine and t.both is not None]
        if others:
            fastest = min(others, key=lambda t: t.both or 0.0)
            goal(f"ms beside {fastest.name}, {where}", mine.both, fastest.both or 0.0)
    mine = headline.ours
    goal("headline, ms", mine.both if mine else None, 600.0)
    goal("headline, MiB", mine.peak_mib if mine else None, 2048.0)
    goal("sample_pixels, µs", sampling.get("sample_pixels"), 60.0)
    goal("sampled_features, µs", sampling.get("sampled_features"), 150.0)
    return goals


def print_size(size: Size) -> None:
    unit = f"u = {size.unit_ms:.3f} ms" if size.unit_ms else "no unit"
    errors = ", ".join(f"{name} {error:.1e}" for name, error in size.errors.items())
    print(f"\nn = {size.n}, d = {size.d}: {unit}; relative errors: {errors}")
    for t in size.timings:
        if t.both is None or t.forward is None or t.backward is None or size.unit_ms is None:
            print(f"  {t.name:18} {t.why_not}")
            continue
        peak = "" if t.peak_mib is None else f"{t.peak_mib:9.1f} MiB"
        rate = 3 * 2 * size.n**2 * size.d / t.both / 1e9  # effective: of the three plain products
        print(
            f"  {t.name:18} {t.forward:9.3f} + {t.backward:9.3f}, both {t.both:9.3f} ms "
            f"= {t.both / size.unit_ms:5.2f} u, {rate:6.1f} TFLOP/s {peak}"
        )


def draw(sizes: Sequence[Size], d: int, path: Path, subtitle: str) -> None:
    """Time and memory against n, log-log, us and the peers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    chosen = sorted((size for size in sizes if size.d == d), key=lambda size: size.n)
    for name in dict.fromkeys(t.name for size in chosen for t in size.timings):
        own = [(s.n, t) for s in chosen for t in s.timings if t.name == name and t.both is not None]
        style = {
            "marker": "o",
            "linewidth": 2.5 if name == "action_kernels" else 1.2,
            "label": name,
        }
        if own:
            left.plot([n for n, _ in own], [t.both for _, t in own], **style)
        peaks = [(n, t.peak_mib) for n, t in own if t.peak_mib is not None]
        if peaks:
            right.plot([n for n, _ in peaks], [peak for _, peak in peaks], **style)
    units = [(s.n, s.unit_ms) for s in chosen if s.unit_ms is not None]
    left.plot([n for n, _ in units], [u for _, u in units], "k:", label="u: one product")
    left.set(title=f"forward + backward, d = {d}", xlabel="rows", ylabel="ms")
    right.set(title="extra memory", xlabel="rows", ylabel="MiB")
    for axes in (left, right):
        if axes.lines:
            axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(subtitle, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def describe_machine(plan: Plan) -> dict[str, str]:
    import triton

    gpu = torch.cuda.get_device_name() if plan.device == "cuda" else "none: Triton's interpreter"
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}


Result = TypeVar("Result")


def _or_else(call: Callable[[], Result], otherwise: Result) -> Result:
    """One failure, shown in full, costs its own measurement and no other."""
    try:
        return call()
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        return otherwise


def _measured(n: int, d: int, plan: Plan, clock: Clock, with_peers: bool) -> Size:
    failed = Size(n, d, timings=[Timing("action_kernels", why_not="it failed, see above")])
    size = _or_else(lambda: measure(n, d, plan, clock, with_peers), failed)
    print_size(size)
    return size


def run(plan: Plan, output: Path) -> dict[str, Any]:
    clock = Clock(plan)
    machine = describe_machine(plan)
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    with action_kernels.use_backend("triton"):
        sampling = _or_else(lambda: time_sampling(plan, clock), dict[str, float]())
        headline = _measured(*plan.headline, plan, clock, with_peers=False)
        sizes = [
            _measured(n, d, plan, clock, with_peers=(n, d) in plan.peer_sizes)
            for n, d in plan.sizes
        ]
    result = {
        "dry_run": plan.device != "cuda",
        "machine": machine,
        "scale": SCALE,
        "complete": len(sampling) == 2 and all(s.unit_ms is not None for s in (headline, *sizes)),
        "sampling_us": sampling,
        "headline": asdict(headline),
        "sizes": [asdict(size) for size in sizes],
        "goals": judge(sizes, headline, sampling)
        if plan.device == "cuda"
        else "a dry run has none",
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    picture_d = plan.headline[1]
    draw([*sizes, headline], picture_d, output / "gpu.png", machine["gpu"])
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in the interpreter")
    parser.add_argument(
        "--output", type=Path, help="a folder; default: .benchmarks, for a dry run a temporary one"
    )
    outputs.add_save(parser)
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA GPU here; --dry-run shows that the script runs through", file=sys.stderr)
        return 2
    if importlib.util.find_spec("matplotlib") is None:
        print("the picture needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    default = Path(tempfile.mkdtemp()) if options.dry_run else outputs.results(options.save)
    output = options.output or default
    result = run(DRY_PLAN if options.dry_run else GPU_PLAN, output)
    print(f"\nwritten: {output / 'gpu.json'}, {output / 'gpu.png'}")
    if options.dry_run:
        print("a dry run: the times are the interpreter's and say nothing of a GPU")
    else:
        for goal in result["goals"]:
            print(f"{'met ' if goal['met'] else 'MISSED'} {goal}")
    return 0 if result["complete"] else 1


if __name__ == "__main__":
    sys.exit(main())
