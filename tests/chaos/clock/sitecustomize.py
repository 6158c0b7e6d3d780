"""A wall clock that jumps: seconds in the file named by CHAOS_CLOCK are added to time.time()."""

import os
import time

_time, _time_ns = time.time, time.time_ns


def _jump() -> float:
    try:
        with open(os.environ["CHAOS_CLOCK"]) as file:
            return float(file.read() or 0)
    except (OSError, KeyError):
        return 0.0


time.time = lambda: _time() + _jump()
time.time_ns = lambda: _time_ns() + int(_jump() * 1e9)
