"""The three example problems, and every contender on a ladder of losses of each.

    sinc      mean squared error of sinc(10 x); 61 parameters, 20,000 points, float64
    images    test cross entropy of Fashion-MNIST; 1,026 parameters, 60,000 images, float32
    burgers   relative error of the Burgers equation's solution; 921 parameters, 6,200 points, edge
              values among the residuals (the example's form has them exact)

A contender trains until its time is up or the last rung is reached. It is looked at whenever its
time has grown by 10 %; neither the time nor the memory of these looks counts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import burgers
import mnist
import sinc
import torch
from _common import CLOCKS, forget_peak, status
from torch import Tensor, nn

PEER = "torch_levenberg_marquardt"
METHODS = ("ours", PEER, "Adam", "L-BFGS")
IMAGES = Path("/usr/share/datasets/fashion-mnist")
# A closure of L-BFGS sees all the data; so many samples at once.
CHUNK = 10_000
# Samples of a first step that loads libraries; neither its time nor its memory counts.
WARM_UP = 100


@dataclass(frozen=True)
class Problem:
    """Data and model of an example, what it is measured by, and settings of the contenders."""

    title: str
    rungs: list[float]
    make_model: Callable[[int], nn.Module]
    x: Tensor
    y: Tensor
    look: Callable[[nn.Module], float]
    objective: Callable[[Any, Tensor], Tensor]  # mean over samples, for Adam and L-BFGS
    ours: dict[str, Any]  # arguments of `fit`
    batches: list[int | None]  # samples in a batch of the least-squares methods; None for all
    rate: float  # Adam's at the start; it falls along a cosine
    adam_batch: int | None

    def contenders(self, methods: list[str]) -> list[str]:
        """Names of some methods' runs."""
        names = []
        for method in methods:
            batches = self.batches if method in ("ours", PEER) else [None]
            names += [with_batch(method, batch) for batch in batches]
        return names

    def first(self, samples: int) -> Problem:
        """The same with fewer samples."""
        return replace(self, x=self.x[:samples], y=self.y[:samples])


def with_batch(name: str, batch: int | None) -> str:
    """Name of a method on batches."""
    return name if batch is None else f"{name}, batches of {batch}"


def make_problem(name: str, smoke: bool) -> Problem:
    """A problem by name."""
    makers = {"sinc": sinc_problem, "images": images_problem, "burgers": burgers_problem}
    return makers[name](smoke)


def sinc_problem(smoke: bool) -> Problem:
    x, y = sinc.make_data(2000 if smoke else 20_000)
    return Problem(
        title=f"sinc(10 x), 61 parameters, {len(x)} points: mean squared error",
        rungs=[10.0**-k for k in range(3, 11)],
        make_model=lambda seed: sinc.make_model(seed, 20),
        x=x,
        y=y,
        look=lambda model: sinc.loss_of(model, x, y),
        objective=nn.functional.mse_loss,
        ours={"loss": "mse", "ftol": 0.0, "xtol": 0.0},
        batches=[None, 1000],
        rate=1e-2,
        adam_batch=1000,
    )


def images_problem(smoke: bool) -> Problem:
    folder = None if smoke or not IMAGES.exists() else IMAGES
    images = mnist.load(folder)
    side, size = images.x.shape[-1], len(images.y)
    rungs = [1.5, 1.0, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4]
    return Problem(
        title=f"{size} images, {'Fashion-MNIST' if folder else 'digits'}: test cross entropy",
        rungs=rungs if folder else [2.0, 1.5, 1.0, 0.7, 0.5, 0.4, 0.3, 0.2],
        make_model=lambda seed: mnist.make_model("cnn", side, seed),
        x=images.x,
        y=images.y,
        look=lambda model: mnist.look(model, images, 0.0).loss,
        objective=nn.functional.cross_entropy,
        ours={
            "loss": "cross_entropy",
            "weight_decay": 1e-3,
            "grow_batches": True,
            "sketch": True,
        },
        batches=[1000 if folder else 500],
        rate=1e-2,
        adam_batch=128,
    )


class FreeBurgers(burgers.Burgers):
    """The network itself as the solution, its values on the edge among the residuals.

    The example writes the solution so that those hold; here all contenders have to learn them.
    """

    def solution(self, points: Tensor) -> tuple[Tensor, ...]:
        return self.derivatives(points)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(points), super().forward(points)

    def u(self, points: Tensor) -> Tensor:
        return self.network(points)


def edge_residual(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """Equation inside, ten times the value on the edge; targets (B, 2) say which, and the value."""
    u, equation = output
    return torch.where(target[:, :1] > 0, 10.0 * (u - target[:, 1:]), equation)


def points_and_edge(inside: int) -> tuple[Tensor, Tensor]:
    """Quasi-random points on both sides of the front, and 200 on the edge; targets."""
    sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=0)
    inner = sobol.draw(inside, dtype=torch.float64)
    inner[:, 0] = 2 * inner[:, 0] - 1
    inner[::2, 0] = inner[::2, 0] ** 3
    x, t = torch.linspace(-1, 1, 100).double(), torch.linspace(0, 1, 50).double()
    start = torch.stack([x, torch.zeros_like(x)], 1)
    walls = [torch.stack([torch.full_like(t, side), t], 1) for side in (-1.0, 1.0)]
    points = torch.cat([inner, start, *walls])
    targets = torch.zeros_like(points)
    targets[inside:, 0] = 1
    targets[inside : inside + 100, 1] = -torch.sin(math.pi * x)
    return points, targets


def burgers_problem(smoke: bool) -> Problem:
    points, targets = points_and_edge(600 if smoke else 6000)
    reference = burgers.Reference()

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return FreeBurgers(20).double()

    return Problem(
        title=f"Burgers equation, 921 parameters, {len(points)} points: relative error",
        rungs=[0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4],
        make_model=make_model,
        x=points,
        y=targets,
        look=reference.error,
        objective=lambda output, target: edge_residual(output, target).square().mean(),
        ours={"residual": edge_residual},
        batches=[None],
        rate=5e-3,
        adam_batch=None,
    )


class TimeIsUp(Exception):
    """Ends a contender from the inside of its closure."""


@dataclass
class Watch:
    """What a contender has reached, and when; `seconds` by `clock`."""

    problem: Problem
    model: nn.Module
    seconds: float
    clock: Callable[[], float]
    trace: list[tuple[float, float]] = field(default_factory=list)
    peak: float = 0.0  # MiB beyond the start

    def __post_init__(self) -> None:
        self.problem.look(self.model)
        self._held = status("VmRSS")
        forget_peak()
        self._away, self._next, self._start = 0.0, 0.0, self.clock()

    @property
    def elapsed(self) -> float:
        """Time of the contender's own."""
        return self.clock() - self._start - self._away

    def __call__(self, prepare: Callable[[], None] = lambda: None) -> bool:
        """Look if it is time to, after `prepare`; whether to go on."""
        now, left = self.elapsed, True
        if now >= self._next or now >= self.seconds:
            start = self.clock()
            self.peak = max(self.peak, status("VmHWM") - self._held)
            prepare()
            self.trace.append((now, self.problem.look(self.model)))
            left = now < self.seconds and not self.trace[-1][1] <= self.problem.rungs[-1]
            forget_peak()
            self._next = 1.1 * now
            self._away += self.clock() - start
        return left

    def result(self) -> dict[str, Any]:
        """Seconds to each rung, the best value and the peak of memory."""
        first = [
            next((t for t, value in self.trace if value <= rung), None)
            for rung in self.problem.rungs
        ]
        best = min((value for _, value in self.trace if not math.isnan(value)), default=math.inf)
        return {"reached": first, "best": best, "peak_mib": self.peak}


def run_ours(problem: Problem, model: nn.Module, watch: Watch, batch: int | None) -> None:
    """`lmsolve.torch.fit`; the watch sees a model of its own."""
    import lmsolve.torch

    watch.model = copy.deepcopy(model)
    dtype = next(model.parameters()).dtype

    def note(step: Any) -> None:
        def load() -> None:
            nn.utils.vector_to_parameters(step.x.to(dtype), watch.model.parameters())

        if not watch(load):
            raise StopIteration

    lmsolve.torch.fit(
        model, (problem.x, problem.y), batch_size=batch, max_steps=10**9, callback=note,
        **problem.ours,
    )  # fmt: skip


def peer_trainer(model: nn.Module, loss: Any = None) -> Any:
    """torch-levenberg-marquardt with its defaults: mean squares where no loss is given."""
    from torch_levenberg_marquardt.loss import MSELoss
    from torch_levenberg_marquardt.training import LevenbergMarquardtModule

    return LevenbergMarquardtModule(model, loss or MSELoss())


def peer_loss(problem: Problem) -> Any:
    """The problem's loss as the peer takes it."""
    from torch_levenberg_marquardt import loss

    if "residual" in problem.ours:

        class Residuals(loss.Loss):
            def forward(self, output: Any, target: Tensor) -> Tensor:
                return problem.objective(output, target)

            def residuals(self, output: Any, target: Tensor) -> Tensor:
                return problem.ours["residual"](output, target)

        return Residuals()
    return loss.MSELoss() if problem.ours["loss"] == "mse" else loss.CrossEntropyLoss()


def run_peer(problem: Problem, model: nn.Module, watch: Watch, batch: int | None) -> None:
    """Its steps on all the data or on shuffled batches."""
    trainer = peer_trainer(model, peer_loss(problem))
    size = min(batch or len(problem.x), len(problem.x))
    while True:
        for rows in torch.randperm(len(problem.x)).split(size):
            trainer.training_step(*chosen(problem, batch, rows))
            if not watch():
                return


def chosen(problem: Problem, batch: int | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Samples of a batch, or all as they are."""
    return (problem.x, problem.y) if batch is None else (problem.x[rows], problem.y[rows])


def run_adam(problem: Problem, model: nn.Module, watch: Watch, batch: int | None) -> None:
    """Adam, its rate decayed along a cosine over the time it has."""
    optimizer = torch.optim.Adam(model.parameters(), lr=problem.rate)
    while True:
        for rows in torch.randperm(len(problem.x)).split(batch or len(problem.x)):
            x, y = chosen(problem, batch, rows)
            optimizer.zero_grad()
            problem.objective(model(x), y).backward()
            optimizer.step()
            if not watch():
                return
            done = min(watch.elapsed / watch.seconds, 1.0)
            optimizer.param_groups[0]["lr"] = problem.rate * (1 + math.cos(math.pi * done)) / 2


def run_lbfgs(problem: Problem, model: nn.Module, watch: Watch, batch: int | None) -> None:
    """L-BFGS with strong Wolfe steps on all the data."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=20, history_size=100, line_search_fn="strong_wolfe",
        tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip
    chunks = list(zip(problem.x.split(CHUNK), problem.y.split(CHUNK), strict=True))

    def closure() -> float:
        optimizer.zero_grad()
        total = 0.0
        for x, y in chunks:
            part = problem.objective(model(x), y) * (len(x) / len(problem.x))
            part.backward()
            total += float(part)
        if not watch():
            raise TimeIsUp
        return total

    try:
        while True:
            optimizer.step(closure)
    except TimeIsUp:
        return


def measure(
    name: str, contender: str, seconds: float, seed: int, clock: str, smoke: bool
) -> dict[str, Any]:
    """One run in this process; what was raised, where a contender cannot do it."""
    problem = make_problem(name, smoke)
    model = problem.make_model(seed)
    runs = {"ours": run_ours, PEER: run_peer, "Adam": run_adam, "L-BFGS": run_lbfgs}
    method, _, size = contender.partition(", batches of ")
    batch = problem.adam_batch if method == "Adam" else int(size) if size else None
    torch.manual_seed(seed)
    try:
        for part, given in ((problem.first(WARM_UP), 0.0), (problem, seconds)):
            trained = copy.deepcopy(model)
            watch = Watch(part, trained, given, CLOCKS[clock])
            runs[method](part, trained, watch, batch)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        lines = str(error).splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0][:60]}"}
    return watch.result()
