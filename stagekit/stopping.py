"""Being asked to stop: the first Ctrl-C or SIGTERM asks, the second ends at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Whether somebody asked to stop. Stages look at it between steps and between batches of generated text."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def ask(self) -> None:
        """Ask to stop at the next safe point."""
        self._event.set()

    def __call__(self) -> bool:
        """Whether it was asked."""
        return self._event.is_set()


@contextlib.contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """While the block runs, SIGINT, SIGTERM and SIGHUP ask to stop; a second SIGINT raises KeyboardInterrupt.

    A signal that the process was started to ignore (`nohup`, a shell's background job) stays ignored. In a thread
    other than the main one there are no signals to catch, and nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.ask()

    signals = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
