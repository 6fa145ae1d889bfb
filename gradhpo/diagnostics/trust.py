"""Whether a hypergradient can be expected to predict retraining: the verdict, and its reasons."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from gradhpo.diagnostics.nearby import Nearby, has_keys
from gradhpo.diagnostics.noise import moments_of
from gradhpo.diagnostics.precision import Estimated
from gradhpo.diagnostics.score import varies
from gradhpo.utils.freezing import trained
from gradhpo.utils.tables import aligned, number


# Thresholds of `trust`: a hypergradient is trusted from the first on, and not below the second.
# `python -m benchmarks trust` sets them on one half of its configurations and tests the other.
TRUSTED, NOT_TRUSTED = 0.97, 0.75
# Training explodes if its loss rises by more than this many times its first value, and the length
# of its updates by more than the second factor.
MOST_RISE, LEAST_GROWTH = 100.0, 10.0
LEAST_FOLLOWED, MOST_SCALE = 0.5, 2.0
# Dtypes whose rounding a check in float64 must see.
HALF = ("bfloat16", "float16")
# The agreements: their names in a table and in a sentence, and the remedy.
_WORDS = {
    "perturbed": (
        "after a perturbation",
        "after a perturbation of the hyperparameters",
        "the predictions hold only for smaller changes: if your outer steps are smaller, check "
        "again with their step_size; a smaller inner learning rate, larger batches, smooth "
        "activations or a shorter horizon make them hold further",
    ),
    "rounded": (
        "with the last bit of the initial parameters changed",
        "with the last bit of every initial parameter changed",
        "training amplifies rounding; use a smaller inner learning rate, a shorter horizon or a "
        "wider dtype",
    ),
    "float64": (
        "in float64",
        "with those in float64",
        'use a wider dtype (jax.config.update("jax_enable_x64", True)) or a shorter horizon',
    ),
    "exact": (
        "of the exact hypergradient",
        "with the exact hypergradient of the same steps",
        "use an optimizer that comes closer: gradhpo.compare_hypergradients shows which",
    ),
    "repeated": (
        "of the same call repeated",
        "with the scores of the same call repeated",
        "something draws random numbers outside of JAX; draw them from PRNG keys in the batches",
    ),
    "redrawn": (
        "with another order of the batches and other keys",
        "with another order of the batches and other random keys, whose effect on the loss counts",
        "make a retraining repeat both (data by index, keys folded with the number of the step), "
        "or average hypergradients over draws",
    ),
    "other keys": (
        "with other random keys",
        "with other random keys",
        "if a retraining repeats them (keys folded with the number of the step), pass "
        "replayed=True; otherwise replayed=False, which measures how much they matter",
    ),
}


@dataclasses.dataclass(frozen=True)
class Trust:
    r"""The measurements behind `HypergradientCheck.verdict`.

    **Fields:**

    - `agreement`: maps a name to Spearman's rank correlation of $g\cdot\Delta_j$ with
        $g'\cdot\Delta_j$ over 500 random perturbations $\Delta_j$, where $g'$ is another
        hypergradient. What could not be measured is missing.
        - `"perturbed"`: that at $\lambda + \Delta$; the mean over four perturbations.
        - `"rounded"`: with the last bit of every initial parameter changed.
        - `"float64"`: with everything in float64, if the state is narrower and nothing random is
            drawn.
        - `"exact"`: the exact hypergradient of the same inner steps (both in float64, if that
            runs).
        - `"repeated"`: by the same call again.
        - `"other keys"`: with other PRNG keys in the batches, if they have any.
        - `"redrawn"`: with other keys and the batches of a stack in another order; the mean over
            three draws, times $s/\sqrt{s^2 + n^2}$, where $s$ is the standard deviation of
            $g\cdot\Delta_j$ and $n$ that of the validation loss between draws.
    - `changes`: of the four perturbed runs, predicted and true change of the validation loss.
    - `followed`: cosine of the true changes with the changes by the mean of the hypergradients at
        both ends. Below 0.5 it casts doubt: then the loss has steps that no derivative sees. `nan`
        if the changes are lost in the rounding of the loss.
    - `scale`: length of the predicted changes over the length of the true ones, if
        perturbations move a single number; otherwise `nan`. Between 0.5 and 2 it casts no doubt.
    - `signal_to_noise`: over the draws of `"redrawn"`, as in
        [`Moments`][gradhpo.diagnostics.noise.Moments]; `nan` if there is nothing to draw.
    - `first_loss`, `last_loss`: mean training loss of the first and the last tenth of the steps.
        `growth`: mean length of the updates in the last tenth over that in the first. `nan` if not
        measured.
    - `replayed`: as passed to the call.
    - `unmeasured`: what matters and could not be measured, in words.
    - `leaves`: maps the name of an agreement among the reasons to the leaf behind it. Repairing
        its part alone closes at least half of the gap to 1, and so does leaving it out. `None` if
        there is one leaf, if several are as wrong, or if the noise of the loss is behind it.
    - `value` (property): the lowest `agreement` that counts, clipped to [0, 1]. `"other keys"`
        never counts, and `"redrawn"` only with `replayed=False`. 0 if training explodes: if its
        loss rises by more than 100 times the first one, and its updates grow tenfold.
    """

    agreement: dict[str, float]
    changes: tuple[tuple[float, float], ...]
    followed: float
    scale: float
    signal_to_noise: float
    first_loss: float
    last_loss: float
    growth: float
    replayed: bool | None
    unmeasured: tuple[str, ...]
    leaves: dict[str, str | None]

    @property
    def explodes(self) -> bool:
        """Whether the training loss ends far above its start, with growing updates."""
        if math.isnan(self.first_loss):
            return False  # not measured
        rises = self.last_loss - self.first_loss > MOST_RISE * abs(self.first_loss)
        # A start at the minimum, with a loss of almost 0, does not explode.
        return not math.isfinite(self.last_loss) or (rises and self.growth > LEAST_GROWTH)

    @property
    def counted(self) -> dict[str, float]:
        """The agreements behind the number; what a retraining repeats does not count."""
        left_out = {"other keys"} | ({"redrawn"} if self.replayed is not False else set())
        return {name: x for name, x in self.agreement.items() if name not in left_out}

    @property
    def value(self) -> float:
        """The lowest of the counted agreements, in [0, 1]; 0 if one of them says nothing."""
        values = [0.0 if math.isnan(x) else x for x in self.counted.values()]
        return 0.0 if self.explodes or not values else float(np.clip(min(values), 0, 1))

    @property
    def doubts(self) -> tuple[str, ...]:
        """The reasons for doubt, in words, with the remedy."""
        found = []
        if self.explodes:
            found.append(
                f"training explodes: its loss goes from {self.first_loss:.4g} to "
                f"{self.last_loss:.4g}; use a smaller inner learning rate"
            )
        elif self.last_loss - self.first_loss > abs(self.first_loss):
            found.append(
                f"training makes its loss worse, from {self.first_loss:.4g} to "
                f"{self.last_loss:.4g}, while its updates grow {self.growth:.3g}-fold: use a "
                "smaller inner learning rate"
            )
        if self.followed < LEAST_FOLLOWED:
            found.append(
                "true changes of the validation loss contradict the hypergradients at both ends "
                f"(cosine {self.followed:.2f}): the loss has steps that no derivative sees (round, "
                "argmax, top-k); use a smooth loss"
            )
        if self.scale < 1 / MOST_SCALE or self.scale > MOST_SCALE:
            found.append(
                "perturbations move one number, so agreement is only about the sign, and "
                f"predicted changes are {self.scale:.2g} times the true ones: use smaller "
                "perturbations, or an optimizer that comes closer to the exact hypergradient"
            )
        return (*found, *map(self._sentence, self._low), *self.unmeasured)

    @property
    def _low(self) -> list[str]:
        """Names of the agreements among the reasons."""
        unknown = ["other keys"] if self.replayed is None and "other keys" in self.agreement else []
        return [name for name in (*self.counted, *unknown) if not self.agreement[name] >= TRUSTED]

    def _sentence(self, name: str) -> str:
        _, what, remedy = _WORDS[name]
        leaf = self.leaves.get(name)
        where = "" if leaf is None else f" (look at {leaf} first)"
        return f"predictions agree by only {self.agreement[name]:.3g} {what}{where}: {remedy}"

    def __str__(self) -> str:
        rows = [["predictions agree with those", "rank correlation"]]
        rows += [[_WORDS[name][0], number(x, 2)] for name, x in self.agreement.items()]
        more = [
            ["training loss, from", number(self.first_loss)],
            ["to", number(self.last_loss)],
            ["growth of the updates", number(self.growth, 2)],
            ["signal to noise over batches and keys", number(self.signal_to_noise, 2)],
        ]
        changes = ", ".join(f"{x:.2g} / {y:.2g}" for x, y in self.changes)
        return "\n".join(
            [aligned(rows), "", aligned(more), f"changes, predicted / true: {changes}"]
        )


def verdict_of(trust: float, reasons: Sequence[str]) -> str:
    """By the thresholds: an agreement below `TRUSTED` is among the reasons."""
    if trust < NOT_TRUSTED:
        return "not trusted"
    return "doubtful" if reasons else "trusted"


def judged(
    nearby: Nearby | None, watched: dict | None, replayed: bool | None, unmeasured: tuple[str, ...]
) -> Trust:
    """From the hypergradients nearby, and from `finiteness`, where they could be computed."""
    nan, changes, agreement = float("nan"), (), {}
    signal_to_noise = first = last = growth = followed = scale = nan
    if watched is not None:
        losses, moved = (np.asarray(watched["forward"][name]) for name in ("loss", "moved"))
        tenth = max(1, len(losses) // 10)
        with np.errstate(all="ignore"):
            first, last = float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
            growth = float(np.mean(moved[-tenth:]) / np.mean(moved[:tenth]))
    if nearby is not None and not varies(nearby.predictions["own"][0]):
        unmeasured += (
            "it predicts the same change for all perturbations: it does not see what they move, or "
            "they are lost in rounding",
        )
    elif nearby is not None:
        agreement = {name: float(np.mean(x)) for name, x in nearby.agreements.items()}
        [own], [own_loss] = nearby.hypergradients["own"], nearby.val_losses["own"]
        pairs = zip(nearby.perturbations, nearby.val_losses["perturbed"], strict=True)
        changes = tuple((float(own @ delta), loss - own_loss) for delta, loss in pairs)
        followed, scale = _followed(nearby, changes)
        if "redrawn" in agreement:
            draws = np.stack([own, *nearby.hypergradients["redrawn"]])
            signal_to_noise = moments_of(draws, draws).signal_to_noise
            signal = np.std(nearby.predictions["own"])
            noise = np.std([own_loss, *nearby.val_losses["redrawn"]], ddof=1)
            with np.errstate(invalid="ignore"):  # no signal at all: nan
                agreement["redrawn"] *= float(signal / np.hypot(signal, noise))
    trust = Trust(
        agreement, changes, followed, scale, signal_to_noise, first, last, growth, replayed,
        unmeasured, leaves={},
    )  # fmt: skip
    if nearby is None:
        return trust
    behind = {name: nearby.leaf_behind(name, TRUSTED, agreement[name]) for name in trust._low}
    return dataclasses.replace(trust, leaves=behind)


def _followed(nearby: Nearby, changes: tuple[tuple[float, float], ...]) -> tuple[float, float]:
    """`followed` and `scale` of `Trust`."""
    [own], [own_loss] = nearby.hypergradients["own"], nearby.val_losses["own"]
    predicted, true = np.transpose(changes)
    pairs = zip(nearby.perturbations, nearby.hypergradients["perturbed"], strict=True)
    by_both = np.asarray([(own + there) @ delta / 2 for delta, there in pairs])
    lengths = [float(np.linalg.norm(x)) for x in (by_both, true, predicted)]
    if not max(lengths[:2]) > 10 * nearby.resolution * abs(own_loss):
        return float("nan"), float("nan")
    with np.errstate(all="ignore"):
        cosine = float(by_both @ true / np.float64(lengths[0] * lengths[1]))
        scale = float(np.float64(lengths[2]) / lengths[1])
    return 0.0 if np.isnan(cosine) else cosine, scale if nearby.num_moving == 1 else float("nan")


def unmeasured_of(
    own: Estimated, wide: Estimated | None, watched: dict | None, replayed: bool | None
) -> tuple[str, ...]:
    """What matters and cannot be measured, with what to do about it."""
    found = []
    if wide is None:
        found.append(
            "float64 does not run, so the rounding error is unknown: let the losses take "
            "float64 inputs (see the notes)"
        )
    if own.program is None:
        found.append("the optimizer sees none of the hyperparameters: use another one")
        return tuple(found)
    is_half = own.program.computes_in(HALF)
    if is_half and (own.draws_random_numbers or not is_half_precise(own.case.state.params)):
        found.append(
            "float64 cannot be compared: part of the loss computes in half precision even then, or "
            "draws random numbers. Check once in float32 throughout, without dropout"
        )
    if watched is None and own.optimizer.inner_solver is None:  # differences confirm a solver
        found.append(
            "there is no exact hypergradient to compare with, so the estimator's own error is "
            "unknown: gradhpo.retraining_score measures it"
        )
    is_free = not has_keys((own.case.train_batch, own.case.val_batch))
    if own.draws_random_numbers and is_free and replayed is not True:
        found.append(
            "random numbers are drawn from keys that are not in the batches: pass typed keys "
            "(jax.random.key) there, or replayed=True if a retraining draws the same"
        )
    return tuple(found)


def is_half_precise(params: PyTree) -> bool:
    """Whether a parameter has less than 32 bits."""
    return any(x.dtype.itemsize < 4 for x in jax.tree.leaves(trained(params)))
