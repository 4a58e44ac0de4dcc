"""Signals that ask a run to stop."""

import signal
import threading
from typing import Any, final


@final
class Interrupts:
    """Notes SIGTERM, SIGINT and SIGUSR2 instead of dying of them; a second SIGINT interrupts as usual.

    Work that has to end well is put into ``with Interrupts() as interrupts:`` and looks at ``interrupts.seen`` now and
    then. It may be entered within another one, as :func:`gigatome.training.loop.fit` does: each knows of every signal
    since the outermost was entered. Handlers are put back at the end. Signals reach the main thread only; elsewhere
    this does nothing.

    Attributes:
        seen: name of the last signal that came, or None.
    """

    def __init__(self):
        self.seen: str | None = None
        self._before: dict[int, Any] = {}
        self._outer: Interrupts | None = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            self._outer = owner if isinstance(owner, Interrupts) else None
            for name in ("SIGTERM", "SIGINT", "SIGUSR2"):
                if hasattr(signal, name) and self._is_noted(getattr(signal, name)):  # Windows has no SIGUSR2
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._note)
            if self._outer is not None:
                self.seen = self.seen or self._outer.seen
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._before):
            self._restore(number)

    def _is_noted(self, number: int) -> bool:
        """False for SIGINT after the outer one has seen it, as a second one interrupts."""
        return self._outer is None or number in self._outer._before

    def _note(self, number: int, frame: object) -> None:
        self.seen = signal.Signals(number).name
        if number == signal.SIGINT:
            self._restore(number)
        if self._outer is not None:
            self._outer._note(number, frame)

    def _restore(self, number: int) -> None:
        if number in self._before:
            handler = self._before.pop(number)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
