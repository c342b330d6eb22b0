"""Signals are noted, and a loss that is not finite ends the run."""

import os
import signal

import pytest

from lmjax.errors import DivergedError
from lmjax.train.faults import StopSignal, check_finite


@pytest.mark.fast
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_a_second_acts_as_always(number: signal.Signals):
    before = signal.getsignal(number)
    signal.signal(number, signal.default_int_handler)
    try:
        with StopSignal() as stop:
            assert stop.received is None
            os.kill(os.getpid(), number)
            assert stop.received is number
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


@pytest.mark.fast
def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.fast
@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_what_is_not_finite_names_the_step_and_the_last_checkpoint(loss: float, norm: float):
    with pytest.raises(DivergedError, match=r"step 7: .*step 5 is from before"):
        check_finite(7, {"loss": loss, "grad_norm": norm}, 5)
    with pytest.raises(DivergedError, match=r"grad_norm is .*there is no checkpoint"):
        check_finite(7, {"loss": loss, "grad_norm": norm}, None)


@pytest.mark.fast
def test_routers_whose_logits_are_not_finite_are_counted_and_named():
    routers = {"1": {"not_finite": 0.0}, "3": {"not_finite": 12.0}, "5": {"not_finite": 16.0}}
    told = r"loss is nan; the router's logits are not finite for 12 tokens in block 3 and for some in 1 more blocks; "
    with pytest.raises(DivergedError, match=told):
        check_finite(7, {"loss": float("nan")}, None, routers)
    with pytest.raises(DivergedError, match="12 tokens in block 3; the run is stopped"):
        check_finite(7, {"loss": 1.0}, None, {"3": routers["3"]})


@pytest.mark.fast
def test_finite_values_pass():
    check_finite(7, {"loss": 1e30, "grad_norm": 0.0}, None)
    check_finite(7, {"loss": 1e30}, None, {"1": {"not_finite": 0.0}})
