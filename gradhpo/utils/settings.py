"""Checks of the settings of optimizers and `run`: numbers, counts, rules. Each names its remedy."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, PyTree, Real

from gradhpo.utils.foreign import uncalled
from gradhpo.utils.repeatable import check_repeatable
from gradhpo.utils.validation import check_arity, native


def setting(value: Real[ArrayLike, ""]) -> Array:
    """Converter for numeric fields: an array leaf, so that a new value does not recompile.

    Equinox gives its annotation to the argument of the constructor, where `checked` finds it.
    """
    if isinstance(value, (bool, np.bool_)) or not eqx.is_array_like(value) or np.ndim(value):
        raise TypeError(f"a numeric setting must be one real number, of shape (), got {value!r}")
    dtype = jnp.result_type(value := native(value))
    if not jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"a numeric setting must be a real number, got {value!r}")
    return jnp.asarray(value, dtype=jnp.result_type(float))


def setting_or_schedule(value: Real[ArrayLike, ""] | Callable) -> Array | Callable:
    """Converter for a numeric field that may also be a schedule, a function of the step.

    Programs are compiled for a schedule, not for its values.
    """
    return value if callable(value) else setting(value)


def check_setting(name: str, value: Array, good: Callable[[np.ndarray], Any], rule: str) -> None:
    """Checks that `good` accepts a setting whose value is known (a traced one is trusted)."""
    if isinstance(value, Tracer) or not eqx.is_array(value):
        return
    if not np.all(good(np.asarray(value))):
        raise ValueError(f"{name} must be {rule}, got {name}={np.asarray(value)}")


def check_count(name: str, value: int, *, most: int | None = None) -> None:
    """A static count: a whole number of at least 1, and at most `most` if given."""
    if isinstance(value, bool) or not isinstance(value, int):
        whole = f": write int({name})" if isinstance(value, np.integer) else ""
        raise TypeError(f"{name} must be a Python int (it fixes shapes), got {value!r}{whole}")
    if value < 1 or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name} must be at least 1{upper}, got {name}={value}")


def check_inner_rule(
    name: str, inner_optimizer: Any, grad_fn: Any, update_fn: Any, inner_solver: Any = None
) -> None:
    """Checks that an inner step is defined in exactly one way."""
    if inner_solver is not None:
        _check_solver(name, inner_optimizer, grad_fn, update_fn)
    elif grad_fn is not None and inner_optimizer is None:
        raise ValueError(
            f"{name} got a grad_fn without an inner_optimizer, which uses the gradient: pass "
            "inner_optimizer=optax.sgd(0.1) as well (an update_fn computes its own gradient)"
        )
    if inner_optimizer is None and update_fn is None and inner_solver is None:
        raise ValueError(
            f"{name} needs an inner update: pass inner_optimizer=optax.sgd(0.1) (or a function "
            "hyperparams -> optax transformation), or update_fn=(params, hyperparams, batch) "
            "-> params"
        )
    if inner_optimizer is not None and update_fn is not None:
        raise ValueError(
            f"{name} got both inner_optimizer and update_fn; pass only one of them, since "
            "either alone defines an inner step"
        )
    called = uncalled(inner_optimizer)
    if called is not None:
        raise TypeError(
            f"{name}(inner_optimizer=...) got {called.partition('(')[0]} itself, which would take "
            f"the hyperparameters for its first argument: write {called}; or, to tune its "
            "arguments, lambda hyperparams: optax.sgd(hyperparams['learning_rate'])"
        )
    is_optax = isinstance(inner_optimizer, optax.GradientTransformation)
    if not (inner_optimizer is None or is_optax or callable(inner_optimizer)):
        raise TypeError(
            f"{name}(inner_optimizer=...) must be an optax.GradientTransformation or a function "
            f"hyperparams -> optax.GradientTransformation, got {inner_optimizer!r}"
        )
    for argument, function, result in (
        ("grad_fn", grad_fn, "gradient"),
        ("update_fn", update_fn, "params"),
    ):
        if not (function is None or callable(function)):
            raise TypeError(
                f"{name}({argument}=...) must be a function (params, hyperparams, batch) -> "
                f"{result}, got {function!r}"
            )


def _check_solver(name: str, inner_optimizer: Any, grad_fn: Any, update_fn: Any) -> None:
    if inner_optimizer is not None:
        raise ValueError(
            f"{name} got both inner_optimizer and inner_solver; pass only one of them, since the "
            f"solver replaces all inner steps: {name}(outer_optimizer=optax.adam(0.01), "
            "inner_solver=solver)"
        )
    if grad_fn is not None and update_fn is not None:
        raise ValueError(
            f"{name} got both a grad_fn and an update_fn with the inner_solver; pass only one of "
            "them, since either alone defines the equation that the solver solves"
        )


def check_outer_optimizer(name: str, outer_optimizer: Any) -> None:
    if not (outer_optimizer is None or isinstance(outer_optimizer, optax.GradientTransformation)):
        raise TypeError(
            f"{name}(outer_optimizer=...) must be an optax.GradientTransformation such as "
            f"optax.adam(1e-2), or None with lr_hyper given to step; got {outer_optimizer!r}"
        )


def check_outer_rate(optimizer: Any, lr_hyper: Any) -> None:
    """`lr_hyper` is given where an optimizer has no `outer_optimizer`, and only there."""
    if not optimizer.tunes:
        if lr_hyper is not None:
            raise ValueError(
                f"got lr_hyper={lr_hyper!r} although {type(optimizer).__name__} leaves the "
                "hyperparameters as they are: leave lr_hyper out"
            )
        return
    has_outer_optimizer = optimizer.outer_optimizer is not None
    if has_outer_optimizer and lr_hyper is not None:
        raise ValueError(
            f"got lr_hyper={lr_hyper!r} although the optimizer has an outer_optimizer, which "
            "sets its own step size: leave lr_hyper out, or construct with outer_optimizer=None"
        )
    if not has_outer_optimizer and lr_hyper is None:
        raise ValueError(
            "the optimizer has outer_optimizer=None, so step needs a step size: pass "
            "lr_hyper=0.1, or construct with outer_optimizer=optax.adam(1e-2)"
        )


def check_rate_schedule(schedule: Callable) -> None:
    """`lr_hyper` as a function of the step: traced, and one real number at every step."""
    check_arity(schedule, "lr_hyper", "step")

    step = jax.ShapeDtypeStruct((), jnp.int32)
    check_repeatable(
        schedule,
        (step,),
        "lr_hyper(step)",
        made="rate of the same step",
        values="its step, which is traced: {said}. Write jnp.where(step < 100, 0.1, 0.01) instead "
        "of a branch, or pass an optax schedule",
        draws="counts its calls, in Python, and a compiled run would do so once for all steps. "
        "Compute it from the step alone: 0.1 * jax.random.uniform(jax.random.fold_in(key, step))",
    )
    rate = eqx.filter_eval_shape(schedule, step)
    if eqx.is_array_like(rate):
        rate = jax.eval_shape(lambda: jnp.asarray(rate))
    if not (isinstance(rate, jax.ShapeDtypeStruct) and rate.shape == () and _is_real(rate.dtype)):
        is_tree = not isinstance(rate, str) and rate is not None
        found = eqx.tree_pformat(rate, struct_as_array=True) if is_tree else repr(rate)
        raise TypeError(f"lr_hyper(step) returned {found}: return the rate, one real number")


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def check_tunes(optimizer: Any) -> None:
    """Checks that there is a hypergradient."""
    if not optimizer.tunes:
        raise TypeError(
            f"{type(optimizer).__name__} leaves the hyperparameters as they are and computes no "
            "hypergradient: use another optimizer, and its adopt(state) for a state of this one"
        )


def outer_rate(value: Any) -> ArrayLike | None:
    """`lr_hyper` as an array: a Python float would be static, and compiled in."""
    if value is None:
        return value
    if callable(value):
        raise TypeError(
            "lr_hyper must be a number here; a schedule step -> rate goes to gradhpo.run"
        )
    if isinstance(value, (bool, complex)) or not eqx.is_array_like(value) or np.ndim(value):
        raise TypeError(f"lr_hyper must be one real number, got {value!r}")
    if isinstance(value, (int, float)) and value < 0:
        raise ValueError(f"lr_hyper must not be negative, got {value}: the step is -lr_hyper * g")
    dtype = jnp.result_type(float)
    # A number goes to the device with the call that uses it; on its own it takes 0.1 ms per step.
    return (np if isinstance(value, (int, float)) else jnp).asarray(value, dtype)


def check_episodes(
    num_steps: int, steps_per_episode: int | None, reptile_rate: Any, step: int
) -> None:
    """Checks that a run consists of whole episodes, and starts at the start of one."""
    rate = np.asarray(reptile_rate)
    check_setting("reptile_rate", jnp.asarray(rate), _is_share, "in [0, 1]")
    if steps_per_episode is None:
        if rate != 1:
            raise ValueError(
                f"reptile_rate={rate} says how an episode starts from the last one, but there "
                "are no episodes: pass steps_per_episode as well"
            )
        return
    check_count("steps_per_episode", steps_per_episode)
    if num_steps % steps_per_episode:
        raise ValueError(
            f"num_steps={num_steps} must be a multiple of steps_per_episode={steps_per_episode}: "
            f"write num_steps={max(1, num_steps // steps_per_episode)} * {steps_per_episode}"
        )
    if step % steps_per_episode:
        raise ValueError(
            f"the state has taken {step} steps, which is not a whole number of episodes of "
            f"steps_per_episode={steps_per_episode}, and the start of its episode is unknown; "
            "to start one here: optimizer.restart(state).update(step=0)"
        )


def check_restart(start: PyTree, reptile_rate: Any, model_state: PyTree) -> None:
    """Checks what `restart` needs in addition to the state."""
    check_setting("reptile_rate", jnp.asarray(reptile_rate), _is_share, "in [0, 1]")
    traced = isinstance(reptile_rate, Tracer)
    moves = not traced and np.any(reptile_rate != 1)
    if (traced or moves) and model_state is not None and not hasattr(start, "model_state"):
        raise ValueError(
            f"reptile_rate={reptile_rate} needs the start of the episode, for the model state too: "
            "pass the state from there, restart(state, state_at_start, reptile_rate)"
        )
    if start is None and moves:
        raise ValueError(
            f"reptile_rate={reptile_rate} needs the start of the episode: pass its parameters as "
            "well, restart(state, start_of_episode.params, reptile_rate)"
        )


def _is_share(x: np.ndarray) -> Any:
    return (x >= 0) & (x <= 1)
