"""Plain vLLM's `worker_extension_cls`: a worker that imports it tells its kernel the rows (`rows_of_stock.py`)."""

import pytest

from parallel.rows_of_stock import told_rows

told_rows(pytest.MonkeyPatch())


class ToldRows:
    """vLLM's worker gets nothing from it."""
