"""`fit`: train a network on a data set, to the end."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from scipy.optimize import OptimizeResult
from torch import Tensor, nn

from . import _checkpoint
from ._data import Drawn, Samples
from ._descent import CALLBACK, FTOL, GTOL, LIMIT, STALLED, XTOL, Descent
from ._losses import ResidualFunction
from ._network import Batch
from ._optimizer import check_devices
from ._session import Options, Session, Trial, warn_notes

#: Rejected trials on one mini-batch before the next is drawn.
ATTEMPTS = 5
#: A mini-batch grows when a step keeps less than this share of its gain on the next batch, on an
#: average over about ten steps. Measured on the sinc problem: docs/torch.md.
KEPT_SHARE, GROWTH = 0.5, 2

MESSAGES = {
    STALLED: "No step from here lowers the cost.",
    CALLBACK: "Stopped by `callback`.",
    LIMIT: "The limit of steps or seconds is reached.",
    GTOL: "`gtol` reached.",
    FTOL: "`ftol` reached.",
    XTOL: "`xtol` reached.",
}

HISTORY = (
    "cost", "accepted", "ratio", "damping", "length", "samples", "seconds", "memory",
)  # fmt: skip


def fit(
    model: nn.Module,
    data: Any,
    *,
    residual: ResidualFunction | None = None,
    loss: str | None = None,
    weights: Tensor | None = None,
    weight_decay: float = 0.0,
    batch_size: int | None = None,
    grow_batches: bool = False,
    max_steps: int = 100,
    max_seconds: float | None = None,
    ftol: float = 1e-12,
    xtol: float = 1e-12,
    gtol: float = 1e-12,
    callback: Callable[[OptimizeResult], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_steps: int | None = 100,
    checkpoint_seconds: float | None = None,
    resume: str | os.PathLike[str] | None = None,
    memory: int | None = None,
    dtype: torch.dtype | None = None,
    linalg: str = "torch",
    devices: Sequence[torch.device | str] | None = None,
    acceleration: bool = True,
    sketch: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> OptimizeResult:
    """Train a network by Levenberg-Marquardt.

    Parameters
    ----------
    model : torch.nn.Module
        The network. Parameters that do not require grad stay as they are. On return it holds the
        best parameters found, on its own device and in its own dtype.
    data : pair of pytrees of tensors, Dataset or DataLoader
        Inputs and targets, each with a leading axis of samples. A tuple of inputs becomes the
        model's positional arguments. A DataLoader's batches are used as they come.
    residual : callable, optional
        ``residual(output, target)`` returns residuals of any shape; the cost is half their sum of
        squares. The difference by default.
    loss : {'mse', 'cross_entropy', 'bce', 'poisson', 'huber'}, optional
        A convex loss instead, averaged over samples as torch's function of that name averages it;
        'bce' takes logits, 'poisson' logarithms of rates. The gradient is exact, the curvature is
        the generalised Gauss-Newton matrix.
    weights : Tensor, shape (samples,), optional
        Weight of each sample's part of the cost.
    weight_decay : float, default 0.0
        Adds ``weight_decay / 2 * |x|**2`` to the cost.
    batch_size : int, optional
        Samples in a mini-batch, drawn without replacement, in a new order every epoch. All of them
        by default.
    grow_batches : bool, default False
        Double the mini-batch when steps keep less than half of their gain on the next batch.
    max_steps : int, default 100
        Trials at most, accepted or rejected.
    max_seconds : float, optional
        Seconds at most.
    ftol, xtol, gtol : float, default 1e-12
        Relative decrease of the cost, relative step, and gradient relative to the residuals and
        the size of their derivatives, at which to stop; for a full batch without random numbers
        in the model. 0 turns a test off.
    callback : callable, optional
        Called after each trial with an `OptimizeResult` of ``x``, ``step``, ``epoch`` and the
        trial's entries of ``history``; ends the fit by raising StopIteration.
    checkpoint : path, optional
        File to keep the state in, written whole or not at all.
    checkpoint_steps : int, optional
        Trials between checkpoints, 100 by default; None for none.
    checkpoint_seconds : float, optional
        Seconds between checkpoints.
    resume : path, optional
        Checkpoint to go on from, with the same model, data and options: the same steps follow, to
        the last bit. ``max_steps`` counts from the first start. A path that does not exist starts
        anew.
    memory : int, optional
        Bytes that matrices and blocks of the Jacobian may take; half of the free memory by
        default.
    dtype : torch.dtype, optional
        Compute the model in this dtype instead of its own; torch.float64 for the last digits.
    linalg : {'torch', 'legate', 'legate-split'}, default 'torch'
        Where rows of the Jacobian are computed and added up: in this process, or in Legate's
        tasks, each on the processor (or GPU) of its shard of the samples, on every rank. Every
        rank calls this with the same model and data; the first rank's callback ends the fit.
        With 'legate-split' the model computes rows on ``devices`` and Legate, on other GPUs or on
        CPUs of the same process, adds them up; a wide network's stay on the model's device.
    devices : sequence of torch.device or str, optional
        Devices of the model for ``linalg='legate-split'``, its own among them; slices of the
        batch go to them in turn. The model's own by default.
    acceleration : bool, default True
        Bend steps along the curvature of the residuals, at one more evaluation a trial and far
        fewer trials. Losses other than 'mse' have no use for it.
    sketch : bool, default False
        Two rows of the Jacobian for each sample instead of one for each of its outputs: the
        gradient stays exact, the curvature becomes a random estimate without bias. For
        mini-batches of samples with many outputs, at a fraction of the cost of a step.
    seed : int, default 0
        Of the order of samples, of dropout masks and sketches.
    progress : bool, optional
        A tqdm progress bar; by default where standard error is a terminal.

    Returns
    -------
    OptimizeResult
        ``x`` (n,), ``cost``, ``status``, ``message``, ``success``, ``nfev``, ``njev``, ``nit``
        (accepted steps), ``steps`` (trials), ``epochs``, ``history`` (a dict of lists: cost,
        accepted, ratio, damping, length, samples, seconds, memory in bytes) and ``notes``. With
        mini-batches ``cost`` is that of all the data, and ``x`` the best at the end of an epoch;
        with a DataLoader they are the last.

    Raises
    ------
    ValueError
        If data, model or options cannot be used; the message names what was expected.

    Examples
    --------
    >>> import torch, lmsolve.torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1))
    >>> x = torch.linspace(-1, 1, 200)[:, None]
    >>> result = lmsolve.torch.fit(model, (x, x**3), dtype=torch.float64, max_steps=200)
    >>> result.cost < 1e-6
    True
    """
    _check_limits(max_steps, max_seconds, {"ftol": ftol, "xtol": xtol, "gtol": gtol})
    listed = tuple(torch.device(d) for d in devices or ())
    options = Options(
        residual,
        loss,
        weight_decay,
        memory,
        dtype,
        linalg,
        seed,
        acceleration,
        listed,
        sketch,
    )
    session = Session(model, options, Descent(ftol, xtol, gtol))
    if devices is not None:
        check_devices(listed, session.network.parameters.device)
    samples = Samples(data, weights, batch_size, session.network.parameters, seed)
    run = _Run(session, samples, grow_batches)
    run.limits = (max_steps, max_seconds)
    run.callback = callback
    if checkpoint is not None:
        run.checkpoint = checkpoint
        run.schedule = _checkpoint.Schedule(checkpoint_steps, checkpoint_seconds)
    if resume is not None and os.path.exists(resume):
        run.restore(_checkpoint.load(resume))
    bar = _progress_bar(progress, max_steps, run.steps)
    try:
        status = run.loop(bar)
    finally:
        bar.close()
    result = run.result(status)
    session.load(result.x)
    warn_notes(session.notes)
    return result


class _Run:
    """The loop of a fit and all that a checkpoint of it holds."""

    def __init__(self, session: Session, samples: Samples, grow: bool) -> None:
        self.session = session
        self.samples = samples
        self.grow = grow
        self.limits: tuple[int, float | None] = (100, None)
        self.callback: Callable[[OptimizeResult], None] | None = None
        self.checkpoint: str | os.PathLike[str] | None = None
        self.schedule = _checkpoint.Schedule(None, None)
        self.steps = 0
        self.epoch = 0
        self.index = 0  # batches of this epoch already done
        self.placed = 0  # batches looked at in all: the seed of their masks
        self.kept = 1.0  # running average of the share of a gain that the next batch confirms
        self.last: tuple[Tensor, float] | None = None  # x before the last step, its gain a sample
        self.best: tuple[float, Tensor] | None = None
        self.elapsed = 0.0
        self.history: dict[str, list[Any]] = {key: [] for key in HISTORY}
        self.rng = torch.get_rng_state()  # at the start of the epoch, for DataLoaders that shuffle

    def loop(self, bar: Any) -> int:
        """Trials until a limit, a tolerance or the callback ends the fit; its status."""
        start = time.perf_counter() - self.elapsed
        for drawn in self._batches():
            self._place(drawn)
            status = self._trials(start, bar)
            if status is not None:
                return status
            self.index = drawn.index + 1
            self._save_if_due()
        raise AssertionError("batches end only with the fit")

    def _batches(self) -> Iterator[Drawn]:
        """Mini-batches without end."""
        while True:
            if self.index and self.samples.loader is not None:
                torch.set_rng_state(self.rng)
            else:
                self.rng = torch.get_rng_state()
            yield from self.samples.draw(self.epoch, self.index)
            self.epoch, self.index = self.epoch + 1, 0
            if self.samples.whole is not None and not self._one_batch:
                self._keep_best(self.samples.whole)

    @property
    def _one_batch(self) -> bool:
        """Whether all steps see the same samples under the same masks."""
        return self.samples.fixed and not self.session.stochastic

    def _place(self, drawn: Drawn) -> None:
        """Look at a batch, and learn from it whether the last one was large enough."""
        session = self.session
        session.place(drawn.batch, self.placed)
        self.placed += 1
        if not self._one_batch:
            session.solver.ftol = session.solver.xtol = session.solver.gtol = 0.0
        if not self.grow or self.last is None or self.samples.size is None:
            return
        (x_old, gain), self.last = self.last, None
        assert session.state is not None and self.samples.whole is not None
        confirmed = session.cost_of(drawn.batch, x_old, self.placed - 1) - session.state.cost
        share = confirmed / self._samples_in_cost(drawn.batch.size) / gain
        self.kept += 0.1 * (min(1.0, max(-1.0, share)) - self.kept)
        if self.kept < KEPT_SHARE:
            self.samples.size = min(GROWTH * self.samples.size, self.samples.whole.size)
            self.kept = 1.0

    def _samples_in_cost(self, size: int) -> int:
        """What the cost of a batch counts: its samples, or one where it is their mean."""
        return size if self.session.network.objective.name == "residual" else 1

    def _trials(self, start: float, bar: Any) -> int | None:
        """Trials on one batch; a status, or None to go on with the next."""
        session, rejected = self.session, 0
        max_steps, max_seconds = self.limits
        while True:
            assert session.state is not None and session.problem is not None
            self.elapsed = time.perf_counter() - start
            if self.steps >= max_steps:
                return LIMIT
            if max_seconds is not None and session.agreed(self.elapsed) >= max_seconds:
                return LIMIT
            cost_old = session.state.cost
            x_old = session.x if self.grow else None
            trial = session.trial()
            status = session.state.status
            self.steps += 1
            self.elapsed = time.perf_counter() - start
            self._record(trial, bar)
            rejected = 0 if trial.accepted else rejected + 1
            if trial.accepted:
                session.update_statistics()
                size = session.problem.batch.size
                gain = (cost_old - trial.cost) / self._samples_in_cost(size)
                self.last = None if x_old is None or not gain > 0 else (x_old, gain)
            if self.callback is not None and session.agreed(self._stopped_by_callback()):
                return CALLBACK
            if self._one_batch:
                if status is not None:
                    return status
                if trial.accepted:  # only then is the state free of its linearisation
                    self._save_if_due()
            elif trial.accepted or rejected >= ATTEMPTS or status is not None:
                return None

    def _record(self, trial: Trial, bar: Any) -> None:
        """One entry of the history."""
        assert self.session.problem is not None
        entry = {
            "cost": trial.cost,
            "accepted": trial.accepted,
            "ratio": trial.ratio,
            "damping": trial.damping,
            "length": trial.length,
            "samples": self.session.problem.batch.size,
            "seconds": self.elapsed,
            "memory": peak_memory(self.session.x0.device),
        }
        for key in HISTORY:
            self.history[key].append(entry[key])
        bar.update()
        bar.set_postfix_str(f"cost {trial.cost:.3e}", refresh=False)

    def _stopped_by_callback(self) -> bool:
        assert self.callback is not None
        latest = {key: values[-1] for key, values in self.history.items() if values}
        try:
            self.callback(
                OptimizeResult(x=self.session.x, step=self.steps, epoch=self.epoch, **latest)
            )
        except StopIteration:
            return True
        return False

    def _keep_best(self, whole: Batch) -> None:
        """Compare the cost of all the data with the best so far."""
        if self.session.state is None:
            return
        cost = self.session.cost_of(whole, self.session.x)
        if self.best is None or cost < self.best[0]:
            self.best = (cost, self.session.x)

    def _save_if_due(self) -> None:
        # To read weights that lie in Legate's stores takes all ranks, whose clocks differ.
        if self.checkpoint is not None and self.session.agreed(self.schedule.due(self.steps)):
            self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        assert self.checkpoint is not None
        own = ("steps", "epoch", "index", "placed", "kept", "last", "best", "elapsed", "history")
        content = {key: getattr(self, key) for key in own}
        _checkpoint.save(
            self.checkpoint,
            {
                **content,
                "rng": self.rng,
                "batch_size": self.samples.size,
                "session": self.session.snapshot(),
            },
        )

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self.session.restore(saved["session"])
        device = self.session.x0.device
        for key in ("steps", "epoch", "index", "placed", "kept", "elapsed", "history", "rng"):
            setattr(self, key, saved[key])
        if saved["last"] is not None:
            self.last = (saved["last"][0].to(device), saved["last"][1])
        if saved["best"] is not None:
            self.best = (saved["best"][0], saved["best"][1].to(device))
        self.samples.size = saved["batch_size"]
        if self._one_batch:
            self.placed -= 1  # the batch is looked at again, not anew

    def result(self, status: int) -> OptimizeResult:
        """What `fit` returns."""
        session = self.session
        assert session.state is not None and session.problem is not None
        x, cost = session.x, session.state.cost
        if self.samples.whole is not None and not self._one_batch:
            self._keep_best(self.samples.whole)
            assert self.best is not None
            cost, x = self.best
        return OptimizeResult(
            x=x,
            cost=cost,
            status=status,
            message=MESSAGES[status],
            success=status >= 0,
            nfev=session.state.nfev,
            njev=session.state.njev,
            nit=session.state.nit,
            steps=self.steps,
            epochs=self.epoch,
            history=self.history,
            notes=list(session.notes),
        )


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: of torch on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _NoBar:
    """A progress bar that shows nothing."""

    def update(self) -> None:
        """One more step."""

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        """Text beside the bar."""

    def close(self) -> None:
        """The end."""


def _progress_bar(progress: bool | None, total: int, done: int) -> Any:
    """A tqdm bar, or a stand-in."""
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, initial=done, unit="step")


def _check_limits(steps: int, seconds: float | None, tolerances: dict[str, float]) -> None:
    if steps < 0:
        raise ValueError(f"`max_steps` must not be negative, got {steps}.")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"`max_seconds` must be positive, got {seconds}.")
    for name, value in tolerances.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be a number >= 0, got {value}.")
