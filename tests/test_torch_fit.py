"""The three doors: a residual function, a fit, an optimizer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402  (after the skip)
from torch.utils.data import DataLoader, IterableDataset, TensorDataset  # noqa: E402

import lmsolve  # noqa: E402
from lmsolve.torch import LM, _checkpoint, _jacobian, _run, available_gpus, fit, residuals  # noqa: E402
from lmsolve.torch._descent import Descent  # noqa: E402
from lmsolve.torch._network import Batch  # noqa: E402
from lmsolve.torch._session import Options, Session  # noqa: E402


def net(width: int = 8, *, seed: int = 0, out: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, out)).double()


def curve(m: int = 60) -> tuple[Any, Any]:
    x = torch.linspace(-1, 1, m, dtype=torch.float64)[:, None]
    return x, torch.sin(3 * x)


def values(model: nn.Module) -> Any:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# --- a residual function ------------------------------------------------------------------------


def test_residual_function_solves_with_least_squares_and_loads_back() -> None:
    model = net()
    x, y = curve()
    problem = residuals(model, x, y)
    assert problem.x0.shape == (problem.n,) and problem.fun(problem.x0).shape == (problem.m,)
    result = lmsolve.least_squares(problem.fun, problem.x0, jac=problem.jac, max_nfev=300)
    problem.load(result.x)
    cost = 0.5 * float((model(x) - y).detach().square().sum())
    assert cost == pytest.approx(float(result.cost)) and cost < 1e-6


def test_residual_function_takes_bounds_and_a_robust_loss() -> None:
    model = net(3)
    x, y = curve()
    y = y.clone()
    y[7] += 40
    problem = residuals(model, x, y)
    result = lmsolve.least_squares(
        problem.fun, problem.x0, jac=problem.jac, bounds=(-4.0, 4.0), loss="soft_l1", max_nfev=200
    )
    problem.load(result.x)
    keep = torch.arange(60) != 7
    assert float(result.x.abs().max()) <= 4.0
    assert float((model(x) - y).detach()[keep].abs().mean()) < 0.1


def test_any_pytree_of_inputs_and_targets() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2).double()

        def forward(self, parts: Any) -> Any:
            return self.layer(torch.cat([parts["x"], parts["rest"][0]], 1))

    x, y = curve()
    inputs, targets = {"x": x, "rest": [x**2]}, (x - x**2, {"y": y})

    def residual(z: Any, t: Any) -> Any:
        return torch.stack([z[:, :1] - t[0], z[:, 1:] - t[1]["y"]], 1)

    torch.manual_seed(0)
    problem = residuals(Both(), inputs, targets, residual)
    seen: list[float] = []
    solved = lmsolve.least_squares(
        problem.fun, problem.x0, jac=problem.jac, callback=lambda intermediate_result: seen.append(
            float(intermediate_result.cost))
    )  # fmt: skip
    fitted = fit(Both(), (inputs, targets), residual=residual, max_steps=100)
    parts = fit(Both(), (inputs, targets), residual=residual, batch_size=25, max_steps=60)
    assert fitted.cost == pytest.approx(float(solved.cost)) == pytest.approx(seen[-1])
    assert parts.cost < 1.5 * fitted.cost


def test_frozen_parameters_stay_and_tied_ones_count_once() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    bias = model[0].bias.clone()
    x, y = curve()
    problem = residuals(model, x, y)
    assert problem.n == 8 + 8 + 1
    problem.load(problem.x0 + 1)
    assert torch.equal(model[0].bias, bias)
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False))
    tied[2].weight = tied[0].weight
    assert residuals(tied, torch.randn(5, 2), torch.randn(5, 2)).n == 4


def test_jacobian_is_the_derivative_of_the_residuals() -> None:
    x, y = curve()
    problem = residuals(net(), x, y, lambda z, t: torch.stack([z - t, z**2], 1))
    J, h = problem.jac(problem.x0), 1e-6
    for j in (0, 9, problem.n - 1):
        e = torch.zeros(problem.n, dtype=torch.float64)
        e[j] = h
        slope = (problem.fun(problem.x0 + e) - problem.fun(problem.x0 - e)) / (2 * h)
        assert torch.allclose(J[:, j], slope, atol=1e-8)


def test_residual_over_the_whole_batch() -> None:
    """A residual whose leading axis is not the batch's: boundary and interior side by side."""
    x, y = curve()
    model = net()
    problem = residuals(model, x, y, lambda z, t: torch.cat([(z - t)[::2, 0], 3 * z[:4, 0]]))
    assert problem.m == 34
    result = lmsolve.least_squares(problem.fun, problem.x0, jac=problem.jac, max_nfev=100)
    assert float(result.cost) < float(0.5 * problem.fun(problem.x0).square().sum())


def test_weights_multiply_the_squares() -> None:
    x, y = curve()
    w = torch.linspace(0, 2, 60, dtype=torch.float64)
    plain, weighted = residuals(net(), x, y), residuals(net(), x, y, weights=w)
    expected = plain.fun(plain.x0) * w.sqrt()
    assert torch.allclose(weighted.fun(plain.x0), expected)


# --- a fit --------------------------------------------------------------------------------------


def test_full_batch_fit_leaves_the_best_in_the_model() -> None:
    model = net()
    x, y = curve()
    result = fit(model, (x, y), max_steps=300)
    cost = 0.5 * float((model(x) - y).detach().square().sum())
    assert result.cost == pytest.approx(cost, rel=1e-9) and cost < 1e-7
    assert torch.equal(values(model), result.x)
    assert all(b <= a for a, b in zip(result.history["cost"], result.history["cost"][1:]))
    assert result.steps == len(result.history["cost"]) == len(result.history["seconds"])
    assert result.nit == sum(result.history["accepted"])


@pytest.mark.parametrize("kind", ["pair", "dataset", "loader"])
def test_every_kind_of_data(kind: str) -> None:
    x, y = curve()
    pair = (x, y)
    data: Any = {"pair": pair, "dataset": TensorDataset(x, y)}.get(kind)
    if kind == "loader":
        data = DataLoader(TensorDataset(x, y), batch_size=25, shuffle=True)  # the last one has 10
    model = net(4)
    fit(model, data, max_steps=150)
    assert float((model(x) - y).detach().square().mean()) < 1e-2


def test_mini_batches_keep_the_best_epoch_and_see_every_sample() -> None:
    x, y = curve()
    model = net()
    seen: list[int] = []
    result = fit(
        model,
        (x, y),
        batch_size=25,
        max_steps=100,
        callback=lambda r: seen.append(r.samples),
    )
    assert set(seen) == {25, 10}
    cost = 0.5 * float((model(x) - y).detach().square().sum())
    assert result.cost == pytest.approx(cost, rel=1e-9)
    assert cost < 1e-2


def test_a_step_is_judged_on_its_own_batch() -> None:
    """Within a batch the cost never rises, whatever the next batch says."""
    x, y = curve()
    result = fit(net(), (x, y + 0.1 * torch.randn_like(y)), batch_size=20, max_steps=60)
    history = result.history
    ratios = [r for r, ok in zip(history["ratio"], history["accepted"]) if ok]
    assert ratios and min(ratios) > 0
    assert any(b > a for a, b in zip(history["cost"], history["cost"][1:]))


def test_batches_grow_when_steps_do_not_carry_over() -> None:
    torch.manual_seed(1)
    x, y = curve(400)
    y = y + 0.5 * torch.randn_like(y)
    result = fit(net(20), (x, y), batch_size=25, grow_batches=True, max_steps=200)
    fixed = fit(net(20), (x, y), batch_size=25, max_steps=200)
    assert max(result.history["samples"]) > 25 == max(fixed.history["samples"])
    assert result.cost < fixed.cost


def test_dropout_holds_its_mask_for_a_step_and_changes_it_between_steps() -> None:
    x, y = curve()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Dropout(0.1), nn.Linear(30, 1)).double()
    first = fit(model, (x, y), max_steps=30)
    assert first.nit > 10
    ratios = [r for r, ok in zip(first.history["ratio"], first.history["accepted"]) if ok]
    assert min(ratios) > 0
    model.eval()
    assert float((model(x) - y).detach().square().mean()) < 0.1


def test_batch_norm_statistics_follow_accepted_steps_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = curve()
    with pytest.warns(UserWarning, match="see each other"):
        result = fit(model, (x, y), max_steps=100)
    assert result.nit < 101
    assert int(model[1].num_batches_tracked) == result.nit
    assert result.cost < 1e-2 and "see each other" in result.notes[0]


def test_what_torch_cannot_vectorise_trains_with_a_note() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return 3 * ctx.saved_tensors[0] ** 2 * g

    class Cubic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, 1.5]).double())

        def forward(self, x: Any) -> Any:
            return Cube.apply(self.w[0] * x) + self.w[1]

    x, _ = curve()
    with pytest.warns(UserWarning, match="cannot vectorise"):
        result = fit(Cubic(), (x, 8 * x**3 - 1), max_steps=50)
    assert torch.allclose(result.x, torch.tensor([2.0, -1.0]).double())


def test_dtype_computes_in_float64_for_a_float32_model() -> None:
    x, y = curve()
    model = net().float()
    result = fit(model, (x.float(), y.float()), dtype=torch.float64, max_steps=400)
    assert result.x.dtype == torch.float64 and values(model).dtype == torch.float32
    plain = fit(net().float(), (x.float(), y.float()), max_steps=400)
    assert result.cost < 1e-9 < plain.cost * 10
    assert torch.equal(values(model), result.x.float())


def test_acceleration_can_be_left_out() -> None:
    x, y = curve()
    bent, straight = (
        fit(net(), (x, y), acceleration=on, max_steps=60, gtol=0, ftol=0, xtol=0)
        for on in (True, False)
    )
    assert straight.nfev <= 61 < bent.nfev
    assert bent.cost < straight.cost < 1e-2


def test_weight_decay_adds_its_quadratic() -> None:
    x, y = curve()
    result = fit(net(), (x, y), weight_decay=0.1, max_steps=300)
    model = net()
    torch.nn.utils.vector_to_parameters(result.x, model.parameters())
    z = model(x)
    cost = 0.5 * (z - y).square().sum() + 0.05 * sum(p.square().sum() for p in model.parameters())
    assert result.cost == pytest.approx(float(cost.detach()))
    grads = torch.autograd.grad(cost, list(model.parameters()))
    assert max(float(g.abs().max()) for g in grads) < 1e-4


def test_wide_network_fits_every_point() -> None:
    """More parameters than residuals: the dual form."""
    x, y = curve(20)
    result = fit(net(60), (x, y), max_steps=200)
    assert result.cost < 1e-8


def test_cross_entropy_is_the_mean_of_torch() -> None:
    x, _ = curve()
    target = (x[:, 0] > 0.2).long()
    model = net(out=2)
    result = fit(model, (x, target), loss="cross_entropy", weight_decay=1e-3, max_steps=60)
    loss = nn.functional.cross_entropy(model(x), target).detach()
    penalty = 0.5e-3 * values(model).square().sum()
    assert result.cost == pytest.approx(float(loss + penalty))
    assert float((model(x).argmax(1) == target).double().mean()) == 1.0


def test_a_sketch_keeps_the_gradient_and_has_the_mean_curvature() -> None:
    x, y = torch.randn(60, 2, dtype=torch.float64), torch.arange(60) % 5
    torch.manual_seed(0)
    model = nn.Linear(2, 5).double()

    def linearised(sketch: bool, number: int) -> Any:
        looked_at = Session(model, Options(loss="cross_entropy", sketch=sketch), Descent())
        looked_at.place(Batch(x, y, None, 60), number)
        problem = looked_at.problem
        assert problem is not None and problem.m == (120 if sketch else 300)
        return problem.linearize(looked_at.x, problem.residual(looked_at.x))

    exact = linearised(False, 0)
    drawn = [linearised(True, number) for number in range(100)]
    for one in drawn:
        assert torch.allclose(one.grad, exact.grad, atol=1e-14)
    away = [one.gram - exact.gram for one in drawn]
    scatter = sum(a.square().sum() for a in away) / 100
    assert float(scatter) > 1e-3 * float(exact.gram.square().sum())
    mean = sum(away[1:], away[0]) / 100
    assert float(mean.square().sum()) < 3 * float(scatter) / 100  # of the mean of 100: a hundredth


@pytest.mark.parametrize("samples", [60, 10])
def test_sketched_fits_find_the_minimum(samples: int) -> None:
    """Ten samples make twenty rows, fewer than the parameters: the dual form."""
    x, _ = curve(samples)
    target = (4 * x[:, 0].abs()).long().clamp(max=3)
    options: dict[str, Any] = {"loss": "cross_entropy", "weight_decay": 1e-3, "max_steps": 300}
    best = fit(net(out=4), (x, target), **options).cost
    assert fit(net(out=4), (x, target), sketch=True, **options).cost < 1.01 * best


def test_the_optimizer_sketches_as_the_fit_does() -> None:
    x, _ = curve()
    target = (4 * x[:, 0].abs()).long().clamp(max=3)
    fitted = fit(net(out=4), (x, target), loss="cross_entropy", sketch=True, max_steps=1)
    optimizer = LM(net(out=4), loss="cross_entropy", sketch=True)
    assert optimizer.step(x, target).loss == pytest.approx(fitted.cost)
    plain = LM(net(out=4), loss="cross_entropy").step(x, target).loss
    assert plain != pytest.approx(fitted.cost, rel=1e-3)


PEAK = """
import ctypes, sys
from pathlib import Path
import numpy as np, torch
from torch import nn
from lmsolve.torch import fit
from lmsolve.torch._jacobian import block_rows

def held(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * float(line.split()[1]) for line in lines if line.startswith(key))

torch.manual_seed(0)
m, width = 8300, 94  # n x n from 32 MiB on: glibc returns such memory whole
model = nn.Sequential(nn.Linear(20, width), getattr(nn, sys.argv[1])(), nn.Linear(width, 1))
model = model.double()
n = sum(p.numel() for p in model.parameters())
x = torch.randn(m, 20, dtype=torch.float64)
y = torch.sin(x.sum(1, keepdim=True))
fit(model, (x[:50], y[:50]), max_steps=2)  # loads libraries; their own buffers come here:
A = np.ones((900, n))
G = torch.from_numpy(A.T @ A + n * np.eye(n))
torch.cholesky_solve(torch.ones(n, 1).double(), torch.linalg.cholesky(G))
del A, G
ctypes.CDLL("libc.so.6").malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = held("VmRSS")
fit(model, (x, y), max_steps=4)
block = block_rows(n, torch.float64) * (n + 21 + 2 * width) * 8
print((held("VmHWM") - before) / (block + 3 * n * n * 8), m * n / (3 * n * n))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("function", ["Tanh", "GELU"])
def test_peak_memory_is_a_block_and_three_square_matrices(function: str) -> None:
    """By a chain and in the general way; the whole of J would be 1.3 times the three."""
    root = str(Path(lmsolve.__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, function],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    peak, whole = map(float, done.stdout.split())
    assert whole > 1.3
    assert 0.5 < peak < 1.2


def test_callback_stops_and_sees_the_step() -> None:
    x, y = curve()
    seen: list[int] = []

    def stop(intermediate: Any) -> None:
        seen.append(intermediate.step)
        assert intermediate.x.shape == (25,) and intermediate.cost >= 0
        if intermediate.step == 5:
            raise StopIteration

    result = fit(net(), (x, y), callback=stop)
    assert result.status == -2 and seen == [1, 2, 3, 4, 5]


def test_limits_end_a_fit() -> None:
    x, y = curve()
    assert fit(net(), (x, y), max_steps=3).steps == 3
    start = time.perf_counter()
    result = fit(net(), (x, y), max_steps=10**9, max_seconds=0.2, ftol=0, xtol=0, gtol=0)
    assert result.status == 0 and time.perf_counter() - start < 20


def test_no_progress_bar_in_a_library_call(capfd: pytest.CaptureFixture[str]) -> None:
    x, y = curve()
    fit(net(), (x, y), max_steps=3)
    assert capfd.readouterr() == ("", "")
    fit(net(), (x, y), max_steps=3, progress=True)
    assert "3/3" in capfd.readouterr().err


def test_torch_random_stream_is_untouched() -> None:
    x, y = curve()
    torch.manual_seed(11)
    expected = torch.rand(3)
    model = net()
    torch.manual_seed(11)
    fit(model, (x, y), batch_size=20, max_steps=10)
    assert torch.equal(torch.rand(3), expected)


# --- checkpoints --------------------------------------------------------------------------------


def dropout_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 9), nn.Tanh(), nn.Dropout(0.1), nn.Linear(9, 1)).double()


def test_a_resumed_fit_with_dropout_sees_a_loaders_order_again(tmp_path: Path) -> None:
    """The look whether the model draws random numbers is taken twice, and leaves no trace."""
    x, y = curve()

    def run(steps: int, seed: int, **options: Any) -> Any:
        model = dropout_net()
        torch.manual_seed(seed)
        data = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
        return fit(model, data, max_steps=steps, **options).x

    path = tmp_path / "state.pt"
    run(5, 4, checkpoint=path, checkpoint_steps=1)
    assert torch.equal(run(12, 9, resume=path), run(12, 4))


@pytest.mark.parametrize("kind", ["full", "mini", "loader", "dropout", "sketch"])
def test_resumed_equals_uninterrupted_to_the_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fastest way is a matter of timing: the two runs compared here must take the same one.
    timed = _jacobian._verified_time
    monkeypatch.setattr(_jacobian, "_verified_time", lambda *a: None if timed(*a) is None else 1.0)
    x, y = curve()
    make: Any = dropout_net if kind == "dropout" else net
    options: dict[str, Any] = {"batch_size": 20} if kind in ("mini", "sketch") else {}
    if kind == "mini":
        options["grow_batches"] = True
    if kind == "sketch":
        y, options["sketch"] = torch.cat([y, y**2, y**3], 1), True
        make = lambda: net(out=3)  # noqa: E731  (as net)

    def data() -> Any:
        if kind != "loader":
            return (x, y)
        torch.manual_seed(4)
        return DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True)

    whole = fit(make(), data(), max_steps=23, **options)
    path = tmp_path / "state.pt"
    fit(make(), data(), max_steps=14, checkpoint=path, checkpoint_steps=5, **options)
    saved = _checkpoint.load(path)["steps"]
    assert 5 <= saved < 14
    resumed = fit(make(), data(), max_steps=23, resume=path, **options)
    assert torch.equal(resumed.x, whole.x) and resumed.cost == whole.cost
    for key in set(whole.history) - {"seconds", "memory"}:
        assert resumed.history[key] == whole.history[key]
    assert (resumed.nfev, resumed.njev, resumed.nit) == (whole.nfev, whole.njev, whole.nit)


def test_a_killed_fit_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            from torch import nn
            import lmsolve.torch
            from lmsolve.torch import _jacobian
            timed = _jacobian._verified_time
            _jacobian._verified_time = lambda *a: None if timed(*a) is None else 1.0
            path, steps = sys.argv[1], int(sys.argv[2])
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
            x = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None]
            result = lmsolve.torch.fit(
                model, (x, torch.sin(3 * x)), batch_size=20, max_steps=steps,
                checkpoint=path, checkpoint_steps=1, resume=path,
            )
            torch.save((result.x, result.steps), path + ".done")
            """
        )
    )
    root = str(Path(lmsolve.__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    killed, clean = tmp_path / "killed", tmp_path / "clean"
    process = subprocess.Popen([sys.executable, script, killed, "1000000"], env=env)
    deadline = time.monotonic() + 60
    while not killed.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    reached = _checkpoint.load(killed)["steps"]
    assert reached > 1
    for path in (killed, clean):
        subprocess.run(
            [sys.executable, script, path, str(reached + 7)], env=env, check=True, timeout=300
        )
    a, b = (torch.load(f"{path}.done", weights_only=True) for path in (killed, clean))
    assert torch.equal(a[0], b[0]) and a[1] == b[1] == reached + 7


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    x, y = curve()
    path = tmp_path / "state.pt"
    fit(net(), (x, y), max_steps=9, checkpoint=path, checkpoint_steps=1)
    with pytest.raises(ValueError, match="4 tensors, 25 values; the model has 4 tensors, 28 val"):
        fit(net(9), (x, y), max_steps=9, resume=path)


def test_checkpoints_every_so_many_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))  # every question takes a second
    monkeypatch.setattr(_checkpoint, "time", SimpleNamespace(monotonic=lambda: next(now)))
    schedule = _checkpoint.Schedule(None, 3.0)
    assert [schedule.due(step) for step in range(7)] == [False, False, True] * 2 + [False]
    x, y = curve()
    path = tmp_path / "state.pt"
    fit(net(), (x, y), max_steps=20, checkpoint=path, checkpoint_steps=None, checkpoint_seconds=3)
    assert 3 <= _checkpoint.load(path)["steps"] <= 20


def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    _checkpoint.save(path, {"a": 1})

    def broken(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        _checkpoint.save(path, {"a": 2})
    assert _checkpoint.load(path)["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


# --- an optimizer -------------------------------------------------------------------------------


def test_optimizer_loop_trains_and_terminates() -> None:
    x, y = curve()
    model = net()
    optimizer = LM(model, residual=lambda a, b: a - b, devices=["cpu"])
    losses = []
    for _ in range(500):
        optimizer.zero_grad()
        loss, terminated = optimizer.step(x, y)
        losses.append(loss)
        if terminated:
            break
    assert losses[-1] < 1e-7
    cost = 0.5 * float((model(x) - y).detach().square().sum())
    assert losses[-1] == pytest.approx(cost, rel=1e-6)


def test_optimizer_says_when_no_step_helps() -> None:
    model = nn.Linear(1, 1).double()
    x = torch.ones(5, 1, dtype=torch.float64)
    y = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], dtype=torch.float64)
    optimizer = LM(model)
    for _ in range(30):
        loss, terminated = optimizer.step(x, y)
    assert terminated and loss == pytest.approx(5.0)


def test_optimizer_state_goes_on_to_the_bit() -> None:
    x, y = curve()
    a, b = net(), net()
    first, second = LM(a), LM(b)
    for i in range(12):
        rows = slice(None, None, 1 + i % 2)
        first.step(x[rows], y[rows])
        second.step(x[rows], y[rows])
        if i == 5:
            kept, weights = second.state_dict(), b.state_dict()
            b = net(seed=3)
            b.load_state_dict(weights)
            second = LM(b)
            second.load_state_dict(kept)
    assert torch.equal(values(a), values(b))


def test_optimizer_takes_up_parameters_changed_by_the_user() -> None:
    x, y = curve()
    model = net()
    optimizer = LM(model)
    optimizer.step(x, y)
    with torch.no_grad():
        model[2].bias.add_(5.0)
    before = 0.5 * float((model(x) - y).detach().square().sum())
    loss, _ = optimizer.step(x, y)
    assert loss < before
    assert loss == pytest.approx(0.5 * float((model(x) - y).detach().square().sum()), rel=1e-9)


def test_available_gpus_are_what_torch_sees() -> None:
    assert len(available_gpus()) == torch.cuda.device_count()


# --- bad input ----------------------------------------------------------------------------------

X, Y = torch.zeros(6, 1), torch.zeros(6, 1)


def linear() -> nn.Module:
    return nn.Linear(1, 1)


def with_nan() -> nn.Module:
    model = linear()
    with torch.no_grad():
        model.bias.fill_(float("nan"))
    return model


def complex_model() -> nn.Module:
    return nn.Linear(1, 1, dtype=torch.complex64)


def frozen() -> nn.Module:
    return linear().requires_grad_(False)


def integers() -> nn.Module:
    """torch itself refuses integers that require grad."""
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False)
    return model


BAD: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "nan in parameters": (with_nan, (X, Y), {}, ValueError, "1 NaN or infinite values in bias"),
    "nan in inputs": (linear, (X + float("nan"), Y), {}, ValueError, "`inputs` must be finite"),
    "inf in targets": (linear, (X, Y + float("inf")), {}, ValueError, "`targets` .*6 NaN"),
    "would broadcast": (
        linear, (X, Y[:, 0]), {}, ValueError, r"shape of the model's output \(6, 1\), got \(6,\)",
    ),
    "other length": (linear, (X, Y[:4]), {}, ValueError, r"as many samples .* 6, .* \(4, 1\)"),
    "no samples": (linear, (X[:0], Y[:0]), {}, ValueError, "at least one sample"),
    "nothing to train": (frozen, (X, Y), {}, ValueError, "trainable parameter, got none"),
    "complex parameters": (complex_model, (X, Y), {}, TypeError, "weight of torch.complex64"),
    "integer parameters": (integers, (X, Y), {}, ValueError, "trainable parameter, got none"),
    "complex data": (linear, (X, Y + 0j), {}, TypeError, "`targets` must be real"),
    "other device": (
        linear, (X, Y.to("meta")), {}, ValueError, "`targets` must be on the model's device cpu",
    ),
    "scalar residual": (
        linear, (X, Y), {"residual": lambda z, t: (z - t).sum()}, ValueError, "got a scalar",
    ),
    "residual is no tensor": (
        linear, (X, Y), {"residual": lambda z, t: [1.0]}, TypeError, "tensor, got list",
    ),
    "residual is detached": (
        linear, (X, Y), {"residual": lambda z, t: (z - t).detach()}, ValueError, "require no grad",
    ),
    "residual and loss": (
        linear, (X, Y), {"residual": lambda z, t: z - t, "loss": "mse"}, ValueError, "not both",
    ),
    "unknown loss": (linear, (X, Y), {"loss": "nll"}, ValueError, "cross_entropy.*got 'nll'"),
    "unknown linalg": (linear, (X, Y), {"linalg": "cuda"}, ValueError, "'torch'.*got 'cuda'"),
    "weights of the wrong shape": (
        linear, (X, Y), {"weights": torch.ones(6, 1)}, ValueError, r"shape \(6,\)",
    ),
    "negative weights": (
        linear, (X, Y), {"weights": -torch.ones(6)}, ValueError, "finite and not negative",
    ),
    "negative decay": (linear, (X, Y), {"weight_decay": -1.0}, ValueError, "not be negative"),
    "empty loader": (
        linear,
        lambda: DataLoader(TensorDataset(X, Y), batch_size=9, drop_last=True),
        {},
        ValueError,
        "at least one batch, got none",
    ),
    "loader with a batch size": (
        linear,
        lambda: DataLoader(TensorDataset(X, Y)),
        {"batch_size": 3},
        ValueError,
        "brings its own batches",
    ),
    "not a pair": (linear, X, {}, TypeError, r"pair \(inputs, targets\)"),
    "batch of none": (linear, (X, Y), {"batch_size": 0}, ValueError, "at least 1, got 0"),
    "no steps": (linear, (X, Y), {"max_steps": -1}, ValueError, "not be negative"),
    "bad tolerance": (linear, (X, Y), {"ftol": float("nan")}, ValueError, "`ftol` must be"),
    "not a module": (lambda: (lambda x: x), (X, Y), {}, TypeError, "torch.nn.Module"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    make, data, options, kind, message = BAD[case]
    data = data() if callable(data) and not isinstance(data, torch.Tensor) else data
    with pytest.raises(kind, match=message):
        fit(make(), data, **options)


def test_an_iterable_dataset_needs_a_loader() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([(X[0], Y[0])])

    with pytest.raises(TypeError, match="as a DataLoader"):
        fit(linear(), Stream())


def test_a_nan_in_a_loaders_batch_is_named() -> None:
    broken = X.clone()
    broken[5] = float("nan")
    with pytest.raises(ValueError, match="`inputs` must be finite, got 1 NaN"):
        fit(linear(), DataLoader(TensorDataset(broken, Y + 1), batch_size=3), max_steps=50)


def test_a_loader_that_shuffles_is_asked_once_for_each_batch() -> None:
    """All trials of a step see the batch that came first, whatever the loader would give next."""
    drawn: list[Any] = []

    class Noted(TensorDataset):
        def __getitem__(self, i: Any) -> Any:
            drawn.append(i)
            return super().__getitem__(i)

    x, y = curve(40)
    result = fit(net(), DataLoader(Noted(x, y), batch_size=10, shuffle=True), max_steps=60)
    assert result.nit < result.steps  # some trials were rejected
    per_epoch = [sorted(drawn[k : k + 40]) for k in range(0, len(drawn) - 39, 40)]
    assert per_epoch and all(one == list(range(40)) for one in per_epoch)
    assert len(drawn) <= 10 * result.steps


def test_parameters_on_two_devices_are_named() -> None:
    model = nn.Sequential(linear(), nn.Linear(1, 1, device="meta"))
    with pytest.raises(ValueError, match=r"0.weight on cpu and 1.weight on meta"):
        fit(model, (X, Y))


def test_a_model_of_two_dtypes_is_named() -> None:
    model = nn.Sequential(linear(), linear().double())
    with pytest.raises(TypeError, match=r"model.to\(dtype\)"):
        fit(model, (X, Y))


def test_random_models_are_refused_where_masks_cannot_be_held() -> None:
    model = nn.Sequential(linear(), nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        residuals(model, X + 1, Y)

    class Wandering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = linear(), 0

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return self.layer(x) * self.calls

    with pytest.raises(ValueError, match="same output for the same data and random numbers"):
        fit(Wandering(), (X + 1, Y))


def test_devices_must_hold_the_model() -> None:
    with pytest.raises(ValueError, match="must include the model's device cpu"):
        LM(linear(), devices=["meta"])


def test_an_infinite_cost_at_the_start_is_named() -> None:
    model = linear()
    with torch.no_grad():
        model.weight.fill_(3e38)
    with pytest.raises(ValueError, match="finite at the start"):
        fit(model, (X + 1e9, Y))


def test_a_nan_on_the_way_is_a_rejected_step() -> None:
    """sqrt of a negative number beyond some parameters: the step is shortened, not believed."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor([5.0], dtype=torch.float64))

        def forward(self, x: Any) -> Any:
            return torch.exp(0.5 * torch.log(self.p - 1)) * x

    x = torch.ones(4, 1, dtype=torch.float64)
    result = fit(Root(), (x, 0.5 * x), max_steps=60)
    assert np.isfinite(result.history["cost"]).all() and not all(result.history["accepted"])
    assert float(result.x) == pytest.approx(1.25, rel=1e-6)


def test_every_status_has_a_message() -> None:
    assert set(_run.MESSAGES) == {-3, -2, 0, 1, 2, 3}
