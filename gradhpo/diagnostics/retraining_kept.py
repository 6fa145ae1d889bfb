"""What a call of `retraining_score` keeps in a directory, and which other calls may go on from."""

from collections.abc import Callable
from pathlib import Path

from jaxtyping import Array

from gradhpo.core.algorithm import Algorithm
from gradhpo.core.exact import with_its_update
from gradhpo.core.state import BilevelState
from gradhpo.data.source import Source
from gradhpo.data.sources import Feed, as_source
from gradhpo.diagnostics.queries import Setting
from gradhpo.training.boundaries import Boundaries, Caller, InDirectory, InMemory
from gradhpo.training.identity import identity
from gradhpo.training.segments import Training
from gradhpo.utils.description import described_arrays


_CALLER = Caller("retraining", "retraining_score", "directory")


def kept_in(
    directory: str | Path | None,
    first: Algorithm,
    state: BilevelState,
    source: Source,
    setting: Setting,
    change: Callable,
    keys: Array,
) -> Boundaries:
    """Blocks of losses, and hypergradients by the name of their optimizer.

    They belong to one training, from one state on the same data, and to one sequence of changes;
    not to the number of these, nor to the estimators beside them.
    """
    if directory is None:
        return InMemory()
    exact = with_its_update(first, min(setting.num_steps, 2))
    start = exact._adopt(state, keep_memory=True)
    feed = Feed(source, as_source(setting.queries, "queries", None))
    about = identity(exact, start, feed, None, None, num_steps=setting.num_steps)
    training = Training(exact, setting.losses, setting.queries, queries=True)
    about["losses"] = described_arrays(training.responses(start, setting.part))
    # As long as the changes are the same: two keys tell.
    changed = [change(keys[number], state.hyperparams) for number in range(2)]
    about["the changed hyperparameters"] = described_arrays(changed)
    return InDirectory(Path(directory), about, False, _CALLER)
