"""The table `lasso`: its closed form, and its saved rows."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import lasso


SAVED = Path(lasso.__file__).parents[1] / "results" / "lasso.txt"


def holdout(data, h):
    w, _ = lasso.exact(data, h)
    return np.mean((data.u @ w - data.v) ** 2)


def test_no_feature_of_the_diabetes_is_another_one_again():
    data = lasso.diabetes()
    assert data.x.shape[1] == data.u.shape[1] == 64
    correlations = np.abs(np.corrcoef(data.x.T)) - np.eye(64)
    assert correlations.max() < 1 - 1e-6


def test_the_closed_form_is_the_derivative_of_the_holdout_error():
    data = lasso.diabetes()
    h = np.full(64, np.log(0.05))
    _, g = lasso.exact(data, h)
    i = int(np.argmax(np.abs(g)))
    move = 1e-5 * np.eye(64)[i]
    slope = (holdout(data, h + move) - holdout(data, h - move)) / 2e-5
    # Central differences: 1e-10 times a third derivative, and 1e-16 / 1e-5.
    np.testing.assert_allclose(g[i], slope, rtol=1e-6)
    shared, total = lasso.exact(data, np.array(np.log(0.05)))[1], g.sum()
    np.testing.assert_allclose(shared, total, rtol=1e-10)  # one solution, the same sums


def lines_of(part):
    """Name and numbers of every row in one part of the saved table."""
    text = SAVED.read_text().split(part)[1].split("\n\n")[0]
    return re.findall(r"^    (\S.*?) {2,}(.+)$", text, re.MULTILINE)


@pytest.mark.parametrize("part", [lasso.HEADS["derive"], lasso.HEADS["solve"]])
def test_saved_hypergradients_of_both_agree(part):
    found = [
        (name, float(figures.split()[0]))
        for name, figures in lines_of(part)
        if name.startswith(("gradhpo", "sparho"))
    ]
    assert {name.split(",")[0] for name, _ in found} == {"gradhpo", "sparho"}
    # The default tolerance of sparho's CG is 1e-8; celer's gap ends at a few times 1e-7.
    assert all(error <= 1e-6 for _, error in found)
