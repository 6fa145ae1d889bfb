"""Four devices: values, placement, what is compiled, and how the work is divided."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import quick
from on_devices import OPTIMIZERS
from processes import python


PROGRAM = str(Path(__file__).with_name("on_devices.py"))
FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count="
FEW = ["greedy", "forward mode", "implicit"]


def on_devices(*arguments, count=4):
    told = python(PROGRAM, *map(str, arguments), compiled=f"{FLAGS}{count}").stdout
    return json.loads(told.split("RESULT")[1])


CASES = quick(
    [
        (axes, spread, few)
        for axes in ("Auto", "Explicit")
        for spread in ("data", "state")
        for few in (True, False)
    ],
    keep=[("Explicit", "state", True)],
)


@pytest.mark.parametrize(("axes", "spread", "few"), CASES)
def test_where_the_arrays_are_the_state_stays(axes, spread, few):
    """As on one device; and nothing moves, nor is compiled again, in the second step."""
    names = [name for name in OPTIMIZERS if (name in FEW) == few]
    for name, found in on_devices("steps", axes, spread, *names).items():
        assert found["error"] < 1e-12, name
        assert found["compiled"][1] == 0, name
        assert not found["moved"], name
        assert not found["hypergradient moved"], name
        assert not found["alone"], name


@pytest.mark.thorough
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
@pytest.mark.parametrize("spread", ["data", "state"])
@pytest.mark.parametrize("name", ["greedy", "HyperDistill"])
def test_runs_with_batches_that_are_spread(axes, spread, name):
    for case, found in on_devices("runs", axes, spread, name).items():
        assert found["error"] < 1e-12, case
        assert not found["moved"], case


def test_a_quarter_of_the_work_for_each_of_four_devices():
    for case, share in on_devices("flops", "greedy").items():
        assert share < 0.3, case


def test_a_run_goes_on_with_fewer_devices(tmp_path):
    expected = on_devices("resumed", 1, 12, tmp_path / "one", count=1)["hyperparams"]
    on_devices("resumed", 4, 6, tmp_path / "four")
    found = on_devices("resumed", 2, 12, tmp_path / "four", count=2)
    np.testing.assert_allclose(found["hyperparams"], expected, rtol=1e-12)
    assert not found["moved"]


@pytest.mark.thorough
def test_examples_that_the_devices_cannot_share_are_refused():
    said = on_devices("uneven")
    assert set(said) == {"arrays", "iterator", "fixed"}
    assert all("data_sharding cannot spread" in text for text in said.values())
    assert all("choose a batch size that" in text for text in said.values())
