r"""The order in which a backward pass visits T inner steps if it keeps log T states at a time.

Before a step can be pulled back, the state before it must be there. The pass keeps the state at the
start of an interval, runs to the middle, finishes the second half, and then does the same with the
first half. At most $\lfloor\log_2 T\rfloor + 1$ intervals are open at a time, and one state is kept
for each. Each level of halves costs half a forward pass.

The order is a table, part of the program: $T(1 + \tfrac12\log_2 T)$ rows of 7 bytes, 8 MB for 10^5
steps.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


class Visit(NamedTuple):
    """Arrays, one element per visit.

    From the state before `step`, in the slot `source`: either pull the cotangent back through the
    step, or take the step and put the new state into the slot `target`.
    """

    step: Int[np.ndarray, " visits"]
    source: Int[np.ndarray, " visits"]
    target: Int[np.ndarray, " visits"]
    pulls: Bool[np.ndarray, " visits"]


class Bisection(NamedTuple):
    """`forward` has the slot of the state before each step on the way forward."""

    num_slots: int
    forward: Int[np.ndarray, " steps"]
    backward: Visit


def bisection(num_steps: int) -> Bisection:
    """The schedule for `num_steps`, which is fixed when a program is compiled."""
    visits = _visits(num_steps, {})
    # Before its first pull the pass would repeat the forward run, which fills the same slots.
    descent, backward = visits[:, : num_steps - 1], visits[:, num_steps - 1 :]
    step, source, target, pulls = backward
    small = lambda x: x.astype(np.int8)
    forward = small(np.append(0, descent[2]))
    backward = Visit(step.astype(np.int32), small(source), small(target), pulls.astype(bool))
    return Bisection(num_steps.bit_length(), forward, backward)


def _visits(num_steps: int, known: dict[int, np.ndarray]) -> Int[np.ndarray, "4 visits"]:
    """Visits of `num_steps` steps from slot 0; a level has at most two different lengths."""
    if num_steps == 1:
        return np.array([[0], [0], [0], [1]])
    if num_steps not in known:
        second = num_steps // 2
        first = num_steps - second
        advance = np.zeros((4, first), int)
        advance[0] = np.arange(first)
        advance[1, 1:] = advance[2] = 1
        # Steps are numbered from the middle on in the second half, whose slots begin one higher.
        later = _visits(second, known) + np.array([[first], [1], [1], [0]])
        known[num_steps] = np.concatenate([advance, later, _visits(first, known)], axis=1)
    return known[num_steps]
