"""Signals that ask a run to stop."""

import signal
import threading
from typing import Any, final


@final
class Interrupts:
    """Notes SIGTERM, SIGINT and SIGUSR2 instead of dying of them; a second SIGINT interrupts as usual.

    Handlers are put back at the end. Signals reach the main thread only; elsewhere this does nothing.

    Attributes:
        seen: name of the last signal that came, or None.
    """

    def __init__(self):
        self.seen: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGUSR2"):
                if hasattr(signal, name):  # Windows has no SIGUSR2
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._before):
            self._restore(number)

    def _note(self, number: int, _: object) -> None:
        self.seen = signal.Signals(number).name
        if number == signal.SIGINT:
            self._restore(number)

    def _restore(self, number: int) -> None:
        handler = self._before.pop(number)
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
