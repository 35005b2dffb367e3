"""Networks: one step, and the time to a ladder of losses on the three example problems, beside
torch-levenberg-marquardt, Adam and L-BFGS.

    python benchmarks/networks.py               # six tables, and results/networks.json
    python benchmarks/networks.py --smoke       # small sizes, nothing written
    python benchmarks/networks.py --only steps sinc
    legate --cpus 2 --gpus 0 benchmarks/networks.py --linalg legate     # or legate-split, torch

Every contender runs in a process of its own, so that its peak memory is its own: the growth of the
process's resident set over what it was when model and data were there. Times are wall and
processor seconds; on a busy machine only the latter compare. A step is an accepted one, rejected
trials included: median and quartiles of 15 (of 8 with 5,000 parameters, which twelve steps solve),
in the best of three processes, on one thread and on two. "nfev" and "njev" are evaluations of the
residuals and the Jacobian a step.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import _ladders  # noqa: E402
import torch  # noqa: E402  (after the path, so that a checkout needs no installation)
from _common import Counter as Calls  # noqa: E402
from _common import environment, footer, quartiles, table  # noqa: E402
from _ladders import METHODS, PEER, peer_trainer  # noqa: E402
from torch import Tensor, nn  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "networks.json"
SHAPES = {"20000 x 61": (20_000, 1, 20), "2000 x 5000": (2_000, 20, 227)}
STEPS = {"20000 x 61": 15, "2000 x 5000": 8}  # the cost is down to nothing soon after
SMOKE_SHAPES = {"2000 x 61": (2_000, 1, 20), "200 x 661": (200, 20, 30)}
OURS = ("ours", "ours, unaccelerated")
PARTS = ("steps", "wide", "sinc", "images", "burgers", "features")
# Widths of layers: five million parameters, mean squares of one output and cross entropy of ten.
WIDE = ((784, 2000, 1700, 1), (784, 2000, 1700, 10))


def problem(samples: int, inputs: int, width: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A tanh network of one hidden layer and smooth targets, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 1)).double()
    if inputs == 1:
        x = torch.linspace(-1, 1, samples, dtype=torch.float64)[:, None]
        return model, x, torch.sinc(10 * x)
    x = torch.randn(samples, inputs, dtype=torch.float64)
    return model, x, torch.sin(x.sum(1, keepdim=True))


@dataclass(frozen=True)
class Stepper:
    """One accepted step on the full batch; evaluations (nfev, njev) up to now."""

    step: Callable[[], object]
    calls: Callable[[], tuple[int, int]]


def stepper(contender: str, model: nn.Module, x: Tensor, y: Tensor) -> Stepper:
    if contender == PEER:
        trainer = peer_trainer(model)
        trainer.forward = fun = Calls(trainer.forward)
        trainer._compute_jacobian = jac = Calls(trainer._compute_jacobian)
        return Stepper(lambda: trainer.training_step(x, y), lambda: (fun.calls, jac.calls))
    from lmsolve.torch._data import make_batch
    from lmsolve.torch._descent import Descent
    from lmsolve.torch._session import Options, Session

    bent = contender != "ours, unaccelerated"
    session = Session(model, Options(loss="mse", acceleration=bent), Descent())
    session.place(make_batch(x, y, None, session.network.parameters), 0)

    def step() -> None:
        while not session.trial().accepted:
            pass

    return Stepper(step, lambda: (session.state.nfev, session.state.njev))


def report_linalg(linalg: str, smoke: bool) -> None:
    """A step, and the kB of it that pass between the host and Legate's tasks, in this process."""
    from lmsolve.torch._cluster import TRAFFIC
    from lmsolve.torch._data import make_batch
    from lmsolve.torch._descent import Descent
    from lmsolve.torch._session import Options, Session

    kinds = TRAFFIC if linalg != "torch" else ()
    heads = "".join(f"{kind:>11s}" for kind in kinds)
    print(f"linalg={linalg!r}: a step, and the kB that pass through the host in it")
    print(f"{'m x n':14s}{'wall ms':>9s}{'size of J':>11s}{heads}")
    for name, shape in (SMOKE_SHAPES if smoke else SHAPES).items():
        model, x, y = problem(*shape)
        session = Session(model, Options(linalg=linalg), Descent())
        batch = make_batch(x, y, None, session.network.parameters)
        times, steps = [], 3 if smoke else 10
        for step in range(steps):
            start = time.perf_counter()
            session.place(batch, step)  # as a mini-batch is
            while not session.trial().accepted:
                pass
            times.append(time.perf_counter() - start)
        traffic = Counter() if session.cluster is None else session.cluster.traffic
        size = len(x) * session.x.numel() * 8
        figures = "".join(f"{traffic[kind] / steps / 1e3:11.1f}" for kind in kinds)
        print(f"{name:14s}{1e3 * statistics.median(times):9.1f}{size / 1e3:11.1f}{figures}")
        assert linalg != "legate" or traffic["jacobian"] == 0


def measure_steps(contender: str, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    model, x, y = problem(*shape)
    with torch.no_grad():
        model(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps = stepper(contender, model, x, y)
    steps.step()
    wall, processor, calls = [], [], steps.calls()
    for _ in range(repeats):
        a, b = time.perf_counter(), time.process_time()
        steps.step()
        wall.append(time.perf_counter() - a)
        processor.append(time.process_time() - b)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nfev, njev = ((now - then) / repeats for now, then in zip(steps.calls(), calls, strict=True))
    return {
        "wall": wall,
        "processor": processor,
        "nfev": nfev,
        "njev": njev,
        "peak_mib": (after - before) / 1024,
    }


def measure_wide(widths: list[int], samples: int, steps: int) -> dict[str, Any]:
    """Accepted steps in float32, on fewer residuals than parameters."""
    from lmsolve.torch._data import make_batch
    from lmsolve.torch._descent import Descent
    from lmsolve.torch._session import Options, Session

    torch.manual_seed(0)
    layers = [
        layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.Tanh())
    ]
    model, k = nn.Sequential(*layers[:-1]), widths[-1]
    x = torch.randn(samples, widths[0])
    y = torch.sin(x[:, :5].sum(1, keepdim=True)) if k == 1 else torch.randint(0, k, (samples,))
    options = Options(loss="mse" if k == 1 else "cross_entropy")
    session = Session(model, options, Descent())
    session.place(make_batch(x, y, None, session.network.parameters), 0)
    assert session.state is not None and session.problem is not None
    found: dict[str, Any] = {"n": session.x.numel(), "m": session.problem.m, "steps": []}
    found["start"] = session.state.cost
    for _ in range(steps):
        trials, a, b = 1, time.perf_counter(), time.process_time()
        while not session.trial().accepted:
            trials += 1
        times = time.perf_counter() - a, time.process_time() - b
        found["steps"].append([trials, *times, session.state.cost])
    found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found


def report_wide(smoke: bool) -> dict[str, Any]:
    """Each accepted step, and the peak memory of the whole process."""
    found = {}
    for widths in ((20, 30, 1), (20, 30, 3)) if smoke else WIDE:
        run = in_process("wide", widths, 64 if smoke else 1024, 2)
        name = f"{run['n']:,} parameters, {run['m']:,} residuals"
        print(f"\n{name}: {run['peak_gib']:.1f} GiB in all; cost {run['start']:.4g}")
        for step, (trials, wall, processor, cost) in enumerate(run["steps"], 1):
            times = f"wall {wall:6.1f} s, processor {processor:6.1f} s"
            print(f"step {step}, trials {trials}, {times}, cost {cost:.4g}", flush=True)
        found[name] = run
    return found


@dataclass(frozen=True)
class Feature:
    """A model and batches that are trained on in turn."""

    model: nn.Module
    batches: list[tuple[Any, Tensor]]
    resumed: bool = False  # half way from the state dicts of model and optimizer


def features() -> dict[str, Feature]:
    """What needs more than one whole batch of samples that do not see each other."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(torch.cat([x, z], 1))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x = torch.randn(64, 1)
    y = x**2
    plain = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))
    norm = nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))
    parts = list(zip(x.split(26), y.split(26), strict=True))
    return {
        "BatchNorm in training": Feature(norm, [(x, y)]),
        "LSTM": Feature(Recurrent(), [(x[:, None].repeat(1, 5, 1), y)]),
        "tuple of inputs": Feature(Two(), [((x, x.flip(0)), y)]),
        "last batch smaller": Feature(plain, parts),
        "from state dicts": Feature(plain, [(x, y)], resumed=True),
    }


def measure_feature(contender: str, name: str) -> dict[str, Any]:
    """Losses before and after ten steps, or what was raised."""
    feature = features()[name]
    model = feature.model
    make, step = (peer_trainer, peer_loss) if contender == PEER else (our_trainer, our_loss)
    losses = []
    try:
        trainer = make(model)
        for number in range(10):
            if feature.resumed and number == 5:
                weights, state = model.state_dict(), trainer.state_dict()
                model = copy.deepcopy(model)
                model.load_state_dict(weights)
                trainer = make(model)
                trainer.load_state_dict(state)
            x, y = feature.batches[number % len(feature.batches)]
            losses.append(step(trainer, x, y))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"}
    return {"first": losses[0], "last": losses[-1]}


def our_trainer(model: nn.Module) -> Any:
    import lmsolve.torch

    return lmsolve.torch.LM(model, loss="mse")


def our_loss(trainer: Any, x: Any, y: Tensor) -> float:
    return float(trainer.step(x, y).loss)


def peer_loss(trainer: Any, x: Any, y: Tensor) -> float:
    return float(trainer.training_step(x, y)[1])


def in_process(*task: Any, threads: int | None = None) -> Any:
    """Result of one measurement in a fresh interpreter, with so many threads or as many as here."""
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--task", json.dumps(task)],
        capture_output=True, text=True, check=False, env=os.environ | own,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def report_steps(peers: list[str], smoke: bool, counts: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    head = ["one accepted step", "", "wall ms", "quartiles", "to ours", "processor ms", "quartiles",
            "nfev", "njev", "MiB"]  # fmt: skip
    lines: list[list[Any]] = []
    shapes = SMOKE_SHAPES if smoke else SHAPES
    for (name, shape), threads in itertools.product(shapes.items(), counts[: 1 if smoke else None]):
        title = f"{name}, {threads} thread{'s' * (threads > 1)}"
        rows: dict[str, dict[str, Any]] = {}
        repeats = STEPS.get(name, 3)
        for _ in range(1 if smoke else 3):  # in turn, for the machine's load changes
            for c in [*OURS, *peers]:
                row = in_process("steps", c, shape, repeats, threads=threads)
                rows[c] = min(rows.get(c, row), row, key=lambda r: statistics.median(r["wall"]))
        base = statistics.median(rows["ours"]["wall"])
        for contender, row in rows.items():
            wall, processor = (milliseconds(row[clock]) for clock in ("wall", "processor"))
            ratio = f"{statistics.median(row['wall']) / base:.2f}"
            calls = f"{row['nfev']:.1f}", f"{row['njev']:.1f}"
            peak = f"{row['peak_mib']:.0f}"
            lines.append([title, contender, *wall, ratio, *processor, *calls, peak])
        found[title] = rows
    print("\n" + table(head, lines))
    return found


def milliseconds(seconds: list[float]) -> tuple[str, str]:
    """Median and quartiles."""
    low, middle, high = (1e3 * s for s in quartiles(seconds))
    return f"{middle:.1f}", f"{low:.1f} .. {high:.1f}"


def report_ladder(
    name: str, methods: list[str], smoke: bool, seconds: float, seeds: int, clock: str
) -> dict[str, Any]:
    """A table: median seconds to each rung where most seeds reach it, best value, peak memory."""
    problem = _ladders.make_problem(name, smoke)
    print(f"\n{problem.title}; median seconds ({clock}) to")
    heads = "".join(f"{rung:>8.2g}" for rung in problem.rungs)
    print(f"{'':44s}{heads}     MiB   best of each seed")
    found = {}
    for contender in problem.contenders(methods):
        runs = [
            in_process("ladder", name, contender, seconds, seed, clock, smoke)
            for seed in range(seeds)
        ]
        found[contender] = runs
        errors = [run["error"] for run in runs if "error" in run]
        if errors:
            print(f"{contender:44s}{errors[0]}", flush=True)
            continue
        cells = [cell([run["reached"][i] for run in runs]) for i in range(len(problem.rungs))]
        bests = " ".join(f"{run['best']:.2g}" for run in runs)
        peak = max(run["peak_mib"] for run in runs)
        print(f"{contender:44s}{''.join(cells)}{peak:8.0f}   {bests}", flush=True)
    return found


def cell(times: list[float | None]) -> str:
    """Median of those that got there, if most did."""
    reached = [t for t in times if t is not None]
    return f"{statistics.median(reached):8.2f}" if 2 * len(reached) > len(times) else f"{'-':>8s}"


def report_features(peers: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    print("\nten steps on 64 samples")
    for name in features():
        for contender in ["ours", *peers]:
            row = in_process("feature", contender, name)
            text = row.get("error") or f"loss {row['first']:.1e} to {row['last']:.1e}"
            print(f"{name:24s}{contender:28s}{text}")
            found[f"{name}, {contender}"] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of a step")
    parser.add_argument("--seconds", type=float, default=30.0, help="a run of a ladder")
    parser.add_argument("--seeds", type=int, default=3, help="of a ladder")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of a ladder")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, help="of a ladder"
    )
    parser.add_argument("--linalg", choices=("torch", "legate", "legate-split"))
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        kind, *rest = json.loads(args.task)
        measure: dict[str, Callable[..., Any]] = {
            "steps": measure_steps,
            "wide": measure_wide,
            "ladder": _ladders.measure,
            "feature": measure_feature,
        }
        print(json.dumps(measure[kind](*rest)))
        return
    if args.linalg:
        report_linalg(args.linalg, args.smoke)
        return
    peers = [PEER] if find_spec(PEER) else []
    if not peers:
        print(f"{PEER} is not installed and is left out (make bench-env)")
    seconds, seeds = (2.0, 1) if args.smoke else (args.seconds, args.seeds)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() and not args.smoke else {}
    for part in args.only:
        if part == "steps":
            found = report_steps(peers, args.smoke, args.threads)
        elif part == "wide":
            found = report_wide(args.smoke)
        elif part == "features":
            found = report_features(peers)
        else:
            methods = [m for m in args.methods if m != PEER or peers]
            found = report_ladder(part, methods, args.smoke, seconds, seeds, args.clock)
        print(f"{footer()}; {torch.get_num_threads()} threads")
        before = kept.get(part, {}).get("found", {})
        kept[part] = {"environment": environment(), "found": {**before, **found}}
    if not args.smoke:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
