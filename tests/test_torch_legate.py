"""Networks in Legate's tasks: the steps of one process, and every trap of threads and shards."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402  (after the skip)
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from lmsolve.legate._start import inspect_machine, obstacle  # noqa: E402
from lmsolve.torch import LM, _cluster, _setup, available_gpus, fit  # noqa: E402
from lmsolve.torch._data import make_batch  # noqa: E402
from lmsolve.torch._vectors import fingerprint  # noqa: E402
from tests.test_legate_ranks import launch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def net(width: int = 8, inputs: int = 1, out: int = 1, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, out)).double()


def curve(m: int = 61) -> tuple[Any, Any]:
    x = torch.linspace(-1, 1, m, dtype=torch.float64)[:, None]
    return x, torch.sin(3 * x)


def cloud(m: int = 21, out: int = 2) -> tuple[Any, Any]:
    torch.manual_seed(5)
    return torch.randn(m, 3).double(), torch.randn(m, out).double()


def both(make: Any, data: Any, **options: Any) -> tuple[Any, Any]:
    """The fit of one process, and of Legate."""
    options = {"max_steps": 6, **options}
    return fit(make(), data, **options), fit(make(), data, linalg="legate", **options)


def assert_same(pair: tuple[Any, Any], rtol: float = 1e-8) -> None:
    expected, found = pair
    assert found.history["accepted"] == expected.history["accepted"]
    np.testing.assert_allclose(found.history["cost"], expected.history["cost"], rtol=rtol)
    scale = float(expected.x.abs().max())
    torch.testing.assert_close(found.x, expected.x, rtol=0.0, atol=rtol * scale)


def session(model: nn.Module, data: Any, **options: Any) -> Any:
    """A session that looks at a batch."""
    optimizer = LM(model, **{"linalg": "legate", **options})
    optimizer.step(*data)
    return optimizer._session


def first_step(model: nn.Module, data: Any, linalg: str) -> tuple[Any, Any]:
    """A session, and its first step at a relative damping of one."""
    looked_at = LM(model, linalg=linalg)._session
    looked_at.place(make_batch(*data, None, looked_at.network.parameters), 0)
    problem, x = looked_at.problem, looked_at.state.x
    sub = problem.linearize(x, problem.residual(x))
    step = sub.solve(sub.size)
    return looked_at, step if linalg == "torch" else looked_at.cluster.read(step.store, "vectors")


@pytest.mark.skipif(obstacle(inspect_machine()) is None, reason="Legate can start here")
def test_without_legate_the_remedy_is_named() -> None:
    with pytest.raises((ImportError, RuntimeError), match=r"install|LEGATE_CONFIG"):
        fit(net(), curve(), linalg="legate")


def test_unknown_place_for_the_linear_algebra() -> None:
    with pytest.raises(ValueError, match="`linalg` must be one of"):
        fit(net(), curve(), linalg="lapack")


def test_processors_that_torch_cannot_use_are_told_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    with pytest.raises(RuntimeError, match="--cpus 1"):
        _setup.check_processors(0, 0, cpu)
    with pytest.raises(RuntimeError, match=r"holds 2 GPUs.*CUDA build"):
        _setup.check_processors(2, 2, cpu)
    with pytest.raises(RuntimeError, match=r"is on cuda:0.*model\.cpu"):
        _setup.check_processors(2, 0, cuda)
    with pytest.raises(ValueError, match="one process, got 2 ranks"):
        _setup.check_split(2, 0, [cpu])
    with pytest.raises(ValueError, match=r"leave out the 1 GPUs.*cuda:0.*fewer --gpus"):
        _setup.check_split(1, 1, [cuda])
    _setup.check_split(1, 1, [torch.device("cuda:1"), cpu])


def test_processes_that_legate_does_not_know_of_are_told_of_its_launcher() -> None:
    with pytest.raises(RuntimeError, match=r"4 processes.*PMI_SIZE.*legate --launcher mpirun"):
        _setup.check_launched(1, {"PMI_SIZE": "4"})
    _setup.check_launched(2, {"OMPI_COMM_WORLD_SIZE": "2"})
    _setup.check_launched(1, {"OMPI_COMM_WORLD_SIZE": "1"})


def test_a_gpu_that_legates_pool_has_filled_is_told_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("memory_reserved", 3e9), ("memory_allocated", 1e9)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: int(value))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * 10**8, 8 * 10**10))
    free = int(_setup.free_gpu_bytes(None)[0])
    assert free == 25 * 10**8
    _setup.check_torch_memory(free, 25 * 10**8, None)
    with pytest.raises(MemoryError, match=r"about 4\.5 GB.*2\.5 GB are free.*--fbmem less"):
        _setup.check_torch_memory(free, 45 * 10**8, None)
    with pytest.raises(MemoryError, match="--fbmem 70000 or less; it has 72000 now"):
        _setup.check_torch_memory(free, free + 2000 * 2**20, 72000 * 2**20)


def test_gpus_that_legate_holds_are_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        node_count = 2

        def get_machine(self) -> Any:
            return SimpleNamespace(count=lambda target: 6)

    core = ModuleType("legate.core")
    core.get_legate_runtime, core.TaskTarget = Runtime, SimpleNamespace(GPU=0)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "legate", ModuleType("legate"))
    monkeypatch.setitem(sys.modules, "legate.core", core)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert available_gpus() == [torch.device("cuda:3")]


def test_no_device_left_for_the_model_is_told_with_the_remedy() -> None:
    for train in (lambda: fit(net(), curve(), devices=[]), lambda: LM(net(), devices=[])):
        with pytest.raises(ValueError, match=r"at least one device.*fewer --gpus"):
            train()


# --- the same steps ---------------------------------------------------------------------------


@pytest.mark.legate
@pytest.mark.parametrize("m", [61, 60, 25])
def test_rows_in_shards_give_the_steps_of_one_process(m: int) -> None:
    assert_same(both(net, curve(m), max_steps=12))


@pytest.mark.legate
def test_fewer_samples_than_processors() -> None:
    told = "A batch of 1 samples leaves 1 of Legate's 2 processors idle"
    with pytest.warns(UserWarning, match=told):
        assert_same(both(net, curve(1), max_steps=3))
    with pytest.warns(UserWarning, match=told):
        assert session(net(), curve(1)).problem.placed.shards == 1
    with pytest.warns(UserWarning, match=told):
        result = fit(net(), DataLoader(TensorDataset(*curve(3)), batch_size=1), linalg="legate")
    assert len(result.notes) == 1


@pytest.mark.legate
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_losses_with_weights_and_decay(loss: str) -> None:
    x, y = cloud(40, 2)
    target = y.argmax(1) if loss == "cross_entropy" else y
    weights = torch.linspace(0.5, 2.0, 40).double()
    options = {"loss": loss, "weights": weights, "weight_decay": 0.01}
    assert_same(both(lambda: net(4, 3, 2), (x, target), **options))


@pytest.mark.legate
@pytest.mark.parametrize("out", [1, 4])
def test_rows_that_are_not_kept_are_made_anew(out: int) -> None:
    make, data = (lambda: net(4, 3, out)), cloud(301, out)
    assert_same(both(make, data, memory=60_000, max_steps=12))
    looked_at = session(make(), data, memory=60_000)
    problem, x = looked_at.problem, looked_at.x
    p, z = torch.ones_like(x), torch.ones(problem.m, dtype=torch.float64)
    products = problem._products(x)
    Jp = products.product(p)
    assert float(z @ Jp) == pytest.approx(float(products.transposed(z) @ p), rel=1e-9)
    curved = problem._curved(x, x.new_empty(0), products)
    torch.testing.assert_close(curved(p, products.transposed(Jp)), curved(p, None))
    assert problem.placed._rows == problem.placed._pending == {}


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(27, 1)
    return nn.Sequential(*layers).double()


@pytest.mark.legate
@pytest.mark.parametrize(("memory", "kept"), [(1 << 28, True), (1 << 19, False)])
def test_small_rows_of_shared_weights_stay_in_their_shards(memory: int, kept: bool) -> None:
    torch.manual_seed(1)
    data = torch.randn(121, 1, 11, 11).double(), torch.randn(121, 1).double()
    assert_same(both(convolutions, data, memory=memory))
    looked_at = session(convolutions(), data, memory=memory)
    problem, x = looked_at.problem, looked_at.x
    evaluated = problem.residual(x)
    assert bool(problem.placed._pending) == kept
    problem.linearize(x, evaluated)
    shapes = [products.J.shape for _, (products, _) in problem.placed._rows.values()]
    assert sorted(shapes) == [(60, x.numel()), (61, x.numel())]


@pytest.mark.legate
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_wide_networks_share_out_the_kernel(decay: float) -> None:
    pair = both(lambda: net(40, 3, 2), cloud(), weight_decay=decay)
    assert_same(pair)


@pytest.mark.legate
def test_large_normal_matrices_are_factored_by_legate(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmsolve.legate import _cholesky

    made, original = [0], _cholesky.LegateCholesky.__init__

    def counted(self: Any, A: Any) -> None:
        made[0] += 1
        original(self, A)

    monkeypatch.setattr(_cholesky, "pays", lambda n: True)
    monkeypatch.setattr(_cholesky.LegateCholesky, "__init__", counted)
    pair = both(net, curve())
    assert_same(pair)
    assert made[0] == pair[1].steps


@pytest.fixture
def pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds for GPUs, on the CPUs of one rank."""
    original = _cluster.Cluster.__init__

    def made(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        self.in_process = self.shared = False

    monkeypatch.setattr(_cluster.Cluster, "__init__", made)


@pytest.fixture(params=["host", "bands"])
def placing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices on the host, as in one process, and in bands with their vectors, as on GPUs."""
    if request.param == "bands":
        from lmsolve.legate import _cholesky

        request.getfixturevalue("pooled")
        monkeypatch.setattr(_cholesky, "pays", lambda n: True)


@pytest.mark.legate
@pytest.mark.parametrize("tile", [7, 41, 5])
def test_a_factor_in_bands_solves_its_system(pooled: None, tile: int) -> None:
    from lmsolve.torch._bands import Bands
    from lmsolve.torch._shards import view_of
    from lmsolve.torch._vectors import combined

    n, cluster = 41, session(net(), curve()).cluster
    torch.manual_seed(0)
    B = torch.randn(n + 3, n).double()
    A, b = B.T @ B, torch.randn(n).double()

    def fill(shard: Any) -> Any:
        band = view_of(shard.outputs[0])
        band.copy_(A[shard.index * tile :][: len(band)])
        return ()

    def put(shard: Any) -> Any:
        view_of(shard.outputs[0]).copy_(b[shard.index * tile :][:tile])
        return ()

    bands, there = Bands(cluster, n, tile, torch.float64), cluster.vector(n, tile)
    cluster.run(fill, bands.count, (), bands.outputs)
    cluster.run(put, bands.count, (), (there.tiles,))
    factor = bands.factor(0.5)
    with cluster.chained():
        x = combined(cluster, (-1.0, factor.solve(there)), against=there)
    image, curvature, off = bands.product(x, 0.5, there)
    expected = -torch.linalg.solve(A + 0.5 * torch.eye(n), b)
    for found, right in ((x, expected), (image, A @ expected)):
        torch.testing.assert_close(cluster.read(found.store, "vectors"), right)
    told = x.square, x.largest, x.along, curvature
    right = expected @ expected, expected.abs().max(), expected @ b, expected @ A @ expected
    np.testing.assert_allclose(told, [float(v) for v in right], rtol=1e-9)
    assert off < 1e-12 * float(A.abs().max())


@pytest.mark.legate
@pytest.mark.parametrize(
    ("make", "points"),  # the wide one's acceleration looks ahead by a launch of its own
    [(net, 1), (lambda: net(40), 2), (lambda: Custom(3), 1), (lambda: net(3).float(), 1)],
    ids=["tall", "wide", "unfactored", "single"],
)
def test_weights_are_written_into_one_store_for_each_point(
    pooled: None, make: Any, points: int
) -> None:
    data = cloud() if isinstance(make(), Custom) else curve()
    if next(make().parameters()).dtype == torch.float32:
        data = data[0].float(), data[1].float()
        assert_same(both(make, data), rtol=2e-4)
    else:
        assert_same(both(make, data))
    looked_at = session(make(), data)
    x, traffic = looked_at.x, looked_at.cluster.traffic
    before = traffic["parameters"]
    problem, other = looked_at.problem, x + 1e-3
    sub = problem.linearize(other, problem.residual(other))
    sub.acceleration(sub.solve(sub.size))
    assert traffic["parameters"] == before + points * x.nbytes  # however many launches
    with looked_at.cluster.chained():
        stored = looked_at.cluster.sent(other).place
    torch.testing.assert_close(looked_at.cluster.read(stored.store, "parameters"), other)


@pytest.mark.legate
def test_an_exception_of_a_launch_that_nobody_waits_for_is_raised_by_the_last() -> None:
    cluster = session(net(), curve()).cluster
    vector = cluster.vector(10, 5)

    def refusing(shard: Any) -> Any:
        if shard.index == 1:
            raise Refused("no more")
        return ()

    with cluster.chained():
        cluster.submit(refusing, 2, (), (vector.tiles,))
        with pytest.raises(Refused, match="no more"):
            cluster.run(lambda shard: (), 2, (vector.store,))
    assert cluster.run(lambda shard: (1.0,), 2)[:, 0].tolist() == [1.0, 1.0]


def test_a_fingerprint_sees_every_bit() -> None:
    x = torch.linspace(-1, 1, 41).double()  # numbers of single precision have zeros at their end
    for i in range(41):
        for bit in range(64):
            y = x.clone()
            y.view(torch.int64)[i] ^= 1 << bit if bit < 63 else -(1 << 63)
            assert fingerprint(y) != fingerprint(x)
    assert fingerprint(x.clone()) == fingerprint(x)
    assert fingerprint(x.flip(0)) != fingerprint(x)


@pytest.mark.legate
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["tall", "wide"])
def test_large_matrices_stay_on_their_processors(
    pooled: None, monkeypatch: pytest.MonkeyPatch, kind: str, decay: float
) -> None:
    from lmsolve.legate import _cholesky

    monkeypatch.setattr(_cholesky, "pays", lambda n: True)
    make = (lambda: net(4, 3, 2)) if kind == "tall" else (lambda: net(40, 3, 2))
    data = cloud(41)
    for acceleration in (True, False):
        assert_same(both(make, data, weight_decay=decay, acceleration=acceleration))
    optimizer = LM(make(), linalg="legate", weight_decay=decay)
    for _ in range(3):
        optimizer.step(*data)
    looked_at = optimizer._session
    traffic, state = looked_at.cluster.traffic, looked_at.state
    # The start, and what each accepted step leaves in the model, which is read once.
    assert traffic == {
        "parameters": (1 + state.nit) * looked_at.x.nbytes,
        "numbers": traffic["numbers"],
    }
    sub = looked_at.problem.linearize(state.x, looked_at.problem.residual(state.x))
    assert "Banded" in type(sub).__name__
    with pytest.raises(np.linalg.LinAlgError):
        sub.solve(-1e6)
    with pytest.raises(np.linalg.LinAlgError, match="not finite"):
        sub.solve(float("nan"))


class Custom(nn.Module):
    """A layer that no factors are known of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(3, width).double())
        self.b = nn.Parameter(torch.randn(width, 2).double() / width)

    def forward(self, x: Any) -> Any:
        return torch.tanh(x @ self.a) @ self.b


@pytest.mark.legate
@pytest.mark.parametrize("width", [3, 40])
def test_models_whose_rows_do_not_factor(width: int) -> None:
    assert_same(both(lambda: Custom(width), cloud()))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(1, 5).double(), nn.Linear(5, 1).double()

    def forward(self, x: Any, shift: Any) -> Any:
        return self.two(torch.tanh(self.one(x) + shift))


@pytest.mark.legate
def test_tuple_inputs() -> None:
    x, y = curve()
    assert_same(both(TwoInputs, ((x, 0.1 * x.cos()), y)))


def normalised() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    return nn.Sequential(*layers).double()


@pytest.mark.legate
@pytest.mark.filterwarnings("ignore:The samples of a batch see each other")
def test_batch_normalisation_sees_the_whole_batch() -> None:
    models = [normalised(), normalised()]
    chosen = iter(models)
    assert_same(both(lambda: next(chosen), curve()))
    torch.testing.assert_close(models[1][1].running_mean, models[0][1].running_mean)


@pytest.mark.legate
def test_single_precision_model_has_its_sums_in_double() -> None:
    x, y = curve()
    pair = both(lambda: net().float(), (x.float(), y.float()))
    assert_same(pair, rtol=2e-4)
    optimizer = session(net().float(), (x.float(), y.float()))
    state = optimizer.state
    sub = optimizer.problem.linearize(state.x, optimizer.problem.residual(state.x))
    assert sub.gram.dtype == torch.float64


@pytest.mark.legate
def test_mini_batches_and_a_data_loader(placing: None) -> None:
    x, y = curve()
    assert_same(both(net, (x, y), batch_size=25))
    assert_same(both(net, (x, y), batch_size=25, grow_batches=True, max_steps=9))
    pair = both(net, DataLoader(TensorDataset(x, y), batch_size=25), max_steps=8)
    assert_same(pair)
    assert set(pair[1].history["samples"]) == {25, 11}


@pytest.mark.legate
def test_optimizer_steps() -> None:
    losses = []
    for linalg in ("torch", "legate"):
        optimizer = LM(net(), linalg=linalg)
        losses.append([optimizer.step(*curve()).loss for _ in range(4)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-9)


@pytest.mark.legate
def test_a_checkpoint_of_legate_goes_on_in_one_process(placing: None, tmp_path: Path) -> None:
    path = tmp_path / "state"
    options = {"checkpoint": path, "checkpoint_steps": 1}
    fit(net(), curve(), max_steps=5, linalg="legate", **options)
    resumed = fit(net(), curve(), max_steps=9, resume=path)
    whole = fit(net(), curve(), max_steps=9)
    assert resumed.steps == 9
    assert resumed.cost == pytest.approx(whole.cost, rel=1e-8)


@pytest.mark.legate
def test_a_plan_of_forward_mode_is_not_taken_up(tmp_path: Path) -> None:
    looked_at = session(net(), curve())
    saved = looked_at.snapshot()
    (key, plan), *_ = saved["plans"]
    looked_at.restore({**saved, "plans": [(key, {**plan, "way": "forward"})]})
    assert looked_at.plans == {}
    looked_at.restore(saved)
    assert list(looked_at.plans) == [key]


@pytest.mark.legate
def test_a_killed_run_goes_on_with_another_number_of_processors(tmp_path: Path) -> None:
    script, path = tmp_path / "train.py", tmp_path / "state"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, sys
            from lmsolve.torch import fit
            from tests.test_torch_legate import curve, net

            def kill(step):
                if step.step == 5:
                    os.kill(os.getpid(), signal.SIGKILL)

            fit(net(), curve(), max_steps=9, checkpoint=sys.argv[1], checkpoint_steps=1,
                callback=kill, linalg="legate")
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LEGATE_CONFIG": "--cpus 1 --gpus 0"}
    done = subprocess.run([sys.executable, script, path], env=environment, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
    resumed = fit(net(), curve(), max_steps=9, resume=path, linalg="legate")
    whole = fit(net(), curve(), max_steps=9)
    assert resumed.steps == 9
    assert resumed.cost == pytest.approx(whole.cost, rel=1e-8)


# --- in two components ------------------------------------------------------------------------


@pytest.mark.legate
@pytest.mark.parametrize("kind", ["factors", "other", "wide"])
def test_two_components_take_the_steps_of_one_process(kind: str) -> None:
    make = {"factors": net, "other": lambda: Custom(3), "wide": lambda: net(40, 3, 2)}[kind]
    data = curve() if kind == "factors" else cloud()
    expected = fit(make(), data, max_steps=6)
    found = fit(make(), data, max_steps=6, linalg="legate-split", devices=["cpu", "cpu"])
    assert_same((expected, found))


@pytest.mark.legate
@pytest.mark.filterwarnings("ignore:The samples of a batch see each other")
def test_two_components_normalise_over_the_batch() -> None:
    expected = fit(normalised(), curve(), max_steps=6)
    assert_same((expected, fit(normalised(), curve(), max_steps=6, linalg="legate-split")))


@pytest.mark.legate
def test_two_components_send_each_row_through_the_host_once() -> None:
    x, y = curve(61)
    optimizer = LM(net(), linalg="legate-split", devices=["cpu", "cpu", "cpu"])
    optimizer.step(x, y)
    looked_at, n = optimizer._session, optimizer._session.x.numel()
    assert looked_at.cluster.traffic["jacobian"] == looked_at.problem.njev * 61 * n * 8
    optimizer.step(x, y)
    assert looked_at.cluster.traffic["jacobian"] == 2 * 61 * n * 8


@pytest.mark.legate
def test_a_slice_is_added_up_while_the_next_one_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import lmsolve.torch._split as split

    slices, waited = 0, []
    computing, adding = split.SplitProblem._slices, split.AddJob.__call__
    another = threading.Condition()

    def computed(self: Any, x: Any) -> Any:
        nonlocal slices
        for rows in computing(self, x):
            with another:
                slices += 1
                another.notify_all()
            yield rows

    def added(self: Any, shard: Any) -> Any:
        with another:  # as long as the main thread has not computed one more, if there is one
            now = self.number
            waited.append(another.wait_for(lambda: slices > now or now == 4, timeout=20.0))
        return adding(self, shard)

    made = split.AddJob.__init__

    def numbered(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self.number = slices

    looked_at = session(net(), curve(), linalg="legate-split")
    problem = looked_at.problem
    problem.plan = replace(problem.plan, samples=16)  # four slices
    monkeypatch.setattr(split.SplitProblem, "_slices", computed)
    monkeypatch.setattr(split.AddJob, "__init__", numbered)
    monkeypatch.setattr(split.AddJob, "__call__", added)
    problem.linearize(looked_at.x, problem.residual(looked_at.x))
    assert slices == 4
    assert len(waited) == 8
    assert all(waited)


@pytest.mark.legate
def test_devices_must_have_the_models_own_among_them() -> None:
    with pytest.raises(ValueError, match="`devices` must include the model's device cpu"):
        fit(net(), curve(), linalg="legate-split", devices=["cuda:7"])


# --- dropout ----------------------------------------------------------------------------------


def dropping() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1)).double()


@pytest.mark.legate
def test_a_step_has_one_dropout_mask_which_differs_between_shards() -> None:
    x = torch.ones(40, 1).double()
    looked_at = session(dropping(), (x, torch.zeros_like(x)))
    problem, point = looked_at.problem, looked_at.x
    assert problem.placed.shards == 2
    rows = problem._rows(problem._point(point))
    for _ in range(5):
        assert torch.equal(problem._rows(problem._point(point)), rows)
    assert not torch.equal(rows[:20], rows[20:])
    cost = float(problem.residual(point).cost)
    assert cost == pytest.approx(0.5 * float(rows @ rows), rel=1e-12)
    # J'r by the rows that the sums saw must be the gradient of that very cost.
    sub = problem.linearize(point, problem.residual(point))
    h, direction = 1e-6, torch.ones_like(point)
    ends = [float(problem.residual(point + s * h * direction).cost) for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * h)
    assert float(sub.grad @ direction) == pytest.approx(slope, rel=1e-6)


@pytest.mark.legate
def test_dropout_leaves_torchs_random_numbers_alone() -> None:
    looked_at = session(dropping(), curve())
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    looked_at.problem.residual(looked_at.x)
    assert torch.equal(torch.randn(4), expected)


# --- examples -----------------------------------------------------------------------------------


def example(name: str) -> Any:
    """An example as a module."""
    folder = ROOT / "examples"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # for what the examples share
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.legate
def test_example_sinc() -> None:
    sinc = example("sinc")
    trace = sinc.run_lm(sinc.make_model(0, 20), *sinc.make_data(2000), 60.0, None, 1e-5, "legate")
    assert sinc.best(trace) < 1e-5


@pytest.mark.legate
def test_example_of_small_images() -> None:
    mnist = example("mnist")
    images = mnist.load(None)
    args = argparse.Namespace(decay=1e-4, batch=500, steps=6, smoke=True, linalg="legate")
    trace = mnist.run_lm(mnist.make_model("cnn", images.x.shape[-1], 0), images, 60.0, args)
    assert trace[-1].loss < trace[0].loss


@pytest.mark.legate
def test_example_of_the_burgers_equation() -> None:
    burgers = example("burgers")
    points, reference, model = burgers.make_points(100), burgers.Reference(), burgers.make_model()
    error = reference.error(model)
    args = argparse.Namespace(steps=25, seconds=60.0, goal=1e-5, linalg="legate")
    burgers.run_lm(model, points, reference, args)
    assert reference.error(model) < 0.9 * error


# --- traps of tasks that are threads --------------------------------------------------------


class Watched(nn.Module):
    """Notes which object computes in which thread, and waits so that threads meet."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.seen: set[tuple[int, int, int]] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Watched:
        made = type(self)()
        made.inner.load_state_dict(self.inner.state_dict())
        made.seen = self.seen
        return made

    def forward(self, x: Any) -> Any:
        self.seen.add((threading.get_ident(), id(self), torch.get_num_threads()))
        time.sleep(0.01)
        return self.inner(x)


@pytest.mark.legate
def test_small_batches_use_all_processors_with_a_copy_of_the_model_for_each_thread() -> None:
    model = Watched()
    threads = torch.get_num_threads()
    looked_at = session(model, curve(6))
    main, own = threading.get_ident(), looked_at.network.module
    model.seen.clear()
    for _ in range(4):
        looked_at.problem.residual(looked_at.x)
    by_thread = {(thread, module) for thread, module, _ in model.seen}
    assert len({thread for thread, _ in by_thread}) == 2
    assert len({module for _, module in by_thread}) == 2
    assert main not in {thread for thread, _ in by_thread}
    assert id(own) not in {module for _, module in by_thread}
    assert {count for _, _, count in model.seen} == {1}  # a task has one processor
    assert torch.get_num_threads() == threads


@pytest.mark.legate
@pytest.mark.parametrize("linalg", ["legate", "legate-split"])
def test_tasks_have_one_blas_thread_each(monkeypatch: pytest.MonkeyPatch, linalg: str) -> None:
    from lmsolve import _threads
    from lmsolve.torch._sums import NormalSums

    found = _threads.libraries()
    assert found  # NumPy's at least
    counts, add = set(), NormalSums.add

    def noted(self: Any, *arguments: Any) -> None:
        counts.update(get() for get, _ in found)
        add(self, *arguments)

    monkeypatch.setattr(NormalSums, "add", noted)
    before = [get() for get, _ in found]
    try:
        for _, set_to in found:
            set_to(2)
        session(net(), curve(), linalg=linalg)
        assert counts == {1}
        assert {get() for get, _ in found} == {2}
    finally:
        for (_, set_to), count in zip(found, before, strict=True):
            set_to(count)


@pytest.mark.legate
def test_forward_mode_is_left_to_one_process() -> None:
    x, y = cloud(40, 2)
    linear = nn.Linear(3, 2, bias=False).double()
    few = lambda: Custom(1)  # noqa: E731  (five parameters, two residuals a sample)
    for make in (few, lambda: linear):
        looked_at = session(make(), (x, y))
        assert looked_at.problem.plan.way != "forward"
    p = torch.randn(5, dtype=torch.float64)
    looked_at = session(few(), (x, y))
    problem, point = looked_at.problem, looked_at.x
    J = torch.func.jacrev(
        lambda v: (
            torch.func.functional_call(
                looked_at.network.module, looked_at.network.parameters.unpack(v), (x,)
            )
            - y
        ).reshape(-1)
    )(point)
    products = problem._products(point)
    for _ in range(5):
        torch.testing.assert_close(products.product(p), J @ p)
    torch.testing.assert_close(products.transposed(y.reshape(-1)), J.T @ y.reshape(-1))


class Refused(Exception):
    pass


@pytest.mark.legate
def test_an_exception_of_the_residual_function_comes_back_with_its_traceback(
    placing: None,
) -> None:
    calls = [0]

    def refusing(output: Any, target: Any) -> Any:
        calls[0] += threading.current_thread() is not threading.main_thread()
        if calls[0] > 3:
            raise Refused("no more" + 10_000 * "!")  # more than Legate itself would carry
        return output - target

    with pytest.raises(Refused, match="no more") as caught:
        fit(net(), curve(), residual=refusing, linalg="legate")
    assert "refusing" in [entry.name for entry in caught.traceback]
    assert fit(net(), curve(), linalg="legate", max_steps=3).cost > 0


@pytest.mark.legate
def test_a_nan_in_one_shard_rejects_the_step(placing: None) -> None:
    x, y = curve()
    count = [0]
    lock = threading.Lock()

    def troubled(output: Any, target: Any) -> Any:
        r = output - target
        if threading.current_thread() is threading.main_thread() or target[-1] != y[-1]:
            return r
        with lock:
            count[0] += 1
        # The start, its linearisation with the curvature, then the first trial.
        return r * float("nan") if 4 <= count[0] < 8 else r

    result = fit(net(), (x, y), residual=troubled, linalg="legate", max_steps=12)
    accepted = result.history["accepted"]
    assert False in accepted and accepted[-1]
    assert np.isfinite(result.cost) and result.cost < result.history["cost"][0]


@pytest.mark.legate
def test_running_out_of_memory_in_a_task_halves_the_blocks(placing: None) -> None:
    x, y = cloud(64, 2)

    def greedy(output: Any, target: Any) -> Any:
        if threading.current_thread() is not threading.main_thread() and output.shape[0] > 8:
            raise torch.OutOfMemoryError("out of memory")
        return output - target

    found = fit(net(4, 3, 2), (x, y), residual=greedy, linalg="legate", max_steps=4)
    expected = fit(net(4, 3, 2), (x, y), max_steps=4)
    assert found.cost == pytest.approx(expected.cost, rel=1e-9)


@pytest.mark.legate
def test_a_matrix_larger_than_legates_memory_is_an_error_that_names_the_option() -> None:
    looked_at = session(net(), curve())
    with pytest.raises(MemoryError, match="--sysmem"):
        looked_at.cluster.require(10**15, "The sums of J'J")


@pytest.mark.legate
def test_a_model_that_cannot_be_copied_is_refused_with_the_remedy() -> None:
    model = net()
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"copy\.deepcopy.*linalg='torch'"):
        fit(model, curve(), linalg="legate")


@pytest.mark.legate
def test_no_rows_of_the_jacobian_reach_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmsolve.legate import _tasks

    m, model = 4001, net()
    n = sum(p.numel() for p in model.parameters())
    read, sizes = _tasks.read, []

    def counted(store: Any) -> Any:
        values = read(store)
        sizes.append(values.nbytes)
        return values

    total = _tasks.HostRows.total

    def counted_total(rows: Any) -> Any:
        sizes.append(rows.shards * rows.size * 8)
        return total(rows)

    monkeypatch.setattr(_tasks, "read", counted)
    monkeypatch.setattr(_tasks.HostRows, "total", counted_total)
    optimizer = LM(model, linalg="legate")
    for _ in range(4):
        optimizer.step(*curve(m))
    status = 2 * _tasks.STATUS * 8
    sums, vector = 2 * (n * n + n) * 8, 2 * n * 8  # a row from each shard
    assert set(sizes) == {status, sums, vector}
    assert sizes.count(sums) == 4  # one linearisation a batch
    assert sum(sizes) < 4 * m * 8  # less than the residuals, let alone J
    traffic = optimizer._session.cluster.traffic
    assert traffic["jacobian"] == traffic["residuals"] == traffic["samples"] == 0
    assert traffic["matrix"] == 4 * sums
    assert traffic["numbers"] == sizes.count(status) * status
    # Beside what came back, a step went to each launch of the curvature's, and the weights of each
    # point once: of four starts three are the ends of the steps before.
    assert traffic["vectors"] == sizes.count(vector) * (vector + n * 8)
    points = sizes.count(status) - sizes.count(sums) - sizes.count(vector) - 3
    assert traffic["parameters"] == points * n * 8


@pytest.mark.legate
def test_of_a_wide_network_the_kernel_reaches_the_host_and_no_rows() -> None:
    optimizer = LM(net(40, 3, 2), linalg="legate")
    optimizer.step(*cloud())
    traffic, problem = optimizer._session.cluster.traffic, optimizer._session.problem
    assert traffic["jacobian"] == 0
    assert traffic["matrix"] == problem.njev * problem.m**2 * 8
    assert 0 < traffic["residuals"] < problem.m * optimizer._session.x.numel() * 8


@pytest.mark.legate
def test_samples_go_to_a_device_once_for_each_batch() -> None:
    x, y = curve()
    looked_at = session(net(), (x, y))
    placed, traffic = looked_at.problem.placed, looked_at.cluster.traffic
    assert placed.on(torch.device("cpu"), 0).inputs.data_ptr() == x.data_ptr()  # nothing is copied
    other = torch.device("meta")
    shards = [placed.on(other, 0), placed.on(other, 1), placed.whole_on(other)]
    assert placed.on(other, 0) is shards[0]
    assert placed.whole_on(other) is shards[2]
    assert traffic["samples"] == 2 * (x.nbytes + y.nbytes)


@pytest.mark.legate
def test_no_garbage_is_collected_in_a_tasks_thread() -> None:
    class Cycle:
        def __init__(self, store: Any) -> None:
            self.me, self.store = self, store

    def littering(output: Any, target: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            assert not gc.isenabled()
            [[] for _ in range(5000)]  # enough for a collection of the youngest
        return output - target

    from legate.core import get_legate_runtime, types

    looked_at = session(net(), curve(), residual=littering)
    Cycle(get_legate_runtime().create_store(types.float64, (8,)))  # to free it there would abort
    looked_at.problem.residual(looked_at.x)
    assert gc.isenabled()


# --- ranks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    fit(net(3), curve(), max_steps=3, checkpoint=folder / "begun", checkpoint_steps=1)
    done = launch(str(ROOT / "tests" / "ranks" / "networks.py"), str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    gone_on = fit(net(3), curve(), max_steps=7, resume=folder / "state")
    return [{"gone on": float(gone_on.cost), **ranks} for ranks in read_ranks(folder)]


def read_ranks(folder: Path) -> list[dict[str, Any]]:
    """What both ranks have found."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "check",
    [
        "tall",
        "wide",
        "dropped",
        "coupled",
        "resumed",
        "nan_on_the_way",
        "out_of_memory_of_one_rank",
        "clocks_that_differ",
    ],
)
def test_two_ranks_end_with_the_same_bits(found: list[dict[str, Any]], check: str) -> None:
    assert found[0]["ranks"] == 2
    assert found[0][check] == found[1][check]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "small", "told"),
    [
        ("sinc", ("--goal", "0.02"), "2000 points"),
        ("burgers", ("--points", "200", "--steps", "10"), "Levenberg-Marquardt: relative error"),
        ("mnist", ("--steps", "10"), "1397 images"),
    ],
)
def test_examples_run_on_two_ranks(
    tmp_path: Path, name: str, small: tuple[str, ...], told: str
) -> None:
    options = ("--smoke", "--alone", "--seconds", "500", "--linalg", "legate", *small)
    done = launch(str(ROOT / "examples" / f"{name}.py"), *options, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(told) == 1  # the first rank's


@pytest.mark.ranks
@pytest.mark.parametrize("check", ["in_bands", "in_wide_bands"])
def test_matrix_and_vectors_of_two_ranks_stay_on_their_processors(
    found: list[dict[str, Any]], check: str
) -> None:
    there = found[0][check]
    assert there == found[1][check]
    assert set(there["crossed"]) == {"numbers"}  # in all of two accepted steps
    wide = check == "in_wide_bands"
    looked_at, step = first_step(
        net(40, 3, 2) if wide else net(3), cloud() if wide else curve(), "torch"
    )
    np.testing.assert_allclose(there["step"], step, rtol=1e-8)
    while looked_at.state.nit < 2:
        looked_at.trial()
    np.testing.assert_allclose(there["x"], looked_at.x, rtol=1e-7)


@pytest.mark.ranks
def test_a_checkpoint_is_due_by_the_clock_of_the_first_rank(found: list[dict[str, Any]]) -> None:
    assert found[0]["clocks_that_differ"] is found[1]["clocks_that_differ"] is True


@pytest.mark.ranks
def test_no_rows_of_the_jacobian_reach_the_host_of_a_rank(found: list[dict[str, Any]]) -> None:
    n = sum(p.numel() for p in net(3).parameters())
    for rank in found:
        crossed = rank["crossed"]
        assert "jacobian" not in crossed
        assert crossed["matrix"] == 2 * 2 * (n * n + n) * 8  # two steps, a row from each shard
        assert set(crossed) <= {"matrix", "vectors", "parameters", "numbers"}
        assert crossed["parameters"] == 3 * n * 8  # the start and two trials, once each


@pytest.mark.ranks
def test_two_ranks_train_as_one_process_does(found: list[dict[str, Any]]) -> None:
    tall = fit(net(3), curve(), max_steps=3)
    assert found[0]["tall"]["cost"] == pytest.approx(tall.cost, rel=1e-9)
    wide = fit(net(40, 3, 2), cloud(), max_steps=2)
    assert found[0]["wide"]["cost"] == pytest.approx(wide.cost, rel=1e-9)


@pytest.mark.ranks
def test_a_fit_changes_from_one_process_to_two_ranks_and_back(found: list[dict[str, Any]]) -> None:
    for steps, cost in ((5, found[0]["resumed"]["cost"]), (7, found[0]["gone on"])):
        assert cost == pytest.approx(fit(net(3), curve(), max_steps=steps).cost, rel=1e-8)


@pytest.mark.ranks
def test_a_nan_of_one_rank_rejects_the_step_on_both(found: list[dict[str, Any]]) -> None:
    accepted = found[0]["nan_on_the_way"]["accepted"]
    assert False in accepted and accepted[-1]
    assert np.isfinite(found[0]["nan_on_the_way"]["cost"])


@pytest.mark.ranks
def test_out_of_memory_on_one_rank_halves_the_blocks_of_both(found: list[dict[str, Any]]) -> None:
    optimizer = LM(net(3))
    optimizer.step(*curve())
    after = found[0]["out_of_memory_of_one_rank"]
    assert after == found[1]["out_of_memory_of_one_rank"]
    assert 10 < after["samples"] <= 20
    assert after["cost"] == pytest.approx(optimizer._session.state.cost, rel=1e-9)


@pytest.mark.ranks
def test_trouble_of_one_rank_is_that_of_both(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["exception_of_one_rank"]["message"] == "the last shard"
        assert "in failing" in rank["exception_of_one_rank"]["trace"]  # where it was raised
        assert rank["nan_of_one_rank"] is False  # not finite
        assert "different data" in rank["data_that_differ"]
        assert "different parameters" in rank["parameters_that_differ"]
        assert "different parameters" in rank["stored_parameters_that_differ"]
