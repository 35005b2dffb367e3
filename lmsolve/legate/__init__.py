"""Least squares on Legate: rows evaluated where the data are, on every CPU, GPU and node it has.

Importing this starts nothing; Legate starts at the first call that needs it.
"""

from ._rows import RowProblem, rows
from ._start import is_first_rank

__all__ = ["RowProblem", "is_first_rank", "rows"]
