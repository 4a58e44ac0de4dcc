import signal
import threading

import pytest

from gigatome.training.interrupts import Interrupts

NAMES = ("SIGTERM", "SIGINT", "SIGUSR2")


@pytest.fixture(autouse=True)
def usual():
    """The handlers of a process that nobody has told anything; they are to be there again afterwards."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in NAMES}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before["SIGINT"])
    assert {name: signal.getsignal(getattr(signal, name)) for name in NAMES} == before


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_noted(name):
    with Interrupts() as interrupts:
        assert interrupts.seen is None
        signal.raise_signal(getattr(signal, name))
        assert interrupts.seen == name
    assert interrupts.seen == name


@pytest.mark.parametrize("name", NAMES)
def test_the_outer_one_knows_what_the_inner_one_has_seen(name):
    with Interrupts() as outer:
        with Interrupts() as middle, Interrupts() as inner:
            signal.raise_signal(getattr(signal, name))
        assert [it.seen for it in (outer, middle, inner)] == [name] * 3


def test_the_inner_one_knows_what_came_before():
    with Interrupts() as outer:
        signal.raise_signal(signal.SIGUSR2)
        with Interrupts() as inner:
            assert inner.seen == "SIGUSR2"
            signal.raise_signal(signal.SIGTERM)
        assert (outer.seen, inner.seen) == ("SIGTERM", "SIGTERM")


def test_the_outer_one_goes_on_noting():
    with Interrupts() as outer:
        with Interrupts() as inner:
            pass
        signal.raise_signal(signal.SIGTERM)
    assert (outer.seen, inner.seen) == ("SIGTERM", None)


def test_an_inner_one_that_fails_restores_the_outer_one():
    with Interrupts() as outer:
        with pytest.raises(ZeroDivisionError), Interrupts():
            raise ZeroDivisionError
        signal.raise_signal(signal.SIGUSR2)
    assert outer.seen == "SIGUSR2"


@pytest.mark.parametrize("where", ["both inside", "one before", "one after", "both outside"])
def test_a_second_sigint_interrupts_however_they_are_nested(where):
    def come(when):
        if where in when:
            signal.raise_signal(signal.SIGINT)

    def twice():
        with Interrupts() as outer:
            come(("one before", "both outside"))
            with Interrupts() as inner:
                come(("one before", "one after", "both inside"))
                assert inner.seen == outer.seen == "SIGINT"
                come(("both inside",))
            come(("one after", "both outside"))

    with pytest.raises(KeyboardInterrupt):
        twice()


def test_a_handler_of_the_callers_is_put_back_and_not_called():
    called = []
    before = signal.signal(signal.SIGTERM, lambda *_: called.append(1))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.seen == "SIGTERM"
        assert not called
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_it_does_nothing():
    seen = []

    def inside():
        with Interrupts() as interrupts:
            seen.append((signal.getsignal(signal.SIGTERM), interrupts.seen))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(before, None)]
