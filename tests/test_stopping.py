"""When a run is done, from the figures of its rungs."""

import math

import pytest

from aldrift_hf.algorithm.stopping import done

T = 2.0


def rung(tau=T, ess=0.2, missing=0.3, error=0.1, kl=1.0, kl_error=0.02):
    return {
        **{"tau": tau, "tau_max": T, "ess": ess, "missing_mass": missing, "missing_mass_error": error},
        **{"kl_to_target": kl, "kl_to_target_error": kl_error},
    }


CLOSE = rung(ess=0.6, missing=-0.05)


@pytest.mark.parametrize(
    ("rungs", "close"),
    [
        ([CLOSE], False),
        ([CLOSE, CLOSE], True),
        ([CLOSE, rung(), CLOSE], False),
        ([rung(tau=1.0), CLOSE, CLOSE], True),
        ([CLOSE, rung(ess=0.49, missing=0.0)], False),
        ([CLOSE, rung(ess=0.5, missing=0.1)], True),
        ([CLOSE, rung(ess=0.9, missing=0.11)], False),
        ([CLOSE, rung(ess=0.9, missing=-0.11)], False),
        ([CLOSE, rung(ess=0.9, error=math.nan)], False),
        ([CLOSE, rung(ess=0.9, missing=0.0, error=0.2)], True),
        ([CLOSE, rung(ess=0.9, missing=0.0, error=0.21)], False),  # as of some twenty draws: too few to tell
        ([{**CLOSE, "tau": 1.0}] * 4, False),
    ],
)
def test_close_to_the_target_on_two_rungs_running(rungs, close):
    reason = done(rungs, 0.5)
    assert (reason is not None) == close
    if reason:
        assert reason.startswith("The model is close to p_T: on 2 rungs running")


UNKNOWN = rung(ess=0.6, missing=math.nan, error=math.nan)
APART = [rung(ess=0.6, missing=missing) for missing in (0.3, -0.3)]


@pytest.mark.parametrize(
    ("rungs", "groups", "close"),
    [
        ([CLOSE, CLOSE], 24, False),  # 22 groups of prompts have not been drawn for
        ([CLOSE] * 23, 24, False),
        ([CLOSE] * 24, 24, True),
        ([CLOSE] * 3, 3, False),
        ([CLOSE] * 4, 3, True),
        ([CLOSE, *[UNKNOWN] * 23], 24, True),
        ([UNKNOWN] * 24, 24, False),
        ([UNKNOWN, UNKNOWN], 1, False),
        ([CLOSE, UNKNOWN], 1, True),
        (APART * 2, 4, True),  # right on average: each alone would be far by luck
        ([CLOSE, CLOSE, rung(ess=0.3, missing=0.0), CLOSE], 4, False),
        ([CLOSE] * 3 + [{**CLOSE, "tau": 1.0}], 4, False),
    ],
)
def test_close_for_all_groups_of_prompts(rungs, groups, close):
    assert (done(rungs, 0.5, groups) is not None) == close


def test_on_two_rungs_running_means_one_after_the_other():
    """Where T is found rung by rung, it may have risen in between."""
    between = {**CLOSE, "tau_max": T + 1, "ess": 0.1}
    assert done([CLOSE, between, CLOSE], 0.5) is None


def falling(step, count=8, kl=1.0, **figures):
    return [rung(kl=kl - step * k, **figures) for k in range(count)]


@pytest.mark.parametrize(
    ("rungs", "stalled"),
    [
        (falling(0.0), True),
        (falling(0.0, 7), False),
        (falling(0.01), True),  # 0.04 lower on average, its error 0.014, of 0.985 nats
        (falling(0.03), False),  # 0.12 lower
        (falling(0.01, kl_error=0.1), False),  # its error 0.071: it may have come closer by more than a tenth
        (falling(0.0, 27, kl_error=0.2), True),  # of 9 rungs each, its error 0.094
        (falling(0.0, 24, kl_error=0.22), False),  # its error 0.11
        (falling(-0.1), True),
        (falling(0.0, tau=1.0), False),
        (falling(0.0, tau=1.0) + falling(0.0, 7), False),
        (falling(0.1) + falling(0.0, kl=0.2), False),  # from 0.65 to 0.2 nats
        (falling(0.1) + falling(0.0, 20, kl=0.2), True),
        (falling(0.0, kl_error=math.nan), False),
        ([*falling(0.0)[:-1], rung(kl=math.inf)], False),
    ],
)
def test_no_longer_coming_closer(rungs, stalled):
    reason = done(rungs, 0.5)
    assert (reason is not None) == stalled
    if reason:
        assert reason.startswith("The model no longer comes closer to p_T")
