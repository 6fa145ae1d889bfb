"""The examples as a user runs them, and the figures that README gives for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"
ALL = sorted(file.stem for file in EXAMPLES.glob("*.py"))


def python(*arguments):
    as_set = os.environ.items()
    environment = {key: value for key, value in as_set if not key.startswith(("JAX_", "XLA_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=EXAMPLES,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def test_learned_learning_rates_beat_a_fixed_one(tmp_path):
    """One seed, 60 episodes of 20 steps; how HyperDistill fares is in examples/README.md."""
    program = f"""
import json, learned_learning_rates
[rows] = learned_learning_rates.main(["--seeds=1", "--output", {str(tmp_path / "picture.png")!r}])
loss = {{name: row if isinstance(row, str) else row.test_loss for name, row in rows.items()}}
print("RESULT" + json.dumps(loss))
"""
    loss = json.loads(python("-c", program).stdout.split("RESULT")[1])
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "cannot see" in loss["first order"]
    for name in ("one step", "T1-T2 (DARTS)", "greedy", "exact"):
        assert loss[name] < loss["best fixed rate of 20"], name
    for name in ("HyperDistill", "DrMAD"):
        assert loss[name] < 0.7 * loss["fixed rate"], name


@pytest.mark.parametrize("name", ALL)
def test_says_what_it_does(name):
    assert python(f"{name}.py", "--help").stdout.startswith("usage")


# The others are run in full below.
@pytest.mark.parametrize(
    "name", sorted(set(ALL) - {"data_hypercleaning", "learned_learning_rates"})
)
def test_quick_form_prints_a_table_and_saves_a_picture(name, tmp_path):
    picture = tmp_path / "sub" / "picture.png"
    done = python(f"{name}.py", "--quick", "--output", str(picture))
    assert picture.stat().st_size > 10_000
    assert "tuned" in done.stdout
    assert "±" in done.stdout


def test_hypercleaning_reaches_what_readme_says(tmp_path):
    """Mean of 3 seeds, 2,000 inner steps, 30 % wrong labels, 100 clean validation digits."""
    program = f"""
import json, data_hypercleaning
runs = data_hypercleaning.main(["--output", {str(tmp_path / "picture.png")!r}])
rows = {{}}
for name, first in runs[0].items():
    if isinstance(first, str):
        rows[name] = first
    else:
        mean = lambda field: sum(float(getattr(run[name], field)) for run in runs) / len(runs)
        rows[name] = [mean("accuracy"), mean("auroc")]
print("RESULT" + json.dumps(rows))
"""
    rows = json.loads(python("-c", program).stdout.split("RESULT")[1])
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "cannot see" in rows["tuned, first order"]
    untuned, alone = rows["untuned, training set"][0], rows["untuned, validation set alone"][0]
    assert untuned < 0.78
    tuned = [name for name in rows if name.startswith("tuned") and "first order" not in name]
    assert len(tuned) == 5
    for name in tuned:
        accuracy, auroc = rows[name]
        assert accuracy >= 0.92, name
        assert accuracy >= alone + 0.02, name
        assert auroc >= 0.91, name
    assert rows["tuned, exact over 20 steps"][0] > rows["tuned, one step"][0]
