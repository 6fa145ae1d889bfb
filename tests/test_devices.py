"""Four devices: values, placement, and what is compiled."""

import json
import os
from pathlib import Path

import pytest
from helpers import quick
from on_devices import OPTIMIZERS
from processes import python


FOUR = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
FEW = ["greedy", "bisected", "forward mode"]


PROGRAM = str(Path(__file__).with_name("on_devices.py"))


def on_four_devices(*arguments):
    told = python(PROGRAM, *arguments, compiled=FOUR).stdout
    return json.loads(told.split("RESULT")[1])


# lineax takes systems of explicitly sharded arrays apart without their shardings.
WITHOUT_EXPLICIT = {"implicit"}
CASES = quick(
    [
        (axes, spread, few)
        for axes in ("Auto", "Explicit")
        for spread in ("data", "state")
        for few in (True, False)
    ],
    keep=[("Auto", "state", True), ("Explicit", "state", True)],
)


@pytest.mark.parametrize(("axes", "spread", "few"), CASES)
def test_where_the_arrays_are_the_state_stays(axes, spread, few):
    """As on one device; and nothing moves, nor is compiled again, in the second step."""
    names = [name for name in OPTIMIZERS if (name in FEW) == few]
    if axes == "Explicit":
        names = [name for name in names if name not in WITHOUT_EXPLICIT]
    for name, found in on_four_devices(axes, spread, *names).items():
        assert found["error"] < 1e-12, name
        assert found["compiled"][1] == 0, name
        assert not found["moved"], name
        assert not found["hypergradient moved"], name
        assert not found["alone"], name
