"""How long something takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def timed(run: Callable[[], Any]) -> float:
    """In seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
