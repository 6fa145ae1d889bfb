"""Eight members on four devices: values, placement, and communication between devices."""

import json
import os
from pathlib import Path

import pytest
from helpers import quick
from processes import python


PROGRAM = str(Path(__file__).with_name("population_on_devices.py"))
FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"


def on_devices(*arguments):
    return json.loads(python(PROGRAM, *arguments, compiled=FLAGS).stdout.split("RESULT")[1])


@pytest.mark.parametrize("axes", quick(["Auto", "Explicit"], keep=[]))
def test_members_are_those_of_one_device(axes):
    for name, found in on_devices("values", axes).items():
        assert found["error"] < 1e-12, name  # rounding: of the sums of a teacher
        assert found["of run"] < 1e-12, name
        assert found["best"] < 1e-12, name
        assert found["compiled"][1] == 0, name
        assert not found["moved"], name
        assert (found["parents"] != list(range(8))) == (name != "alone")


@pytest.mark.thorough
def test_only_exploits_and_teachers_exchange_anything():
    """A quarter of the work and the memory; without exploiting, a step sends nothing."""
    costs = on_devices("costs")
    for name, found in costs.items():
        assert found["flops"] < 0.26, name
        for memory in ("arguments", "temporary", "results"):
            assert found[memory] < 0.26, (name, memory)
    assert costs["alone"]["collectives"] == []
    # Everything that exploiting adds is in its branch; a teacher's gradient is outside it.
    assert costs["random"]["outside of branches"] == 0
    assert costs["learned"]["outside of branches"] == 2
