"""What a run says at its end: how many steps, how many refused, and why it stopped."""

import jax
import numpy as np
from jaxtyping import PyTree


class Rejections:
    """Counts steps that were refused as non-finite, those in a row, and the likely cause."""

    def __init__(self, before: float, most_in_a_row: int):
        self._last, self._most = before, most_in_a_row
        self.total, self.in_a_row, self.longest = 0, 0, 0
        self.of_derivatives = 0  # refused though both losses were finite

    @property
    def too_many(self) -> bool:
        return self.longest >= self._most

    def count(self, metrics: dict[str, np.ndarray]) -> None:
        """The steps of one more chunk."""
        losses = np.isfinite(metrics["train_loss"]) & np.isfinite(metrics["val_loss"])
        only_derivative = losses & ~np.isfinite(metrics["hypergrad_norm"])
        for value, derivative in zip(metrics["rejected"], only_derivative, strict=True):
            rejected = value > self._last
            self._last = value
            self.total += int(rejected)
            self.of_derivatives += int(rejected and derivative)
            self.in_a_row = self.in_a_row + 1 if rejected else 0
            self.longest = max(self.longest, self.in_a_row)


def keeps_second_moments(inner_opt_state: PyTree) -> bool:
    """Whether an optax state has the field `nu`, as those of Adam and its relatives."""
    paths = jax.tree_util.tree_flatten_with_path(inner_opt_state)[0]
    return any(getattr(key, "name", None) == "nu" for path, _ in paths for key in path)


def report(
    stop_reason: str,
    taken: int,
    num_steps: int,
    seconds: float,
    rejections: Rejections,
    data_error: str,
    remark: str,
    second_moments: bool,
) -> str:
    """The sentences, in the order in which they matter.

    `remark` is what the algorithm says; `second_moments` tells of an optimizer like Adam.
    """
    why = {
        "num_steps": "The run is complete.",
        "callback": "A callback stopped the run.",
        "data error": f"A data source failed: {data_error}",
        "data exhausted": (
            "An iterator ended; gradhpo.iterate(loader) starts a loader again at its end."
        ),
        "rejected": (
            f"{rejections.longest} steps in a row came out non-finite and were rejected: they left "
            "no trace in the state."
        ),
    }[stop_reason]
    sentences = [
        f"{taken} of {num_steps} steps in {seconds:.1f} s, {rejections.total} rejected as "
        f"non-finite. {why}"
    ]
    if remark:
        sentences.append(remark)
    elif rejections.of_derivatives:
        adam = (
            "With Adam and its relatives that is the square root at a gradient of exactly 0 (a "
            "dead unit, an input that is always 0): use optax.adam(..., eps_root=1e-16)."
        )
        overflow = (
            "Over many steps a derivative may overflow: a learning rate too high, a momentum or "
            "beta of 1 or more."
        )
        sentences.append(
            f"In {rejections.of_derivatives} of the rejected steps both losses were finite and "
            "only the hypergradient was not: something that is differentiated has no finite "
            f"derivative. {adam if second_moments else overflow}"
        )
    elif rejections.in_a_row:  # it ended so
        sentences.append(
            "Usual causes: a learning rate too high (inner or outer), a momentum of 1 or more, or "
            "NaN in the data."
        )
    return " ".join(sentences)
