"""A model under training: the solver's state, the batch it looks at, and one trial at a time.

What `fit` and `LM` share. A batch and the dropout masks drawn for it are fixed from the first trial
on it to the next call of `place`, so that accepting and rejecting compare like with like. The
damping outlives the batch, its cost does not.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._chain import Chain
from ._chain_problem import ChainProblem, verified
from ._cluster import Cluster
from ._descent import START, START_LOSS, Descent, FitState
from ._jacobian import Plan, Point, choose, is_out_of_memory
from ._legate import LegateProblem
from ._losses import Objective, ResidualFunction, from_loss, from_residual, sketched
from ._network import Batch, Network
from ._params import Parameters, fixed_random
from ._problem import NetworkProblem, Settings, available_memory
from ._split import SplitProblem

T = TypeVar("T")

#: Where rows are made and added up: in this process, or in Legate's tasks.
LINALG = ("torch", "legate", "legate-split")


@dataclass(frozen=True)
class Options:
    """Constants of a session, as the user gave them."""

    residual: ResidualFunction | None = None
    loss: str | None = None
    weight_decay: float = 0.0
    memory: int | None = None
    dtype: torch.dtype | None = None
    linalg: str = "torch"
    seed: int = 0
    acceleration: bool = True
    devices: tuple[torch.device, ...] = ()
    sketch: bool = False


@dataclass(frozen=True)
class Trial:
    """What one trial did."""

    cost: float
    accepted: bool
    ratio: float
    damping: float
    length: float


class Session:
    """A model, its parameters in the solver, and the current batch."""

    def __init__(self, model: nn.Module, options: Options, solver: Descent) -> None:
        if options.linalg not in LINALG:
            raise ValueError(f"`linalg` must be one of {LINALG}, got {options.linalg!r}.")
        if not options.weight_decay >= 0 or math.isinf(options.weight_decay):
            raise ValueError(f"`weight_decay` must not be negative, got {options.weight_decay}.")
        self.model = model
        self.options = options
        self.solver = solver
        objective = _objective(options.residual, options.loss)
        self.network = Network(
            *_working_copy(model, options.dtype),
            sketched(objective) if options.sketch else objective,
        )
        x0 = self.network.parameters.pack(self.network.module)
        check_parameters(self.network.parameters, x0)
        self.x0 = x0.to(torch.float64)
        self.memory = options.memory or available_memory(x0.device) // 2
        self.cluster: Cluster | None = None
        self.devices = options.devices or (self.network.parameters.device,)
        if options.linalg != "torch":
            split = options.linalg == "legate-split"
            self.cluster = Cluster(self.network, self.devices if split else None)
            self.memory = int(self.agreed(self.memory))
        self.plans: dict[Any, Plan] = {}
        self._chain: Chain | None = None
        self._chain_sought = False
        self.problem: NetworkProblem | None = None
        self.state: FitState | None = None
        self.notes: list[str] = []
        self._idle_told = False
        self._stochastic: bool | None = None
        self._read: tuple[Any, Tensor] | None = None  # a point in a store, and its values

    @property
    def x(self) -> Tensor:
        """Current parameters (n,) in float64; from Legate's stores once for each point."""
        at = self.x0 if self.state is None else self.state.x
        if isinstance(at, Tensor):
            return at
        assert self.cluster is not None
        if self._read is None or self._read[0] is not at:
            self._read = at, self.cluster.read(at.store, "parameters").to(self.x0.device)
        return self._read[1]

    def place(self, batch: Batch, number: int) -> None:
        """Look at a batch; ``number`` seeds its masks and its sketch."""
        batch = self._sketched(batch, number)
        if self._stochastic is None:
            self._stochastic = is_stochastic(self.network, self._point(batch, None), batch)
        settings = self._settings(batch, self._mask_seed(number))
        plan = self._plan(batch, settings)
        self._retry(lambda: self._look_at(batch, plan, settings))
        self._note_idle(batch)

    def _look_at(self, batch: Batch, plan: Plan, settings: Settings) -> None:
        """Take up a batch: its problem, and the state there."""
        self.problem = self._problem(batch, plan, settings)
        x = self._own_point()
        if self.state is None:
            start = START if self.network.objective.exact else START_LOSS
            self.state = self.solver.init(self.problem, x, start)
        else:
            self.state = self.solver.resume(self.problem, self.state._replace(x=x))

    def _own_point(self) -> Any:
        """Current parameters where the problem has its vectors."""
        if isinstance(self.problem, LegateProblem) and self.problem.distributed:
            assert self.cluster is not None
            at = self.x0 if self.state is None else self.state.x
            return self.cluster.stored(at) if isinstance(at, Tensor) else at
        return self.x

    def _note_idle(self, batch: Batch) -> None:
        """Tell once that a batch has no sample for some processors."""
        if self._idle_told or self.options.linalg != "legate" or self.cluster is None:
            return
        if batch.size < self.cluster.processors:
            self._idle_told = True
            self.notes.append(
                f"A batch of {batch.size} samples leaves {self.cluster.processors - batch.size} of "
                f"Legate's {self.cluster.processors} processors idle: use larger batches, or start "
                "Legate with fewer."
            )

    @property
    def stochastic(self) -> bool:
        """Whether the model draws random numbers."""
        return bool(self._stochastic)

    def trial(self) -> Trial:
        """One trial on the current batch."""
        assert self.problem is not None and self.state is not None
        before = self.state.nit
        self._retry(self._step)
        self._keep_plan()
        return Trial(
            cost=self.state.cost,
            accepted=self.state.nit > before,
            ratio=self.state.ratio,
            damping=self.state.mu,
            length=self.state.length,
        )

    def _step(self) -> None:
        assert self.problem is not None and self.state is not None
        if isinstance(self.problem, ChainProblem) and self._chain is None:
            batch, plan, settings = self.problem.batch, self.problem.plan, self.problem.settings
            self.problem, self.state = None, self.state._replace(point=None)  # free their memory
            self._look_at(batch, plan, settings)
            assert self.problem is not None
        self.state = self.solver.step(self.problem, self.state)

    def _retry(self, compute: Callable[[], T]) -> T:
        """Run, and where a chain runs out of memory again without it: the general way halves."""
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            alone = self._chain is not None and self.cluster is None
            if not (alone and is_out_of_memory(error)):
                raise
        self._chain = None
        return compute()

    def cost_of(self, batch: Batch, x: Tensor, number: int = 0) -> float:
        """Cost of any samples at x (n,), under the masks of a batch of that number."""
        batch = self._sketched(batch, number)
        settings = self._settings(batch, self._mask_seed(number))
        plan = self._plan(batch, settings)

        def cost() -> float:
            problem = self._problem(batch, plan, settings)
            return float(problem.cost(problem.residual(x)))

        return self._retry(cost)

    def load(self, x: Tensor) -> None:
        """Leave x (n,) in the model."""
        Parameters.of(self.model).load(self.model, x)

    def update_statistics(self) -> None:
        """Running statistics of the model (batch normalisation) after an accepted step."""
        if not any(
            m.training and getattr(m, "track_running_stats", False) for m in self.model.modules()
        ):
            return
        assert self.problem is not None
        batch, module = self.problem.batch, self.network.module
        args = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
        with torch.no_grad(), fixed_random(0, self.x.device):
            self.network.call(self.network.parameters.unpack(self.x), args)
        if module is not self.model:
            for name, buffer in self.model.named_buffers():
                buffer.copy_(module.get_buffer(name))

    def agreed(self, value: float) -> float:
        """A number that decides something, the same on every rank of a run."""
        return value if self.cluster is None else self.cluster.agreed(value)[0]

    def _problem(self, batch: Batch, plan: Plan, settings: Settings) -> NetworkProblem:
        chain = self._chain_of(batch, plan, settings)
        if self.cluster is None:
            if chain is not None:
                return ChainProblem(self.network, batch, plan, settings, chain)
            return NetworkProblem(self.network, batch, plan, settings)
        if self.network.parameters.dtype != torch.float32:
            chain = None  # differences serve, and were better
        if self.options.linalg == "legate":
            return LegateProblem(self.network, batch, plan, settings, self.cluster, chain)
        return SplitProblem(self.network, batch, plan, settings, self.cluster, self.devices, chain)

    def _chain_of(self, batch: Batch, plan: Plan, settings: Settings) -> Chain | None:
        """The network's chain, where the normal equations can be made from one."""
        problem = NetworkProblem(self.network, batch, plan, settings)
        if plan.coupled or problem.form() != "normal":
            return None
        if not self._chain_sought:
            self._chain_sought = True
            found = verified(self.network, batch, settings, self.x, plan.k)
            self._chain = found if self.agreed(found is not None) else None
        dtype = self.network.parameters.dtype
        if self._chain is None or not ChainProblem.suits(
            self._chain, batch, dtype, self.memory // 4
        ):
            return None
        return self._chain

    def _sketched(self, batch: Batch, number: int) -> Batch:
        """The batch with the random numbers of its sketch, if there is one."""
        if not self.options.sketch:
            return batch
        generator = torch.Generator().manual_seed((self.options.seed << 20) + number)
        phase = torch.rand(batch.size, generator=generator, dtype=torch.float64)
        return replace(batch, targets=(batch.targets, phase.to(self.x.device)))

    def _mask_seed(self, number: int) -> int | None:
        return (self.options.seed << 20) + number if self._stochastic else None

    def _settings(self, batch: Batch, seed: int | None) -> Settings:
        scale = 1.0 if self.network.objective.name == "residual" else 1.0 / batch.size
        options = self.options
        return Settings(scale, options.weight_decay, self.memory, seed, options.acceleration)

    def _point(self, batch: Batch, seed: int | None) -> Point:
        settings = self._settings(batch, seed)
        return Point(self.network.parameters.unpack(self.x), settings.scale, seed)

    def _plan(self, batch: Batch, settings: Settings) -> Plan:
        """The plan for batches of this shape; a smaller last batch shares it if it can."""
        shapes = tuple(
            tuple(a.shape[1:]) if isinstance(a, Tensor) else None
            for a in pytree.tree_leaves((batch.inputs, batch.targets))
        )
        key = next((k for k in self.plans if k[0] == shapes and k[1] in (None, batch.size)), None)
        if key is None:
            point = Point(self.network.parameters.unpack(self.x), settings.scale, settings.seed)
            chosen = choose if self.cluster is None else self.cluster.choose
            plan = chosen(self.network, batch, point, self.memory // 4)
            key = (shapes, batch.size if plan.coupled else None)
            self.plans[key] = plan
            if plan.note and plan.note not in self.notes:
                self.notes.append(plan.note)
        self._key = key
        return self.plans[key]

    def _keep_plan(self) -> None:
        """Remember that blocks had to be halved."""
        assert self.problem is not None
        if self.problem.plan is not self.plans[self._key]:
            self.plans[self._key] = self.problem.plan

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint needs, in plain types and tensors."""
        assert self.state is not None
        kept = self.state._replace(point=None, x=self.x)._asdict()
        return {
            "state": kept,
            "plans": [(key, vars(plan).copy()) for key, plan in self.plans.items()],
            "stochastic": self._stochastic,
            "buffers": {k: v.clone() for k, v in self.network.module.named_buffers()},
            "names": list(self.network.parameters.names),
            "shapes": [tuple(s) for s in self.network.parameters.shapes],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take up a snapshot of a model of the same layout; `place` comes next."""
        shapes = [tuple(s) for s in self.network.parameters.shapes]
        if saved["names"] != list(self.network.parameters.names) or saved["shapes"] != shapes:
            raise ValueError(
                "The checkpoint must belong to a model of the same trainable parameters: it holds "
                f"{len(saved['names'])} tensors, {sum(math.prod(s) for s in saved['shapes'])} "
                f"values; the model has {len(shapes)} tensors, {self.network.parameters.n} values."
            )
        state = dict(saved["state"])
        state["x"] = state["x"].to(self.x0.device)
        self.state = FitState(**state)
        plans = {key: Plan(**plan) for key, plan in saved["plans"]}
        # Forward mode belongs to the whole process, and Legate's tasks are threads.
        alone = self.cluster is None
        self.plans = {key: plan for key, plan in plans.items() if alone or plan.way != "forward"}
        self._stochastic = saved["stochastic"]
        with torch.no_grad():
            for name, value in saved["buffers"].items():
                self.network.module.get_buffer(name).copy_(value)


def _working_copy(model: nn.Module, dtype: torch.dtype | None) -> tuple[nn.Module, Parameters]:
    """The module to evaluate: the model itself, or a copy in another dtype."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    parameters = Parameters.of(model)
    if dtype is None or dtype == parameters.dtype:
        return model, parameters
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`dtype` must be torch.float32 or torch.float64, got {dtype}.")
    module = copy.deepcopy(model).to(dtype)
    return module, replace(parameters, dtype=dtype)


def _objective(residual: ResidualFunction | None, loss: str | None) -> Objective:
    if residual is not None and loss is not None:
        raise ValueError("Give `residual` or `loss`, not both.")
    if residual is not None and not callable(residual):
        raise TypeError(f"`residual` must be callable, got {type(residual).__name__}.")
    return from_residual(residual) if loss is None else from_loss(loss)


def check_parameters(parameters: Parameters, x: Tensor) -> None:
    """ValueError where the model's values are not finite."""
    if bool(x.isfinite().all()):
        return
    for index, name in enumerate(parameters.names):
        bad = int((~x[parameters.span(index)].isfinite()).sum())
        if bad:
            raise ValueError(
                f"`model` must have finite parameters, got {bad} NaN or infinite values in {name}."
            )


def is_stochastic(network: Network, point: Point, batch: Batch) -> bool:
    """Whether two calls differ; ValueError if they do so for the same random numbers."""
    probe = batch.block(0, 32)

    def differs(seed: int | None) -> bool:
        a, b = (network.judge(point.tensors, probe, 1.0, seed).rows.detach() for _ in range(2))
        return not bool(torch.equal(a, b) or (a.isnan() & b.isnan() | (a == b)).all())

    device = network.parameters.device
    # The order of a shuffling loader is drawn from the same stream: a resumed run looks again.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        drawn = differs(None)
    if not drawn:
        return False
    if differs(0):
        raise ValueError(
            "`model` must give the same output for the same data and random numbers, and it does "
            "not: steps cannot be accepted or rejected. Use `model.eval()`."
        )
    return True


def warn_notes(notes: list[str]) -> None:
    """Tell once what slows a model down."""
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=3)
