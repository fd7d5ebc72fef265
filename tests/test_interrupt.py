"""A signal ends the program as an exception, but not in the middle of what is to be done as a whole."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from prune_lab.system import interrupt
from prune_lab.system.interrupt import signals_deferred
from prune_lab.tracking.connection import Uninterrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Our handlers, for the time of a test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    interrupt.end_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_is_a_keyboard_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_are_exits(number: signal.Signals, code: int) -> None:
    with pytest.raises(SystemExit) as end:
        signal.raise_signal(number)
    assert end.value.code == code


def test_what_is_whole_is_done_before_the_signal_counts() -> None:
    done = []

    def work() -> None:
        with signals_deferred():
            with signals_deferred():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner", "outer"]
    with signals_deferred():  # it counts once
        pass


def test_a_second_signal_waits_for_nothing() -> None:
    done = []

    def work() -> None:
        with signals_deferred():
            signal.raise_signal(signal.SIGINT)
            done.append("first")
            signal.raise_signal(signal.SIGTERM)
            done.append("second")

    with pytest.raises(SystemExit):
        work()
    assert done == ["first"]
    with signals_deferred():
        pass


def test_a_signal_counts_though_what_is_whole_fails() -> None:
    @signals_deferred()
    def work() -> None:
        signal.raise_signal(signal.SIGINT)
        raise ValueError

    with pytest.raises(KeyboardInterrupt):
        work()


def test_another_thread_holds_nothing_back() -> None:
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with signals_deferred():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(10)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    leave.set()
    thread.join()


def test_a_transaction_of_a_store_is_not_left_open(tmp_path: Path) -> None:
    """What happened without it: the connection that was interrupted kept the file locked."""

    class Client:
        def write(self) -> None:
            connection = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
            connection.execute("create table t (x)")
            connection.execute("begin immediate")
            signal.raise_signal(signal.SIGINT)
            connection.execute("insert into t values (1)")
            connection.execute("commit")
            connection.close()

    with pytest.raises(KeyboardInterrupt):
        Uninterrupted(Client()).write()
    with sqlite3.connect(tmp_path / "store.db", timeout=0) as store:
        store.execute("begin immediate")
        assert store.execute("select x from t").fetchall() == [(1,)]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt.end_on_signals()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("number", SIGNALS)
def test_a_program_that_is_done_ends_quietly(number: signal.Signals) -> None:
    """By a signal that comes when its work is over and Python takes itself apart."""
    script = """
import atexit, os, signal, sys
from prune_lab.__main__ import main
number, sys.argv[1:] = int(sys.argv[1]), sys.argv[2:]
signal.signal(number, signal.SIG_DFL)  # whoever started the tests may ignore it
atexit.register(os.kill, os.getpid(), number)
main()
"""
    command = [sys.executable, "-c", script, str(int(number)), "--help"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-number, "")
