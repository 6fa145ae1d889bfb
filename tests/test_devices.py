"""Four devices: values, placement, compilation, and the division of work."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import quick
from on_devices import OPTIMIZERS, SINGLE_LOOPS
from processes import interpreter, python
from solvers_on_devices import SOLVERS, STACKED
from sums_on_devices import SUMS

from benchmarks.costs import devices


PROGRAM, OF_SUMS, OF_SOLVERS = (
    str(Path(__file__).with_name(name))
    for name in ("on_devices.py", "sums_on_devices.py", "solvers_on_devices.py")
)
FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count="
FEW = ["greedy"]  # in the quick suite
TWICE = ["GMRES", "LU", "BiCGStab", "Nystrom"]
FEW_SUMS = ["curvature, update_fn", "words", "smoothed"]


def on_devices(*arguments, count=4, program=PROGRAM):
    told = python(program, *map(str, arguments), compiled=f"{FLAGS}{count}").stdout
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
    """As on one device; in the second step nothing moves or is compiled again."""
    names = [name for name in OPTIMIZERS if (name in FEW) == few]
    check(on_devices("steps", axes, spread, *names))


@pytest.mark.thorough
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_the_state_of_single_loops_stays_too(axes):
    check(on_devices("steps", axes, "state", *SINGLE_LOOPS))


def check(cases):
    for name, found in cases.items():
        assert found["error"] < 1e-12, name  # rounding: sums are taken in another order
        assert found["compiled"][1] == 0, name
        assert not found["moved"], name
        assert not found["hypergradient moved"], name
        assert not found["alone"], name


@pytest.mark.thorough
@pytest.mark.parametrize(("axes", "spread", "few"), CASES)
def test_sums_begin_where_their_terms_are(axes, spread, few):
    names = [name for name in SUMS if (name in FEW_SUMS) == few]
    check(on_devices("sums", axes, spread, *names, program=OF_SUMS))


HALF = len(SOLVERS) // 2


@pytest.mark.parametrize(
    ("axes", "spread", "chosen"),
    quick(
        [
            (axes, spread, chosen)
            for axes in ("Auto", "Explicit")
            for spread in ("data", "state")
            for chosen in (slice(1), slice(1, HALF), slice(HALF, None))
        ],
        keep=[],
    ),
)
def test_every_linear_solver_works_where_the_arrays_are(axes, spread, chosen):
    check(on_devices("steps", axes, spread, *list(SOLVERS)[chosen], program=OF_SOLVERS))


@pytest.mark.thorough
def test_stacks_are_factorised_with_more_threads_than_devices(monkeypatch):
    """The two settings of docs/how_to/scaling.md. Without them the program may wait for ever."""
    monkeypatch.setenv("NPROC", "16")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    arguments = ["steps", "Auto", "data", *STACKED]
    program = f"""
import os, runpy, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
sys.argv = {[OF_SOLVERS, *arguments]}
sys.path.insert(0, {str(Path(OF_SOLVERS).parent)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    check(json.loads(interpreter("-c", program).stdout.split("RESULT")[1]))


@pytest.mark.thorough
@pytest.mark.parametrize("spread", ["data", "state"])
def test_solutions_are_differentiated_under_explicit_axes(spread):
    found = on_devices("twice", "Explicit", spread, *TWICE, program=OF_SOLVERS)
    for name in TWICE:
        assert found[name]["error"] < 1e-11, name  # rounding, in differentiated iterations
        assert not found[name]["moved"], name


@pytest.mark.thorough
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_a_running_state_settles_where_it_is(axes):
    found = on_devices("running", axes, program=OF_SOLVERS)
    assert found["error"] < 1e-12  # rounding
    assert not found["moved"]


@pytest.mark.thorough
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_the_vectors_of_a_solver_are_spread(axes):
    """A quarter; GMRES holds 21 vectors in its cycles, so unsharded parameters would show."""
    for name, share in on_devices("shares", axes, program=OF_SOLVERS).items():
        most = 0.3 if name == "GMRES" else 0.5  # BiCGStab has few vectors besides whole parameters
        assert share["temporaries"] < most, name
        assert max(share["arguments"], share["flops"]) < 0.3, name


@pytest.mark.thorough
def test_every_piece_of_a_batch_is_spread_over_the_devices():
    for case, share in on_devices("shares", program=OF_SUMS).items():
        assert share < 0.3, case


@pytest.mark.thorough
def test_what_explicit_axes_exclude_is_refused():
    said = on_devices("refused", program=OF_SUMS)
    assert set(said) == {"pieces", "words"}
    assert all("the 2 examples of a piece" in text for text in said.values())
    assert all("choose a num whose pieces" in text for text in said.values())


@pytest.mark.thorough
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
@pytest.mark.parametrize("spread", ["data", "state"])
@pytest.mark.parametrize("name", ["greedy", "HyperDistill"])
def test_runs_with_batches_that_are_spread(axes, spread, name):
    for case, found in on_devices("runs", axes, spread, name).items():
        assert found["error"] < 1e-12, case
        assert not found["moved"], case


@pytest.mark.thorough
def test_a_quarter_of_the_work_for_each_of_four_devices():
    for case, share in on_devices("flops", "greedy").items():
        assert share < 0.3, case


# How often XLA all-reduces a derivative with respect to the hyperparameters: wherever it is
# computed, not once at the end of a loop that sums such derivatives.
REDUCTIONS = {
    "first order": 0,  # the validation loss has them only in a penalty
    "one step": 1,
    "T1-T2": 2,  # two gradients, and their difference
    "HyperDistill": 1,
    "implicit": 1,  # none in the products of the linear solver
    **dict.fromkeys(["greedy", "tasks", "DrMAD", "unrolled", "checkpointed"], devices.STEPS),
    "bisected": devices.STEPS + 1,  # also counted where the pass only takes a step
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    quick(
        list(itertools.product(devices.OPTIMIZERS, devices.KINDS)),
        keep=[("one step", "network, data")],
    ),
)
def test_four_devices_divide_the_costs_of_a_step(name, kind):
    """A quarter, plus 0.05 for scalars, masks and operations that a single device would fuse.

    Plus 0.1 where XLA gathers parameters before every use: it then computes some matrix products
    twice (52 instead of 43 with checkpoints), and keeps arrays that a single device would not.
    """
    found = on_devices("step_costs", name, kind)
    most = 0.35 if kind == "network, state" else 0.3
    assert max(found[part] for part in ("arguments", "made", "flops")) < most
    copies = devices.FEW if name == "forward mode" else devices.TASKS if name == "tasks" else 1
    if kind == "entries, state":
        # Sums over the parameters, and the unit vectors of forward mode.
        assert found["largest_exchanged"] <= (devices.FEW**2 if name == "forward mode" else 8)
        return
    # In "entries" temporaries are a few arrays: the compiler decides how many of them share memory
    # with results.
    assert found["temporaries"] < most
    assert found["largest_exchanged"] <= copies * found["largest"]  # gradients, and no trajectory
    if name != "forward mode":  # whose few hyperparameters do not differ from scalars
        assert found["reductions"] <= REDUCTIONS[name]


@pytest.mark.thorough
def test_a_run_goes_on_with_fewer_devices(tmp_path):
    expected = on_devices("resumed", 1, 12, tmp_path / "one", count=1)["hyperparams"]
    on_devices("resumed", 4, 6, tmp_path / "four")
    found = on_devices("resumed", 2, 12, tmp_path / "four", count=2)
    np.testing.assert_allclose(found["hyperparams"], expected, rtol=1e-12)
    assert not found["moved"]


@pytest.mark.thorough
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
@pytest.mark.parametrize("spread", ["data", "state"])
def test_whole_runs_are_replayed(axes, spread):
    if spread == "state":
        found = on_devices("moving", axes)
        assert found["error"] < 1e-12
        assert not found["moved"]
    for case, found in on_devices("replays", axes, spread).items():
        assert found["error"] < 1e-12, case
        assert not found["moved"], case
        assert not found["hypergradient moved"], case


@pytest.mark.thorough
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
@pytest.mark.parametrize("spread", ["data", "state"])
def test_retrainings_of_a_spread_state(axes, spread):
    found = on_devices("retrainings", axes, spread)
    assert found["error"] < 1e-13  # of losses and hypergradients of at most 1, in another order
    assert found["smallest change"] > 1e-6
    assert not found["failed"]


@pytest.mark.thorough
def test_examples_that_the_devices_cannot_share_are_refused():
    said = on_devices("uneven")
    assert set(said) == {"arrays", "iterator", "fixed"}
    assert all("data_sharding cannot spread" in text for text in said.values())
    assert all("choose a batch size that" in text for text in said.values())
