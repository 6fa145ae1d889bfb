"""What `gradhpo.utils.foreign` reads of other libraries is still what they say and hold."""

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jaxtyping import Array, Float, TypeCheckError, jaxtyped

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
    with pytest.raises(TypeError, match=r"takes_a_vector: argument vector must not be 'text'"):
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
    """What diffrax's adjoints put around that which they have differentiated already."""
    x = jnp.asarray(1.0)
    assert foreign.NO_TANGENT in said_by(jax.grad(lambda x: eqxi.nondifferentiable(x) ** 2), x)


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
    assert programs.contains_custom_vjp(jax.make_jaxpr(own_rule)(x).jaxpr)
    draws = {
        "uniform": lambda key: jax.random.uniform(key),
        "gamma": lambda key: jax.random.gamma(key, 2.0),
        "rbg": lambda key: jax.random.bits(jax.random.wrap_key_data(key, impl="rbg")),
    }
    for name, draw in draws.items():
        key = jnp.zeros(4, jnp.uint32) if name == "rbg" else jax.random.key(0)
        assert names_in(draw, key) & set(foreign.RANDOM), name


def test_what_a_failed_call_says():
    with pytest.raises(TypeError) as caught:
        (lambda x: x)()  # pyright: ignore[reportCallIssue]
    assert foreign.is_missing_argument(caught.value)
    assert foreign.is_out_of_memory(MemoryError())
    assert foreign.is_out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert not foreign.is_out_of_memory(ValueError("no"))


def test_a_check_at_run_time_is_found_in_what_jax_raises():
    @jax.jit
    def failing(x):
        return eqx.error_if(x, x > 0, "x is too large")

    with pytest.raises(Exception, match="x is too large") as caught:
        jax.block_until_ready(failing(jnp.asarray(1.0)))
    assert str(foreign.runtime_check(caught.value)) == "x is too large"
    assert foreign.runtime_check(ValueError("x is too large")) is None


def test_states_of_optax_are_read():
    w = jnp.ones(3)
    assert foreign.keeps_second_moments(optax.adam(0.1).init(w))
    assert foreign.keeps_second_moments(optax.chain(optax.clip(1.0), optax.adamw(0.1)).init(w))
    assert not foreign.keeps_second_moments(optax.sgd(0.1, momentum=0.9).init(w))
    fixed = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    scheduled = optax.inject_hyperparams(optax.sgd)(learning_rate=lambda count: 0.1)
    assert [float(x) for x in foreign.injected_values(fixed.init(w))] == pytest.approx([0.1])
    assert foreign.injected_values(scheduled.init(w)) == []
