"""Progress on the terminal."""

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
from tqdm.auto import tqdm


class ProgressBar:
    """A `tqdm` bar that counts steps and shows the last losses."""

    def __init__(self, bar: tqdm):
        self._bar = bar

    def advance(self, steps: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Moves on by a chunk of steps with these metrics."""
        shown = ("train_loss", "val_loss", "hypergrad_norm")
        self._bar.set_postfix({name: f"{metrics[name][-1]:.4g}" for name in shown}, refresh=False)
        self._bar.update(steps)


@contextlib.contextmanager
def progress_bar(total: int, *, shown: bool = True) -> Iterator[ProgressBar]:
    """A bar over `total` steps, closed at the end also when the loop raises."""
    with tqdm(total=total, disable=not shown, unit="step", dynamic_ncols=True) as bar:
        yield ProgressBar(bar)
