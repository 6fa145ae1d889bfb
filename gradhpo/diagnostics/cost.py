"""What a compiled program costs: work and memory by the compiler's count, time by the clock."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun, jaxprs_in_params
from jaxtyping import PyTree


# Loops whose length only the run finds, and lineax's solvers, which hide theirs.
_OPEN = ("while", "linear_solve")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one program.

    - `flops`: floating-point operations, loops counted as often as they run. A loop whose length
        is found only while it runs, or inside a linear solver, counts once: then `at_least`.
    - `temporary_bytes`: memory that the program needs besides its arguments and results.
    - `total_bytes`: with them.
    - `seconds`: of one run, `nan` if it was not run.
    """

    flops: float
    at_least: bool
    temporary_bytes: int
    total_bytes: int
    seconds: float = float("nan")


class Program:
    """A compiled function of pytrees, for the arrays that it was made with.

    Arrays may be `jax.ShapeDtypeStruct`s where it is to be looked at and not to be run. What is
    not an array is part of the program; of the result only the arrays are returned.
    """

    def __init__(self, function: Callable, *arguments: PyTree):
        self._arrays, static = eqx.partition(arguments, _is_array)

        def on_arrays(arrays):
            return eqx.filter(function(*eqx.combine(arrays, static)), eqx.is_array)

        traced = jax.jit(on_arrays).trace(self._arrays)
        self._lowered, self._jaxpr = traced.lower(), traced.jaxpr
        self._compiled = self._lowered.compile()

    def __call__(self, *arguments: PyTree) -> Any:
        """The result, for other arguments of the same kind if some are given."""
        arrays = eqx.filter(arguments, _is_array) if arguments else self._arrays
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
        """As the compiler counts: the body of a loop once, however often it runs."""
        return _flops(self._compiled)

    @property
    def temporary_bytes(self) -> int:
        return self._memory.temp_size_in_bytes

    @property
    def _memory(self) -> Any:
        found = self._compiled.memory_analysis()
        if found is None:
            raise NotImplementedError(f"the compiler for {jax.default_backend()} counts no memory")
        return found

    @functools.cached_property
    def cost(self) -> Cost:
        memory = self._memory
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return Cost(
            flops=_with_loops(self._jaxpr, _flops(self._lowered)),
            at_least=_has_open_loop(self._jaxpr.jaxpr),
            temporary_bytes=memory.temp_size_in_bytes,
            total_bytes=memory.temp_size_in_bytes + held - memory.alias_size_in_bytes,
        )


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _flops(program: Any) -> float:
    analysis = program.cost_analysis()
    return float((analysis or {}).get("flops", 0.0))


def _with_loops(program: ClosedJaxpr, counted: float) -> float:
    """What was `counted` with the bodies of loops once, made right for their lengths."""
    for length, body in _scans(program.jaxpr):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in body.in_avals]
        once = _flops(jax.jit(jaxpr_as_fun(body)).lower(*shapes))
        counted += length * _with_loops(body, once) - once
    return counted


def _scans(program: Jaxpr) -> Iterator[tuple[int, ClosedJaxpr]]:
    """The outermost loops of known length, with their bodies."""
    for eqn in program.eqns:
        if eqn.primitive.name == "scan":
            yield eqn.params["length"], eqn.params["jaxpr"]
        else:
            for inner in jaxprs_in_params(eqn.params):
                yield from _scans(inner)


def _has_open_loop(program: Jaxpr) -> bool:
    return any(
        eqn.primitive.name in _OPEN or any(map(_has_open_loop, jaxprs_in_params(eqn.params)))
        for eqn in program.eqns
    )
