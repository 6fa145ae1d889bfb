"""The table `bergson`: our side, its error messages, and its README's claims on saved rows."""

import json
import statistics

import jax
import numpy as np
import pytest

from benchmarks.__main__ import RESULTS
from benchmarks.peers import attributed, bergson
from benchmarks.peers.attributed import Size


ROWS = [json.loads(line) for line in (RESULTS / "bergson.jsonl").read_text().splitlines()]


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", list(attributed.OPTIMIZERS))
def test_three_programs_of_ours_compute_the_same(tmp_path, optimizer):
    attributed.write_problem(tmp_path / "problem.npz", Size(width=4, steps=6, batch_size=7))
    # optax raises a float to an integer power.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        problem = attributed.load(tmp_path / "problem.npz", "float64")
        one, many = (attributed.by_jax(problem, optimizer, queries)() for queries in (False, True))
        # Float64: only rounding remains, amplified by Adam's roots of small numbers.
        for program in (attributed.replayed, attributed.unrolled):
            found = program(problem, optimizer, False)()
            np.testing.assert_allclose(found, one, rtol=1e-6, atol=1e-12)
        of_queries = attributed.replayed(problem, optimizer, True)()
        np.testing.assert_allclose(of_queries, many, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(many.mean(axis=0), one, rtol=1e-6, atol=1e-12)


@pytest.mark.thorough
def test_a_table_without_bergson_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.peers.environment.CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    bergson.print_bergson(quick=True)
    printed = capsys.readouterr().out
    assert printed.count("bergson: does not install: ") == 2
    assert "the rows took" in printed


def saved(what, **setting):
    found = [x for x in ROWS if x["what"] == what and setting.items() <= x.items()]
    assert found
    return found


def test_bergson_computes_the_same_number_and_has_the_same_score():
    for row in saved("numbers"):
        # Adam's roots of small numbers amplify rounding.
        most = {"SGD": 1e-13, "AdamW": 1e-9}[row["optimizer"]]
        assert max(row["off"].values()) <= most
        # Ranks of float32 and float64 hypergradients may differ in a few places.
        assert abs(row["score"]["gradhpo"] - row["score"]["bergson: MAGIC"]) < 0.01


@pytest.mark.parametrize(
    ("optimizer", "scores"), [("SGD", [0.82, 0.82, 0.32]), ("AdamW", [0.29, 0.28, 0.46])]
)
def test_scores_against_retraining(optimizer, scores):
    """Of our exact number, of bergson's, and of cosines."""
    (row,) = saved("numbers", optimizer=optimizer)
    assert [round(x, 2) for x in row["score"].values()] == scores


def test_one_query_takes_replay_ten_times_as_long_as_the_scan_by_hand():
    (row,) = saved("cost", size="small", queries=1)
    seconds = [round(statistics.median(x), 3) for x in row["seconds"].values()]
    assert seconds == [0.211, 0.02, 0.019, 1.183]  # replay, unrolled, by hand, MAGIC
    (row,) = saved("cost", size="large")
    assert [round(statistics.median(x), 1) for x in row["seconds"].values()] == [1.8, 1.7, 1.7, 2.8]


def test_the_scan_by_hand_is_fastest_and_bergson_slowest_and_largest():
    (row,) = saved("cost", size="small", queries=5)
    seconds = {name: statistics.median(x) for name, x in row["seconds"].items()}
    by_hand, ours, theirs = (
        seconds[name]
        for name in ("jax.vjp, checkpointed scan", "gradhpo: replay", "bergson: MAGIC")
    )
    assert 5 <= ours / by_hand <= 6
    assert 15 <= theirs / ours <= 20
    grown = {name: row["peak"][name] - row["before"][name] for name in seconds}
    assert grown["gradhpo: replay"] > 10 * grown["bergson: MAGIC"]
    assert row["peak"]["bergson: MAGIC"] > 1.5 * row["peak"]["gradhpo: replay"]
