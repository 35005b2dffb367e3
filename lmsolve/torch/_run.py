"""The loop of a fit: mini-batches, trials, history, checkpoints, and the result."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from scipy.optimize import OptimizeResult
from torch import Tensor

from . import _checkpoint
from ._data import Drawn, Samples
from ._descent import CALLBACK, FTOL, GTOL, LIMIT, STALLED, XTOL
from ._network import Batch
from ._session import Session, Trial

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


class Run:
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
