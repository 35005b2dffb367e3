"""Images classified by Levenberg-Marquardt on the cross entropy, beside Adam.

    python examples/mnist.py [--smoke] [--data FOLDER] [--model cnn|dnn] [--seconds 120] [--seeds 5]
    legate --cpus 2 --gpus 0 examples/mnist.py --linalg legate

FOLDER holds the four IDX files of MNIST or Fashion-MNIST (Debian's dataset-fashion-mnist puts them
into /usr/share/datasets/fashion-mnist); without one, the 1,797 digits of examples/data are used.
Adam's rate is the best of four, by its test loss on the first seed. Prints the test loss and
accuracy both reach, and when ours passes the best of Adam's test losses.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import _picture
import numpy as np
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor, nn

import lmsolve.torch
from lmsolve.legate import is_first_rank

DIGITS = Path(__file__).parent / "data" / "digits.csv.gz"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


class Images(NamedTuple):
    x: Tensor  # (images, 1, side, side), zero mean, unit variance
    y: Tensor
    x_test: Tensor
    y_test: Tensor


class Point(NamedTuple):
    """One look at the test images."""

    seconds: float
    loss: float
    accuracy: float


def read_idx(folder: Path, name: str) -> np.ndarray:
    """One IDX file, compressed or not: two zero bytes, type, axes, sizes, values."""
    path = folder / name
    packed = Path(f"{path}.gz")
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    axes = raw[3]
    shape = np.frombuffer(raw, ">i4", axes, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def load(folder: Path | None) -> Images:
    if folder is None:
        table = np.loadtxt(DIGITS, delimiter=",", dtype=np.float32)
        x, y = table[:, :-1].reshape(-1, 8, 8), table[:, -1]
        parts = (x[:1397], y[:1397], x[1397:], y[1397:])
    else:
        names = ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"]
        x, y, x_test, y_test = (read_idx(folder, f"{name}-ubyte") for name in names)
        parts = (x, y, x_test, y_test)
    x, y, x_test, y_test = (torch.tensor(np.asarray(a, np.float32)) for a in parts)
    mean, std = x.mean(), x.std()
    x, x_test = ((a - mean)[:, None] / std for a in (x, x_test))
    return Images(x, y.long(), x_test, y_test.long())


def make_model(kind: str, side: int, seed: int) -> nn.Module:
    """The two networks of cuPyLMA's benchmarks, 1,026 and 52,650 parameters, or smaller ones."""
    torch.manual_seed(seed)
    if kind == "dnn":
        sizes = [784, 64, 32, 10] if side == 28 else [64, 24, 10]
        layers: list[nn.Module] = [nn.Flatten()]
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            layers += [nn.Tanh()] if i else []
            layers += [nn.Linear(a, b)]
        return nn.Sequential(*layers)
    if side == 28:
        return nn.Sequential(
            nn.Conv2d(1, 4, 5), nn.Tanh(), nn.MaxPool2d(2),
            nn.Conv2d(4, 16, 2), nn.Tanh(), nn.MaxPool2d(4),
            nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 8, 3), nn.Tanh(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def look(model: nn.Module, images: Images, seconds: float) -> Point:
    with torch.no_grad():
        z = model(images.x_test)
    loss = float(nn.functional.cross_entropy(z, images.y_test))
    return Point(seconds, loss, float((z.argmax(1) == images.y_test).float().mean()))


def run_lm(
    model: nn.Module, images: Images, seconds: float, args: argparse.Namespace
) -> list[Point]:
    """Ours; the time of the looks does not count."""
    trace: list[Point] = []
    away = 0.0

    def note(step: OptimizeResult) -> None:
        nonlocal away
        if not step.accepted:
            return
        start = time.perf_counter()
        nn.utils.vector_to_parameters(step.x.float(), model.parameters())
        trace.append(look(model, images, step.seconds - away))
        away += time.perf_counter() - start
        if step.seconds - away > seconds and not args.smoke:
            raise StopIteration

    lmsolve.torch.fit(
        model, (images.x, images.y), loss="cross_entropy", weight_decay=args.decay,
        batch_size=args.batch, grow_batches=True, sketch=True, max_steps=args.steps,
        callback=note, linalg=args.linalg,
    )  # fmt: skip
    return trace


def run_adam(model: nn.Module, images: Images, seconds: float, rate: float) -> list[Point]:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    trace: list[Point] = []
    start, away = time.perf_counter(), 0.0
    while time.perf_counter() - start - away < seconds:
        for chosen in torch.randperm(len(images.y)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.x[chosen]), images.y[chosen]).backward()
            optimizer.step()
        now = time.perf_counter()
        trace.append(look(model, images, now - start - away))
        away += time.perf_counter() - now
    return trace


def lowest(trace: list[Point]) -> Point:
    return min(trace, key=lambda point: point.loss)


def paint(figure: Any, lm: list[list[Point]], adam: list[list[Point]]) -> None:
    axes = figure.subplots()
    for color, (name, runs) in enumerate((("Levenberg-Marquardt", lm), ("Adam", adam))):
        for i, trace in enumerate(runs):
            label = name if i == 0 else None
            axes.plot([p.seconds for p in trace], [p.loss for p in trace], f"C{color}", label=label)
    axes.set(xlabel="wall time (s)", ylabel="test cross entropy", yscale="log")
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="the small digits, one seed, 30 steps")
    parser.add_argument("--alone", action="store_true", help="without Adam")
    parser.add_argument("--data", type=Path, help="folder with IDX files")
    parser.add_argument("--model", choices=("cnn", "dnn"), default="cnn")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10**9, help="at most, for each run of ours")
    parser.add_argument("--batch", type=int, help="samples in a first mini-batch of ours")
    parser.add_argument("--decay", type=float, default=1e-3, help="weight decay of ours")
    parser.add_argument("--linalg", choices=("torch", "legate"), default="torch")
    parser.add_argument("--out", type=Path, default=Path("out"))
    if parser.parse_args().smoke:  # by steps: one takes long on a machine that is busy
        parser.set_defaults(seconds=4.0, seeds=1, steps=30)
    args = parser.parse_args()
    first = args.linalg == "torch" or is_first_rank()
    images = load(args.data)
    side = images.x.shape[-1]
    args.batch = args.batch or (1000 if args.data else 300)
    few = images._replace(x=images.x[:100], y=images.y[:100])
    once = argparse.Namespace(**vars(args) | {"steps": 1})
    run_lm(make_model(args.model, side, 0), few, args.seconds, once)  # loads libraries
    n = sum(p.numel() for p in make_model(args.model, side, 0).parameters())
    if first:
        print(f"{len(images.y)} images, {args.model} of {n} parameters", flush=True)
    lm = []
    for seed in range(args.seeds):
        lm.append(run_lm(make_model(args.model, side, seed), images, args.seconds, args))
        if first:
            print(f"seed {seed}: {told(lm[-1])}", flush=True)
    if not first:
        return
    adam = [] if args.alone else beside(lm, images, args)
    _picture.write(args.out / "mnist.png", (7, 4.5), lambda f: paint(f, lm, adam))
    assert min(lowest(t).accuracy for t in lm) > (0.85 if args.data is None else 0.8)


def beside(lm: list[list[Point]], images: Images, args: argparse.Namespace) -> list[list[Point]]:
    """Adam on the seeds of ours, with the best rate of the first."""

    def run(seed: int, rate: float) -> list[Point]:
        model = make_model(args.model, images.x.shape[-1], seed)
        return run_adam(model, images, args.seconds, rate)

    rate = min(RATES[1:2] if args.smoke else RATES, key=lambda r: lowest(run(0, r)).loss)
    print(f"Adam's rate {rate}")
    adam, faster = [], 0
    for seed, trace in enumerate(lm):
        adam.append(run(seed, rate))
        theirs = lowest(adam[-1])
        passed = next((p.seconds for p in trace if p.loss <= theirs.loss), None)
        faster += passed is not None and passed <= theirs.seconds / 2
        after = "never" if passed is None else f"after {passed:.2f} s"
        print(f"seed {seed}: Adam {told(adam[-1])}; ours passes it {after}")
    print(f"Adam's best test loss in at most half of its time: {faster} of {args.seeds} seeds")
    return adam


def told(trace: list[Point]) -> str:
    """The lowest test loss of a run."""
    point = lowest(trace)
    return f"test loss {point.loss:.4f} ({point.accuracy:.2%}), {point.seconds:.2f} s"


if __name__ == "__main__":
    main()
