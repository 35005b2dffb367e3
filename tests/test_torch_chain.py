"""Chains of layers: the sums and products of the general way, and exact second derivatives."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402  (after the skip)

from lmsolve.torch import _chain_problem, _factors, _jacobian  # noqa: E402
from lmsolve.torch._chain import Chain  # noqa: E402
from lmsolve.torch._chain_problem import ChainProblem, ChainProducts, Memory, verified  # noqa: E402
from lmsolve.torch._descent import Descent  # noqa: E402
from lmsolve.torch._jacobian import Plan  # noqa: E402
from lmsolve.torch._losses import from_loss, from_residual  # noqa: E402
from lmsolve.torch._network import Batch, Network  # noqa: E402
from lmsolve.torch._params import Parameters, quiet_transforms  # noqa: E402
from lmsolve.torch._problem import NetworkProblem, Settings  # noqa: E402
from lmsolve.torch._session import Options, Session  # noqa: E402

B = 70  # blocks of 32, 32 and 6


def mlp(*sizes: int, function: Any = nn.Tanh, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o, bias=bias), function()]
    return nn.Sequential(*layers[:-1])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one hidden layer": lambda: mlp(1, 5, 1),
    "two outputs": lambda: mlp(3, 4, 2),
    "deep": lambda: mlp(2, 4, 3, 1, function=nn.Sigmoid),
    "relu without bias": lambda: mlp(3, 5, 2, function=nn.ReLU, bias=False),
    "linear": lambda: nn.Linear(2, 2),
    "nested": lambda: nn.Sequential(mlp(2, 4, 3), nn.Tanh(), nn.Linear(3, 1)),
    "function at the end": lambda: nn.Sequential(mlp(2, 4, 2), nn.Sigmoid()),
    "wide": lambda: mlp(3, 24, 6),
}


def curved(z: Any, y: Any) -> Any:
    """Residuals that are not linear in the outputs, but for the last."""
    return torch.cat(
        [torch.sin(z) * y, z[:, :1] ** 2 - z[:, -1:] * y[:, :1], z[:, :1] - y[:, :1]], 1
    )


LOSSES = {
    "residual": from_residual(None),
    "curved": from_residual(curved),
    "mse": from_loss("mse"),
    "cross_entropy": from_loss("cross_entropy"),
}


def setup(model: nn.Module, loss: str = "mse", dtype: Any = torch.float64) -> tuple[Any, Any]:
    """A network and a batch of `B` samples."""
    model = model.to(dtype)
    x = torch.randn(B, next(model.parameters()).shape[1], dtype=dtype)
    with torch.no_grad():
        y = torch.rand_like(model(x))
    network = Network(model, Parameters.of(model), LOSSES[loss])
    return network, Batch(x, y, torch.rand(B, dtype=dtype), B)


def problems(
    network: Any, batch: Any, settings: Any, monkeypatch: Any, threads: int = 1
) -> tuple[Any, Any]:
    """The general problem and the chain's, in small blocks for some threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(_chain_problem, "block_rows", lambda n, dtype: 32 // threads)
    k = network.judge(network.parameters.unpack(start(network)), batch, 1.0).rows.shape[1]
    plan = Plan("factors", k, False, 40)
    chain = Chain.of(network)
    assert chain is not None
    chained = ChainProblem(network, batch, plan, settings, chain)
    return NetworkProblem(network, batch, plan, settings), chained


def start(network: Any) -> Any:
    return network.parameters.pack(network.module).double()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss", ["residual", "curved", "cross_entropy"])
def test_sums_and_products_are_those_of_the_general_way(
    name: str, loss: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, batch = setup(MODELS[name](), loss)
    settings = Settings(0.25, decay=0.1)
    general, chained = problems(network, batch, settings, monkeypatch, threads)
    assert len(chained.inputs) >= 3
    x = start(network)
    evaluated = chained.residual(x)
    torch.testing.assert_close(chained.cost(evaluated), general.cost(general.residual(x)))
    a, b = general._normal(x, None), chained.linearize(x, evaluated)
    for key in ("gram", "grad", "r"):
        torch.testing.assert_close(getattr(b, key), getattr(a, key))
    z, p = torch.randn(chained.m).double(), torch.randn_like(x)
    torch.testing.assert_close(b.products.transposed(z), a.products.transposed(z))
    torch.testing.assert_close(b.products.product(p), a.products.product(p))
    step = a.solve(0.1)
    torch.testing.assert_close(b.solve(0.1), step)
    if loss != "cross_entropy":
        torch.testing.assert_close(b.acceleration(step), a.acceleration(step))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss", ["residual", "curved"])
def test_second_derivatives_of_float32_are_exact(
    name: str, loss: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, batch = setup(MODELS[name](), loss, torch.float32)
    _, chained = problems(network, batch, Settings(0.25), monkeypatch, threads)
    x = start(network)
    sub = chained.linearize(x, chained.residual(x))
    p = sub.solve(0.1)

    precise = Network(
        copy.deepcopy(network.module).double(),
        replace(network.parameters, dtype=torch.float64),
        network.objective,
    )
    samples = Batch(batch.inputs.double(), batch.targets.double(), batch.weights, B)

    def rows(t: Any) -> Any:
        tensors = precise.parameters.unpack(x + t * p)
        return precise.judge(tensors, samples, 0.25).rows.reshape(-1)

    t, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    with quiet_transforms():
        _, r_pp = torch.func.jvp(lambda s: torch.func.jvp(rows, (s,), (one,))[1], (t,), (one,))
    close = {"rtol": 1e-4, "atol": 1e-5 * float(r_pp.abs().amax())}
    torch.testing.assert_close(sub.products.second_derivative(p).double(), r_pp, **close)
    right = -0.5 * sub.products.transposed(r_pp).double()
    A = sub.gram + 0.1 * torch.eye(len(x))
    close = {"rtol": 1e-3, "atol": 1e-4 * float(right.abs().amax())}
    torch.testing.assert_close(A @ sub.acceleration(p), right, **close)


@pytest.mark.parametrize("damping", [1e-6, 1e-2])
def test_float32_rows(damping: float, monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = setup(mlp(2, 4, 2), dtype=torch.float32)
    general, chained = problems(network, batch, Settings(), monkeypatch)
    x = start(network)
    a = general._normal(x, None, damping)
    b = chained.linearize(x, chained.residual(x), damping)
    assert b.gram.dtype == torch.float64
    torch.testing.assert_close(b.gram, a.gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-6)


def test_trials_leave_the_linearised_point_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trial writes into the same memory, which is not that of the accepted point."""
    network, batch = setup(mlp(1, 5, 1))
    general, chained = problems(network, batch, Settings(), monkeypatch)
    x = start(network)
    sub = chained.linearize(x, chained.residual(x))
    for shift in (0.1, 0.2):
        chained.residual(x + shift)
        sub.acceleration(sub.solve(0.1))
    z = torch.randn(B).double()
    expected = general._normal(x, None).products.transposed(z)
    torch.testing.assert_close(sub.products.transposed(z), expected)


def test_an_evaluation_overwritten_by_a_later_one_is_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, batch = setup(mlp(1, 5, 1))
    general, chained = problems(network, batch, Settings(), monkeypatch)
    x = start(network)
    early = chained.residual(x)
    chained.residual(x + 0.5)
    torch.testing.assert_close(chained.linearize(x, early).gram, general._normal(x, None).gram)


def test_activations_are_free_without_the_garbage_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which does not know how large they are, and mini-batches have some each."""
    network, batch = setup(mlp(1, 5, 1))
    gc.disable()
    try:
        _, chained = problems(network, batch, Settings(), monkeypatch)
        x = start(network)
        sub = chained.linearize(x, chained.residual(x))
        sub.acceleration(sub.solve(0.1))
        held = [weakref.ref(chained._held), weakref.ref(chained._spare)]
        assert all(ref() is not None for ref in held)
        del chained, sub
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()


def tied() -> nn.Module:
    net = mlp(2, 2, 2)
    net[2].weight = net[0].weight
    return net


def frozen() -> nn.Module:
    net = mlp(2, 3, 2)
    net[0].bias.requires_grad_(False)
    return net


def hooked() -> nn.Module:
    net = mlp(2, 3, 2)
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    return net


class Doubled(nn.Linear):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


@pytest.mark.parametrize("make", [tied, frozen, hooked, lambda: Doubled(2, 2),
                                  lambda: nn.Sequential(nn.Linear(2, 2), nn.GELU())])  # fmt: skip
def test_other_models_are_no_chains(make: Callable[[], nn.Module]) -> None:
    model = make()
    network = Network(model, Parameters.of(model), from_residual(None))
    assert Chain.of(network) is None


def test_a_layer_that_does_something_else_is_found_out() -> None:
    model = mlp(2, 3, 2)
    network, batch = setup(model)
    assert verified(network, batch, Settings(), start(network), 2) is not None
    model[1].forward = torch.sin
    assert verified(network, batch, Settings(), start(network), 2) is None


class Once(torch.autograd.Function):
    """Cannot be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, z: Any) -> Any:
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Any) -> Any:
        (z,) = ctx.saved_tensors
        return 3 * z**2 * g


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("accelerated", [False, True])
def test_residuals_without_second_derivatives_go_the_general_way(
    accelerated: bool, dtype: Any
) -> None:
    model = mlp(2, 3, 2)
    _, batch = setup(model, dtype=dtype)
    objective = from_residual(lambda z, y: Once.apply(z) - y)
    network = Network(model, Parameters.of(model), objective)
    found = verified(network, batch, Settings(acceleration=accelerated), start(network), 2)
    assert (found is None) == (accelerated and dtype == torch.float32)


def test_a_fit_takes_the_chain_where_the_normal_equations_fit() -> None:
    network, batch = setup(mlp(2, 5, 1))

    def placed(samples: int, **options: Any) -> Any:
        session = Session(network.module, Options(loss="mse", **options), Descent())
        session.place(batch.block(0, samples), 0)
        return session

    session = placed(B)
    assert type(session.problem) is ChainProblem
    costs = [session.trial().cost for _ in range(30)]
    assert costs[-1] < 0.5 * costs[0]
    assert type(placed(10).problem) is NetworkProblem  # wider than the batch: the dual form
    assert type(placed(B, memory=20_000).problem) is NetworkProblem  # the activations do not fit


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Memory, "__init__"),
        (ChainProblem, "_evaluate"),
        (ChainProducts, "add_rows"),
        (ChainProblem, "_rows"),  # of the acceleration
    ],
)
def test_a_chain_that_runs_out_of_memory_goes_the_general_way_in_halved_blocks(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, batch = setup(mlp(2, 5, 1))
    run, sizes = _factors.run, set[int]()

    def full(*arguments: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte")

    def limited(network: Any, tensors: Any, batch: Any, *rest: Any) -> Any:
        if batch.size > B // 4:
            raise MemoryError
        sizes.add(batch.size)
        return run(network, tensors, batch, *rest)

    def placed() -> Session:
        """A session after some trials by a chain."""
        session = Session(network.module, Options(loss="mse"), Descent())
        session.place(batch, 0)
        for _ in range(3):
            session.trial()
        assert type(session.problem) is ChainProblem
        return session

    whole, limit = placed(), placed()
    expected = [whole.trial().cost for _ in range(6)]
    assert type(whole.problem) is ChainProblem
    monkeypatch.setattr(owner, name, full)
    monkeypatch.setattr(_factors, "run", limited)
    if owner is Memory:
        limit.place(batch, 1)
    costs = [limit.trial().cost for _ in range(6)]
    assert costs == pytest.approx(expected, rel=1e-6) and costs[-1] < costs[0]
    assert limit.cost_of(batch, limit.x) == pytest.approx(costs[-1])
    assert type(limit.problem) is NetworkProblem
    assert sizes and max(sizes) <= B // 4
    assert all(plan.samples <= B // 4 for plan in limit.plans.values())


def test_no_other_way_is_timed_for_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first use of torch.func in a process takes most of a second."""
    network, batch = setup(mlp(2, 5, 1))
    timed: list[str] = []
    verified_time = _jacobian._verified_time

    def noted(network: Any, batch: Any, point: Any, plan: Any) -> Any:
        timed.append(plan.way)
        return verified_time(network, batch, point, plan)

    monkeypatch.setattr(_jacobian, "_verified_time", noted)
    Session(network.module, Options(), Descent()).place(batch, 0)
    assert timed == ["factors"]
