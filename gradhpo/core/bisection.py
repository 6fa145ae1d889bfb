r"""The order in which a backward pass visits T inner steps if it keeps log T states at a time.

Before a step can be pulled back, the state before it must be there. The pass keeps the state at the
start of an interval, runs to the middle, finishes the second half first, and then does the same
with the first half: the states at the starts of all intervals that are under way are at most
$\lfloor\log_2 T\rfloor + 1$. Each level of halves costs half a forward pass.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Visit(NamedTuple):
    """Arrays, one element per visit.

    From the state before `step`, in the slot `source`: either pull the cotangent back through the
    step, or take the step and put the new state into the slot `target`.
    """

    step: Int[np.ndarray, " visits"]
    source: Int[np.ndarray, " visits"]
    target: Int[np.ndarray, " visits"]
    pulls: Int[np.ndarray, " visits"]


class Bisection(NamedTuple):
    """`forward` has the slot of the state before each step on the way forward."""

    num_slots: int
    forward: Int[np.ndarray, " steps"]
    backward: Visit


def bisection(num_steps: int) -> Bisection:
    """The schedule for `num_steps`, which is fixed when a program is compiled."""
    visits = _visits(num_steps)
    # Before its first pull the pass would repeat the way forward, which fills the same slots.
    descent, backward = visits[:, : num_steps - 1], visits[:, num_steps - 1 :]
    forward = np.append(np.zeros(1, int), descent[2])
    return Bisection(num_steps.bit_length(), forward, Visit(*backward))


@functools.lru_cache(maxsize=128)
def _visits(num_steps: int) -> Int[np.ndarray, "4 visits"]:
    """Of `num_steps` steps from the state in slot 0."""
    if num_steps == 1:
        return np.array([[0], [0], [0], [1]])
    second = num_steps // 2
    first = num_steps - second
    advance = np.zeros((4, first), int)
    advance[0] = np.arange(first)
    advance[1, 1:] = advance[2] = 1
    # Steps are numbered from the middle on in the second half, whose slots begin one higher.
    later = _visits(second) + np.array([[first], [1], [1], [0]])
    return np.concatenate([advance, later, _visits(first)], axis=1)
