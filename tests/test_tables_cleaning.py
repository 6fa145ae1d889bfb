"""The tables of data cleaning: their network, and their README's claims about saved rows."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import RESULTS
from benchmarks.intervals import half_interval
from benchmarks.tables import cleaning, cleaning_runs, cleaning_why
from benchmarks.tables.cleaning_data import Network, load_data, windows


def convolved(x, kernel, bias, size, stride):
    """`lax` on images `[n, h, w, channels]`; rows of a kernel are pixels, channels."""
    weights = kernel.reshape(len(kernel), size, size, -1).transpose(1, 2, 3, 0)
    order = "NHWC", "HWIO", "NHWC"
    strides = (stride, stride)
    found = jax.lax.conv_general_dilated(x, weights, strides, "VALID", dimension_numbers=order)
    return jax.nn.relu(found + bias[None, None, None])


@pytest.mark.thorough
def test_the_network_is_three_convolutions_and_a_linear_layer():
    images = jax.random.normal(jax.random.key(0), (2, 28, 28, 1), jnp.float32)
    net = Network(jax.random.key(1))
    found = net(windows(images.transpose(3, 1, 2, 0), 4, 4))
    x = images
    sizes = (4, 4), (3, 2), (2, 1)
    for kernel, bias, size in zip(net.kernels[:3], net.biases[:3], sizes, strict=True):
        x = convolved(x, kernel, bias, *size)
    assert x.shape == (2, 2, 2, 8)
    flat = x.transpose(0, 3, 1, 2).reshape(2, -1)
    expected = flat @ net.kernels[3].T + net.biases[3][None]
    # Sums of a few hundred float32 products in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough  # reads 5,000 images from text
def test_that_share_of_the_labels_is_wrong():
    clean, noisy = load_data(0.0, 3), load_data(0.3, 3)
    assert not clean.wrong.any()
    assert noisy.wrong.sum() == 300
    np.testing.assert_array_equal(clean.train[1] != noisy.train[1], noisy.wrong)
    np.testing.assert_array_equal(clean.train[0], noisy.train[0])
    assert [len(part[1]) for part in noisy[:3]] == [1_000, 1_000, 3_000]
    # The patches of the first layer are the pixels of each image, each once.
    x, _ = noisy.test
    assert x.shape == (16, 7, 7, 3_000)
    assert 0 <= x.min() < x.max() == 1


@pytest.mark.thorough
def test_normalised_weights_do_not_change_with_a_common_factor():
    images = jax.random.normal(jax.random.key(1), (16, 7, 7, 20), jnp.float32)
    labels = jnp.arange(20, dtype=jnp.int32) % 10
    net, batch = Network(jax.random.key(0)), ((images, labels), jnp.float32(1))
    equal = jnp.full(20, -3.0, jnp.float32)
    plain = cleaning_runs.weighted_loss(net, 0 * equal, batch)
    # Rounding of 20 terms in float32.
    np.testing.assert_allclose(cleaning_runs.normalised_loss(net, equal, batch), plain, rtol=1e-5)
    slope = jax.grad(cleaning_runs.normalised_loss, argnums=1)(net, equal, batch)
    assert abs(jnp.sum(slope)) < 1e-5 * jnp.sum(jnp.abs(slope))


@pytest.mark.thorough
def test_quick_tables_run_from_end_to_end(monkeypatch, capsys, as_a_user_has_it):
    """Two rows: compiled without optimisation, as in all tests, steps take far longer."""
    short = lambda row: cleaning_runs.row_of(row, steps=20)
    monkeypatch.setattr(cleaning, "row_of", short)
    monkeypatch.setattr(cleaning_why, "row_of", short)
    monkeypatch.setattr(cleaning, "QUICK", ("T1-T2",))
    monkeypatch.setattr(cleaning_why, "QUICK", [(cleaning_why.AS_IT_IS, "no tuning")])
    cleaning.print_cleaning(quick=True)
    cleaning_why.print_cleaning_why(quick=True)
    printed = capsys.readouterr().out
    assert re.search(r"0\.5 +T1-T2 ", printed)
    assert re.search(r"as in cleaning +no tuning ", printed)
    assert "nan" not in printed


def saved(name):
    lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def accuracies(noise, method, name="val"):
    return cleaning.of_seeds(saved("cleaning"), noise, method, name)


@pytest.mark.parametrize("noise", cleaning.NOISES)
def test_saved_rows_of_cleaning_say_what_the_readme_says(noise):
    means = {x: np.mean(list(accuracies(noise, x).values())) for x in cleaning.METHODS}
    assert all(len(accuracies(noise, x)) == 5 for x in cleaning.METHODS)
    assert min(means, key=means.get) == "no tuning"
    for better, worse in (("greedy", "no tuning"), ("exact", "greedy"), ("DrMAD", "greedy")):
        pairs = accuracies(noise, better), accuracies(noise, worse)
        assert all(pairs[0][seed] > pairs[1][seed] for seed in pairs[0]), (better, worse)
        gain = [pairs[0][seed] - pairs[1][seed] for seed in pairs[0]]
        assert np.mean(gain) > half_interval(np.array(gain))
    for level in (("greedy", "T1-T2"), ("exact", "DrMAD")):
        one, other = (accuracies(noise, x) for x in level)
        gain = [one[seed] - other[seed] for seed in one]
        assert abs(np.mean(gain)) < half_interval(np.array(gain)), level
    # Their peaks are closer together than their ends.
    peaks = [np.mean(list(accuracies(noise, x, "best_val").values())) for x in cleaning.METHODS]
    assert np.ptp(peaks) < 0.4 * np.ptp(list(means.values()))
    assert np.mean(list(accuracies(noise, "no tuning", "fitted_wrong").values())) > 93


def of_why(method, **changes):
    """Rows of all seeds, in the order of seeds, that differ from `cleaning` by `changes` alone."""
    wanted = cleaning_why.AS_IT_IS._replace(**changes)._asdict() | {"method": method}
    del wanted["label"]
    rows = [row for row in saved("cleaning_why") if wanted.items() <= row.items()]
    assert [row["seed"] for row in rows] == sorted(cleaning_why.SEEDS)
    return rows


def values(rows, name):
    return np.array([row[name] for row in rows])


def test_saved_rows_of_why_say_what_the_readme_says():
    slower = {"scale": 0.25}, {"scale": 2.0, "momentum": 0.0}
    for changes in slower:
        exact, greedy = (values(of_why(x, **changes), "val") for x in ("exact", "greedy"))
        assert (exact > greedy).all()
        assert exact.mean() > 0.81
        assert greedy.mean() > 0.77
    for method in ("exact", "greedy"):
        rows, plain = of_why(method), values(of_why(method), "val")
        assert values(of_why(method, scale=4.0), "val").mean() < 0.41 < plain.mean()
        assert values(of_why(method, horizon=100), "val").mean() < plain.mean()
        assert abs(values(of_why(method, normalised=True), "val").mean() - plain.mean()) < 0.011
        weights = np.mean(values(rows, "mean_weights"), axis=0)
        assert 0.43 < weights.min() < weights.max() < 0.535
    auroc = [values(of_why(x), "auroc").mean() for x in ("exact", "greedy")]
    assert auroc[0] > auroc[1]
    again = [values(of_why(x), "again_test").mean() for x in ("exact", "greedy")]
    assert again[0] > again[1] + 0.05


def test_saved_cosines_say_what_the_readme_says():
    rows = [row for row in saved("cleaning_why") if row.get("cosines")]
    assert len(rows) == 3
    along = lambda pair: np.mean([row[pair] for row in rows], axis=0)[1:]
    assert 0.89 <= along("T1-T2, greedy").min() < along("T1-T2, greedy").max() < 0.995
    for method in ("T1-T2", "greedy"):
        assert 0.51 <= along(f"{method}, exact").min() < along(f"{method}, exact").max() < 0.805
    assert along("DrMAD, exact").min() > 0.985
