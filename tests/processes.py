"""Programs in separate processes, as a user starts them.

They are forked from a process that has imported JAX but not started it: importing takes longer than
many of them run.
"""

import functools
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple


# Time limit of a process in seconds; a busy machine may need more.
LIMIT = float(os.environ.get("GRADHPO_TEST_TIMEOUT", "300"))
EXAMPLES = Path(__file__).parents[1] / "examples"
IMPORTED = [
    "processes", "gradhpo", "diffrax", "matplotlib.pyplot", "sklearn.linear_model",
    "sklearn.metrics",
]  # fmt: skip


class Done(NamedTuple):
    returncode: int | None
    stdout: str
    stderr: str


@functools.cache
def context():
    """The `multiprocessing` context; processes inherit this one's XLA flags, but not JAX's."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(IMPORTED)
    before = dict(os.environ)
    try:
        for name in [name for name in os.environ if name.startswith("JAX_")]:
            del os.environ[name]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return found


def python(*arguments, compiled="", check=True) -> Done:
    """`python *arguments` in the folder of the examples: a script, or `-c` and a program.

    `compiled`: XLA flags.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "stdout"), Path(folder, "stderr")
        process = context().Process(target=_main, args=(arguments, compiled, said))
        process.start()
        process.join(LIMIT)
        in_time = process.exitcode is not None
        process.kill()
        process.join()
        texts = (path.read_text() if path.exists() else "" for path in said)
        done = Done(process.exitcode, *texts)
    assert in_time, f"more than GRADHPO_TEST_TIMEOUT = {LIMIT:.0f} s: {done}"
    assert not check or done.returncode == 0, done.stderr
    return done


def as_in_the_suite():
    """Saves time on what no test looks at."""
    import jax

    # Where in the source an operation came from: a tenth of the time.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    # Tracing makes many objects that last until it ends: look less often for those that do not,
    # and never among what was imported.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _main(arguments, compiled, said):
    for handle, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), handle)
    os.environ["XLA_FLAGS"] = compiled
    as_in_the_suite()
    os.chdir(EXAMPLES)
    first, *rest = arguments
    if first == "-c":
        program, *rest = rest
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest]
        exec(compile(program, "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(first).resolve().parent))
        sys.argv = list(arguments)
        runpy.run_path(first, run_name="__main__")


def interpreter(*arguments) -> Done:
    """The same in a fresh interpreter, imports included."""
    own = {key: x for key, x in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=EXAMPLES, env=own, capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)
