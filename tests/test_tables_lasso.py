"""The table `lasso`: its closed form, and what its README says of the saved rows."""

import numpy as np
import pytest

from benchmarks.__main__ import RESULTS
from benchmarks.peers import lasso
from benchmarks.peers.environment import PeerError
from benchmarks.rows import Kept, measured


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


# -- the program ---------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_table_without_sparho_says_why_and_is_shown_again_from_its_rows(
    tmp_path, monkeypatch, capsys
):
    def absent(requirements):
        raise PeerError(f"does not install: {requirements[0]}")

    monkeypatch.setattr("benchmarks.peers.environment.python_of", absent)
    monkeypatch.setattr(lasso, "STEPS", 3)
    few = {what: [row for row in rows if row.how != "Support"] for what, rows in lasso.ROWS.items()}
    monkeypatch.setattr(lasso, "ROWS", few | {"derive": lasso.ROWS["derive"], "solve": []})
    file = tmp_path / "lasso.jsonl"
    lasso.print_lasso(quick=True, file=file)
    printed = capsys.readouterr().out
    assert printed.count("does not install: sparho==0.2.0") == 5
    assert printed.count("gradhpo, ") == 2
    assert "a grid of penalties    0.50323    100" in printed
    assert len(file.read_text().splitlines()) == 3  # the other five are tried again
    monkeypatch.setattr(lasso, "Workers", None)  # none is started
    lasso.print_lasso(quick=True, file=Kept(file))
    kept = capsys.readouterr().out
    assert "UNFINISHED: 3 of 8 rows" in kept
    ours = [line for line in printed.splitlines() if line.startswith(("    gradhpo", "    scikit"))]
    assert len(ours) == 3
    assert all(line in kept for line in ours)


# -- what is saved -------------------------------------------------------------------------------


def _missing(wanted):
    raise AssertionError(f"no saved row of {wanted}")


@pytest.fixture(scope="module")
def rows():
    """Nothing is missing: what is not there would be measured."""
    settings = lasso.settings_of(lasso.tasks(), quick=False)
    return measured(settings, _missing, RESULTS / "lasso.jsonl")


def saved(rows, what, **setting):
    found = [x for x in rows if x["what"] == what and setting.items() <= x.items()]
    assert found
    return found


def ratios(rows, what, **setting):
    return [x["ratio"] for x in saved(rows, what, **setting)]


def test_every_program_has_run(rows):
    assert len(rows) == 54
    assert not [x for x in rows if "failed" in x]


def within(values):
    return [round(min(values), 2), round(max(values), 2)]


def test_hypergradients_agree(rows):
    """With the closed form, as far as each program solves."""
    errors = lambda **setting: [
        x["error"] for what in ("derive", "solve") for x in saved(rows, what, **setting)
    ]
    assert max(errors(how="Support")) <= 2e-13
    assert max(errors(how="GMRES")) <= 6e-12
    assert max(x["error"] for x in saved(rows, "derive", how="closely")) <= 2e-9
    assert max(x["error"] for x in saved(rows, "solve", library="sparho")) <= 2e-9
    assert max(x["error"] for x in saved(rows, "derive", how="default")) <= 2e-8


def test_sparho_takes_less_time_for_a_hypergradient_and_gmres_more(rows):
    assert within(ratios(rows, "derive", library="sparho")) == [0.30, 0.58]
    assert within(ratios(rows, "solve", library="sparho")) == [0.41, 0.79]
    assert within(ratios(rows, "derive", how="GMRES")) == [1.35, 1.72]
    assert within(ratios(rows, "solve", how="GMRES")) == [0.98, 1.16]


def test_searches_take_these_times(rows):
    """On the four problems, in units of gradient descent with `Support`."""
    found = lambda **setting: [round(x, 2) for x in ratios(rows, "search", **setting)]
    hoag, ours = found(how="sklearn"), found(how="Support")
    assert hoag == [0.20, 0.69, 0.95, 0.47]
    assert ours == [1.05, 1.06, 1.08, 0.76]
    assert found(library="sparho", how="descent") == [0.73, 0.83, 1.25, 0.78]
    assert found(how="grid") == [0.42, 0.30]
    tasks = dict.fromkeys(x["task"] for x in rows)
    for task, least in zip(tasks, hoag, strict=True):
        others = [
            x.get("ratio", 1.0)
            for x in saved(rows, "search", task=task)
            if x["how"] not in ("grid", "sklearn")
        ]
        assert round(min(others), 2) > least


def test_searches_reach_these_errors(rows):
    losses = lambda **setting: [x["loss"] for x in saved(rows, "search", **setting)]
    ours, hoag = losses(how="Support"), losses(how="sklearn")
    assert [round(x, 5) for x in (ours[1], hoag[1])] == [0.46940, 0.46820]
    assert [round(x, 3) for x in (ours[3], hoag[3])] == [0.158, 0.173]
    for i in (0, 2):  # one penalty
        assert abs(ours[i] - hoag[i]) <= 2e-5
    assert round(losses(how="celer")[1], 5) == 0.49654
    assert round(ours[2], 5) == 0.49252
    for i, name in enumerate(("diabetes, 1 penalty", "sparse, 1 penalty")):
        assert losses(how="grid")[i] - min(losses(task=name)) <= 2e-4


def test_at_one_rate_both_take_the_same_steps(rows):
    found = saved(rows, "search", library="sparho", how="descent")
    assert len(found) == 4
    assert max(x["off"] for x in found) <= 1e-9
    assert {x["steps"] for x in found} == {50}
