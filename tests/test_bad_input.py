"""Common mistakes in arguments to `run`, loaders and controls: each has its own message."""

import itertools
import random

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import OUTER
from ridge import LOSSES, SGD, X, Y, train_loss, val_loss

import gradhpo
from gradhpo.data.functions import check_function


BATCH = (np.asarray(X[:4]), np.asarray(Y[:4]))
KEY = jax.random.key(0)


OPTIMIZER = gradhpo.OneStepOptimizer(SGD, OUTER)
WITHOUT_OUTER = gradhpo.OneStepOptimizer(SGD)
UNROLLED = gradhpo.UnrolledOptimizer(SGD, OUTER, unroll_steps=3)
STATE = OPTIMIZER.init(jnp.zeros(3), jnp.full(3, -2.0))
STATE_WITHOUT_OUTER = WITHOUT_OUTER.init(jnp.zeros(3), jnp.full(3, -2.0))


def run(**settings):
    """A run of three chunks, with something wrong."""
    arguments = {
        "optimizer": OPTIMIZER, "state": STATE, "losses": LOSSES, "train_data": (X, Y),
        "val_data": (X, Y), "num_steps": 9, "chunk_size": 3, "progress": False,
    } | settings  # fmt: skip
    return gradhpo.run(**arguments)


def without_outer(lr_hyper):
    return run(optimizer=WITHOUT_OUTER, state=STATE_WITHOUT_OUTER, lr_hyper=lr_hyper)


def begin(start_fn):
    return run(start_fn=start_fn, key=KEY, steps_per_episode=3)


class Loader:
    def __iter__(self):
        return iter([BATCH])


def batches(*last, good=0):
    return iter([BATCH] * good + list(last))


RUN = {
    "num_steps=0": (lambda: run(num_steps=0), ValueError, "num_steps must be at least 1"),
    "num_steps=2.5": (lambda: run(num_steps=2.5), TypeError, r"num_steps must be .*got 2.5"),
    "num_steps='9'": (lambda: run(num_steps="9"), TypeError, r"num_steps must be .*got '9'"),
    "chunk_size=0": (lambda: run(chunk_size=0), ValueError, "chunk_size must be at least 1"),
    "max_rejections=0": (lambda: run(max_rejections=0), ValueError, "max_rejections must be at"),
    "a callback, not a list": (
        lambda: run(callbacks=lambda state, metrics: None),
        TypeError,
        r"callbacks must be .*got .*callbacks=\[callback\]",
    ),
    "no function": (lambda: run(callbacks=[None]), TypeError, "callbacks must be"),
    "a class": (
        lambda: run(callbacks=[gradhpo.BestState]),
        TypeError,
        r"create an instance: callbacks=\[gradhpo.BestState\(...\)\]",
    ),
    "another signature": (
        lambda: run(callbacks=[lambda state: None]),
        TypeError,
        r"callbacks\[0\] is called as callbacks\[0\]\(state, metrics\), but its signature",
    ),
    "optimizer class": (
        lambda: run(optimizer=gradhpo.OneStepOptimizer),
        TypeError,
        r"optimizer must be .*: pass an optimizer such as",
    ),
    "an optax optimizer": (
        lambda: run(optimizer=optax.sgd(0.1)),
        TypeError,
        r"optimizer must be .*: pass an optimizer such as",
    ),
    "params as state": (
        lambda: run(state=jnp.zeros(3)),
        TypeError,
        r"state must be .*: pass what optimizer.init\(params, hyperparams\)",
    ),
    "a pair of losses": (
        lambda: run(losses=(train_loss, val_loss)),
        TypeError,
        r"losses must be .*: pass gradhpo.LossFunctions\(train_loss, val_loss\)",
    ),
    "state of another optimizer": (
        lambda: run(optimizer=gradhpo.OneStepOptimizer(optax.adam(0.1), OUTER)),
        ValueError,
        "inner_opt_state",
    ),
    "lr_hyper is missing": (lambda: without_outer(None), ValueError, "so step needs a step size"),
    "lr_hyper < 0": (lambda: without_outer(-0.1), ValueError, "lr_hyper must not be negative"),
    "lr_hyper='0.1'": (lambda: without_outer("0.1"), TypeError, "lr_hyper must be"),
    "lr_hyper and an outer optimizer": (
        lambda: run(lr_hyper=0.1),
        ValueError,
        "leave lr_hyper out, or construct with outer_optimizer=None",
    ),
    "episodes that do not divide": (
        lambda: run(steps_per_episode=4),
        ValueError,
        r"must be a multiple of steps_per_episode=4: write num_steps=2 \* 4",
    ),
    "steps_per_episode=0": (lambda: run(steps_per_episode=0), ValueError, "steps_per_episode must"),
    "reptile_rate=2": (
        lambda: run(steps_per_episode=3, reptile_rate=2.0),
        ValueError,
        r"reptile_rate must be in \[0, 1\]",
    ),
    "a rate without episodes": (
        lambda: run(reptile_rate=0.5),
        ValueError,
        "there are no episodes: pass steps_per_episode as well",
    ),
    "within an episode": (
        lambda: run(state=STATE.update(step=jnp.asarray(1, jnp.int32)), steps_per_episode=3),
        ValueError,
        "is not a whole number of episodes",
    ),
    "checkpoint=True": (
        lambda: run(checkpoint=True),
        TypeError,
        r"must be .*got True: pass the path of a",
    ),
    "checkpoint=''": (lambda: run(checkpoint=""), ValueError, "must be the path of a directory"),
}

RUN |= {
    "num_steps by position": (
        lambda: gradhpo.run(OPTIMIZER, STATE, LOSSES, (X, Y), (X, Y), 100),
        TypeError,
        "run takes num_steps by name: write num_steps=100",
    ),
    "lr_hyper returns None": (
        lambda: without_outer(lambda step: None),
        TypeError,
        r"lr_hyper\(step\) returned None: return the rate, one real number",
    ),
    "lr_hyper returns an array": (
        lambda: without_outer(lambda step: jnp.ones(3)),
        TypeError,
        r"lr_hyper\(step\) returned .*\[3\]: return the rate, one real number",
    ),
    "lr_hyper branches": (
        lambda: without_outer(lambda step: 0.1 if step < 10 else 0.01),
        ValueError,
        r"lr_hyper\(step\) needs the value of its step, .* Write jnp.where\(step < 100",
    ),
    "lr_hyper returns text": (
        lambda: without_outer(lambda step: "0.1"),
        TypeError,
        r"lr_hyper\(step\) returned '0.1': return the rate, one real number",
    ),
    "lr_hyper draws": (
        lambda: without_outer(lambda step: random.random()),
        ValueError,
        r"lr_hyper\(step\) made another rate of the same step .*jax.random.fold_in\(key, step",
    ),
    "record needs a value": (
        lambda: run(record=lambda state: {"first": float(state.params[0])}),
        ValueError,
        r"record\(state\) needs the value of its state, .*gradhpo.Monitor",
    ),
    "record draws": (
        lambda: run(record=lambda state: {"noise": jnp.asarray(GENERATOR.normal())}),
        ValueError,
        r"record\(state\) made another value of the same state",
    ),
    "start_fn needs a value": (
        lambda: begin(lambda key, h: jnp.full(3, float(h[0]))),
        ValueError,
        r"start_fn\(key, hyperparams\) needs the value of its arguments, .*Write jnp.where",
    ),
    "start_fn draws": (
        lambda: begin(lambda key, h: jnp.asarray(GENERATOR.normal(size=3))),
        ValueError,
        r"start_fn\(.*\) made another start of the same key .*jax.random.normal\(key, shape\)",
    ),
    "lr_hyper of nothing": (
        lambda: without_outer(lambda: 0.1),
        TypeError,
        r"lr_hyper is called as lr_hyper\(step\), but its signature",
    ),
    "gamma='0.9'": (
        lambda: gradhpo.GreedyOptimizer(SGD, OUTER, gamma="0.9"),
        TypeError,
        r"GreedyOptimizer: gamma must be one real number.*got '0.9'",
    ),
    "damping=None": (
        lambda: gradhpo.ImplicitOptimizer(SGD, OUTER, damping=None),
        TypeError,
        r"ImplicitOptimizer: damping must be one real number.*got None",
    ),
}

INPUTS = np.asarray(X)
NEEDS_A_VALUE = (
    r"train_data\(index\) needs the value of its index, which is traced: .* pass "
    r"gradhpo.ArrayData\(arrays, batch_size, key\)"
)
DRAWS = (
    r"train_data\(index\) made another batch of the same index .* Pass gradhpo.ArrayData\("
    r"arrays, batch_size, key\) for random mini-batches"
)
FUNCTIONS = {
    "a slice": (lambda i: X[i * 2 : (i + 1) * 2], NEEDS_A_VALUE),
    "a slice of NumPy": (lambda i: INPUTS[i * 2 : (i + 1) * 2], NEEDS_A_VALUE),
    "an index into NumPy": (lambda i: INPUTS[i], NEEDS_A_VALUE),
    "an index into a list": (lambda i: [X, -X][i % 2], NEEDS_A_VALUE),
    "int(i)": (lambda i: X[int(i)], NEEDS_A_VALUE),
    "a range": (lambda i: X[jnp.arange(i, i + 2)], NEEDS_A_VALUE),
    "a branch": (lambda i: X if i < 3 else -X, NEEDS_A_VALUE),
    "a seed": (lambda i: np.random.default_rng(i).normal(size=3), NEEDS_A_VALUE),
    "NumPy's randomness": (lambda i: INPUTS + np.random.normal(size=(10, 3)), DRAWS),
    "a generator of NumPy": (lambda i: X[GENERATOR.permutation(10)], DRAWS),
    "a static slice": (lambda i: X[(start := next(NUMBERS) % 8) : start + 2], DRAWS),
    "a factor": (lambda i: X * GENERATOR.normal(), DRAWS),
    "Python's randomness": (lambda i: X * random.random() * i.astype(X.dtype), DRAWS),
    "the next batch": (lambda i: next(COUNTED), DRAWS),
    "a return forgotten": (lambda i: None, r"train_data\(index\) returned no array: return the"),
}
GENERATOR = np.random.default_rng(0)
NUMBERS = itertools.count()
COUNTED = map(np.full, itertools.repeat(3), itertools.count())


@pytest.mark.parametrize("what", FUNCTIONS)
def test_a_function_of_the_index_that_cannot_be_traced(what):
    """The most common mistake; random numbers drawn only once used to pass silently."""
    function, message = FUNCTIONS[what]
    with pytest.raises(ValueError, match=message):
        run(train_data=function)


def test_functions_of_the_index_that_can():
    """Constants, their own seeds, keys, NaN, functions already compiled."""
    draw = lambda i: jax.random.normal(jax.random.fold_in(KEY, i), (3,))
    fixed = lambda i: INPUTS[np.random.default_rng(0).choice(10, 4)]
    unknown = lambda i: jnp.full(3, jnp.nan) * i.astype(float)
    for function in (draw, jax.jit(draw), fixed, unknown):
        check_function(function, "train_data")


DATA = {
    "a list of batches": (
        lambda: run(train_data=[BATCH] * 9),
        TypeError,
        r"train_data is a list of 9 items: pass gradhpo.iterate\(train_data\)",
    ),
    "a tuple of dicts": (
        lambda: run(val_data=({"x": X}, {"x": X})),
        TypeError,
        r"val_data is a tuple of 2 items: pass gradhpo.iterate\(val_data\)",
    ),
    "lists of numbers": (
        lambda: run(train_data=(X.tolist(), Y.tolist())),
        TypeError,
        r"train_data\[0\] is a list of Python numbers, not an array: write np.asarray",
    ),
    "a list of numbers for validation": (
        lambda: run(val_data=iter([(X, Y.tolist())] * 9)),
        TypeError,
        r"val_data\[1\] is a list of Python numbers",
    ),
    "lists of numbers in a step": (
        lambda: OPTIMIZER.step(STATE, (X.tolist(), Y), (X, Y), LOSSES),
        TypeError,
        r"train_batch\[0\] is a list of Python numbers",
    ),
    "lists of numbers in a diagnostic": (
        lambda: gradhpo.compare_hypergradients(
            {"one": OPTIMIZER}, STATE, (X, Y), (X.tolist(), Y), LOSSES
        ),
        TypeError,
        r"val_batch\[0\] is a list of Python numbers",
    ),
    "lists of numbers as arrays": (
        lambda: gradhpo.ArrayData((X.tolist(), Y.tolist()), 4, KEY),
        ValueError,
        "holds a list of Python numbers: write np.asarray",
    ),
    "a generator function": (
        lambda: run(train_data=batches_forever),
        TypeError,
        r"is a generator function; call it: train_data=batches_forever\(\)",
    ),
    "a BatchStack": (
        lambda: run(train_data=gradhpo.BatchStack.of([(X, Y)] * 3)),
        TypeError,
        "train_data is a BatchStack, which serves one step; pass gradhpo.ArrayData",
    ),
    "a loader": (
        lambda: run(train_data=Loader()),
        TypeError,
        r"is a Loader, which is not a source of batches; wrap it: gradhpo.iterate\(train_data\)",
    ),
    "a path": (
        lambda: run(train_data="digits.npz"),
        TypeError,
        "train_data is a str, which is not a source of batches",
    ),
    "a function of nothing": (
        lambda: run(train_data=lambda: (X, Y)),
        TypeError,
        r"train_data is called as train_data\(index\), but its signature",
    ),
    "an empty iterator": (
        lambda: run(train_data=iter([])),
        ValueError,
        "train_data is an iterator without a single batch",
    ),
    "an empty loader": (
        lambda: run(val_data=gradhpo.iterate([])),
        ValueError,
        "val_data is an iterator without a single batch",
    ),
    "fewer batches than a step takes": (
        lambda: run(optimizer=UNROLLED, train_data=batches(good=2)),
        ValueError,
        "the data iterators end before the first step",
    ),
    "a ragged batch": (
        lambda: run(train_data=batches((X[:2], Y[:2]), good=1)),
        ValueError,
        r"train_data \(batch 1\) differs from the first in its shapes: .*drop_last=True",
    ),
    "another structure": (
        lambda: run(train_data=batches({"x": X, "y": Y}, good=1)),
        ValueError,
        "differs from the first in its structure.*the same pytree every time",
    ),
    "another dtype": (
        lambda: run(train_data=batches((BATCH[0].astype(np.float32), BATCH[1]), good=1)),
        ValueError,
        "differs from the first in its dtypes.*convert all batches to the same",
    ),
    "text in a batch": (
        lambda: run(train_data=batches((X, np.asarray(["a"] * 10)))),
        TypeError,
        r"train_data \(batch 0\) holds a ndarray with dtype <U1: .*leave text and objects out",
    ),
    "a string in a batch": (
        lambda: run(train_data=batches((X, "label"))),
        TypeError,
        r"train_data \(batch 0\) holds a str",
    ),
    "objects in a batch": (
        lambda: run(train_data=batches((X, object()))),
        TypeError,
        r"train_data \(batch 0\) holds a object with dtype object",
    ),
    "no example in a batch": (
        lambda: run(train_data=batches((X[:0], Y[:0]))),
        ValueError,
        r"train_data \(batch 0\) is empty: it holds no example",
    ),
    "nothing in a batch": (
        lambda: run(val_data=batches(None, None)),
        ValueError,
        r"val_data \(batch 0\) holds no array: None",
    ),
    "one iterator twice": (
        lambda: (lambda data: run(train_data=data, val_data=data))(batches(good=20)),
        ValueError,
        "train_data and val_data are the same iterator",
    ),
    "iterate(5)": (lambda: gradhpo.iterate(5), TypeError, r"loader must be .*got 5"),
}

ARRAYS = {
    "lengths differ": (
        lambda: gradhpo.ArrayData((X, Y[:5]), 2, KEY),
        ValueError,
        "leading axes differ; shapes are",
    ),
    "a scalar": (
        lambda: gradhpo.ArrayData((X, jnp.zeros(())), 2, KEY),
        ValueError,
        r"\[1\] has no leading axis",
    ),
    "no array": (lambda: gradhpo.ArrayData((), 2, KEY), ValueError, "holds no array"),
    "no example": (lambda: gradhpo.ArrayData(X[:0], 2, KEY), ValueError, "holds no example"),
    "batch_size=0": (lambda: gradhpo.ArrayData(X, 0, KEY), ValueError, "batch_size must be at le"),
    "batch_size=11": (
        lambda: gradhpo.ArrayData(X, 11, KEY),
        ValueError,
        "batch_size must be at least 1 and at most 10, got batch_size=11",
    ),
    "batch_size=2.0": (
        lambda: gradhpo.ArrayData(X, 2.0, KEY),
        TypeError,
        r"batch_size must be .*got 2.0",
    ),
    "a seed for a key": (
        lambda: gradhpo.ArrayData(X, 2, 0),
        TypeError,
        r"key must be .*got 0: pass jax.random.key\(0\)",
    ),
    "many keys": (
        lambda: gradhpo.ArrayData(X, 2, jax.random.split(KEY)),
        ValueError,
        r"ArrayData\(key\) must be one key such as jax.random.key\(0\), got shape \(2,\)",
    ),
    "hold=0": (lambda: gradhpo.ArrayData(X, 2, KEY, hold=0), ValueError, "hold must be at least"),
    "too many": (
        lambda: gradhpo.ArrayData(np.zeros(2**17, np.int8), 2**16, KEY),
        ValueError,
        r"exceeds 2\*\*32",
    ),
    "index=1.5": (
        lambda: gradhpo.ArrayData(X, 2, KEY)(1.5),
        TypeError,
        r"index must be .*got 1.5",
    ),
    "index=-1": (lambda: gradhpo.ArrayData(X, 2, KEY)(-1), ValueError, "index must be at least 0"),
    "a stack of none": (
        lambda: gradhpo.ArrayData(X, 2, KEY).stack(0, 0),
        ValueError,
        "count must be at least 1",
    ),
    "epochs=0": (
        lambda: gradhpo.ArrayData(X, 2, KEY).num_batches(0),
        ValueError,
        "epochs must be positive",
    ),
}

CONTROLS = {
    "optax.MultiSteps": (
        lambda: gradhpo.OneStepOptimizer(SGD, optax.MultiSteps(OUTER, 2)),
        TypeError,
        r"outer_optimizer must be .*got .*MultiSteps its .gradient_transformation\(\)",
    ),
    "patience=0": (lambda: gradhpo.EarlyStopping(0), ValueError, "patience must be at least 1"),
    "patience=1.5": (lambda: gradhpo.EarlyStopping(1.5), TypeError, r"patience must be .*got 1.5"),
    "min_delta": (lambda: gradhpo.EarlyStopping(1, min_delta=-1.0), ValueError, "min_delta must"),
    "metric=5": (lambda: gradhpo.BestState(5), TypeError, r"metric must be .*got 5"),
    "a metric that is not there": (
        lambda: run(callbacks=[gradhpo.BestState("third_loss")]),
        ValueError,
        "metric='third_loss' is not a metric of this run; available: .*val_loss",
    ),
    "a memory without a start": (
        lambda: run(callbacks=[Remembering()]),
        TypeError,
        r"callbacks\[0\] has the attribute memory.*no method start\(state, resumed\)",
    ),
    "seconds=0": (lambda: gradhpo.TimeLimit(0), ValueError, "seconds must be positive"),
    "every=0": (lambda: gradhpo.CSVLogger("x", every=0), ValueError, "every must be at least 1"),
    "path=None": (lambda: gradhpo.CSVLogger(None), TypeError, r"path must be .*got None"),
    "path is a directory": (
        lambda: gradhpo.JSONLinesLogger("/tmp"),
        ValueError,
        "is a directory; pass a file",
    ),
    "window=0": (lambda: gradhpo.moving_average(0), ValueError, "window must be at least 1"),
    "directory=None": (lambda: gradhpo.Checkpoint(None), TypeError, "directory must be"),
    "every_steps=0": (lambda: gradhpo.Checkpoint("x", 0), ValueError, "every_steps must be at lea"),
    "every_seconds=-1": (
        lambda: gradhpo.Checkpoint("x", every_seconds=-1.0),
        ValueError,
        "every_seconds must be at least 0",
    ),
    "keep=0": (lambda: gradhpo.Checkpoint("x", keep=0), ValueError, "keep must be at least 1"),
    "load_checkpoint of params": (
        lambda: gradhpo.load_checkpoint("x", jnp.zeros(3)),
        TypeError,
        "state must be",
    ),
}

TABLE = RUN | DATA | ARRAYS | CONTROLS


class Remembering:
    memory = None

    def __call__(self, state, metrics):
        pass


def batches_forever():
    while True:
        yield BATCH


def test_the_table_is_long():
    assert len(RUN | DATA) >= 40
    assert len(TABLE) == len(RUN) + len(DATA) + len(ARRAYS) + len(CONTROLS)


@pytest.mark.parametrize("what", TABLE)
def test_says_what_is_wrong(what):
    call, error, message = TABLE[what]
    before = jax.tree.map(np.array, eqx.filter(STATE, eqx.is_array))
    with pytest.raises(error, match=message):
        call()
    jax.tree.map(np.testing.assert_array_equal, eqx.filter(STATE, eqx.is_array), before)


LATER = {
    "ragged": (
        lambda: batches((X[:2], Y[:2]), good=4),
        "data error",
        r"\(batch 4\) differs from the f",
    ),
    "structure": (lambda: batches(X, good=4), "data error", "differs from the first in its str"),
    "text": (lambda: batches("end", good=4), "data error", r"\(batch 4\) holds a str"),
    "ends": (lambda: batches(good=4), "data exhausted", r"gradhpo.iterate\(loader\) restarts a lo"),
}


@pytest.mark.parametrize("name", ["train_data", "val_data"])
@pytest.mark.parametrize("what", LATER)
def test_what_comes_later_costs_no_state(what, name):
    data, reason, message = LATER[what]
    with pytest.warns(RuntimeWarning, match=message):
        state, history = run(**{name: data()})
    assert history.stop_reason == reason
    assert state.step == len(history["val_loss"]) == 4
    assert np.all(np.isfinite(state.params))
