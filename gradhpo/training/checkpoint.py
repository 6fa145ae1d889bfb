"""Checkpoints of a run: how often, how many, and the directory that holds them."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradhpo.core.measured import with_aux_of_steps, without_aux
from gradhpo.core.state import BilevelState
from gradhpo.core.types import METRICS
from gradhpo.training.callbacks import Callbacks, are_one, called
from gradhpo.training.checkpoint_file import (
    Leaves,
    is_checkpoint_header,
    leaves_of,
    read_tree,
)
from gradhpo.training.checkpoint_folder import SUFFIX, Stored, is_folder, read_kept
from gradhpo.training.frozen_file import FrozenFile
from gradhpo.training.history import History
from gradhpo.training.metrics_file import MetricsFile
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked
from gradhpo.utils.warn import warn


_NAME = re.compile(r"step-\d{10}\.(ckpt|orbax)")


@checked
@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where `run` keeps checkpoints, how often it writes one, and how many it keeps.

    `run(..., checkpoint="runs/digits")` is short for `checkpoint=Checkpoint("runs/digits")`. `run`
    writes a checkpoint before the first step, then at the end of the first chunk after
    `every_steps` or `every_seconds`, whichever comes first, and at the end of the run (unless a
    callback failed and so missed part of the last chunk). Each is one file
    `step-0000001000.ckpt`, written atomically; next to them are the history, in `metrics.bin`, and
    frozen leaves, written once, in `frozen.ckpt`. If several processes share the state, it is a
    folder `step-0000001000.orbax`, in which each writes its part of the arrays with Orbax
    (`pip install -e ".[orbax]"` in a clone): use a directory that all of them see.

    **Arguments:**

    - `directory`: a path, created if it does not exist; a relative one starts at the current
        directory. One directory holds one run. Other files in it, such as a log, are left alone.
    - `every_steps`: steps between two checkpoints, at least 1; default `None`, only by the clock.
    - `every_seconds`: seconds between two, default 60; `float("inf")`: only by steps.
    - `keep`: how many of the newest to keep, at least 1; default 2.

    **Raises:** `ValueError` for an empty `directory`, `every_steps < 1`, `keep < 1` or negative
    `every_seconds`; `TypeError` for anything that is not a path or number.

    ```python
    checkpoint = gradhpo.Checkpoint("runs/digits", every_seconds=600.0, keep=3)
    ```
    """

    directory: str | Path
    every_steps: int | None = None
    every_seconds: float | int = 60.0
    keep: int = 2

    def __post_init__(self):
        if not str(self.directory):
            raise ValueError("Checkpoint(directory) must be the path of a directory, got ''")
        if self.every_steps is not None:
            check_count("every_steps", self.every_steps)
        check_count("keep", self.keep)
        if not self.every_seconds >= 0:
            raise ValueError(f"every_seconds must be at least 0, got {self.every_seconds!r}")
        # Absolute: the program may change its working directory.
        object.__setattr__(self, "directory", Path(self.directory).absolute())

    @classmethod
    def of(cls, value: "str | Path | Checkpoint") -> "Checkpoint":
        """Settings from the argument of [`run`][gradhpo.run]: a `Checkpoint`, or its directory."""
        return value if isinstance(value, Checkpoint) else cls(value)


@checked
def load_checkpoint(
    path: str | Path, state: BilevelState, callbacks: Sequence[Callable] = ()
) -> tuple[BilevelState, History]:
    """State and history of a run from its checkpoints, to inspect or to continue from elsewhere.

    **Arguments:**

    - `path`: the directory of the run (its newest checkpoint), or one checkpoint in it, a file or a
        folder `step-....orbax`.
    - `state`: any state of the same optimizer and model, from `optimizer.init`: it gives the
        structure and is not changed.
    - `callbacks`: those whose memory you want, made as in the run: `best = gradhpo.BestState()` in
        `callbacks=[best]` has `best.state` afterwards. Default: none.

    **Returns:** `(state, history)` at that checkpoint. If only the history is damaged, a warning
    says so and the history is empty.

    **Raises:** `ValueError` if there is no checkpoint, if it is damaged or has another structure,
    if it has no memory for such a callback, or if its frozen leaves are missing or damaged.

    ```python
    import tempfile
    loss = lambda w, h, batch: jnp.sum((w - h) ** 2 * batch)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.1))
    start = optimizer.init(jnp.zeros(3), jnp.ones(3))
    losses = gradhpo.LossFunctions(loss, loss)
    with tempfile.TemporaryDirectory() as directory:
        gradhpo.run(optimizer, start, losses, jnp.ones(3), jnp.ones(3), num_steps=5,
                    checkpoint=directory, progress=False)
        state, history = gradhpo.load_checkpoint(directory, start)
    assert state.step == 5 and len(history["val_loss"]) == 5
    ```
    """
    path, state = Path(path), without_aux(state)
    if path.is_dir() and path.suffix != SUFFIX:
        found = checkpoints_in(path)
        if not found:
            raise ValueError(f"{path} holds no checkpoint (such as step-0000001000.ckpt)")
        path = found[-1]
    if not (path.is_file() or is_folder(path)):
        raise ValueError(f"there is no checkpoint at {path}")
    header, body = read_kept(path, is_checkpoint_header)
    check_leaves(path, header["leaves"]["state"], leaves_of(state))
    state = FrozenFile(path.parent).read_into(state, header.get("frozen"))
    state = read_tree(body, state)
    wanted = Callbacks(callbacks)
    if callbacks:
        wanted.start(state, resumed=True)
        read_memories(path, header, body, wanted, all_of_them=False)
    metrics, report = {}, f"Read from {path}."
    try:
        metrics = MetricsFile(path.parent / "metrics.bin").read(header["metrics"])
    except ValueError as error:
        report += f" The history is empty: {error}"
        warn(report, RuntimeWarning)
    aux = {name: metrics[name] for name in header.get("aux", []) if name in metrics}
    again = lambda tree: with_aux_of_steps(tree, aux, int(state.step) - header["taken"])
    wanted.remember(again)
    state = again(state)
    metrics = metrics or {name: np.zeros(0) for name in METRICS}
    return state, History(metrics, header["stop_reason"], report)


def read_memories(
    path: Path,
    header: dict[str, Any],
    body: Leaves | Stored,
    callbacks: Callbacks,
    all_of_them: bool = True,
) -> None:
    """Gives each callback the memory of the same callback, at any position in the list."""
    found = header["callbacks"]
    left = list(zip(callbacks.remembering, callbacks.identities, strict=True))
    there = ", ".join(map(called, found)) if found else "none"
    for identity, leaves in zip(found, header["leaves"]["memories"], strict=True):
        mine = next((x for x in left if are_one(identity, x[1])), None)
        if mine is None:
            body.skip(len(leaves))
            if all_of_them:
                warn(
                    f"{path} has the memory of {called(identity)}, but no callback takes it: it is "
                    "lost"
                )
            continue
        left.remove(mine)
        check_leaves(path, leaves, leaves_of(mine[0].memory))
        mine[0].memory = read_tree(body, mine[0].memory)
    for _, identity in left:
        if not all_of_them:
            raise ValueError(
                f"{path} has no memory of {called(identity)}; it has memories of: {there}"
            )
        warn(
            f"{called(identity)} was not among the callbacks of {path} (which has memories of: "
            f"{there}): it starts empty where the run resumes"
        )


def checkpoints_in(directory: Path) -> list[Path]:
    """From the oldest to the newest: files of one process, and complete folders of several."""
    named = (path for path in directory.iterdir() if _NAME.fullmatch(path.name))
    return sorted(path for path in named if path.suffix != SUFFIX or is_folder(path))


def check_leaves(path: Path, found: list, expected: list) -> None:
    """Checks that a checkpoint has the structure that it is read into."""
    if found == expected:
        return
    theirs, ours = ({name: rest for name, *rest in leaves} for leaves in (found, expected))
    lines = [
        f"{name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
        for name in dict.fromkeys([*theirs, *ours])
        if theirs.get(name) != ours.get(name)
    ]
    only_notes = all("metadata[" in line for line in lines)
    remedy = (
        "Pass a state with the same notes, state.update(metadata={...})"
        if only_notes
        else "Pass a state from the same optimizer.init for the same model, in the same "
        "precision and with the same leaves frozen"
    )
    raise ValueError(
        f"{path} holds a state of another structure: " + "; ".join(lines[:5]) + f". {remedy}"
    )
