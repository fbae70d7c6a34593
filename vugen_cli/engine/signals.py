"""Signals that ask a run to stop: it ends the step, saves its state, and says how to go on."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

# Ctrl-C, a launcher that ends a job, and Slurm's warning ahead of time (`#SBATCH --signal=USR1@300`).
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a wish to stop after the step.

    A job may be told several times, by its scheduler and by its launcher, so repeats change nothing; only a
    second Ctrl-C ends the run at once, and not while `saving`.

    Attributes:
        asked: whether one has come.
    """

    def __init__(self) -> None:
        self.asked = self._saving = False

    def __enter__(self) -> "StopSignals":
        self._before: dict[int, Any] = {}
        for number in ASKING:
            with contextlib.suppress(ValueError):  # not the main thread: a notebook or a test
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT and not self._saving:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """While a state is being saved, not even a second Ctrl-C ends the run."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
