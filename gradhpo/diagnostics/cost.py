"""What a compiled program costs: work and memory by the compiler's count, and wall time."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Container, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun, jaxprs_in_params
from jaxtyping import PyTree

from gradhpo.utils.foreign import OPEN_LOOPS
from gradhpo.utils.freezing import carried


@dataclasses.dataclass(frozen=True)
class Cost:
    """The costs of one program.

    - `flops`: floating-point operations. Loop bodies are multiplied by their trip count; of a
        conditional's branches the most expensive one counts, taken or not. A loop inside a linear
        solver, or one with a length known only at run time, counts once: then `at_least` is true.
    - `temporary_bytes`: memory that the program needs in addition to its arguments and results.
    - `total_bytes`: the same, including them.
    - `seconds`: for one run, `nan` if it was not run.
    """

    flops: float
    at_least: bool
    temporary_bytes: int
    total_bytes: int
    seconds: float = float("nan")


class Program:
    """A compiled function of pytrees, for the arrays that it was made with.

    Arrays may be `jax.ShapeDtypeStruct`s if the program is only inspected and not run. Everything
    that is not an array is part of the program; only the arrays of the result are returned, without
    frozen leaves, which `step` returns unchanged.
    """

    def __init__(self, function: Callable, *arguments: PyTree):
        self._arrays, static = eqx.partition(on_device(arguments), _is_array)

        def on_arrays(arrays):
            return carried(function(*eqx.combine(arrays, static)))[0]

        traced = jax.jit(on_arrays).trace(self._arrays)
        self._lowered, self._jaxpr = traced.lower(), traced.jaxpr
        self._compiled = self._lowered.compile()

    def __call__(self, *arguments: PyTree) -> Any:
        """The result, for other arguments of the same kind if given."""
        arrays = eqx.filter(on_device(arguments), _is_array) if arguments else self._arrays
        return jax.block_until_ready(self._compiled(arrays))

    def timed(self) -> tuple[Any, float]:
        """The result, and the seconds of a run: the least of five, unless they are long."""
        seconds, result = [], None
        while len(seconds) < 5 and sum(seconds) < 0.5:
            start = time.perf_counter()
            result = self()
            seconds.append(time.perf_counter() - start)
        return result, min(seconds)

    @property
    def flops_with_loops_once(self) -> float:
        """The compiler's count, in which the body of a loop counts once."""
        return _flops(self._compiled)

    @property
    def bytes_with_loops_once(self) -> float:
        """Read and written by all operations, as the compiler counts them."""
        return float((self._compiled.cost_analysis() or {}).get("bytes accessed", 0.0))

    @property
    def host_bytes(self) -> int:
        """Temporary memory on the host, if its memory is separate."""
        return self._memory.host_temp_size_in_bytes

    @property
    def temporary_bytes(self) -> int:
        return self._memory.temp_size_in_bytes

    @property
    def argument_bytes(self) -> int:
        """Memory of the arguments, per device."""
        return self._memory.argument_size_in_bytes

    @property
    def result_bytes(self) -> int:
        """Memory of the results, per device; until they are written it may hold temporaries."""
        return self._memory.output_size_in_bytes

    @property
    def text(self) -> str:
        """The optimized program."""
        return self._compiled.as_text() or ""

    @property
    def _memory(self) -> Any:
        found = self._compiled.memory_analysis()
        if found is None:
            raise NotImplementedError(
                f"the compiler for {jax.default_backend()} does not report memory"
            )
        return found

    def has(self, operations: Container[str]) -> bool:
        """Whether one of these operations (names of JAX primitives) is in the program."""
        return any(eqn.primitive.name in operations for eqn in _operations(self._jaxpr.jaxpr))

    def computes_in(self, dtypes: Container[str]) -> bool:
        """Whether a result anywhere in the program has one of these dtypes, given by name."""
        return any(
            str(getattr(out.aval, "dtype", "")) in dtypes
            for eqn in _operations(self._jaxpr.jaxpr)
            for out in eqn.outvars
        )

    @functools.cached_property
    def cost(self) -> Cost:
        memory = self._memory
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return Cost(
            flops=_once(self._jaxpr, self._lowered) + _beyond_once(self._jaxpr.jaxpr),
            at_least=self.has(OPEN_LOOPS),
            temporary_bytes=memory.temp_size_in_bytes,
            total_bytes=memory.temp_size_in_bytes + held - memory.alias_size_in_bytes,
        )


# For a CPU, which does not report how much is free.
_FREE_BYTES = 2.0**31


def free_bytes(tree: PyTree) -> float:
    """Memory that a program on a tree may take: half of what its devices report as free.

    The device with the least free memory counts.
    """
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    devices = set().union(*(x.sharding.addressable_devices for x in arrays))
    return min(map(_free_on, devices or jax.local_devices()[:1]))


def _free_on(device: Any) -> float:
    stats: dict[str, Any] = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return _FREE_BYTES
    return max(1.0, (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) / 2)


def on_device(tree: PyTree) -> PyTree:
    """NumPy arrays become arguments of a program: as constants they would be compiled in."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, tree)


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _flops(program: Any) -> float:
    """The compiler's count; `nan` if it has none."""
    analysis = program.cost_analysis()
    return float("nan") if analysis is None else float(analysis.get("flops", 0.0))


def _beyond_once(program: Jaxpr) -> float:
    """What to add to a count that includes the body of a loop once."""
    return math.fsum(_of_operation(eqn) for eqn in program.eqns)


def _of_operation(eqn: Any) -> float:
    if eqn.primitive.name == "scan":
        length, unroll, body = (eqn.params[name] for name in ("length", "unroll", "jaxpr"))
        # For an unrolled loop the compiler sees several copies of the body, and the remaining
        # steps.
        copies = length if unroll >= length else unroll + length % unroll
        once = _once(body)
        return length * (once + _beyond_once(body.jaxpr)) - copies * once
    if eqn.primitive.name == "cond":
        # The compiler counts the most expensive branch; loops may change which one that is.
        branches = eqn.params["branches"]
        beyond = [_beyond_once(branch.jaxpr) for branch in branches]
        if not any(beyond):
            return 0.0
        once = [_once(branch) for branch in branches]
        return max(map(sum, zip(once, beyond, strict=True))) - max(once)
    return math.fsum(map(_beyond_once, jaxprs_in_params(eqn.params)))


def _once(program: ClosedJaxpr, lowered: Any = None) -> float:
    """The flops of a traced program, which may be `lowered` already, with loops once.

    Before optimisation. Compilers for GPUs do not count these: then the one for the CPU does.
    """
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.in_avals]
    lower = lambda: jax.jit(jaxpr_as_fun(program)).lower(*shapes)
    found = _flops(lower() if lowered is None else lowered)
    if math.isnan(found):
        with contextlib.suppress(RuntimeError), jax.default_device(jax.devices("cpu")[0]):
            found = _flops(lower())
    return found


def _operations(program: Jaxpr) -> Iterator[Any]:
    """All operations, including nested ones."""
    for eqn in program.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _operations(inner)
