"""The table of schedules: its parts, and its page's claims about the saved rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.__main__ import RESULTS
from benchmarks.intervals import half_interval, with_interval
from benchmarks.tables import schedule_search as search, schedule_training as training, schedules


@pytest.mark.thorough
def test_the_inner_optimizer_is_that_of_the_paper():
    """v = momentum v + (g + decay w), w = w - rate v, each with separate windows."""
    random = np.random.default_rng(0)
    steps = 7
    schedule = {
        "rate": np.array([0.1, 0.2, 0.3]),
        "momentum": np.array([0.9, 0.5]),
        "decay": np.array([0.01]),
    }
    gradients = 4 * random.normal(size=(steps, 3))
    assert np.any(np.abs(gradients) > training.LARGEST_ENTRY)
    w, v = np.ones(3), np.zeros(3)
    ours = jnp.ones(3)
    optimizer = training.scheduled({k: jnp.asarray(x) for k, x in schedule.items()}, steps)
    state, update = optimizer.init(ours), jax.jit(optimizer.update)
    for i, gradient in enumerate(gradients):
        # As in get_hypers of the authors' program.
        rate, momentum, decay = (x[int(len(x) * i / steps)] for x in schedule.values())
        v = momentum * v + np.clip(gradient, -3, 3) + decay * w
        w = w - rate * v
        updates, state = update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        given = {k: x[i] for k, x in training.of_steps(schedule, steps).items()}
        np.testing.assert_allclose([*given.values()], [rate, momentum, decay], rtol=1e-6)  # float32
    np.testing.assert_allclose(ours, w, rtol=1e-12)  # float64, in the same order


def test_cosine_ends_at_zero_and_stairs_have_its_mean():
    smooth = search.cosine(0.3, 0.9, 1e-4, 100)
    assert smooth["rate"][0] == 0.3
    assert smooth["rate"][50] == pytest.approx(0.15)
    assert 0 < smooth["rate"][-1] < 1e-3 * smooth["rate"][0]
    stairs = search.in_windows(smooth, 5)
    assert len(stairs["rate"]) == 5
    assert np.mean(stairs["rate"]) == pytest.approx(np.mean(smooth["rate"]))
    assert stairs["momentum"] == [0.9]


def test_random_schedules_lie_in_the_range_of_the_grid():
    drawn = search.at_random(20, (5, 3, 1), seed=1)
    assert [len(drawn[0][name]) for name in training.NAMES] == [5, 3, 1]
    for name, axis in zip(training.NAMES, zip(*search.GRID, strict=True), strict=True):
        values = np.concatenate([x[name] for x in drawn])
        smallest = min(x for x in axis if x > 0 or name == "momentum")
        assert smallest <= values.min() < values.max() <= max(axis)
    again = search.at_random(20, (5, 3, 1), seed=2)
    assert np.all(again[0]["rate"] != drawn[0]["rate"])


def test_regret_is_over_the_best_constant_of_the_same_seed():
    rows = {
        "ours": [{"val_losses": [3.0, 1.5, 2.0]}, {"val_losses": [4.0, 5.0, 0.5]}],
        "constant": [{"val_losses": [2.0, 1.0]}, {"val_losses": [1.0, 3.0]}],
    }
    np.testing.assert_equal(schedules.regrets(rows, "ours"), [[2, 0.5, 0.5], [3, 3, -0.5]])


@pytest.mark.thorough
def test_a_tiny_table_runs_from_end_to_end(monkeypatch, capsys, tmp_path, as_a_user_has_it):
    tiny = search.Size(seeds=2, steps=20, outer_steps=2, random=4)
    monkeypatch.setattr(schedules, "QUICK", tiny)
    file = tmp_path / "rows.jsonl"
    schedules.print_schedules(quick=True, file=file)
    printed = capsys.readouterr().out
    assert "forward mode 5/5/5" in printed
    assert "the rows took" in printed
    rows = search.rows_of(tiny, file)  # all are known
    for row in rows[search.OURS]:
        # Rates of 0 do not train; the first sign shows that training helps.
        assert not any(row["schedules"][0]["rate"])
        assert min(row["schedules"][1]["rate"]) == pytest.approx(0.1)
        # The same training with and without derivatives, in float32.
        np.testing.assert_allclose(row["along"], row["val_losses"][:-1], rtol=1e-4)
        assert row["val_losses"][1] < row["val_losses"][0]


def test_the_saved_table_says_what_its_page_says(monkeypatch):
    monkeypatch.setattr(search, "measure", None)  # nothing is missing
    size = search.WHOLE
    rows = search.rows_of(size, RESULTS / "schedules.jsonl")
    page = (RESULTS.parent / "tables" / "README.md").read_text()
    lines = {line.name: line for line in schedules.lines_of(rows, size)}
    found = {name: schedules.chosen(rows, line)[0] for name, line in lines.items()}
    ours, constant = found[search.OURS], found["constant, grid of 100"]
    better = {
        "cosine, grid of 100 of its own": "0.0094 ± 0.0146",
        "the same in five stairs": "0.0150 ± 0.0173",
        "random, 100 schedules": "0.0083 ± 0.0139",
    }
    for name, said in better.items():
        assert np.mean(found[name]) < np.mean(ours)
        assert with_interval((ours - found[name]).tolist(), 4) == said
        assert said in page
    # Methods that it beats by more than the interval.
    worse = {"constant, grid of 100": "0.0191 ± 0.0116", "random, 11 schedules": "0.0148 ± 0.0091"}
    for name, said in worse.items():
        assert with_interval((found[name] - ours).tolist(), 4) == said
        assert said in page
    for name, line in lines.items():
        if "last" not in name:
            losses, accuracies = schedules.chosen(rows, line)
            shown = [
                with_interval(losses.tolist(), 4),
                with_interval(accuracies.tolist(), 2, 100.0),
            ]
            row = next(row for row in page.splitlines() if f"| {shown[0]} |" in row)
            assert f"| {shown[1]} |" in row
            assert f"| {line.runs * size.steps:,} |" in row
    over = schedules.regrets(rows, search.OURS)
    np.testing.assert_allclose(over[:, -1], ours - constant)
    assert np.all(np.mean(over, axis=0)[:4] > 0)
    assert np.all(np.mean(over, axis=0)[4:] < 0)
    assert np.all(np.mean(over, axis=0)[5:] + half_interval(over)[5:] < 0)
    gained = np.mean(over, axis=0)[7] - np.mean(over, axis=0)[10]
    assert f"{gained:.4f}" == "0.0025"
    largest = {
        method: [
            schedules.largest_effective(x) for x in schedules.best_schedules(rows, method, size)
        ]
        for method in rows
    }
    spans = {search.OURS: (0.6, 2.7), "cosine": (6.0, 10.0)}
    spans["wide"] = (1.9, 5.8)
    largest["wide"] = largest["stairs"] + largest["random"]
    for method, span in spans.items():
        assert (min(largest[method]), max(largest[method])) == pytest.approx(span, abs=0.05)
    for row in rows[search.OURS]:
        np.testing.assert_allclose(row["along"], row["val_losses"][:-1], atol=2e-6)
