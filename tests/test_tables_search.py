"""The table of architecture searches: its operations, its stopping rule, its saved rows."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import RESULTS
from benchmarks.tables import search
from benchmarks.tables.search_network import (
    EDGES,
    OPERATIONS,
    SIDE,
    convolution_matrices,
    free_matrices,
)
from benchmarks.tables.search_runs import ALONG, FIRST, letters, num_free, stopped


@pytest.mark.usefixtures("as_a_user_has_it")
def test_the_matrices_of_an_edge_are_its_operations():
    random = np.random.default_rng(0)
    c = 2
    shares = random.uniform(size=(1, len(OPERATIONS)))
    three, one = random.normal(size=(1, 9, c, c)), random.normal(size=(1, c, c))
    image = random.normal(size=(SIDE, SIDE, c))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    kernel = three[0].reshape(3, 3, c, c)
    binomial = np.outer([1, 2, 1], [1, 2, 1]) / 16
    convolved, free = np.zeros((2, SIDE, SIDE, c))
    for i, j in np.ndindex(SIDE, SIDE):
        near = padded[i : i + 3, j : j + 3]
        convolved[i, j] = shares[0, 0] * np.einsum("abc,abcd->d", near, kernel)
        convolved[i, j] += shares[0, 1] * image[i, j] @ one[0]
        free[i, j] = shares[0, 2] * near.mean((0, 1))
        free[i, j] += shares[0, 3] * np.tensordot(binomial, near, 2)
        free[i, j] += (shares[0, 4] + 0.7) * image[i, j]
    flat = image.reshape(SIDE**2, c)
    matrices = convolution_matrices(*(jnp.float32(x) for x in (shares, three, one)))
    found = np.tensordot(flat, matrices[0], 2)
    np.testing.assert_allclose(found, convolved.reshape(-1, c), rtol=1e-5, atol=1e-6)  # float32
    found = np.asarray(free_matrices(jnp.float32(shares), jnp.float32(0.7))[0]) @ flat
    np.testing.assert_allclose(found, free.reshape(-1, c), rtol=1e-5, atol=1e-6)


def test_a_search_stops_before_its_curvature_grows():
    assert stopped(np.ones(9)) == 8
    # The first mean of three that includes a 10 is 4, more than 1 / .75 times the mean three points
    # earlier, and ends at point 6.
    assert stopped(np.array([1.0] * 6 + [10.0] * 3)) == 3
    assert stopped(np.array([1.0] * 6 + [1.2] * 3)) == 8


def test_an_architecture_has_no_zero_and_counts_its_free_edges():
    alpha = np.zeros((EDGES, len(OPERATIONS)))
    alpha[:, OPERATIONS.index("0")] = 9
    alpha[np.arange(EDGES), [0, 1, 2, 3, 4, 0]] = 1
    assert letters(alpha) == "31asi3"
    assert num_free("31asi3") == 3


@pytest.fixture(scope="module")
def saved():
    rows = [json.loads(line) for line in (RESULTS / "search.jsonl").read_text().splitlines()]
    return [row for row in rows if "search" in row], [row for row in rows if "architecture" in row]


def test_the_saved_first_order_searches_collapse(saved):
    searches, trainings = saved
    accuracy = {(row["architecture"], row["seed"]): row["test"] for row in trainings}
    found = {(row["search"], row["seed"]): row["architectures"] for row in searches}
    last = str(ALONG[-1])

    def of(name, step, seeds=search.SEEDS):
        chosen = [(found[name, seed][step], seed) for seed in seeds]
        return np.mean([num_free(x) for x, _ in chosen]), np.mean([accuracy[x] for x in chosen])

    (free, high), (more, low) = of(FIRST, "100"), of(FIRST, last)
    assert more > free + 1
    assert low < high - 0.05
    few = search.SEEDS_OF["first order, penalty"]
    assert of(f"first order, {search.DECAYED}", last)[1] > low + 0.1
    free, high = of("first order, penalty", last, few)
    more, low = of(FIRST, last, few)
    assert free < more - 2
    assert high > low
    # No search result is as good as the best operation everywhere.
    best = np.mean([accuracy["3" * EDGES, seed] for seed in search.SEEDS])
    for name, seeds in search.SEEDS_OF.items():
        assert of(name, last, seeds)[1] < best, name


@pytest.mark.thorough
def test_a_short_table_runs_from_end_to_end(capsys, as_a_user_has_it):
    search.print_search(quick=True)
    printed = capsys.readouterr().out
    assert re.search(r"first order, 10 +\d\.\d", printed)
    assert "best of 4 random" in printed
