"""Networks as least-squares problems, on torch.

Three doors: `residuals` makes a network a residual function for `lmsolve.least_squares`, `fit`
trains it on a data set, and `LM` is an optimizer for a training loop of your own.
"""

from ._fit import fit
from ._optimizer import LM, StepResult, available_gpus
from ._residuals import NetworkResiduals, residuals

__all__ = ["LM", "NetworkResiduals", "StepResult", "available_gpus", "fit", "residuals"]
