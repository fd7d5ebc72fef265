"""Ctrl-C, SIGTERM and a closing terminal end the program as exceptions, so that its runs are recorded as KILLED.

A call of a store is not cut in two: a connection that is left in the middle of its transaction would keep the store
locked for the very call that records the end.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_depth = 0  # how many `signals_deferred` blocks the main thread is in
_held: int | None = None  # the signal that came while it was


def end_on_signals() -> None:
    """Turns signals into KeyboardInterrupt or SystemExit(128 + number); nothing outside the main thread."""
    _on_signals(_received)


def leave_to_system() -> None:
    """Signals end the process as they do any other: for when all is on record and Python takes itself apart.

    An exception that a handler raised then could end up in C++ code, which knows nothing better than to abort.
    """
    _on_signals(signal.SIG_DFL)


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    if not _in_main_thread():
        return
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it: so do we
            signal.signal(number, handler)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """A signal that comes inside takes effect at the end; a second one at once, for whoever cannot wait."""
    global _depth, _held
    if not _in_main_thread():  # where Python delivers no signals
        yield
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0 and _held is not None:
            number, _held = _held, None
            _end(number)


def _received(number: int, frame: FrameType | None) -> None:
    global _held
    if _depth and _held is None:
        _held = number
    else:
        _held = None
        _end(number)


def _end(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
