"""Signals that end a command: at once, or after the step that runs.

SIGTERM and Ctrl-C (SIGINT) ask for the end. SIGUSR1 does as SIGTERM does: it is what Slurm sends ahead of time
(`--signal=USR1@120`). Signals that the process was started to ignore stay ignored, and outside the main thread, where
Python takes no signals, nothing changes.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bankwise.errors import Interrupted

_NOTICE = signal.SIGUSR1
_DUPLICATES_S = 5.0


@contextmanager
def end_at_once() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise `Interrupted`, as Ctrl-C raises `KeyboardInterrupt`."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(f"interrupted by {signal.Signals(signum).name}", signum)

    with _handling(end, (signal.SIGTERM, _NOTICE)):
        yield


class StopRequest:
    """Whether a signal has asked the training to stop."""

    def __init__(self) -> None:
        self.signum = 0
        """The signal; 0: none so far."""
        self._noted = 0.0

    @contextmanager
    def listening(self, *, processes: int = 1, say: bool = True) -> Iterator[None]:
        """The first signal is noted, a second one does what it did before: it stops at once.

        A SIGUSR1 is a notice, so the SIGTERM that follows at the end of the allotted time is still a first signal.
        With several `processes`, the launcher passes on what each of them got already: signals of the same few seconds
        count as one.
        """
        self.signum = 0

        def note(signum: int, frame: FrameType | None) -> None:
            if self.signum in (0, _NOTICE):
                is_first, self.signum, self._noted = self.signum == 0, signum, time.monotonic()
                if is_first and say:
                    # Unbuffered: the signal may have come in the middle of a print.
                    name = signal.Signals(signum).name
                    os.write(2, f"{name}: stopping after this step, with a checkpoint\n".encode())
            elif signum != _NOTICE and (processes == 1 or time.monotonic() - self._noted > _DUPLICATES_S):
                restore()
                signal.raise_signal(signum)

        with _handling(note, (signal.SIGINT, signal.SIGTERM, _NOTICE)) as restore:
            yield


@contextmanager
def _handling(
    handler: Callable[[int, FrameType | None], None], signals: tuple[signal.Signals, ...]
) -> Iterator[Callable[[], None]]:
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    if threading.current_thread() is threading.main_thread():
        # None: a handler that Python did not set, and could not set again.
        before = {each: old for each in signals if (old := signal.getsignal(each)) not in (None, signal.SIG_IGN)}
    for each in before:
        signal.signal(each, handler)
    try:
        yield restore
    finally:
        restore()
