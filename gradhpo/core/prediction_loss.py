"""Losses of the prediction, for methods in function space instead of parameter space."""

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradhpo.core.problem import Problem
from gradhpo.utils.advice import WHO_SEES
from gradhpo.utils.programs import readings, visible_leaves
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_arity, leaf_names
from gradhpo.utils.warn import place_of, warn_once


@checked
class PredictionLoss(eqx.Module):
    r"""A loss of the prediction: a function `predict`, and a loss of what it returns.

    This is $L(w, \lambda) = \ell(\lambda, h_w(x), x, y)$. Called as any loss is,
    `(params, hyperparams, batch)`, it returns `loss(predict(params, hyperparams, batch),
    hyperparams, batch)`. So every optimizer and every diagnostic takes it, and
    [`FunctionalOptimizer`][gradhpo.FunctionalOptimizer] can see the prediction in between, which it
    needs.

    **Arguments:**

    - `predict`: `(params, hyperparams, batch) -> predictions`, a pytree of arrays. Return the
        parameters beside the output if the loss has a penalty on them.
    - `loss`: `(predictions, hyperparams, batch) -> scalar`, or `-> (scalar, metrics)` with a dict
        of scalars.

    If the state has a `model_state`, `predict` takes it as its fourth argument and returns
    `(predictions, new_model_state)`; `loss` is called in the same way.

    **Raises:** `TypeError` for functions that do not take these arguments.

    ```python
    predict = lambda w, h, batch: batch[0] @ w
    squares = gradhpo.PredictionLoss(predict, lambda v, h, batch: jnp.mean((v - batch[1]) ** 2))
    x = jnp.ones((4, 2))
    assert squares(jnp.ones(2), None, (x, jnp.zeros(4))) == 4
    ```
    """

    predict: Callable
    loss: Callable

    def __check_init__(self):
        check_arity(self.loss, "loss", "predictions, hyperparams, batch")
        with_state = "params, hyperparams, batch, model_state"
        try:
            check_arity(self.predict, "predict", "params, hyperparams, batch")
        except TypeError:
            check_arity(self.predict, "predict", with_state)

    def __call__(
        self, params: PyTree, hyperparams: PyTree, batch: PyTree, *model_state: PyTree
    ) -> Any:
        """The loss, called like any other."""
        predictions = self.predict(params, hyperparams, batch, *model_state)
        if not model_state:
            return self.loss(predictions, hyperparams, batch)
        if not (isinstance(predictions, tuple) and len(predictions) == 2):
            raise ValueError(
                "predict got a model state, so it must return (predictions, new_model_state), "
                f"not a {type(predictions).__name__}"
            )
        predictions, new = predictions
        returned = self.loss(predictions, hyperparams, batch)
        if isinstance(returned, tuple) and len(returned) == 2:
            loss, metrics = returned
            return loss, (new, metrics)
        return returned, new

    def value(self, predictions: PyTree, hyperparams: PyTree, batch: PyTree) -> Any:
        """The loss at given predictions, without metrics."""
        returned = self.loss(predictions, hyperparams, batch)
        return returned[0] if isinstance(returned, tuple) else returned


def prediction_losses(name: str, problem: Problem) -> tuple[PredictionLoss, PredictionLoss]:
    """The training and the validation loss of a problem, both of them losses of the prediction.

    Warns about hyperparameters that act on the prediction itself: in function space, where the
    prediction is the variable, they have no derivative.

    **Arguments:**

    - `name`: of the optimizer, for the messages.
    - `problem`: the problem of one outer step.

    **Returns:** two [`PredictionLoss`][gradhpo.PredictionLoss].

    **Raises:** `TypeError` for other losses; `ValueError` for a problem with a model state, and if
    all hyperparameters act only on the prediction.

    ```python
    from gradhpo.extend import prediction_losses

    def estimate(self, problem, memory):  # of your own algorithm
        train, val = prediction_losses(type(self).__name__, problem)
    ```
    """
    phi, validation, z, hyperparams = problem
    train = _of_prediction(name, "train", phi.train_loss_fn)
    val = _of_prediction(name, "val", validation.val_loss_fn)
    if z.r is not None:
        raise ValueError(
            f"{name} takes no model_state: the function it fits to the model would need one too. "
            "Normalise without running state (LayerNorm, GroupNorm)"
        )
    params = eqx.combine(z.w, phi.frozen)
    both = (train, phi.batch(0)), (val, validation.val_batch)

    def predictions(h: PyTree) -> list[PyTree]:
        return [loss.predict(params, h, batch) for loss, batch in both]

    def read_by_losses(h: PyTree) -> Any:
        fixed = jax.lax.stop_gradient(predictions(hyperparams))
        (of_train, rest), (of_val, more) = (eqx.partition(v, eqx.is_inexact_array) for v in fixed)
        inner = lambda v, h: train.value(eqx.combine(v, rest), h, both[0][1])
        outer = val.value(eqx.combine(of_val, more), h, both[1][1])
        return outer, jax.grad(inner)(of_train, h)

    seen = jax.tree.leaves(visible_leaves(read_by_losses, hyperparams))
    numbers = lambda h: eqx.filter(predictions(h), eqx.is_inexact_array)
    inside = jax.tree.leaves(readings(numbers, hyperparams, by_derivative=False).by())
    _check_seen(name, problem, seen, inside)
    return train, val


def _of_prediction(name: str, which: str, loss: Any) -> PredictionLoss:
    if isinstance(loss, PredictionLoss):
        return loss
    raise TypeError(
        f"{name} takes losses of the prediction, but {which}_loss_fn is {place_of(loss)}. Write "
        f"{which}_loss = gradhpo.PredictionLoss(predict, loss) with predict(params, hyperparams, "
        "batch) -> predictions and loss(predictions, hyperparams, batch) -> scalar; all other "
        "optimizers take it too"
    )


def _check_seen(name: str, problem: Problem, seen: list[bool], inside: list[bool]) -> None:
    """Names the hyperparameters that act `inside` the prediction, where no derivative sees them."""
    names = leaf_names(problem.hyperparams)
    inside_names = list(itertools.compress(names, inside))
    why = (
        f"the prediction is the variable of {name}, so the effect of hyperparameters on it inside "
        f"predict has no derivative. {WHO_SEES['optimum']} see it, with the same losses"
    )
    if not any(seen):
        acting = f" ({', '.join(inside_names)}: inside predict)" if inside_names else ""
        raise ValueError(
            f"{name} sees none of the hyperparameters: at given predictions, neither loss depends "
            f"on them{acting}; {why}"
        )
    alone = [n for n, here, there in zip(names, inside, seen, strict=True) if here and not there]
    partly = [n for n, here, there in zip(names, inside, seen, strict=True) if here and there]
    if alone:
        zero = f"{name} gives a hypergradient of 0 for hyperparams {', '.join(alone)}, which act "
        warn_once(f"{zero}inside predict alone: {why}", *problem.functions())
    if partly:
        warn_once(
            f"{name} ignores the effect of hyperparams {', '.join(partly)} inside predict: {why}",
            *problem.functions(),
        )


def is_linear(function: Callable[[PyTree], PyTree], x: PyTree) -> bool:
    """Whether a function is linear, up to a constant, judged by its traced program, not by values.

    **Arguments:**

    - `function`: of one tree of floating-point arrays.
    - `x`: such a tree.

    **Returns:** `True` if the traced derivative does not read the point where it is taken, not even
    in a comparison, as with `jax.nn.relu`. A function without a forward derivative counts as not
    linear, and so does a loop (`lax.scan`), which is not examined.

    ```python
    from gradhpo.extend import is_linear

    assert is_linear(lambda w: 2 * w + 1, jnp.ones(3))
    assert not is_linear(jnp.tanh, jnp.ones(3))
    assert not is_linear(jax.nn.relu, jnp.ones(3))
    ```
    """
    ones = jax.tree.map(jnp.ones_like, x)
    push = lambda x: jax.jvp(function, (x,), (ones,))[1]
    return not any(jax.tree.leaves(readings(push, x, by_derivative=False).by()))
