"""The Burgers equation as a physics-informed network, trained by Levenberg-Marquardt.

    python examples/burgers.py [--smoke] [--seconds 600] [--goal 1e-6] [--seed 0] [--out out]
    legate --cpus 2 --gpus 0 examples/burgers.py --linalg legate

    u_t + u u_x = (0.01 / pi) u_xx  on -1 < x < 1, 0 < t < 1,   u(x, 0) = -sin(pi x),  u(+-1, t) = 0

A front of width 0.01 forms at x = 0. The solution is odd in x and is written so that it meets the
initial and boundary values whatever the network (three layers of 16, 609 parameters) says; the
network is judged by the equation at 6,000 points. Its error is taken against the solution by the
Cole-Hopf transform. L-BFGS and Adam then get the time that ours took, on the same network.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _picture
import numpy as np
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor, nn

import lmsolve.torch
from lmsolve.legate import is_first_rank

VISCOSITY = 0.01 / math.pi
STEEP = 20.0  # of the factor that vanishes at x = 0


def exact(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Solution by the Cole-Hopf transform, its integrals by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    y = x[..., None] - 2 * np.sqrt(VISCOSITY * t)[..., None] * nodes
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    kernel = weights * np.exp(exponent - exponent.max(-1, keepdims=True))
    return -(np.sin(np.pi * y) * kernel).sum(-1) / kernel.sum(-1)


class Burgers(nn.Module):
    """u(x, t) and the residual of the equation at points (B, 2).

    With N the network, u = -sin(pi x) + t f(x) N(x, t) with f = (1 - x) tanh(20 x) for x >= 0, and
    u(-x, t) = -u(x, t): every initial and boundary value is met, and only the equation is left.

    The derivatives travel through the layers beside the value, so that every parameter is met in
    a Linear layer's call: the solver then makes a row of the Jacobian four times as fast as through
    nested autograd, to which `main` compares the residual.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(),
            nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, 1),
        )  # fmt: skip

    def derivatives(self, points: Tensor) -> tuple[Tensor, ...]:
        """N, N_x, N_t, N_xx."""
        zero = torch.zeros_like(points)
        x_hat, t_hat = (zero.index_fill(1, torch.tensor(axis), 1.0) for axis in (0, 1))
        u, u_x, u_t, u_xx = points, x_hat, t_hat, zero
        for layer in self.network:
            if isinstance(layer, nn.Linear):
                # All in one call; the last row gives the bias, which derivatives do not have.
                together = layer(torch.stack([u, u_x, u_t, u_xx, torch.zeros_like(u)], 1))
                u, u_x, u_t, u_xx, bias = together.unbind(1)
                u_x, u_t, u_xx = u_x - bias, u_t - bias, u_xx - bias
            else:
                u = torch.tanh(u)
                slope = 1 - u * u
                u_xx = slope * (u_xx - 2 * u * u_x * u_x)
                u_x, u_t = slope * u_x, slope * u_t
        return u, u_x, u_t, u_xx

    def solution(self, points: Tensor) -> tuple[Tensor, ...]:
        """u, u_x, u_t, u_xx for x >= 0."""
        x, t = points[:, :1], points[:, 1:]
        n, n_x, n_t, n_xx = self.derivatives(points)
        T = torch.tanh(STEEP * x)
        T_x = STEEP * (1 - T * T)
        f, f_x, f_xx = (1 - x) * T, (1 - x) * T_x - T, -2 * T_x * (1 + (1 - x) * STEEP * T)
        sine, cosine = torch.sin(math.pi * x), torch.cos(math.pi * x)
        u = -sine + t * f * n
        u_x = -math.pi * cosine + t * (f_x * n + f * n_x)
        u_xx = math.pi**2 * sine + t * (f_xx * n + 2 * f_x * n_x + f * n_xx)
        return u, u_x, f * (n + t * n_t), u_xx

    def forward(self, points: Tensor) -> Tensor:
        u, u_x, u_t, u_xx = self.solution(points)
        return u_t + u * u_x - VISCOSITY * u_xx

    def u(self, points: Tensor) -> Tensor:
        """The solution on both sides."""
        x, t = points[:, :1], points[:, 1:]
        z = x.abs()
        factor = (1 - z) * torch.tanh(STEEP * z)
        n = self.network(torch.cat([z, t], 1))
        return x.sign() * (t * factor * n - torch.sin(math.pi * z))

    def by_nested_autograd(self, points: Tensor) -> Tensor:
        """The residual of the equation once more."""
        x, t = (points[:, i : i + 1].clone().requires_grad_() for i in (0, 1))
        u = self.u(torch.cat([x, t], 1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        return u_t + u * u_x - VISCOSITY * u_xx


def make_points(count: int) -> tuple[Tensor, Tensor]:
    """Quasi-random points with x >= 0, every second one drawn towards the front; and zeros."""
    sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=0)
    points = sobol.draw(count, dtype=torch.float64)
    points[::2, 0] = points[::2, 0] ** 3
    return points, torch.zeros_like(points[:, :1])


class Reference:
    """The exact solution on a grid, and how far a network is from it."""

    def __init__(self) -> None:
        self.x, self.t = np.meshgrid(np.linspace(-1, 1, 257), np.linspace(0.01, 1, 100))
        self.u = exact(self.x, self.t)
        self._points = torch.tensor(np.stack([self.x.ravel(), self.t.ravel()], 1))

    def values(self, model: Burgers) -> np.ndarray:
        with torch.no_grad():
            return model.u(self._points).numpy().reshape(self.u.shape)

    def error(self, model: Burgers) -> float:
        """Relative error in the 2-norm."""
        return float(np.linalg.norm(self.values(model) - self.u) / np.linalg.norm(self.u))


def make_model(seed: int = 0) -> Burgers:
    torch.manual_seed(seed)
    return Burgers().double()


def run_lm(
    model: Burgers,
    data: tuple[Tensor, Tensor],
    reference: Reference,
    args: argparse.Namespace,
    say: Callable[[str], None] = print,
) -> float:
    """Train until the error is below ``args.goal`` or time is up; the seconds it took."""
    probe = copy.deepcopy(model)
    step = 0

    def report(state: OptimizeResult) -> None:
        nonlocal step
        step += 1
        if step % 20:
            return
        nn.utils.vector_to_parameters(state.x, probe.parameters())
        error = reference.error(probe)
        say(f"{state.seconds:6.0f} s  cost {state.cost:.2e}  error {error:.2e}")
        if error < args.goal:
            raise StopIteration

    result = lmsolve.torch.fit(
        model,
        data,
        max_steps=args.steps,
        max_seconds=args.seconds,
        callback=report,
        linalg=args.linalg,
    )
    return float(result.history["seconds"][-1])


def run_other(name: str, model: Burgers, data: tuple[Tensor, Tensor], seconds: float) -> None:
    """L-BFGS or Adam on the same residuals."""
    points, targets = data
    optimizer: torch.optim.Optimizer
    if name == "Adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    else:
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=20, history_size=100, line_search_fn="strong_wolfe",
            tolerance_grad=0, tolerance_change=0,
        )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(points) - targets).square().mean()
        loss.backward()
        return loss

    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        optimizer.step(closure)


def paint(figure: Any, reference: Reference, model: Burgers) -> None:
    u = reference.values(model)
    left, right = figure.subplots(1, 2)
    image = left.pcolormesh(reference.t, reference.x, u, cmap="RdBu", shading="gouraud")
    figure.colorbar(image, ax=left, label="u")
    left.set(xlabel="t", ylabel="x", title="network")
    image = right.pcolormesh(reference.t, reference.x, np.abs(u - reference.u), shading="gouraud")
    figure.colorbar(image, ax=right, label="|u - exact|")
    right.set(xlabel="t", ylabel="x", title="error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="600 points, 60 steps")
    parser.add_argument("--alone", action="store_true", help="without L-BFGS and Adam")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--points", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--goal", type=float, default=1e-6, help="error to stop at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--linalg", choices=("torch", "legate"), default="torch")
    parser.add_argument("--out", type=Path, default=Path("out"))
    if parser.parse_args().smoke:
        parser.set_defaults(points=600, steps=60)
    args = parser.parse_args()
    first = args.linalg == "torch" or is_first_rank()
    say = partial(print, flush=True) if first else lambda line: None
    data, reference, model = make_points(args.points), Reference(), make_model(args.seed)
    start = reference.error(model)
    assert torch.allclose(model(data[0]), model.by_nested_autograd(data[0]), atol=1e-12)
    taken = run_lm(model, data, reference, args, say)
    if not first:
        return
    error = reference.error(model)
    print(f"Levenberg-Marquardt: relative error {error:.2e} after {taken:.0f} s")
    others: dict[str, float] = {}
    for name in () if args.alone else ("L-BFGS", "Adam"):
        other = make_model(args.seed)
        run_other(name, other, data, taken)
        others[name] = reference.error(other)
        print(f"{name}: relative error {others[name]:.2e} after {taken:.0f} s")
    _picture.write(args.out / "burgers.png", (10, 4), lambda f: paint(f, reference, model))
    assert error < min(others.values(), default=0.9 * start), (error, others)
    assert args.smoke or error < 1e-5, error


if __name__ == "__main__":
    main()
