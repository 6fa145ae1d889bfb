"""The report of `check_hypergradient`: what was measured, and how to judge it."""

import dataclasses
from collections.abc import Iterator

from gradhpo.core.vanishing import WHY_ZERO
from gradhpo.diagnostics.comparison import Agreement
from gradhpo.diagnostics.metasmooth import FiniteDifference
from gradhpo.diagnostics.nonfinite import NonFinite
from gradhpo.diagnostics.precision import StepError
from gradhpo.diagnostics.trust import Trust, verdict_of
from gradhpo.utils.tables import Report, aligned, number


# A measurement above these (for smoothness, below) becomes a finding.
MOST_ROUNDING, MOST_UPHILL, LEAST_SMOOTHNESS = 0.05, 0.5, 0.5
# Outer steps smaller than this, relative to a leaf, are of little use.
LEAST_WIDTH = 1e-3
# Findings that also cast doubt on the hypergradient as a prediction of retraining.
_DOUBTS = ("nonfinite", "detached", "vanishing", "contradicts", "uphill", "difference step")


@dataclasses.dataclass(frozen=True, repr=False)
class HypergradientCheck(Report):
    """What [`check_hypergradient`][gradhpo.check_hypergradient] found.

    **Fields:**

    - `verdict`: `"trusted"`, `"doubtful"` or `"not trusted"` (property), whether the hypergradient
        can be expected to predict retraining; `reasons`, in words, with the remedy; `trust`, the
        number behind it.
    - `findings`: what is wrong, in words, with the remedy; `healthy` if there is nothing.
    - `nonfinite`: the source of a NaN or infinity in the estimate or in the validation loss, or
        `None`.
    - `precision`, `precision_by_leaf`: agreement of the estimate in the parameters' own precision
        (`narrow`, or float32 if that is float64) with the estimate in float64; `None` if random
        numbers are drawn, which differ between precisions.
    - `finite_differences`: maps a leaf to the derivative of the whole training along a random
        direction, by the exact hypergradient and by differences, and the `width` up to which the
        two agree: how far an outer step can trust it.
    - `detached`: leaves that change training but have no derivative; `why_detached` says where it
        may be lost.
    - `unseen`: leaves that this optimizer does not see, though others might.
    - `vanishing`: leaves that it sees but whose hypergradient is exactly 0.
    - `val_loss`: the validation loss at the end.
    - `uphill_share`: the share of inner steps that increase their own training loss (taken with a
        new optimizer state).
    - `step_error`: for an estimate that itself takes finite differences (`T1T2Optimizer`).
    - `metasmoothness`: see [`metasmoothness`][gradhpo.metasmoothness], at `step_size`; `diverges`
        if one of its training runs ends with a NaN or an infinity.
    - `is_zero`: whether the whole hypergradient is exactly 0.
    - `trusting`: the [measurements][gradhpo.diagnostics.trust.Trust] behind `verdict`, `reasons`
        and `trust`.
    - `notes`: what could not be measured, and why.
    - `why_narrow`, `at_jumps`: advice that depends on the inner optimizer.
    """

    name: str
    num_steps: int
    narrow: str
    own_precision_is_narrow: bool
    nonfinite: NonFinite | None
    precision: Agreement | None
    precision_by_leaf: dict[str, Agreement]
    finite_differences: dict[str, FiniteDifference]
    detached: tuple[str, ...]
    why_detached: str
    unseen: tuple[str, ...]
    vanishing: tuple[str, ...]
    val_loss: float
    uphill_share: float
    step_error: StepError | None
    metasmoothness: float
    diverges: bool
    step_size: float
    is_zero: bool
    trusting: Trust
    notes: tuple[str, ...]
    why_narrow: str
    at_jumps: str

    @property
    def healthy(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    @property
    def rounding(self) -> float:
        """Relative error of the estimate in the narrow precision; `nan` if not measured."""
        return float("nan") if self.precision is None else self.precision.relative_error["narrow"]

    def _is_narrow(self, check: FiniteDifference) -> bool:
        """Whether a derivative that matters holds only for very small steps."""
        matters = abs(check.derivative) * LEAST_WIDTH > 1e-6 * abs(self.val_loss)
        return 0 < check.width < LEAST_WIDTH and matters

    @property
    def findings(self) -> tuple[str, ...]:
        """What is wrong, in words, with the remedy."""
        return tuple(text for _, text in self._found)

    @property
    def trust(self) -> float:
        """The number behind the verdict, in [0, 1]: `trusting.value`.

        0 if the hypergradient is not finite, or exactly 0 everywhere.
        """
        return 0.0 if self.nonfinite is not None or self.is_zero else self.trusting.value

    @property
    def verdict(self) -> str:
        """`"not trusted"` if `trust` is below 0.75; otherwise `"trusted"` if there is no reason."""
        return verdict_of(self.trust, self.reasons)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons for doubt, in words, each with the remedy.

        An agreement below 0.97, training that gets worse, what could not be measured, and findings
        of faults: not finite, detached, exactly 0, contradicted by differences, uphill, or a step
        of finite differences that is wrong.
        """
        of_findings = tuple(text for kind, text in self._found if kind in _DOUBTS)
        return of_findings + self.trusting.doubts

    @property
    def _found(self) -> Iterator[tuple[str, str]]:
        """Findings with their kinds."""
        if self.nonfinite is not None:
            yield "nonfinite", str(self.nonfinite)
        if self.detached:
            yield (
                "detached",
                f"{', '.join(self.detached)} change training but have no derivative: "
                f"{self.why_detached}",
            )
        if self.vanishing:
            yield (
                "vanishing",
                f"the hypergradient of {', '.join(self.vanishing)} is exactly 0: {WHY_ZERO}",
            )
        for leaf, check in self.finite_differences.items():
            if leaf in self.detached:
                continue
            if self._is_narrow(check):
                yield (
                    "narrow",
                    f"{leaf}: its derivative holds (to 10 %) only for steps up to "
                    f"{check.width:.0e}, but outer steps are larger. {self.why_narrow}",
                )
            elif check.contradicts:
                yield (
                    "contradicts",
                    f"{leaf}: the derivative along a random direction is {check.derivative:.4g}, "
                    f"but finite differences give {check.difference:.4g}: part of its effect is "
                    "cut off (by stop_gradient: use gradhpo.detach instead), a custom "
                    "derivative rule is wrong, an inner_solver has not "
                    "solved its equation, or there is a kink (relu, abs) right here",
                )
            elif check.erratic:
                yield (
                    "erratic",
                    f"{leaf}: nothing confirms its derivative of {check.derivative:.4g}, since "
                    "nearby training runs contradict each other (differences of "
                    f"{check.difference:.4g} ± {check.uncertainty:.0e} at steps of 1e-3 to 1e-6): "
                    f"training jumps there; {self.at_jumps}",
                )
        if self.uphill_share > MOST_UPHILL:
            yield (
                "uphill",
                f"{self.uphill_share:.0%} of the inner steps go uphill on their own training loss: "
                "a sign error in the update? (w - rate * gradient goes down)",
            )
        if self.step_error is not None and self.step_error.finding:
            yield "difference step", self.step_error.finding
        if self.own_precision_is_narrow and self.rounding > MOST_ROUNDING:
            yield (
                "rounding",
                f"rounding: in {self.narrow} the hypergradient is {self.rounding:.1%} away from "
                "that in float64 (cosine "
                f"{self.precision.cosine['narrow']:.3f}): use float64 "  # pyright: ignore
                '(jax.config.update("jax_enable_x64", True)), or a shorter horizon',
            )
        if self.diverges:
            yield (
                "diverges",
                f"training diverges within two outer steps of {self.step_size:g} down the "
                "hypergradient: use smaller outer steps, or bound what drives it (a sigmoid)",
            )
        if self.metasmoothness < LEAST_SMOOTHNESS:
            yield (
                "rough",
                f"training is not smooth in the hyperparameters at steps of {self.step_size:g} "
                f"(metasmoothness {self.metasmoothness:.2f}; pass your own step_size=): use "
                "smaller outer steps, larger batches, smooth activations or a smaller inner "
                "learning rate",
            )

    def __str__(self) -> str:
        rows = [
            [f"{self.narrow} against float64: relative error", number(self.rounding)],
            ["inner steps that go uphill", f"{self.uphill_share:.0%}"],
            [f"metasmoothness at steps of {self.step_size:g}", number(self.metasmoothness, 2)],
        ]
        if self.step_error is not None:
            rows.append(["change with half of epsilon", number(self.step_error.halved)])
        why = "\n".join(f"- {text}" for text in self.reasons)
        parts = [
            f"{self.name} after {self.num_steps} inner steps: {self.verdict} ({self.trust:.2f})"
        ]
        parts += [*filter(None, [why]), str(self.trusting), aligned(rows)]
        if self.finite_differences:
            head = ["exact, along a random direction", "derivative", "differences", "±"]
            table = [[*head, "holds up to"]]
            for leaf, check in self.finite_differences.items():
                numbers = (f"{x:.6g}" for x in check[:2])
                table.append([leaf, *numbers, f"{check[2]:.0e}", f"{check.width:.0e}"])
            parts.append(aligned(table))
        notes = list(self.notes)
        if self.unseen:
            notes.append(f"not seen by {self.name}: {', '.join(self.unseen)}")
        found = [f"{i}. {text}" for i, text in enumerate(self.findings, 1)]
        parts.append(
            "\n".join(["Found:", *found] if found else ["Found: nothing wrong with the derivative"])
        )
        return "\n\n".join(parts + (["\n".join(notes)] if notes else []))
