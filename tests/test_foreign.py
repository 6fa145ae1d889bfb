"""What `gradhpo.utils.foreign` relies on in other libraries is still there."""

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.extend.random import threefry_2x32
from jaxtyping import Array, ArrayLike, Float, Real, TypeCheckError, jaxtyped

from gradhpo.utils import foreign, programs
from gradhpo.utils.typecheck import beartype, checked


def said_by(function, *arguments):
    with pytest.raises(foreign.NO_DERIVATIVE) as caught:
        function(*arguments)
    return str(caught.value)


def test_a_refused_argument_is_found_in_the_report():
    def takes_a_vector(vector: Float[Array, " n"]):
        return vector

    takes_a_vector.__module__ = "gradhpo.example"
    with pytest.raises(TypeCheckError) as caught:
        jaxtyped(typechecker=beartype)(takes_a_vector)("text")
    parameter, value, expected = foreign.refused_argument(str(caught.value)) or ("", "", "")
    assert (parameter, value) == ("vector", "'text'")
    assert "Float" in expected
    assert foreign.refused_argument("something else") is None
    with pytest.raises(TypeError, match=r"takes_a_vector: vector must be .*got 'text'"):
        checked(takes_a_vector)("text")


def while_loop(x):
    return jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, x)


@jax.custom_vjp
def own_rule(x):
    return x**2


own_rule.defvjp(lambda x: (x**2, x), lambda x, bar: (2 * x * bar,))


def callback(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), x.dtype), x)


def test_missing_rules_are_told_as_before():
    x = jnp.asarray(1.0)
    assert foreign.NO_REVERSE in said_by(jax.grad(while_loop), x)
    assert foreign.NO_FORWARD in said_by(jax.jvp, own_rule, (x,), (x,))
    assert foreign.NO_CALLBACK_DERIVATIVE in said_by(jax.grad(callback), x)


def test_unexpected_tangents_are_told_as_before():
    """What diffrax's adjoints put around values that they have already differentiated."""
    x = jnp.asarray(1.0)
    assert foreign.NO_TANGENT in said_by(jax.grad(lambda x: eqxi.nondifferentiable(x) ** 2), x)


@pytest.mark.parametrize(
    "function",
    [
        lambda i: jnp.arange(9.0)[i : i + 2],
        lambda i: np.arange(9.0)[i],
        lambda i: np.random.default_rng(i),
        lambda i: [1.0, 2.0][i],
        lambda i: jnp.arange(i),
        lambda i: 1.0 if i else 2.0,
        int,
    ],
)
def test_what_needs_a_value_says_so_as_before(function):
    with pytest.raises((TypeError, ValueError, IndexError)) as caught:
        jax.make_jaxpr(function)(1)
    assert foreign.needs_a_value(caught.value)
    for error in (TypeError("unsupported operand"), IndexError("out of range"), KeyError("x")):
        assert not foreign.needs_a_value(error)


def names_in(function, *arguments):
    def walk(program):
        for eqn in program.eqns:
            yield eqn.primitive.name
            for inner in jaxprs_in_params(eqn.params):
                yield from walk(inner)

    return set(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


def test_operations_have_the_names_that_are_looked_for():
    x = jnp.asarray(1.0)
    solve = lambda x: lx.linear_solve(lx.MatrixLinearOperator(x * jnp.eye(2)), jnp.ones(2)).value
    assert "while" in names_in(while_loop, x)
    assert "linear_solve" in names_in(solve, x)
    assert names_in(jax.vmap(solve), jnp.ones(3)) & set(foreign.OPEN_LOOPS)
    assert any(map(foreign.is_custom_vjp, names_in(own_rule, x)))
    assert programs.contains(jax.make_jaxpr(own_rule)(x).jaxpr, foreign.is_custom_vjp)
    checks = lambda x: eqx.error_if(x, x > 0, "x is too large")
    assert names_in(checks, x) & set(foreign.CALLBACKS)
    assert any(map(foreign.is_recomputed, names_in(jax.checkpoint(jnp.sin), x)))
    assert any(map(foreign.is_recomputed, names_in(eqx.filter_checkpoint(jnp.sin), x)))


DRAWS = (
    jax.random.bits,
    jax.random.normal,
    lambda key: jax.random.gamma(key, 2.0),
    lambda key: jax.random.permutation(key, 5),
    lambda key: jax.random.categorical(key, jnp.zeros(3)),
)


def test_random_numbers_are_found_in_a_trace():
    """Drawn in every public way, with keys of every kind; every name we look for occurs."""
    seen = set()
    for kind in ("threefry2x32", "rbg", "unsafe_rbg"):
        with jax.default_prng_impl(kind):
            for key in (jax.random.key(0), jax.random.PRNGKey(0)):
                for draw in DRAWS:
                    found = names_in(draw, key) & set(foreign.RANDOM)
                    assert found, (kind, draw)
                    seen |= found
    # Their building blocks, which may be called directly.
    words = jnp.zeros(4, jnp.uint32)
    for draw in (
        lambda words: threefry_2x32(words[:2], words),
        lambda words: jax.lax.rng_bit_generator(words, (3,)),
    ):
        found = names_in(draw, words) & set(foreign.RANDOM)
        assert found
        seen |= found
    assert seen == set(foreign.RANDOM)
    without = lambda key: jax.random.split(jax.random.fold_in(key, 1))
    assert not names_in(without, jax.random.key(0)) & set(foreign.RANDOM)


def test_what_a_failed_call_says():
    with pytest.raises(TypeError) as caught:
        (lambda x: x)()  # pyright: ignore[reportCallIssue]
    assert foreign.is_missing_argument(caught.value)


# An exbibyte exceeds the address space: it fails at once, and nothing is written.
ABSURD = 2**57


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: jnp.zeros(ABSURD),
        lambda: jax.jit(lambda x: x + jnp.ones(ABSURD))(1.0),
        lambda: jax.device_put(np.broadcast_to(np.zeros(1), (ABSURD,))),
        lambda: np.zeros(ABSURD),
    ],
)
def test_an_allocation_that_fails_is_told_from_other_errors(allocate):
    with pytest.raises((jax.errors.JaxRuntimeError, MemoryError)) as caught:
        jax.block_until_ready(allocate())
    assert foreign.is_out_of_memory(caught.value)


def test_another_error_at_run_time_is_not_out_of_memory():
    def fails(x):
        raise ValueError("no")

    x = jnp.zeros(())
    with pytest.raises(jax.errors.JaxRuntimeError, match="no") as caught:
        jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(fails, x, x))(x))
    assert not foreign.is_out_of_memory(caught.value)


def test_a_check_at_run_time_is_found_in_what_jax_raises():
    @jax.jit
    def failing(x):
        return eqx.error_if(x, x > 0, "x is too large")

    with pytest.raises(Exception, match="x is too large") as caught:
        jax.block_until_ready(failing(jnp.asarray(1.0)))
    assert str(foreign.runtime_check(caught.value)) == "x is too large"
    assert foreign.runtime_check(ValueError("x is too large")) is None


def test_states_of_optax_are_read():
    w, pair = jnp.ones(3), optax.LookaheadParams.init_synced
    assert foreign.keeps_second_moments(optax.adam(0.1).init(w))
    assert foreign.keeps_second_moments(optax.chain(optax.clip(1.0), optax.adamw(0.1)).init(w))
    assert not foreign.keeps_second_moments(optax.sgd(0.1, momentum=0.9).init(w))
    assert foreign.searches_along_lines(optax.lbfgs().init(w))
    assert foreign.searches_along_lines(optax.scale_by_backtracking_linesearch(5).init(w))
    assert not foreign.searches_along_lines(optax.adam(0.1).init(w))
    assert foreign.takes_objective(optax.contrib.sophia(0.1).init(w))
    assert not foreign.takes_objective(optax.lbfgs().init(w))
    assert foreign.looks_ahead(optax.chain(optax.lookahead(optax.sgd(0.1), 5, 0.5)).init(pair(w)))
    free = optax.contrib.schedule_free_sgd(0.1).init(w)
    assert [x.shape for x in foreign.averages(free)] == [(3,)]
    fixed = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    scheduled = optax.inject_hyperparams(optax.sgd)(learning_rate=lambda count: 0.1)
    assert [float(x) for x in foreign.injected_values(fixed.init(w))] == pytest.approx([0.1])
    assert foreign.injected_values(scheduled.init(w)) == []


def test_what_optax_makes_transformations_with():
    assert foreign.uncalled(optax.sgd) == "optax.sgd(0.1)"
    assert foreign.uncalled(optax.contrib.dog) == "optax.contrib.dog(0.1)"
    assert foreign.uncalled(optax.scale_by_adam) == "optax.scale_by_adam(...)"
    assert foreign.uncalled(optax.identity) == "optax.identity()"
    assert foreign.uncalled(optax.MultiSteps) == "optax.MultiSteps(...)"
    ours = (lambda h: optax.sgd(h), optax.sgd(0.1), optax.constant_schedule(0.1), 3, None)
    assert all(foreign.uncalled(x) is None for x in ours)
    assert foreign.makes_a_transformation(optax.MultiSteps(optax.sgd(0.1), 2))
    assert not foreign.makes_a_transformation(optax.sgd(0.1))


def test_a_number_that_was_expected_is_recognised():
    def takes(number: Real[ArrayLike, ""], vector: Float[Array, " n"]):
        return number, vector

    takes.__module__ = "gradhpo.example"
    for arguments, is_number in ((("text", jnp.ones(2)), True), ((1.0, "text"), False)):
        with pytest.raises(TypeCheckError) as caught:
            jaxtyped(typechecker=beartype)(takes)(*arguments)
        _, _, expected = foreign.refused_argument(str(caught.value)) or ("", "", "")
        assert foreign.is_one_number(expected) == is_number
