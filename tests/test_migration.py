"""docs/how_to/from_*.md: programs of other libraries, and ours, with the same hypergradients."""

import json

import pytest
from helpers import quick

from benchmarks.__main__ import RESULTS
from benchmarks.peers.migration import PAGES, by_gradhpo, off, pairs_of


pytestmark = pytest.mark.usefixtures("as_a_user_has_it")
PAIRS = {page: list(pairs_of(page)) for page in PAGES}
SAVED = [json.loads(line) for line in (RESULTS / "migration.jsonl").read_text().splitlines()]


def saved(pair):
    """The hypergradient by the program that the page shows for the other library."""
    [row] = [row for row in SAVED if pair.settings.items() <= row.items()]
    return row["gradient"]


def test_pages_have_the_programs_that_they_promise():
    assert [pair.title for pair in PAIRS["from_jaxopt"]] == [
        "custom_root", "custom_fixed_point", "GradientDescent", "ProximalGradient",
        "ProjectedGradient", "LBFGS",
    ]  # fmt: skip
    assert [pair.library for pair in PAIRS["from_maml"]] == ["TorchOpt", "higher"]


@pytest.mark.parametrize("pair", PAIRS["from_jaxopt"], ids=lambda pair: pair.title)
def test_five_lines_change_at_most(pair):
    """As the page says; a program that is none of theirs would change in more."""
    assert 0 < pair.changed <= 5


@pytest.mark.parametrize("page", quick(PAGES, keep=[]))
def test_hypergradients_are_those_of_the_other_libraries(page):
    """Theirs are saved by `python -m benchmarks migration --save`, where they are installed."""
    ours = by_gradhpo(page)
    # As the pages say: jaxopt's solvers and its linear solve end at tolerances.
    tolerance = 1e-8 if page == "from_jaxopt" else 1e-12
    for pair in PAIRS[page]:
        assert off(ours[pair.title], saved(pair)) < tolerance, pair.title


def test_saved_results_are_of_the_programs_on_the_pages():
    """After a change of one: delete its line in migration.jsonl, and measure it again."""
    for pairs in PAIRS.values():
        assert all(saved(pair) for pair in pairs)
