import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from aldrift_hf.ladder import linear_ladder


def test_the_papers_steps():
    assert linear_ladder(2.0, 0.5) == [0.5, 1.0, 1.5, 2.0]


def test_the_last_step_is_clipped_to_t_exactly():
    assert linear_ladder(1.0, 0.4) == [0.4, 0.8, 1.0]
    assert linear_ladder(0.3, 1.0) == [0.3]
    assert len(linear_ladder(6.0, 0.1)) == 60  # 6.0 / 0.1 is a hair above 60 or below, by rounding


@given(st.floats(0.01, 100), st.floats(0.05, 10))
def test_it_rises_to_t_by_steps_no_larger_than_asked(tau_max, step):
    ladder = linear_ladder(tau_max, step)
    differences = [b - a for a, b in zip([0.0, *ladder], ladder)]
    assert ladder[-1] == tau_max
    assert all(0 < difference <= step * (1 + 1e-6) for difference in differences)


@pytest.mark.parametrize(("tau_max", "step"), [(0, 1), (1, 0), (-1, 1), (math.inf, 1), (1, math.nan)])
def test_bad_steps_are_refused(tau_max, step):
    with pytest.raises(ValueError, match="positive and finite"):
        linear_ladder(tau_max, step)
