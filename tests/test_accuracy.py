"""Which cheap hypergradient is closer to the exact one (benchmarks/ has the full table)."""

import numpy as np
import pytest

from benchmarks.costs.accuracy import PROBLEMS, cosines


@pytest.mark.thorough
@pytest.mark.usefixtures("as_a_user_has_it")
@pytest.mark.parametrize("name", ["layers, digits"])
def test_the_order_is_that_of_the_paper(name):
    """Figure 3 of the HyperDistill paper: DrMAD, HyperDistill, one step, first order."""
    found = cosines(PROBLEMS[name](seed=0), counts=(10, 20))
    order = ["DrMAD", "HyperDistill .9", "one step", "first order"]
    medians = [np.median(found[method]) for method in order]
    assert medians == sorted(medians, reverse=True)
    assert medians[0] > 0.9
