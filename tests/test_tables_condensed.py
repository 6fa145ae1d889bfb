"""The table of small training sets: its saved rows, and its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tables import condensed
from benchmarks.tables.distilling import first, label_distributions
from benchmarks.tables.small_sets import (
    Network,
    Schedule,
    accuracies,
    by_k_means,
    digits,
    herded,
    keys_of,
    labels_of,
)


ROWS = condensed.ROOT / "benchmarks" / "results" / "condensed.jsonl"


@pytest.fixture(scope="module")
def saved():
    """The saved rows; a missing one would be measured."""
    measured = condensed.measured(condensed.settings_of(condensed.Size()), _missing, ROWS)
    return lambda *of: 100 * np.array(condensed.means(measured, *of))


def _missing(wanted):
    raise AssertionError(f"no saved row of {wanted}")


def test_herding_follows_the_mean_as_its_definition_does():
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    found = herded(x, 6)
    assert len(set(found)) == 6
    for k in range(6):
        far = {
            i: np.linalg.norm(x.mean(0) - np.mean(x[[*found[:k], i]], axis=0))
            for i in range(30)
            if i not in found[:k]
        }
        # float32: two sums of six numbers in another order.
        assert far[found[k]] <= min(far.values()) + 1e-6


@pytest.mark.thorough
def test_one_centre_is_the_mean_of_its_class():
    train = digits(0).train
    x, y = (np.asarray(a) for a in train)
    expected = np.stack([x[y == c].mean(0) for c in range(10)])
    # float32: a mean of a hundred numbers of about 1.
    np.testing.assert_allclose(by_k_means(train, 1, 0), expected, atol=1e-5)


def test_parts_of_the_digits_share_nothing_and_labels_follow_their_images():
    data = digits(3)
    parts = [{x.tobytes() for x in np.asarray(part[0])} for part in data]
    assert [len(part[1]) for part in data] == [1_100, 300, 397]
    assert not parts[0] & parts[2]
    assert not parts[0] & parts[1]
    assert labels_of(2).tolist() == [c for c in range(10) for _ in range(2)]
    soft = label_distributions(first(np.zeros((20, 64), np.float32), soft=True), labels_of(2))
    assert jnp.argmax(soft, axis=1).tolist() == labels_of(2).tolist()


@pytest.mark.thorough
def test_accuracies_are_those_of_gradient_descent_written_out(as_a_user_has_it):
    network, data = Network(8), digits(0)
    x, labels = data.train[0][:20], jax.nn.one_hot(data.train[1][:20], 10, dtype=jnp.float32)
    keys = keys_of(0, 0, 2)
    rate = jnp.float32(0.3)
    found = accuracies(network, keys, x, labels, rate, (data.val, data.test), Schedule(2, 3))
    assert found.shape == (2, 2, 3)
    w = network.start(jax.random.split(keys[1])[0])
    for _ in range(4):
        g = jax.grad(network.loss)(w, x, labels)
        w = jax.tree.map(lambda w, g: w - rate * g, w, g)
    # Two of 300 digits, where the last bits of two logits decide.
    assert abs(found[1, 0, 1] - network.accuracy(w, *data.val)) <= 2 / 300


@pytest.mark.thorough
def test_a_tiny_form_runs_from_end_to_end(tmp_path, monkeypatch, capsys, as_a_user_has_it):
    monkeypatch.setattr(condensed, "QUICK", condensed.Size(1, 5, (1,), ("soft", "DrMAD"), 2))
    monkeypatch.setattr(condensed, "FIGURE", tmp_path / "images.png")
    monkeypatch.setattr(condensed, "NETWORKS", {"same": Network(), "tanh": Network(64, "tanh")})
    monkeypatch.setattr(condensed, "LONG", 20)
    condensed.print_condensed(quick=True, file=tmp_path / "rows.jsonl")
    printed = capsys.readouterr().out
    assert "0 validation losses were not finite" in printed
    assert (tmp_path / "images.png").stat().st_size > 0
    # Two ways to one hypergradient.
    line = next(line for line in printed.splitlines() if 'checkpoints="sqrt"' in line)
    assert float(line.split()[-1]) > 0.999


def test_what_the_readme_says_of_the_saved_rows(saved):
    grid = {each: saved("exact", each, "same") for each in condensed.EACH}
    learned = {each: saved("exact", each) for each in condensed.EACH}
    for each in (1, 2):
        rivals = [saved(kind, each).mean() for kind in condensed.SETS]
        assert grid[each].mean() > max(rivals) + 2
        assert saved("k-means", each).mean() == max(rivals)
        assert np.sum(grid[each] > saved("k-means", each)) == 3 + each  # seed by seed
    # The learned rate is close to the edge of stability.
    assert sum(np.sum(x < 75) for x in learned.values()) == 5
    assert min(x.min() for x in grid.values()) > 89
    assert all(learned[n].mean() < saved("k-means", n).mean() for n in (1, 5, 10))
    assert all(abs(grid[n].mean() - saved("k-means", n).mean()) < 1 for n in (5, 10))
    for where in ("width 256", "tanh"):
        assert saved("exact", 1, where).mean() > saved("k-means", 1, where).mean() + 2
    assert saved("all", 0).mean() > max(x.mean() for x in grid.values())
