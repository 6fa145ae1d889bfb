"""How many steps in a row were refused, counted on the device, which has the next chunk already."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Refused(eqx.Module):
    """What one chunk passes to the next: a chunk after one that ends the run takes no step.

    It then returns the state that it was given. `Record` counts in the same way.

    - `limit`: the run ends after this number of refused steps in a row.
    - `in_a_row`: refused steps in a row so far.
    - `over`: whether there ever were as many as the limit.
    """

    limit: Int[Array, ""]
    in_a_row: Int[Array, ""]
    over: Bool[Array, ""]

    @classmethod
    def at_first(cls, limit: int, in_a_row: int) -> "Refused":
        """The count where a run begins or resumes."""
        whole = lambda x: jnp.asarray(min(x, 2**31 - 1), jnp.int32)
        return cls(whole(limit), whole(in_a_row), jnp.asarray(False))

    def after(
        self, before: Float[Array, "*members"], counted: Float[Array, "steps *members"]
    ) -> "Refused":
        """After more steps; `counted` is the metric `rejected` at each, `before` that before them.

        A step of a population counts as refused if every member's step is.

        ```python
        first = Refused.at_first(2, 0)
        assert not first.after(jnp.asarray(3.0), jnp.array([4.0, 4.0, 5.0])).over
        assert first.after(jnp.asarray(3.0), jnp.array([4.0, 5.0, 5.0])).over
        ```
        """
        each = jnp.diff(counted, axis=0, prepend=before[None]) > 0
        refused = jnp.all(each.reshape(len(counted), -1), axis=1)
        number = 1 + jnp.arange(len(counted), dtype=jnp.int32)
        accepted = jax.lax.cummax(jnp.where(refused, 0, number))  # the last one so far
        in_a_row = number - accepted + jnp.where(accepted == 0, self.in_a_row, 0)
        over = self.over | jnp.any(in_a_row >= self.limit)
        return dataclasses.replace(self, in_a_row=in_a_row[-1], over=over)
