"""The benchmarks' machinery; test_costs.py checks what they measure."""

import argparse
import contextlib
import re
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
from processes import LIMIT

from benchmarks import verdict
from benchmarks.__main__ import GROUPS, OF_A_GPU, RESULTS, TABLES, file_of, names_of, refused
from benchmarks.costs import gpu
from benchmarks.costs.gpt import SIZES, gpt, num_params
from benchmarks.costs.gpu_row import BY_JAX, ON_HOST
from benchmarks.limited import Ended, python
from benchmarks.peers import environment
from benchmarks.peers.environment import PeerError, python_of
from benchmarks.rows import Kept, measured
from benchmarks.trust import calibration
from benchmarks.trust.problems import Config
from benchmarks.trust.scoring import judged
from gradhpo.diagnostics.trust import NOT_TRUSTED, TRUSTED


_ROOMS = ("costs", "peers", "trust", "tables")
READMES = [RESULTS.parent / name / "README.md" for name in _ROOMS]


@pytest.mark.parametrize("name", [name for name in TABLES if name not in OF_A_GPU])
def test_every_table_has_a_saved_result_and_its_place_in_a_readme(name):
    assert (RESULTS / f"{name}.txt").is_file()
    assert any(f"results/{name}.txt)" in readme.read_text() for readme in READMES)


def test_every_saved_result_is_that_of_a_table():
    assert {path.stem for path in RESULTS.glob("*.txt")} == set(TABLES) - OF_A_GPU
    others = [path for path in RESULTS.glob("*/*.txt") if path.parent.name not in OF_A_GPU]
    assert {path.stem for path in others} <= set(TABLES)  # of other machines


@pytest.mark.thorough
def test_a_peer_that_does_not_install_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.peers.environment.CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PeerError, match=r"does not install: .*no-such-package"):
        python_of(["no-such-package==1"])
    assert not any(tmp_path.iterdir())


class Told(NamedTuple):
    name: str
    text: str

    def save(self, path):
        path.write_text(self.text)


# Of a worker that refuses some tasks.
SCRIPT = """
import sys
sys.path.insert(0, {workers!r})
from worker import serve
texts = {{}}
def load(name, path):
    texts[name] = open(path).read()
    if texts[name] in {refused}:
        raise ValueError(f"refused: {{name}}")
serve(load=load, text_of=lambda name: texts[name])
"""


def test_workers_load_every_task_or_say_why_there_is_none(tmp_path, monkeypatch):
    def python_of(requirements):
        if "absent" in requirements[0]:
            raise PeerError(f"does not install: {requirements[0]}")
        return sys.executable

    for name, not_loaded in (("kind.py", []), ("fussy.py", ["second"])):
        text = SCRIPT.format(workers=str(environment.WORKERS), refused=not_loaded)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(environment, "python_of", python_of)
    monkeypatch.setattr(environment, "WORKERS", tmp_path)
    tasks = [Told("a", "first"), Told("b", "second")]
    scripts = {
        "ours": ("kind.py", ()), "fussy": ("fussy.py", ["fussy"]),
        "one": ("kind.py", ["absent==1"]), "two": ("kind.py", ["absent==2"]),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        workers = environment.Workers(stack, scripts, tasks)
        assert [workers.ask("ours", "text_of", name=x) for x in "ab"] == ["first", "second"]
        reasons = {
            "fussy": "ValueError: refused: b",
            "one": "does not install: absent==1",
            "two": "does not install: absent==2",
        }
        for library, reason in reasons.items():
            with pytest.raises(PeerError, match=f"^{reason}$"):
                workers.ask(library, "text_of", name="a")
        with pytest.raises(RuntimeError, match="refused: b"):  # a failure of ours is a bug
            environment.Workers(stack, {"ours": ("fussy.py", ())}, tasks)


# -- the table of a GPU --------------------------------------------------------------------------


def test_it_is_made_by_name_and_saved_on_a_gpu_alone(capsys):
    given = lambda *tables, quick=False: argparse.Namespace(
        tables=tables, without=["budget"], quick=quick, kept=False
    )
    assert set(names_of(given())) == set(TABLES) - OF_A_GPU - {"budget"}
    assert names_of(given("gpu", "flops", "budget")) == ["gpu", "flops"]
    assert names_of(given("peers")) == [name for name in GROUPS["peers"] if name != "budget"]
    assert names_of(given("flops", "loop", quick=True)) == ["flops"]
    assert "(no quick form: loop)" in capsys.readouterr().out
    assert names_of(given(quick=True)) == [name for name in TABLES if TABLES[name].quick]
    assert refused(["gpu", "flops"], "cpu") == ["gpu"]
    assert refused(["gpu", "flops"], "gpu") == ["flops"]
    assert file_of("flops") == RESULTS / "flops.txt"
    assert file_of("gpu").parent == RESULTS / "gpu"


@pytest.mark.parametrize(("backend", "millions"), [("cpu", "0.00717"), ("gpu", "110")])
def test_without_time_it_starts_nothing_and_says_so(backend, millions, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "python", None)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    gpu.print_gpu(minutes=0)
    printed = capsys.readouterr().out
    assert printed.lstrip().startswith("Nothing below is about a GPU") == (backend == "cpu")
    assert f"a transformer of {millions} M parameters" in printed
    assert printed.count("no time left") == 4  # numbers, rows, loops, tests
    assert all(f"{steps} {kept}" in printed for steps, kept in gpu.ROWS)


def test_rows_may_take_the_whole_card_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "20")
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    given = gpu.of_rows("folder")
    assert given["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] == "20"
    assert given["XLA_CLIENT_MEM_FRACTION"] == "0.92"
    # JAX raises if both the old and the new name are set.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert "XLA_CLIENT_MEM_FRACTION" not in gpu.of_rows("folder")


@pytest.mark.thorough
def test_a_process_that_is_stopped_or_fails_keeps_what_it_said():
    sleeping = "print('first', flush=True); import time; time.sleep(1_000)"
    assert python("-c", sleeping, limit=3) == Ended("first\n", "stopped after 3 s")
    failing = "import os; print(os.environ['GIVEN']); raise ValueError('last line')"
    done = python("-c", failing, limit=LIMIT, GIVEN="x")
    assert done == Ended("x\n", "ValueError: last line")
    killed = "import os; os.write(2, b'a warning'); os.kill(os.getpid(), 9)"
    assert python("-c", killed, limit=LIMIT) == Ended("", "ended with -9 a warning")


def test_a_row_that_fails_shows_what_it_told_before():
    told = '{"temporary": 1048576, "host": 0}\n{"failed": "out of memory"}\n'
    line = gpu.columns(gpu.row_of(Ended(told, "")))
    assert line.split() == ["1", "MiB", "0", "B", "out", "of", "memory"]
    told = '{"temporary": 1048576, "peak": 2097152, "at_most": true, "found": [1.0, 3.0]}'
    told += '\n{"seconds": 1'
    row = gpu.row_of(Ended(told, "stopped after 3 s")) | {"expected": [1.0, 4.0]}
    assert gpu.columns(row).split() == "1 MiB <= 2 MiB 2e-01 stopped after 3 s".split()


def test_the_large_model_has_the_parameters_that_it_is_called_by():
    """They are counted without creating them."""
    size = SIZES["110M"]
    shapes = jax.eval_shape(lambda: gpt(size).params)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == num_params(size)
    assert round(num_params(size), -7) == 110_000_000


@pytest.mark.thorough
def test_its_smallest_form_runs_from_end_to_end(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "ROWS", [(4, BY_JAX), (4, ON_HOST)])
    monkeypatch.setattr(gpu, "LOOPS", ["OneStepOptimizer"])
    monkeypatch.setattr(gpu, "TESTS", "tests/test_rooms.py -k point_down")
    # Its programs run for milliseconds.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    gpu.print_gpu(minutes=2 * LIMIT / 60)
    printed = capsys.readouterr().out
    assert not [word for word in ("WRONG", "FAILED", "skipped", "stopped") if word in printed]
    assert len(re.findall(r"e[-+]\d\d   right$", printed, re.MULTILINE)) == 8
    row = re.search(rf"^ +4 {ON_HOST} .* (\S+)$", printed, re.MULTILINE)
    # float32, and the first step of Adam divides by roots of small squares.
    assert float(row[1]) < 1e-3
    assert "OneStepOptimizer       batch  128" in printed
    assert re.search(r"^tests/test_rooms.py .*: \d+ passed", printed, re.MULTILINE)


# -- the calibration of trust --------------------------------------------------------------------


def test_thresholds_lie_between_configurations_that_they_part():
    trust = np.array([0.0, 0.3, 0.6, 0.7, 0.9, 0.95, 1.0])
    scores = np.array([0.1, 0.4, 0.6, 0.9, 0.7, 0.85, 0.99])
    found = calibration.thresholds_of(trust, scores)
    # All scores above .925 are at least .8, and all below .45 are below .5.
    np.testing.assert_allclose(found, (0.925, 0.45))
    # Pairs of good (.7, .95, 1) and bad (0, .3): no bad one has more trust. In the second case one
    # of six pairs ties, and the other bad one exceeds one of the three.
    assert calibration.auc(trust, scores) == 1.0
    assert calibration.auc(np.array([0.7, 0.8, 0.6, 0.7, 0.9, 0.95, 1.0]), scores) == 4.5 / 6


def test_rows_that_are_known_are_not_measured_again(tmp_path, monkeypatch):
    measured = []

    def row_of(config, retrainings):
        measured.append(config.steps)
        return vars(config) | {"retrainings": retrainings, "score": float("nan")}

    monkeypatch.setattr(calibration, "row_of", row_of)
    file, configs = tmp_path / "rows.jsonl", [Config(steps=1), Config(steps=2)]
    calibration.measured_of(configs[:1], 3, file)
    rows = calibration.measured_of(configs, 3, file)
    assert measured == [1, 2]
    assert [row["steps"] for row in rows] == [1, 2]
    assert len(file.read_text().splitlines()) == 2
    calibration.measured_of(configs[:1], 4, file)  # other retrainings
    assert measured == [1, 2, 1]


def test_a_row_that_failed_is_returned_and_tried_again(tmp_path):
    file, works = tmp_path / "rows.jsonl", False
    measure = lambda row: (
        {"y": 2 * row["x"]} if works or row["x"] == 1 else {"failed": "no network"}
    )
    settings = [{"x": 1}, {"x": 2}]
    assert [row.get("failed") for row in measured(settings, measure, file)] == [None, "no network"]
    assert measured(settings, None, Kept(file))[0]["y"] == 2
    works = True
    assert [row["y"] for row in measured(settings, measure, file)] == [2, 4]
    assert len(file.read_text().splitlines()) == 2


def test_rows_that_a_file_lacks_are_left_out_and_counted(tmp_path, capsys):
    file, settings = tmp_path / "rows.jsonl", [{"x": 1}, {"x": 2}]
    rows = measured(settings[:1], lambda row: {"y": row["x"]}, file)
    assert measured(settings[:1], None, Kept(file)) == rows
    assert "UNFINISHED" not in capsys.readouterr().out
    file.write_text(file.read_text() + '{"x": 2, "y"')  # killed while it wrote
    assert measured(settings, None, Kept(file)) == rows
    assert "UNFINISHED: 1 of 2 rows" in capsys.readouterr().out
    assert [row["y"] for row in measured(settings, lambda row: {"y": row["x"]}, file)] == [1, 2]


def test_the_saved_calibration_is_that_of_the_grid_and_keeps_its_word(monkeypatch):
    monkeypatch.setattr(calibration, "row_of", None)  # nothing is missing
    grid = calibration.GRID
    rows = calibration.measured_of(grid, calibration.RETRAININGS, calibration.ROWS)
    scores, trust = (np.array([row[name] for row in rows]) for name in ("score", "trust"))
    assert len(rows) >= 30
    assert np.sum(scores < 0.5) >= 6
    assert np.sum(scores > 0.95) >= 6
    assert calibration.auc(trust, scores) >= 0.95
    verdicts = np.array([judged(row, config)[0] for row, config in zip(rows, grid, strict=True)])
    # The number is what the library computes from the agreements today.
    for row, config in zip(rows, grid, strict=True):
        counted = [
            x for name, x in row["agreement"].items() if name not in ("other keys", "redrawn")
        ]
        counted += [row["agreement"]["redrawn"]] if config.replayed is False else []
        assert row["trust"] in (0, np.clip(min(counted, default=0), 0, 1))
        assert row["trust"] > 0 or not counted or min(counted) <= 0
    assert np.all(scores[verdicts == "trusted"] >= 0.5)
    assert np.all(scores[verdicts == "not trusted"] <= 0.95)
    # The library uses the thresholds of the half that sets them, rounded.
    found = calibration.thresholds_of(*(x[calibration.setting_half(grid)] for x in (trust, scores)))
    np.testing.assert_allclose(found, (TRUSTED, NOT_TRUSTED), atol=0.05)


@pytest.mark.thorough
def test_a_quick_calibration_runs_from_end_to_end(monkeypatch, capsys, as_a_user_has_it):
    monkeypatch.setattr(calibration, "QUICK", [Config(steps=5), Config("cancer", steps=5)])
    calibration.print_trust(quick=True)
    printed = capsys.readouterr().out
    assert printed.count("momentum x1, T=5") == 2
    assert "nothing is judged" in printed


# -- the picture of the summary page -------------------------------------------------------------


def test_it_shows_the_ends_of_the_saved_searches(tmp_path):
    problems = verdict.read(verdict.TABLE.read_text())
    assert [title.split(":")[0] for title in problems] == ["2", "109", "1,000"]
    assert [len(rows) for rows in problems.values()] == [3, 4, 4]
    penalties = problems["109: a penalty for each feature"]
    assert penalties["gradhpo"] == (0.401 / 0.713, 0.593 / 0.665)  # retrained, not on the way
    assert penalties["one shared penalty"] == (0.575 / 0.713, 0.562 / 0.665)
    verdict.draw(problems, tmp_path / "verdict.png")
    assert (tmp_path / "verdict.png").stat().st_size > 10_000
