"""Rows of the Jacobian: every way against a plain reference, on every kind of model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402  (after the skip)
from torch.func import functional_call, jacrev, vmap  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

from lmsolve.torch import _factors, _jacobian  # noqa: E402
from lmsolve.torch._jacobian import Plan, Point, choose, stream  # noqa: E402
from lmsolve.torch._losses import from_loss, from_residual  # noqa: E402
from lmsolve.torch._network import Batch, Network  # noqa: E402
from lmsolve.torch._params import Parameters  # noqa: E402
from lmsolve.torch._problem import NetworkProblem, Settings, block_sums  # noqa: E402
from lmsolve.torch._products import GraphProducts, HeldProducts  # noqa: E402
from lmsolve.torch._sums import ChunkSums, NormalSums  # noqa: E402

B = 24
MEMORY = 1 << 28


class Recurrent(nn.Module):
    """An LSTM, which torch.func does not vectorise."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.out = nn.Linear(4, 1)

    def forward(self, x: Any) -> Any:
        return self.out(self.lstm(x)[0][:, -1])


class Shared(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, x: Any) -> Any:
        return self.out(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Bypassed(nn.Module):
    """A layer whose weight is also used outside of its call, behind the hook's back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Any) -> Any:
        return self.layer(x) * self.layer.weight.square().sum()


class Slope(nn.Module):
    """u + du/dx by autograd inside of forward: a physics-informed residual."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Any) -> Any:
        x = x.detach().requires_grad_()
        u = self.net(x)
        return u + torch.autograd.grad(u.sum(), x, create_graph=True)[0]


class Decay(nn.Module):
    """A curve with three parameters of its own, many outputs a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.5, 1.5, 0.2]))

    def forward(self, t: Any) -> Any:
        return self.p[1] * torch.exp(-self.p[0] * t) + self.p[2]


class Cube(torch.autograd.Function):
    """A custom autograd function without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Custom(nn.Module):
    """A parameter outside of any layer, through a custom autograd function."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 2) / 3)

    def forward(self, x: Any) -> Any:
        return Cube.apply(x @ self.w)


class Two(nn.Module):
    """Two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3, bias=False)

    def forward(self, x: Any, y: Any) -> Any:
        return torch.tanh(self.a(x) + self.b(y))


def mlp(*extra: nn.Module, out: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *extra, nn.Linear(6, out))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, stride=2),
        nn.ELU(),
        nn.Conv2d(3, 2, (3, 2), padding="same", dilation=2, bias=False),
        nn.BatchNorm2d(2).eval(),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    net[2].weight = net[0].weight
    return net


def registered_twice() -> nn.Sequential:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 2))


def pruned() -> nn.Sequential:
    """A linear layer whose weight is made of another parameter, as old forms of norms do too."""
    return nn.Sequential(prune.l1_unstructured(nn.Linear(4, 5), "weight", 0.5), nn.Linear(5, 2))


def vectors(*shape: int) -> Any:
    return torch.randn(B, *shape)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "tanh": (lambda: mlp(nn.Tanh()), lambda: vectors(4), "factors"),
    "in place": (lambda: mlp(nn.ReLU(inplace=True)), lambda: vectors(4), "factors"),
    "layer norm": (lambda: mlp(nn.LayerNorm(6), nn.GELU()), lambda: vectors(4), "factors"),
    "sequence": (lambda: mlp(nn.Tanh()), lambda: vectors(5, 4), "factors"),
    "convolution": (convolutional, lambda: vectors(1, 8, 8), "factors"),
    "convolution 1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.ELU(), nn.Flatten()),
        lambda: vectors(2, 5),
        "factors",
    ),
    "called twice": (Shared, lambda: vectors(4), "factors"),
    "tied": (tied, lambda: vectors(4), "factors"),
    "registered twice": (registered_twice, lambda: vectors(4), "factors"),
    "pruned": (pruned, lambda: vectors(4), "vmap"),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        lambda: vectors(3, 4),
        "vmap",
    ),
    "two inputs": (Two, lambda: (vectors(4), vectors(2)), "factors"),
    "weight used twice": (Bypassed, lambda: vectors(4), "vmap"),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten()),
        lambda: vectors(2, 4, 4),
        "vmap",
    ),
    "few parameters": (Decay, lambda: vectors(30).abs(), "forward"),
    "LSTM": (Recurrent, lambda: vectors(5, 3), "graph"),
    "custom function": (Custom, lambda: vectors(4), "graph"),
    "nested autograd": (Slope, lambda: vectors(1), "graph"),
}


def setup(
    model: nn.Module, inputs: Any, objective: Any = None, weights: Any = None
) -> tuple[Network, Batch, Point]:
    """Network, batch and starting point in float64, with targets of the output's shape."""
    model = model.to(torch.float64)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    args = tuple(a.to(torch.float64) for a in args)
    output = model(*args).detach()
    network = Network(model, Parameters.of(model), objective or from_residual(None))
    point = Point(network.parameters.unpack(network.parameters.pack(model)))
    return network, Batch(args, torch.randn_like(output), weights, B), point


def whole_jacobian(network: Network, batch: Batch, point: Point) -> tuple[Any, Any]:
    """Rows and J (m, n) by plain backward passes through the whole batch."""
    leaves = {k: t.detach().requires_grad_() for k, t in point.tensors.items()}
    r = network.judge(leaves, batch, point.scale, point.seed).rows.reshape(-1)
    J = []
    for v in r:
        parts = torch.autograd.grad(v, list(leaves.values()), retain_graph=True)
        J.append(torch.cat([g.reshape(-1) for g in parts]))
    return r.detach(), torch.stack(J)


def streamed(network: Network, batch: Batch, point: Point, plan: Plan) -> tuple[Any, Any]:
    blocks = [(r.clone(), J.clone()) for r, J in stream(network, batch, point, plan)]
    return torch.cat([r for r, _ in blocks]), torch.cat([J for _, J in blocks])


def close(a: Any, b: Any) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-10, atol=1e-10 * float(b.abs().max())))


@pytest.mark.parametrize("name", MODELS)
def test_the_expected_way_gives_the_rows_of_plain_backward(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, way = MODELS[name]
    network, batch, point = setup(make(), inputs())
    r, J = whole_jacobian(network, batch, point)
    tried = _jacobian._candidates(r.numel() // B, J.shape[1], _factors.supported(network))
    plan = next(p for p in tried if p.way == way)
    for samples in (5, B):
        found = streamed(network, batch, point, replace(plan, samples=samples))
        assert close(found[0], r) and close(found[1], J)


#: A module that stands in two places has two names, of which functional_call takes the other.
FACTORED = {name for name, (*_, way) in MODELS.items() if way == "factors"} - {"registered twice"}


@pytest.mark.parametrize("name", sorted(FACTORED))
def test_factors_give_the_rows_of_torch_func(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, _ = MODELS[name]
    network, batch, point = setup(make(), inputs())

    def output(tensors: Any, *sample: Any) -> Any:
        alone = tuple(a[None] for a in sample)
        return functional_call(network.module, tensors, alone).reshape(-1)

    axes = (None, *(0 for _ in batch.inputs))
    parts = vmap(jacrev(output), in_dims=axes)(dict(point.tensors), *batch.inputs)
    J = torch.cat([parts[k].flatten(2) for k in network.parameters.names], 2).flatten(0, 1)
    plan = Plan("factors", J.shape[0] // B, False, 7)
    assert close(streamed(network, batch, point, plan)[1], J)


@pytest.mark.parametrize("name", MODELS)
def test_a_way_is_chosen_that_is_right(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, _ = MODELS[name]
    network, batch, point = setup(make(), inputs())
    plan = choose(network, batch, point, MEMORY)
    r, J = whole_jacobian(network, batch, point)
    found = streamed(network, batch, point, plan)
    assert close(found[0], r) and close(found[1], J)
    assert all(type(p) is nn.Parameter for m in network.module.modules() for p in own(m))


def own(module: nn.Module) -> list[Any]:
    """What a module has in the places of its parameters."""
    return [p for p in module._parameters.values() if p is not None]


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("name", ["tanh", "attention", "registered twice", "LSTM"])
def test_products_without_rows(name: str, forward: bool) -> None:
    """Also where the kernel that the model takes can be differentiated only once."""
    torch.manual_seed(0)
    make, inputs, _ = MODELS[name]
    network, batch, point = setup(make(), inputs())
    r, J = whole_jacobian(network, batch, point)
    products = GraphProducts(network, batch, point, 7, _forward_mode=forward)
    z, p = torch.randn_like(r), torch.randn(J.shape[1], dtype=J.dtype)
    assert close(products.product(p), J @ p)
    assert close(products.transposed(z), J.T @ z)


@pytest.mark.parametrize("name", ["weight used twice", "nested autograd"])
def test_factors_that_would_be_wrong_are_found_out(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, _ = MODELS[name]
    network, batch, point = setup(make(), inputs())
    plan = Plan("factors", 1, False, B)
    assert _jacobian._verified_time(network, batch, point, plan) is None


@pytest.mark.parametrize(("width", "way"), [(2, "forward"), (20, "graph")])
def test_batch_norm_in_training_takes_the_whole_graph(width: int, way: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 2)
    )
    network, batch, point = setup(model, vectors(1))
    before = model[1].running_mean.clone()
    plan = choose(network, batch, point, MEMORY)
    assert plan.coupled and plan.way == way and "see each other" in plan.note
    r, J = whole_jacobian(network, batch, point)
    found = streamed(network, batch, point, plan)
    assert close(found[0], r) and close(found[1], J)
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("seed", [0, 5])
def test_dropout_keeps_its_mask_for_one_seed(seed: int) -> None:
    torch.manual_seed(0)
    network, batch, point = setup(mlp(nn.Dropout(0.5), nn.Tanh()), vectors(4))
    point = replace(point, seed=seed)
    plan = choose(network, batch, point, MEMORY)
    r, J = whole_jacobian(network, batch, point)
    found = streamed(network, batch, point, plan)
    assert not plan.coupled
    assert close(found[0], r) and close(found[1], J)
    other = network.judge(point.tensors, batch, 1.0, seed + 1).rows.reshape(-1)
    assert not torch.allclose(other, r)


def test_torch_random_stream_is_left_alone() -> None:
    network, batch, point = setup(mlp(nn.Dropout(0.5), nn.Tanh()), vectors(4))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    network.judge(point.tensors, batch, 1.0, 7)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_sums_add_up_to_the_normal_equations(dtype: Any) -> None:
    torch.manual_seed(0)
    weights = torch.rand(B, dtype=dtype)
    model = mlp(nn.Tanh()).to(dtype)
    x, y = vectors(4).to(dtype), vectors(2).to(dtype)
    network = Network(model, Parameters.of(model), from_residual(None))
    batch = Batch(x, y, weights, B)
    flat = network.parameters.pack(model).double()
    point = Point(network.parameters.unpack(flat))
    r, J = (v.double() for v in whole_jacobian(network, batch, point))
    plan = choose(network, batch, point, MEMORY)
    parts = [
        block_sums(network, flat, batch.block(lo, hi), plan, Settings())
        for lo, hi in [(0, 7), (7, 20), (20, B)]
    ]
    gram, grad, cost = (torch.stack(v).sum(0) for v in zip(*parts, strict=True))
    eps = 50 * torch.finfo(dtype).eps
    assert torch.allclose(gram, J.T @ J, rtol=eps, atol=eps)
    assert torch.allclose(grad, J.T @ r, rtol=eps, atol=eps)
    assert torch.allclose(cost, 0.5 * r @ r, rtol=eps)
    assert gram.dtype == torch.float64


def test_float32_gram_keeps_small_singular_values() -> None:
    """At scaled condition 1e6 the Gram matrix of the given J is right to its smallest value."""
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(400, 12, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    J = ((U * torch.logspace(0, -6, 12, dtype=torch.float64)) @ V.T).float()
    sums = NormalSums(12, torch.float64, J.device)
    sums.add(torch.ones(400), J)
    chunked = ChunkSums(12, torch.float64, 2)
    chunked.add_chunks(torch.cat([J.T, torch.ones(1, 400)]).double().view(13, 2, 200).movedim(1, 0))
    exact = torch.linalg.svdvals(J.double()) ** 2
    for gram in (sums.gram, chunked.gram):
        found = torch.linalg.eigvalsh(gram).flip(0)
        assert torch.allclose(found, exact, rtol=1e-2)
    single = torch.linalg.eigvalsh((J.T @ J).double())[0]
    assert float((single / exact[-1] - 1).abs()) > 1


@pytest.mark.parametrize(
    "name", ["tanh", "sequence", "convolution", "called twice", "tied", "weight used twice"]
)
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("memory", [1 << 28, 1 << 16])
def test_wide_step_equals_the_primal_step(name: str, decay: float, memory: int) -> None:
    torch.manual_seed(0)
    make, inputs, _ = MODELS[name]
    network, batch, _ = setup(make(), inputs())
    x = network.parameters.pack(network.module)
    point = Point(network.parameters.unpack(x))
    plan = choose(network, batch, point, MEMORY)
    problem = NetworkProblem(network, batch, plan, Settings(decay=decay, memory=memory))
    r, J = whole_jacobian(network, batch, point)
    sub = problem._dual(x, None)
    grad = J.T @ r + decay * x
    assert close(sub.grad, grad)
    assert sub.size == pytest.approx(float(J.square().sum()) / problem.network.parameters.n + decay)
    for damping in (1e-1, 1e-3):
        A = J.T @ J + (decay + damping) * torch.eye(len(x), dtype=x.dtype)
        p = torch.linalg.solve(A, -grad)
        assert torch.allclose(sub.solve(damping), p, rtol=1e-7, atol=1e-9)
    p = torch.randn_like(x)
    Jp = J @ p
    model = grad @ p + 0.5 * Jp @ Jp + 0.5 * decay * p @ p
    assert torch.allclose(sub.reduction(p), -model)


def test_acceleration_is_the_second_order_part_of_the_geodesic() -> None:
    """Against r_pp by autograd, in both forms."""
    torch.manual_seed(0)
    network, batch, point = setup(mlp(nn.Tanh()), vectors(4))
    x = network.parameters.pack(network.module)
    problem = NetworkProblem(network, batch, choose(network, batch, point, MEMORY), Settings())
    _, J = whole_jacobian(network, batch, point)

    def r(flat: Any) -> Any:
        return network.judge(network.parameters.unpack(flat), batch, 1.0).rows.reshape(-1)

    for sub in (problem._normal(x, None), problem._normal(x, problem.residual(x).passes),
                problem._dual(x, None)):  # fmt: skip
        p = 1e-2 * sub.solve(0.1)
        _, r_pp = torch.func.jvp(lambda v: torch.func.jvp(r, (v,), (p,))[1], (x,), (p,))  # noqa: B023
        A = J.T @ J + 0.1 * torch.eye(len(x), dtype=x.dtype)
        exact = -0.5 * torch.linalg.solve(A, J.T @ r_pp)
        assert torch.allclose(sub.acceleration(p), exact, rtol=1e-2, atol=1e-2 * exact.abs().max())


@pytest.mark.parametrize(
    ("memory", "kept", "held"),
    [
        (1 << 28, True, HeldProducts),
        (1 << 16, False, HeldProducts),
        (1 << 15, False, GraphProducts),
    ],
)
def test_small_rows_of_shared_weights_stay_for_products(
    memory: int, kept: bool, held: type[Any]
) -> None:
    """A convolution's activations, or its rows, fit into a quarter of the memory, or nothing."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(27, 1)
    images = torch.randn(B, 1, 11, 11)
    network, batch, point = setup(nn.Sequential(*layers), images)
    x = network.parameters.pack(network.module)
    plan = choose(network, batch, point, memory // 4)
    assert plan.way == "factors"
    problem = NetworkProblem(network, batch, plan, Settings(memory=memory))
    evaluated = problem.residual(x)
    assert (evaluated.passes is not None) == kept
    sub = problem._normal(x, evaluated.passes)
    assert type(sub.products) is held
    r, J = whole_jacobian(network, batch, point)
    z, p = torch.randn_like(r), torch.randn_like(x)
    assert close(sub.products.transposed(z), J.T @ z)
    assert close(sub.products.product(p), J @ p)
    assert close(sub.grad, J.T @ r)


@pytest.mark.parametrize("name", ["tanh", "LSTM"])
def test_matrix_free_steps_solve_the_damped_system(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, _ = MODELS[name]
    network, batch, _ = setup(make(), inputs())
    x = network.parameters.pack(network.module)
    point = Point(network.parameters.unpack(x))
    plan = choose(network, batch, point, MEMORY)
    problem = NetworkProblem(network, batch, plan, Settings(memory=1 << 10, decay=1e-3))
    assert problem.form() == "products"
    sub = problem.linearize(x, problem.residual(x))
    _, J = whole_jacobian(network, batch, point)
    A = J.T @ J + (1e-3 + 0.1) * torch.eye(len(x), dtype=x.dtype)
    exact = torch.linalg.solve(A, -sub.grad)
    rough = sub.solve(0.1)
    assert 0 < float(sub.reduction(rough)) <= float(sub.reduction(exact))
    sub.tolerance = 1e-12
    assert torch.allclose(sub.solve(0.1), exact, rtol=1e-4, atol=1e-6)
    estimate = float(J.square().sum()) / len(x)
    assert estimate / 4 < sub.size < 4 * estimate


def test_inputs_of_any_scale_take_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the preconditioner they take more than twice as many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    network = Network(model, Parameters.of(model), from_residual(None))
    inputs = torch.randn(300, 12).double()
    batch = Batch(inputs * torch.logspace(-2, 1, 12), inputs[:, :4].sum(1, keepdim=True), None, 300)
    x = network.parameters.pack(model)
    plan = choose(network, batch, Point(network.parameters.unpack(x)), MEMORY)
    problem = NetworkProblem(network, batch, plan, Settings(memory=1 << 10))
    sub = problem.linearize(x, problem.residual(x))
    damping = 1e-3 * sub.size
    _, J = whole_jacobian(network, batch, Point(network.parameters.unpack(x)))
    A = J.T @ J + damping * torch.eye(len(x), dtype=x.dtype)
    most = float(sub.reduction(torch.linalg.solve(A, -sub.grad)))
    monkeypatch.setattr(sub, "tolerance", 0.0)

    def needed() -> int:
        """Iterations to 90 % of the decrease."""
        for found in range(1, 200):
            monkeypatch.setattr(sub, "most", found)
            if float(sub.reduction(sub.solve(damping))) > 0.9 * most:
                break
        return found

    preconditioned = needed()
    monkeypatch.setattr(sub, "squares", torch.full_like(sub.squares, sub.size))
    assert preconditioned < 0.5 * needed()


@pytest.mark.parametrize(("samples", "form"), [(10, "dual"), (200, "normal")])
def test_form_follows_the_shape(samples: int, form: str) -> None:
    torch.manual_seed(0)
    model = mlp(nn.Tanh()).double()
    network = Network(model, Parameters.of(model), from_residual(None))
    batch = Batch(torch.randn(samples, 4).double(), torch.randn(samples, 2).double(), None, samples)
    x = network.parameters.pack(model)
    plan = choose(network, batch, Point(network.parameters.unpack(x)), MEMORY)
    assert NetworkProblem(network, batch, plan, Settings()).form() == form


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte"),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
    ],
    ids=["cpu", "cuda", "python"],
)
def test_running_out_of_memory_halves_the_block(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network, batch, _ = setup(mlp(nn.Tanh()), vectors(4))
    x = network.parameters.pack(network.module)
    plan = Plan("factors", 2, False, 16, activation_bytes=1 << 40)
    problem = NetworkProblem(network, batch, plan, Settings())
    expected = problem.linearize(x, problem.residual(x)).grad
    run, limit = _factors.run, 4

    def limited(network: Any, tensors: Any, batch: Any, *rest: Any) -> Any:
        if batch.size > limit:
            raise error
        return run(network, tensors, batch, *rest)

    monkeypatch.setattr(_factors, "run", limited)
    found = problem.linearize(x, problem.residual(x)).grad
    assert problem.plan.samples == 4
    assert torch.allclose(found, expected)
    limit = 0
    with pytest.raises(MemoryError, match="smaller batch"):
        problem.linearize(x, problem.residual(x))


LOSSES: dict[str, tuple[Callable[[Any, Any], Any], Callable[[], Any]]] = {
    "mse": (nn.functional.mse_loss, lambda: vectors(3).double()),
    "huber": (nn.functional.huber_loss, lambda: 3 * vectors(3).double()),
    "bce": (nn.functional.binary_cross_entropy_with_logits, lambda: vectors(3).double().sigmoid()),
    "poisson": (nn.functional.poisson_nll_loss, lambda: vectors(3).double().abs().round()),
    "cross_entropy": (nn.functional.cross_entropy, lambda: torch.randint(3, (B,))),
    "soft cross_entropy": (nn.functional.cross_entropy, lambda: vectors(3).double().softmax(1)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_match_torch_in_value_gradient_and_curvature(name: str) -> None:
    torch.manual_seed(0)
    function, targets = LOSSES[name]
    y = targets()
    model = mlp(nn.Tanh(), out=3).double()
    network = Network(model, Parameters.of(model), from_loss(name.removeprefix("soft ")))
    x, inputs = network.parameters.pack(model), vectors(4).double()
    batch = Batch(inputs, y, None, B)
    plan = choose(network, batch, Point(network.parameters.unpack(x)), MEMORY)
    problem = NetworkProblem(network, batch, plan, Settings(scale=1 / B))

    def outputs(flat: Any) -> Any:
        return functional_call(model, network.parameters.unpack(flat), (inputs,))

    flat = x.clone().requires_grad_()
    value = function(outputs(flat), y)
    (grad,) = torch.autograd.grad(value, flat)
    evaluation = problem.residual(x)
    assert torch.allclose(problem.cost(evaluation), value)
    sub = problem._normal(x, evaluation.passes)
    assert torch.allclose(sub.grad, grad, atol=1e-12)
    J = jacrev(lambda v: outputs(v).reshape(-1))(x)
    z = outputs(x).reshape(-1).detach()
    H = torch.autograd.functional.hessian(lambda v: function(v.view(B, 3), y), z)
    exact = J.T @ H @ J
    if name == "huber":  # a majorant: never less than the Hessian
        assert float(torch.linalg.eigvalsh(sub.gram - exact).min()) > -1e-12
    else:
        assert torch.allclose(sub.gram, exact, atol=1e-12)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_saturated_outputs_keep_a_finite_exact_gradient(loss: str) -> None:
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.weight.fill_(0.0)
        model.bias.copy_(torch.tensor([800.0, -800.0]))
    network = Network(model, Parameters.of(model), from_loss(loss))
    classes = torch.ones(B, dtype=torch.long)
    hot = nn.functional.one_hot(classes, 2).double()
    y = classes if loss == "cross_entropy" else hot
    x = network.parameters.pack(model)
    batch = Batch(torch.ones(B, 1).double(), y, None, B)
    problem = NetworkProblem(network, batch, Plan("factors", 2, False, B), Settings(scale=1 / B))
    sub = problem._normal(x, problem.residual(x).passes)
    flat = x.clone().requires_grad_()
    out = functional_call(model, network.parameters.unpack(flat), (batch.inputs,))
    function = LOSSES[loss][0]
    (grad,) = torch.autograd.grad(function(out, y), flat)
    assert torch.allclose(sub.grad, grad) and float(grad.abs().max()) > 0.1
    assert bool(torch.isfinite(sub.gram).all())


def test_no_warning_reaches_the_user_while_a_way_is_chosen() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0)
    network, batch, point = setup(layer, vectors(3, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = choose(network, batch, point, MEMORY)
    _, J = whole_jacobian(network, batch, point)
    assert close(streamed(network, batch, point, plan)[1], J)
