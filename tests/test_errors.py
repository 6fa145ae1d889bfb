"""Misuse: each kind raises an error that names the argument and says what to write instead."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo.utils.settings import outer_rate
from gradhpo.utils.structure import check_same_structure, where_they_differ


SGD = optax.sgd(0.1)
W, H, B = jnp.zeros(3), jnp.ones(3), jnp.ones(3)


def train_loss(w, h, batch):
    return jnp.sum(jnp.square(w - h)) + 0 * jnp.sum(batch)


def val_loss(w, h, batch):
    return jnp.sum(jnp.square(w - 1)) + 0 * jnp.sum(batch)


def one_step(**changes):
    return gradhpo.OneStepOptimizer(**({"inner_optimizer": SGD, "outer_optimizer": SGD} | changes))


def step(optimizer=None, state=None, train_batch=B, val_batch=B, tl=train_loss, vl=val_loss, **kw):
    optimizer = one_step() if optimizer is None else optimizer
    state = optimizer.init(W, H) if state is None else state
    return optimizer.step(state, train_batch, val_batch, tl, vl, **kw)


def init(params=W, hyperparams=H):
    return one_step().init(params, hyperparams)


def run(train_data=B, val_data=B, optimizer=None, num_steps=2, **kw):
    optimizer = one_step() if optimizer is None else optimizer
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    state = optimizer.init(W, H)
    settings = {"num_steps": num_steps, "progress": False} | kw
    return gradhpo.run(optimizer, state, losses, train_data, val_data, **settings)


class BatchNormed(eqx.Module):
    norm: eqx.nn.BatchNorm
    weight: jax.Array


class OnlyArrays(eqx.Module):
    w: jax.Array
    h: jax.Array


def swapped_all_arrays():
    params, hyperparams = gradhpo.partition(OnlyArrays(W, H), lambda m: m.h)
    return init(hyperparams, params)


def swapped_dicts():
    params, hyperparams = gradhpo.partition({"w": W, "h": H}, lambda d: d["h"])
    return init(hyperparams, params)


def swapped():
    model = eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))
    params, hyperparams = gradhpo.partition(model, lambda m: m.layers[0])
    return init(hyperparams, params)


def implicit(**changes):
    return gradhpo.ImplicitOptimizer(**({"inner_optimizer": SGD, "outer_optimizer": SGD} | changes))


def coupled(w, h, batch):
    """The Jacobian of its gradient is not symmetric, and JAX cannot tell."""
    return jnp.sum(jnp.square(w - h)) + w[0] * gradhpo.detach(jnp.sin(w[1]))


def detached(solver):
    return step(implicit(linear_solver=solver), tl=coupled)


def contraction(w, h, batch):
    return w - 0.1 * (w - h)


def by_cg_through_an_update_fn():
    cg = lx.CG(rtol=1e-5, atol=1e-5)
    return step(implicit(inner_optimizer=None, update_fn=contraction, linear_solver=cg))


def by_nystrom_through_an_update_fn():
    nystrom = gradhpo.Nystrom(2, 0.1, jax.random.key(0))
    return step(implicit(inner_optimizer=None, update_fn=contraction, linear_solver=nystrom))


def with_a_while_loop_in_the_loss():
    def loop(w):
        return jax.lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] * 2, c[1] + 1), (w, 0))[0]

    return step(tl=lambda w, h, batch: jnp.sum(loop(w) * h))


def online(**changes):
    return gradhpo.OnlineHypergradientOptimizer(SGD, **changes)


def estimate_theta(optimizer, state):
    tasks = (2,) * isinstance(optimizer, gradhpo.TaskBatched)
    batches = gradhpo.BatchStack(jnp.ones((4, *tasks, 3)))
    return optimizer.estimate_theta(state, batches, jnp.ones((*tasks, 3)), train_loss, val_loss)


def foreign_inner_state():
    adam = one_step(inner_optimizer=optax.adam(0.1))
    return step(optimizer=one_step(), state=adam.init(W, H))


def foreign_outer_state():
    adam = one_step(outer_optimizer=optax.adam(0.1))
    return step(optimizer=one_step(), state=adam.init(W, H))


def needs_extra_arguments():
    return step(one_step(inner_optimizer=optax.polyak_sgd()))


def branches_on_a_value():
    inner = lambda h: optax.sgd(
        optax.schedules.linear_schedule(h[0], 0.0, 3) if h[0] > 0 else optax.constant_schedule(1.0)
    )
    return step(one_step(inner_optimizer=inner))


def checkpoints(**kw):
    return gradhpo.UnrolledOptimizer(SGD, SGD, **kw)


def batch_generator():
    yield B


class Loader:
    def __iter__(self):
        return iter([B])


def looping(w, h):
    turn = lambda c: (c[0] * h, c[1] + 1)
    return jax.lax.while_loop(lambda c: c[1] < 3, turn, (w, 0))[0]


def looping_loss(w, h, batch):
    return jnp.sum(looping(w, h))


def differentiating_a_loop(w, h, batch):
    return w - jax.grad(lambda w: looping_loss(w, h, batch))(w)


def opaque_loss(w, h, batch):
    return jax.pure_callback(np.sum, jax.ShapeDtypeStruct((), w.dtype), w * h)


@jax.custom_vjp
def with_a_loop_in_its_rule(w):
    return jnp.sum(w**2)


with_a_loop_in_its_rule.defvjp(
    lambda w: (jnp.sum(w**2), w), lambda w, bar: (bar * 2 * looping(w, jnp.ones_like(w)),)
)


def by_hand(optimizer, update_fn=lambda w, h, b: looping(w, h), **changes):
    return optimizer(outer_optimizer=SGD, update_fn=update_fn, **changes)


def peak(h):
    return optax.sgd(optax.warmup_cosine_decay_schedule(0.0, h[0], 3, 10))


MODEL = {"w": W, "h": H, "layers": [W, H]}
BOTH = train_loss, val_loss
LOSSES = gradhpo.LossFunctions(*BOTH)
TEXT = np.array(["cat", "dog", "cat"])


# (the mistake, the error, what its message must say)
MISUSES = {
    "CG for an update_fn": (by_cg_through_an_update_fn, ValueError, "lineax.CG.*use lineax.GMRES"),
    "Nystrom for an update_fn": (
        by_nystrom_through_an_update_fn, ValueError, "symmetric operator.*lineax.GMRES",
    ),
    "CG beside detach": (
        lambda: detached(lx.CG(rtol=1e-5, atol=1e-5)), ValueError,
        r"lineax\.CG.*symmetric system, which an update_fn, gradhpo\.detach or.*use lineax\.GMRES",
    ),
    "Cholesky beside detach": (
        lambda: detached(lx.Cholesky()), ValueError, r"lineax\.Cholesky.*gradhpo\.detach or",
    ),
    "Nystrom beside detach": (
        lambda: detached(gradhpo.Nystrom(2, 0.1, jax.random.key(0))), ValueError,
        r"symmetric operator.*gradhpo\.detach or another custom_vjp.*lineax\.GMRES",
    ),
    "solver is a string": (
        lambda: implicit(linear_solver="cg"), TypeError, "linear_solver.*lineax.CG",
    ),
    "negative damping": (lambda: implicit(damping=-1.0), ValueError, "damping must be at least 0"),
    "no inner steps": (lambda: implicit(inner_steps=0), ValueError, "inner_steps must be at least"),
    "no forward steps": (
        lambda: gradhpo.ForwardModeOptimizer(SGD, unroll_steps=0), ValueError, "unroll_steps",
    ),
    "a key that is a number": (
        lambda: gradhpo.Nystrom(2, 0.1, 0), TypeError, r"key.*jax.random.key\(0\)",
    ),
    "a while_loop in the loss": (
        with_a_while_loop_in_the_loss, ValueError, "DirectAdjoint.*lax.scan.*Reverse-mode",
    ),
    "loss is not scalar": (
        lambda: step(tl=lambda w, h, b: jnp.square(w - h)), ValueError,
        r"train_loss_fn must return a real scalar, got shape \(3,\).*\.mean\(\)",
    ),
    "loss is an integer": (
        lambda: step(vl=lambda w, h, b: jnp.sum(h > 0)), ValueError, "val_loss_fn.*int",
    ),
    "loss returns auxiliary output": (
        lambda: step(tl=lambda w, h, b: (train_loss(w, h, b), w)), TypeError,
        r"train_loss_fn returned a loss and an array: .*dict of scalar metrics.*model_state",
    ),
    "loss takes two arguments": (
        lambda: step(tl=lambda model, batch: 0.0), TypeError,
        r"train_loss_fn\(params, hyperparams, batch\)",
    ),
    "loss takes four arguments": (
        lambda: step(vl=lambda a, b, c, d: 0.0), TypeError, "val_loss_fn.*missing",
    ),
    "integer hyperparameters": (
        lambda: init(W, jnp.arange(3)), TypeError,
        r"hyperparams has dtype int.*jnp\.asarray\(\[0, 1, 2\], float\)",
    ),
    "boolean hyperparameter": (
        lambda: init(W, {"on": True}), TypeError, r"hyperparams\['on'\] has dtype bool",
    ),
    "no hyperparameters": (lambda: init(W, {}), ValueError, "hyperparams holds nothing to tune"),
    "a string as hyperparameter": (
        lambda: init(W, {"name": "sgd"}), TypeError, r"hyperparams\['name'\] is 'sgd'",
    ),
    "complex hyperparameter": (
        lambda: init(W, jnp.ones(2, complex)), TypeError, "hyperparams is complex.*two real arrays",
    ),
    "complex parameter": (
        lambda: init({"w": jnp.ones(2, complex)}, H), TypeError, r"params\['w'\] is complex",
    ),
    "nothing to train": (
        lambda: init({"n": jnp.arange(3)}, H), ValueError, "params holds no floating-point",
    ),
    "a Python float to train": (
        lambda: init({"w": 0.5}, H), ValueError, r"jnp\.asarray\(0\.0\) instead of 0\.0",
    ),
    "swapped": (swapped, (ValueError, TypeError), "swapped"),
    "swapped, all arrays": (swapped_all_arrays, ValueError, "swapped"),
    "swapped, dicts": (swapped_dicts, ValueError, "swapped"),
    "running state": (
        lambda: init(
            BatchNormed(eqx.nn.BatchNorm(3, axis_name="b", mode="batch"), jnp.ones(3)), H
        ), ValueError, "running state.*make_with_state",
    ),
    "mismatched batch axes": (
        lambda: gradhpo.DataBatch(jnp.ones((4, 2)), jnp.ones(3)), ValueError,
        r"DataBatch.*leading axes differ.*\(4, 2\).*\(3,\)",
    ),
    "a batch of scalars": (
        lambda: gradhpo.DataBatch(jnp.ones((4, 2)), jnp.asarray(1.0)), ValueError,
        r"DataBatch.*no leading axis",
    ),
    "stack of the wrong length": (
        lambda: step(checkpoints(unroll_steps=4), train_batch=gradhpo.BatchStack(jnp.ones((3, 2)))),
        ValueError, "BatchStack of 3 batches.*4 inner steps.*stack 4 batches",
    ),
    "stack of ragged batches": (
        lambda: gradhpo.BatchStack.of([jnp.ones(3), jnp.ones(2)]), ValueError, "batch 1 has shapes",
    ),
    "stack of nothing": (lambda: gradhpo.BatchStack.of([]), ValueError, "got no batch"),
    "stack for validation": (
        lambda: step(val_batch=gradhpo.BatchStack(jnp.ones((1, 3)))), ValueError,
        "val_batch is a BatchStack",
    ),
    "both outer optimizer and rate": (
        lambda: step(lr_hyper=0.1), ValueError, "leave lr_hyper out",
    ),
    "neither outer optimizer nor rate": (
        lambda: step(one_step(outer_optimizer=None)), ValueError, r"pass lr_hyper=0\.1",
    ),
    "rate is a vector": (
        lambda: outer_rate(jnp.ones(2)), TypeError, "lr_hyper must be one real number",
    ),
    "rate is a schedule": (
        lambda: outer_rate(optax.constant_schedule(0.1)), TypeError, r"lr_hyper.*gradhpo\.run",
    ),
    "rate is True": (
        lambda: step(one_step(outer_optimizer=None), lr_hyper=True), TypeError, "lr_hyper",
    ),
    "zero inner steps": (
        lambda: gradhpo.T1T2Optimizer(SGD, SGD, inner_steps=0), ValueError,
        "inner_steps must be at least 1, got inner_steps=0",
    ),
    "negative unroll steps": (
        lambda: checkpoints(unroll_steps=-1), ValueError, "unroll_steps must be at least 1",
    ),
    "unroll steps as float": (
        lambda: checkpoints(unroll_steps=2.0), TypeError, "unroll_steps",
    ),
    "truncation too long": (
        lambda: checkpoints(unroll_steps=3, truncation=4), ValueError,
        "truncation must be at least 1 and at most 3",
    ),
    "more checkpoints than steps": (
        lambda: checkpoints(unroll_steps=3, checkpoints=4), ValueError,
        "checkpoints must be at least 1 and at most 3",
    ),
    "unknown checkpoint scheme": (
        lambda: checkpoints(unroll_steps=3, checkpoints="cube"), TypeError, "checkpoints",
    ),
    "few states in the memory of the host": (
        lambda: checkpoints(unroll_steps=3, checkpoints="log", store="host"), ValueError,
        'write store="device"',
    ),
    "epsilon is zero": (
        lambda: gradhpo.T1T2Optimizer(SGD, SGD, epsilon=0.0), ValueError,
        r"epsilon must be positive, got epsilon=0\.0",
    ),
    "epsilon is a string": (
        lambda: gradhpo.T1T2Optimizer(SGD, SGD, epsilon="small"), TypeError, "'small'",
    ),
    "unknown perturbation": (
        lambda: gradhpo.T1T2Optimizer(SGD, SGD, perturb="w"), TypeError, "perturb",
    ),
    "T1-T2 by weights with an update_fn": (
        lambda: gradhpo.T1T2Optimizer(outer_optimizer=SGD, update_fn=lambda w, h, b: w),
        ValueError, "needs perturb='hyperparams'",
    ),
    "no inner update": (
        lambda: gradhpo.OneStepOptimizer(outer_optimizer=SGD), ValueError,
        r"inner_optimizer=optax\.sgd\(0\.1\)",
    ),
    "two inner updates": (
        lambda: one_step(update_fn=lambda w, h, b: w), ValueError, "pass only one of them",
    ),
    "inner optimizer is a number": (
        lambda: one_step(inner_optimizer=0.1), TypeError, "inner_optimizer",
    ),
    "outer optimizer is a function": (
        lambda: one_step(outer_optimizer=lambda h: SGD), TypeError, "outer_optimizer",
    ),
    "inner optimizer function returns a number": (
        lambda: one_step(inner_optimizer=lambda h: 0.1).init(W, H), TypeError,
        r"the function returned 0\.1",
    ),
    "optimizer that needs the loss": (
        needs_extra_arguments, ValueError,
        r"missing.*'value'.*optax\.polyak_sgd\) fit as inner_optimizer of Impl.*update_fn",
    ),
    "optimizer that branches on a value": (
        branches_on_a_value, ValueError, r"needs the value.*in Python.*jnp\.where",
    ),
    "inner state from another optimizer": (
        foreign_inner_state, ValueError, r"state\.inner_opt_state does not fit.*init\(",
    ),
    "outer state from another optimizer": (
        foreign_outer_state, ValueError, r"state\.outer_opt_state does not fit",
    ),
    "update_fn returns another structure": (
        lambda: step(
            gradhpo.UnrolledOptimizer(outer_optimizer=SGD, update_fn=lambda w, h, b: (w * h, w))
        ), ValueError, "update_fn must return params of the structure.*return the new params alone",
    ),
    "first order on a blind validation loss": (
        lambda: step(gradhpo.FOOptimizer(SGD, SGD)), ValueError,
        "FOOptimizer sees none of the hyperparameters.*OneStepOptimizer, T1T2Optimizer, Greedy",
    ),
    "hyperparameters that nothing uses": (
        lambda: step(tl=lambda w, h, b: jnp.sum(jnp.square(w))), ValueError,
        "OneStepOptimizer sees none of the hyperparameters.*nor the inner update",
    ),
    "state is not a state": (lambda: step(state=(W, H)), TypeError, "state"),
    "a list of batches as data": (
        lambda: run([B, B]), TypeError, r"train_data is a list.*gradhpo\.iterate\(train_data\)",
    ),
    "a tuple of DataBatch as data": (
        lambda: run(val_data=(gradhpo.DataBatch(W, H),) * 2), TypeError, r"val_data is a tuple",
    ),
    "a loader without next": (lambda: run(Loader()), TypeError, r"gradhpo\.iterate\(train_data\)"),
    "an iterator without batches": (lambda: run(iter([])), ValueError, "without a single batch"),
    "a BatchStack as data": (
        lambda: run(gradhpo.BatchStack(jnp.ones((1, 3)))), TypeError, "serves one step",
    ),
    "ragged batches from an iterator": (
        lambda: run(iter([np.ones(3), np.ones(2)])), ValueError, "drop or pad the ragged last",
    ),
    "discount above one": (
        lambda: gradhpo.GreedyOptimizer(SGD, gamma=1.1), ValueError, r"gamma must be in \[0, 1\]",
    ),
    "negative discount of HyperDistill": (
        lambda: gradhpo.OnlineHypergradientOptimizer(SGD, gamma=-0.1), ValueError, "gamma must be",
    ),
    "no steps to go greedily": (
        lambda: gradhpo.GreedyOptimizer(SGD, unroll_steps=0), ValueError, "unroll_steps",
    ),
    "no steps on the line": (
        lambda: gradhpo.DrMADOptimizer(SGD, unroll_steps=0), ValueError, "unroll_steps",
    ),
    "no memory": (
        lambda: gradhpo.OnlineHypergradientOptimizer(SGD, memory_size=0), ValueError, "memory_size",
    ),
    "weight that is no number": (
        lambda: gradhpo.OnlineHypergradientOptimizer(SGD, distillation_weight=float("nan")),
        ValueError, "distillation_weight must be finite",
    ),
    "period of nothing": (
        lambda: gradhpo.OnlineHypergradientOptimizer(SGD, estimation_period=0), ValueError,
        "estimation_period",
    ),
    "distilled data without a key": (
        lambda: online().init(W, H, batch=B), ValueError, r"init got batch but no key",
    ),
    "a key without distilled data": (
        lambda: online().init(W, H, key=jax.random.key(0)),
        ValueError, "init got key but no batch",
    ),
    "distilled data of scalars": (
        lambda: online().init(W, H, batch=1.0, key=jax.random.key(0)), ValueError,
        r"init\(batch=...\) holds no array",
    ),
    "another batch than the distilled one": (
        lambda: step(
            online(), online().init(W, H, batch=jnp.ones(5), key=jax.random.key(0)), lr_hyper=0.1
        ),
        ValueError, "the training batch does not fit",
    ),
    "one batch to estimate on": (
        lambda: online().estimate_theta(online().init(W, H), B, B, train_loss, val_loss),
        TypeError, r"train_batches.*BatchStack",
    ),
    "HyperDistill with a state of one step": (
        lambda: step(online(outer_optimizer=SGD), one_step().init(W, H)), ValueError,
        r"state.memory does not fit(.|\n)*init\(params, hyperparams\)",
    ),
    "theta of HyperDistill from a state of one step": (
        lambda: estimate_theta(online(outer_optimizer=SGD), one_step().init(W, H)), ValueError,
        r"state.memory does not fit(.|\n)*init\(params, hyperparams\)",
    ),
    "theta of HyperDistill from a state of implicit differentiation": (
        lambda: estimate_theta(online(outer_optimizer=SGD), implicit().init(W, H)), ValueError,
        r"state.memory does not fit(.|\n)*init\(params, hyperparams\)",
    ),
    "theta of tasks from a state of one": (
        lambda: estimate_theta(gradhpo.TaskBatched(online(), 2), online().init(W, H)), ValueError,
        "made without a task axis.*num_tasks=2",
    ),
    "theta of tasks from a state of other tasks": (
        lambda: estimate_theta(
            gradhpo.TaskBatched(online(outer_optimizer=SGD), 2),
            gradhpo.TaskBatched(one_step(), 2).init(W, H),
        ),
        ValueError, r"state.memory does not fit(.|\n)*init\(params, hyperparams\)",
    ),
    "tasks with a state of one": (
        lambda: step(gradhpo.TaskBatched(one_step(), 3), one_step().init(W, H)), ValueError,
        "made without a task axis.*num_tasks=3",
    ),
    "other tasks": (
        lambda: step(
            gradhpo.TaskBatched(one_step(), 3), gradhpo.TaskBatched(one_step(), 2).init(W, H)
        ),
        ValueError, "made for 2 tasks",
    ),
    "a data source as example batch": (
        lambda: online().init(W, H, batch=lambda i: B, key=jax.random.key(0)), TypeError,
        r"init\(batch=...\) is a function or a data source",
    ),
    "a stack as example batch": (
        lambda: online().init(W, H, batch=gradhpo.BatchStack(B), key=jax.random.key(0)), TypeError,
        r"init\(batch=...\) is a BatchStack",
    ),
    "part of the way from nowhere": (
        lambda: one_step().restart(one_step().init(W, H), reptile_rate=0.5), ValueError,
        r"restart\(state, start_of_episode.params",
    ),
    "theta of one step": (
        lambda: gradhpo.TaskBatched(one_step(), 2).estimate_theta(
            gradhpo.TaskBatched(one_step(), 2).init(W, H),
            gradhpo.BatchStack(jnp.ones((3, 2, 4))), jnp.ones((2, 4)), train_loss, val_loss,
        ),
        TypeError, "OneStepOptimizer has nothing to estimate",
    ),
    "no tasks": (lambda: gradhpo.TaskBatched(one_step(), 0), ValueError, "num_tasks"),
    "tasks of tasks": (
        lambda: gradhpo.TaskBatched(gradhpo.TaskBatched(one_step(), 2), 2), ValueError,
        "one task axis is enough",
    ),
    "a batch without tasks": (
        lambda: step(gradhpo.TaskBatched(one_step(), 2)), ValueError,
        r"train_batch has shape \(3,\).*num_tasks=2 needs \[tasks",
    ),
    "a stack without tasks": (
        lambda: step(
            gradhpo.TaskBatched(one_step(), 2), train_batch=gradhpo.BatchStack(jnp.ones((1, 3)))
        ),
        ValueError, r"\[inner steps, tasks",
    ),
    "an optimizer class for tasks": (
        lambda: gradhpo.TaskBatched(gradhpo.OneStepOptimizer, 2), TypeError, "optimizer",
    ),
    "steps that are not whole episodes": (
        lambda: run(num_steps=5, steps_per_episode=2), ValueError, r"write num_steps=2 \* 2",
    ),
    "a rate without episodes": (
        lambda: run(reptile_rate=0.5), ValueError, "pass steps_per_episode",
    ),
    "a rate above one": (
        lambda: run(steps_per_episode=1, reptile_rate=1.5), ValueError, "reptile_rate must be in",
    ),
    "a state in the middle of an episode": (
        lambda: gradhpo.run(
            one_step(), step(), gradhpo.LossFunctions(train_loss, val_loss), B, B, num_steps=4,
            steps_per_episode=2, progress=False,
        ),
        ValueError, r"taken 1 steps.*restart\(state\)\.update\(step=",
    ),
    "no steps": (lambda: run(num_steps=0), ValueError, "num_steps must be at least 1"),
    "chunk of nothing": (lambda: run(chunk_size=0), ValueError, "chunk_size must be at least 1"),
    "run with rate and outer optimizer": (lambda: run(lr_hyper=0.1), ValueError, "leave lr_hyper"),
    "run without either": (
        lambda: run(optimizer=one_step(outer_optimizer=None)), ValueError, "lr_hyper",
    ),
    "callback is not callable": (lambda: run(callbacks=["log"]), TypeError, "callbacks"),
    "batch larger than the data": (
        lambda: gradhpo.ArrayData(jnp.ones((3, 2)), 4, jax.random.key(0)), ValueError,
        "batch_size must be at least 1 and at most 3",
    ),
    "arrays of different lengths": (
        lambda: gradhpo.ArrayData((jnp.ones(3), jnp.ones(4)), 2, jax.random.key(0)), ValueError,
        r"ArrayData\(arrays\): leading axes differ",
    ),
    "arguments of step in the wrong order": (
        lambda: one_step().step(init(), train_loss, val_loss, B, B), TypeError,
        # (the tests' import hook raises before `step` does)
        r"train_loss_fn.*the order of arguments is|parameter 'train_loss_fn'",
    ),
    "losses as a tuple": (
        lambda: gradhpo.run(one_step(), init(), (train_loss, val_loss), B, B, num_steps=1),
        TypeError, r"run: losses.*gradhpo\.LossFunctions\(train_loss, val_loss\)",
    ),
    "one callback instead of a list": (
        lambda: run(callbacks=lambda state, metrics: None), TypeError, r"callbacks=\[callback\]",
    ),
    "positional unroll_steps": (
        lambda: gradhpo.UnrolledOptimizer(SGD, 20), TypeError,
        r"UnrolledOptimizer: outer_optimizer must be .*got 20: pass an optax",
    ),
    "a stack made of a list": (
        lambda: gradhpo.BatchStack([B, B]), TypeError, r"BatchStack\.of\(\[b1, b2",
    ),
    "a data source as a batch": (
        lambda: step(train_batch=gradhpo.ArrayData(B, 2, jax.random.key(0))), TypeError,
        r"train_batch is a function or a data source.*data\(i\)",
    ),
    "a generator function as data": (
        lambda: run(batch_generator), TypeError, r"train_data=batch_generator\(\)",
    ),
    "the whole model as params": (
        lambda: init(OnlyArrays(W, H), gradhpo.partition(OnlyArrays(W, H), lambda m: m.h)[1]),
        ValueError, r"params still contains.*gradhpo\.partition\(model, where\)",
    ),
    "the model of separate trees": (
        lambda: init({"w": W}, {"h": H}).model, ValueError, "not two halves of one model",
    ),
    "NaN parameters": (
        lambda: init({"w": W * jnp.nan}, H), ValueError, r"params\['w'\] holds NaN at the start",
    ),
    "negative rate": (
        lambda: step(one_step(outer_optimizer=None), lr_hyper=-0.1), ValueError, "not be negative",
    ),
    "update_fn returns another shape": (
        lambda: step(
            gradhpo.UnrolledOptimizer(outer_optimizer=SGD, update_fn=lambda w, h, b: w[:2] * h[:2])
        ), ValueError, "update_fn must return params of the structure and shapes",
    ),
    "update_fn of two arguments": (
        lambda: step(gradhpo.OneStepOptimizer(outer_optimizer=SGD, update_fn=lambda w, h: w)),
        TypeError, r"update_fn\(params, hyperparams, batch\)",
    ),
    "rate as a Python number inside the inner optimizer": (
        lambda: one_step(inner_optimizer=lambda h: optax.sgd(float(h[0]))).step(
            init(), B, B, train_loss, val_loss
        ), ValueError, r"float\(\.\.\.\)",
    ),
    "a validation loss that sees nothing": (
        lambda: step(vl=lambda w, h, b: jnp.sum(b)), ValueError,
        "depends neither on the parameters nor on them",
    ),
    "coordinate out of range": (
        lambda: gradhpo.finite_difference_hypergradient(
            one_step(), init(), B, B, train_loss, val_loss, coordinates=[0, 3]
        ), ValueError, "coordinates must lie in 0 to 2",
    ),
    "a while_loop in the training loss, forward mode": (
        lambda: step(gradhpo.ForwardModeOptimizer(SGD, SGD), tl=looping_loss), ValueError,
        "takes the derivative of train_loss_fn.*lax.scan, or ForwardModeOptimizer with an update_fn"
        " that computes its gradient by jax.jacfwd",
    ),
    "a while_loop in the validation loss": (
        lambda: step(gradhpo.ForwardModeOptimizer(SGD, SGD), vl=looping_loss), ValueError,
        r"takes the derivative of val_loss_fn, (?!.*ForwardModeOptimizer with).*use lax.scan\.",
    ),
    "a while_loop in an update_fn": (
        lambda: step(by_hand(gradhpo.OneStepOptimizer)), ValueError,
        "takes the derivative of update_fn.*or ForwardModeOptimizer, which takes forward deriv",
    ),
    "the gradient of a while_loop in an update_fn": (
        lambda: step(by_hand(gradhpo.ForwardModeOptimizer, differentiating_a_loop)), ValueError,
        "(?!.*derivative of update_fn).*use lax.scan. What JAX says",
    ),
    "a while_loop in a derivative rule": (
        lambda: step(tl=lambda w, h, b: with_a_loop_in_its_rule(w - h)), ValueError,
        "(?!.*train_loss_fn)takes second derivatives of the training loss.*use lax.scan. What JAX",
    ),
    "an opaque validation loss": (
        lambda: step(vl=opaque_loss), ValueError,
        r"derivative of val_loss_fn.*around an opaque function write a jax.custom_vjp, or use Evo",
    ),
    "optax.sgd, not called": (
        lambda: one_step(inner_optimizer=optax.sgd), TypeError,
        r"got optax\.sgd itself.*write optax\.sgd\(0\.1\); or,.*lambda hyperparams: optax\.sgd\(",
    ),
    "optax.contrib.dog, not called": (
        lambda: gradhpo.FixedOptimizer(optax.contrib.dog), TypeError,
        r"got optax\.contrib\.dog itself.*write optax\.contrib\.dog\(0\.1\)",
    ),
    "optax.scale_by_adam, not called": (
        lambda: one_step(inner_optimizer=optax.scale_by_adam), TypeError,
        r"write optax\.scale_by_adam\(\.\.\.\)",
    ),
    "optax.adam as outer optimizer, not called": (
        lambda: one_step(outer_optimizer=optax.adam), TypeError,
        r"outer_optimizer must be .*got .*adam>: pass optax\.adam\(0\.1\)",
    ),
    "a function that returns optax.adam": (
        lambda: init_with(lambda h: optax.adam), TypeError, r"return optax\.adam\(0\.1\)",
    ),
    "MultiSteps as inner optimizer": (
        lambda: one_step(inner_optimizer=optax.MultiSteps(SGD, 2)), TypeError,
        r"inner_optimizer must be.*MultiSteps its \.gradient_transformation\(\)",
    ),
    "a function that returns MultiSteps": (
        lambda: init_with(lambda h: optax.MultiSteps(optax.sgd(h[0]), 2)), TypeError,
        r"return its \.gradient_transformation\(\)",
    ),
    "a tuned peak of a warm-up": (
        lambda: step(one_step(inner_optimizer=peak)), ValueError,
        r"unit = optax\.warmup_cosine_decay_schedule\(0\.0, 1\.0,.*hyperparams\['peak'\] \* unit\(",
    ),
    "gamma of three": (
        lambda: gradhpo.GreedyOptimizer(SGD, gamma=jnp.full(3, 0.9)), TypeError,
        r"GreedyOptimizer: gamma must be one real number.*got .*\[3\]",
    ),
    "epsilon of one in a list": (
        lambda: gradhpo.T1T2Optimizer(SGD, epsilon=np.full(1, 0.1)), TypeError,
        r"T1T2Optimizer: epsilon must be one real number.*got f64\[1\].*",
    ),
    "damping of three": (
        lambda: implicit(damping=jnp.zeros(3)), TypeError, "damping must be",
    ),
    "distillation_weight of three": (
        lambda: online(distillation_weight=jnp.ones(3)), TypeError, "distillation_weight",
    ),
    "step_size of three": (
        lambda: gradhpo.Neumann(20, jnp.ones(3)), TypeError, "Neumann: step_size must be",
    ),
    "damping of Nystrom of three": (
        lambda: gradhpo.Nystrom(2, jnp.ones(3), jax.random.key(0)), TypeError,
        "Nystrom: damping must be",
    ),
    "gamma is text": (
        lambda: gradhpo.GreedyOptimizer(SGD, gamma="0.9"), TypeError,
        r"gamma must be one real number.*got '0.9'",
    ),
    "gamma is a flag": (
        lambda: gradhpo.GreedyOptimizer(SGD, gamma=True), TypeError, "must be one real number",
    ),
    "unroll_steps of T1-T2": (
        lambda: gradhpo.T1T2Optimizer(SGD, SGD, unroll_steps=3), TypeError,
        r"T1T2Optimizer has no argument unroll_steps \(did you mean inner_steps\?\); it takes inne",
    ),
    "inner_steps of unrolling": (
        lambda: checkpoints(inner_steps=3), TypeError,
        r"UnrolledOptimizer has no argument inner_steps \(did you mean unroll_steps\?\)",
    ),
    "a misspelt field": (
        lambda: gradhpo.GreedyOptimizer(SGD, gama=0.5), TypeError,
        r"GreedyOptimizer has no argument gama \(did you mean gamma\?\)",
    ),
    "a field of nothing": (
        lambda: one_step(frequency=3), TypeError,
        "OneStepOptimizer has no argument frequency; it takes inner_optimizer, outer_optimizer, ",
    ),
    "a field that is missing": (
        lambda: gradhpo.TaskBatched(one_step()), TypeError,
        r"TaskBatched needs num_tasks; it got optimizer=One.*: write TaskBatched\(optimizer, num_t",
    ),
    "a required argument that is missing beside others": (
        lambda: gradhpo.EarlyStopping(metric="third"), TypeError,
        r"write EarlyStopping\(patience, metric=...\)",
    ),
    "an argument of run that is unknown": (
        lambda: run(num_step=3), TypeError, r"run has no argument num_step \(did you mean num_step",
    ),
    "an argument of partition that is missing": (
        lambda: gradhpo.partition(MODEL), TypeError, r"partition needs where;.*partition\(model, w",
    ),
    "state forgotten": (
        lambda: gradhpo.run(one_step(), LOSSES, B, B, num_steps=2), TypeError,
        r"run needs state; it got optimizer=OneStepOptimizer, state=LossFunctions, losses=Array, tr"
        r".*: write run\(optimizer, state, losses, train_data, val_data, num_steps=\.\.\.\)",
    ),
    "positional num_steps": (
        lambda: gradhpo.run(one_step(), init(), LOSSES, B, B, 2), TypeError,
        r"run takes num_steps by name: write num_steps=2",
    ),
    "an argument too many": (
        lambda: gradhpo.partition(MODEL, lambda m: m["h"], None, 3), TypeError,
        r"partition: too many positional arguments: write partition\(model, where\), and everythi",
    ),
    "an argument of a method that is unknown": (
        lambda: one_step().init(W, H, batches=B), TypeError,
        r"init has no argument batches \(did you mean batch\?\); it takes params, hyperparams, ba",
    ),
    "an argument of a method that is missing": (
        lambda: one_step().init(W), TypeError,
        r"init needs hyperparams; it got params=Array: write .*init\(params, hyperparams\)",
    ),
    "an argument of step that is unknown": (
        lambda: step(rate=0.1), TypeError, r"step.* 'rate'",
    ),
    "a logger's path that is missing": (
        lambda: gradhpo.CSVLogger(), TypeError, r"CSVLogger needs path; it got nothing: write CSV",
    ),
    "unroll_steps from NumPy": (
        lambda: checkpoints(unroll_steps=np.int64(3)), TypeError,
        r"unroll_steps must be .*got np\.int64\(3\).*unroll_steps=int\(unroll_steps\)",
    ),
    "num_steps from JAX": (
        lambda: run(num_steps=jnp.asarray(3)), TypeError, r"num_steps=int\(num_steps\)",
    ),
    "losses in one, and another": (
        lambda: one_step().step(init(), B, B, LOSSES, val_loss), TypeError,
        r"step got LossFunctions, which hold both losses, followed by.*step\(\.\.\., gradhpo\.",
    ),
    "losses in one and a positional rate": (
        lambda: one_step(outer_optimizer=None).step(init(), B, B, LOSSES, 0.1), TypeError,
        r"followed by 0\.1.*by name, lr_hyper=0\.1",
    ),
    "one loss": (
        lambda: one_step().compute_hypergradient(init(), B, B, train_loss), TypeError,
        r"compute_hypergradient got no val_loss_fn: write compute_hypergradient\(\.\.\., train_los",
    ),
    "losses in one in the wrong place": (
        lambda: one_step().step(init(), B, B, train_loss, LOSSES), TypeError,
        "step got LossFunctions as val_loss_fn: write",
    ),
    "no validation batch": (
        lambda: step(val_batch=None, vl=lambda w, h, b: jnp.sum(b["x"] * w)), TypeError,
        r"val_batch \(val_data in run\) is None, and val_loss_fn fails with it \('NoneType' obje",
    ),
    "no validation data": (
        lambda: run(val_data=None), TypeError, r"val_batch \(val_data in run\) is None.*sum requir",
    ),
    "no training batch": (
        lambda: step(train_batch=None), TypeError, r"train_batch \(train_data in run\) is None",
    ),
    "a module as hyperparameters": (
        lambda: init(W, eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))), TypeError,
        r"hyperparams\.activation is.*Only the arrays of a module .*gradhpo\.partition\(model",
    ),
    "labels that are text": (
        lambda: step(train_batch=(B, TEXT)), TypeError,
        r"train_batch\[1\] holds <U3: a batch is a pytree of numbers; encode labels, np\.unique",
    ),
    "text for validation": (
        lambda: step(val_batch={"y": "cat"}, vl=lambda w, h, b: jnp.sum(w) * jnp.sum(b["y"])),
        TypeError, r"val_batch\['y'\] holds str: a batch is a pytree of numbers",
    ),
    "labels that are text, in a run": (
        lambda: run(train_data=(B, TEXT)), TypeError, "train_data holds .* dtype <U3: a batch is",
    ),
    "labels that are objects, in data": (
        lambda: gradhpo.ArrayData((jnp.ones((3, 2)), TEXT.astype(object)), 2, jax.random.key(0)),
        TypeError, "holds .* dtype object: a batch is a pytree of numbers",
    ),
    "a list of batches for a step": (
        lambda: step(train_batch=[(B, B), (B, B)]), TypeError, r"gradhpo\.BatchStack\.of\(train_ba",
    ),
    "finite-difference step of zero": (
        lambda: gradhpo.finite_difference_hypergradient(
            one_step(), init(), B, B, train_loss, val_loss, epsilon=0
        ), ValueError, "epsilon must be positive",
    ),
}  # fmt: skip


def init_with(inner_optimizer):
    return one_step(inner_optimizer=inner_optimizer).init(W, H)


@pytest.mark.parametrize("kind", list(MISUSES))
def test_misuse_is_named_with_its_remedy(kind):
    act, error, message = MISUSES[kind]
    with pytest.raises(error, match=f"(?s){message}"):
        act()


def test_there_are_at_least_25_kinds():
    assert len(MISUSES) >= 25


@pytest.mark.thorough
@jax.numpy_dtype_promotion("standard")  # optax's schedules need it
def test_the_line_for_a_tuned_peak_works():
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, 3, 10)
    inner = lambda hyperparams: optax.sgd(lambda count: hyperparams["peak"] * unit(count))
    tuned = gradhpo.UnrolledOptimizer(inner, SGD, unroll_steps=4)
    loss = lambda w, h, batch: jnp.sum(jnp.square(w - 2.0))
    state = tuned.init(W, {"peak": jnp.asarray(0.2)})
    rates = jnp.stack([unit(count) for count in range(4)]).astype(float)
    expected = lambda peak: jnp.sum((2.0 * jnp.prod(1 - 2 * peak * rates)) ** 2 * jnp.ones(3))
    found = tuned.compute_hypergradient(state, None, None, loss, loss)["peak"]
    rtol = 1e-6  # optax's schedules are float32
    np.testing.assert_allclose(found, jax.grad(expected)(0.2), rtol=rtol)
    at_once = optax.sgd(optax.warmup_cosine_decay_schedule(0.0, 0.2, 3, 10))
    fixed = gradhpo.FixedOptimizer(at_once, inner_steps=4)
    by_optax = fixed.step(fixed.init(W, H), None, None, loss, loss)
    by_line = tuned.step(state, None, None, loss, loss)
    np.testing.assert_allclose(by_line.params, by_optax.params, rtol=rtol)


@jax.numpy_dtype_promotion("standard")
def test_multi_steps_as_inner_optimizer():
    inner = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    kinds = gradhpo.UnrolledOptimizer, gradhpo.ForwardModeOptimizer
    optimizers = [kind(inner, SGD, unroll_steps=4) for kind in kinds]
    found = [x.compute_hypergradient(x.init(W, H), B, B, *BOTH) for x in optimizers]
    share = 1 - 0.8**2  # two updates, each with the mean of two equal gradients
    # It keeps the mean in float32.
    np.testing.assert_allclose(found[0], 2 * share * (share * H - 1), rtol=1e-7)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-7)


def test_losses_in_one_are_both_losses():
    optimizer = one_step(outer_optimizer=None)
    state, together = optimizer.init(W, H), (B, B, LOSSES)
    expected = optimizer.step(state, B, B, *BOTH, lr_hyper=0.1)
    assert optimizer.step(state, *together, lr_hyper=0.1) == expected
    hypergradient = optimizer.compute_hypergradient(state, *together)
    np.testing.assert_array_equal(H - 0.1 * hypergradient, expected.hyperparams)
    np.testing.assert_allclose(
        gradhpo.finite_difference_hypergradient(optimizer, state, *together), hypergradient, 1e-6
    )
    batches = gradhpo.BatchStack(jnp.ones((2, 3)))
    of_theta = [
        online().estimate_theta(online().init(W, H), batches, B, *losses).memory.theta
        for losses in (BOTH, (LOSSES,))
    ]
    assert of_theta[0] == of_theta[1]


def test_nodes_of_a_list_in_a_tuple_are_selected():
    nested = gradhpo.partition(MODEL, lambda m: (m["h"], [m["layers"][1], (m["w"],)]))
    alone = gradhpo.partition(MODEL, lambda m: (m["h"], m["layers"][1], m["w"]))
    assert eqx.tree_equal(nested, alone)
    of_list = gradhpo.partition(MODEL, lambda m: (m["h"], m["layers"]))[1]  # a node of the model
    assert of_list["w"] is None
    assert len(jax.tree.leaves(of_list)) == 3


def test_a_leaf_that_the_method_cannot_see_is_named_once():
    def loss(w, h, batch):
        return jnp.sum(jnp.square(w - h["seen"])) + 0 * jnp.sum(
            jax.lax.stop_gradient(h["detached"])
        )

    hyperparams = {"seen": H, "detached": H, "unused": H}
    optimizer = one_step()
    state = optimizer.init(W, hyperparams)
    with pytest.warns(UserWarning, match=r"0 for hyperparams \['detached'\], \['unused'\]"):
        state = optimizer.step(state, B, B, loss, val_loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(state, B, B, loss, val_loss)  # compiled: no second warning


def test_inject_hyperparams_is_fine_where_it_does_no_harm():
    state = step(one_step(inner_optimizer=optax.inject_hyperparams(optax.sgd)(0.1)))
    assert state.metadata["rejected"] == 0


def test_hyperparameters_may_be_python_floats():
    state = init(W, {"rate": 0.1, "decay": np.float32(0.2)})
    assert state.hyperparams["rate"].dtype == jnp.float64
    assert state.hyperparams["decay"].dtype == jnp.float32
    assert not state.hyperparams["rate"].weak_type


def test_what_differs_comes_after_the_remedy_in_few_lines():
    layers = {f"layer{i}": {"w": jnp.ones((3, 3)), "b": jnp.ones(3)} for i in range(20)}
    other = jax.tree.map(lambda x: x[:2], layers)
    with pytest.raises(ValueError, match="does not fit") as raised:
        check_same_structure(other, layers, "the tree", "Make it again.")
    lines = str(raised.value).splitlines()
    assert lines[0] == "the tree does not fit this optimizer. Make it again."
    assert lines[1] == "  ['layer0']['b']: expected f64[3], found f64[2]"
    assert lines[9:] == ["  and 32 more"]
    lacking = where_they_differ({"a": 1.0}, {"a": 1.0, "b": jnp.ones(2)})
    assert lacking == "  ['b']: expected f64[2], found nothing"
    assert "their containers" in where_they_differ((jnp.ones(2),), [jnp.ones(2)])
