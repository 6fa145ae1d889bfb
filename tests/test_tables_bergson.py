"""The table `bergson`: our side of it, its reasons, and what its README says of the saved rows."""

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
    with jax.enable_x64(True):
        problem = attributed.load(tmp_path / "problem.npz", "float64")
        one, many = (attributed.by_jax(problem, optimizer, queries)() for queries in (False, True))
        # Float64: what is left is rounding, which Adam's roots of small numbers enlarge.
        for program in (attributed.replayed, attributed.unrolled):
            found = program(problem, optimizer, False)
            np.testing.assert_allclose(found, one, rtol=1e-6, atol=1e-12)
        of_queries = attributed.replayed(problem, optimizer, True)
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
        assert row["off"]["bergson: MAGIC"] <= 1e-10
        # Ranks of float32 and float64 hypergradients may differ in a few places.
        assert abs(row["score"]["gradhpo"] - row["score"]["bergson: MAGIC"]) < 0.01
        assert row["score"]["bergson: cosine"] < row["score"]["gradhpo"] - 0.1


def test_replay_is_faster_and_takes_less_memory_of_the_process():
    for row in saved("cost"):
        seconds = {name: statistics.median(x) for name, x in row["seconds"].items()}
        assert seconds["bergson: MAGIC"] > seconds["gradhpo: replay"]
        assert row["peak"]["bergson: MAGIC"] > row["peak"]["gradhpo: replay"]
