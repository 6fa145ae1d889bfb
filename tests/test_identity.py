"""Which run a checkpoint belongs to: differences are found, and rounding is not one.

Most tests compare two descriptions directly, as `run` does.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick
from problems import OUTER, relaxed
from ridge import LOSSES, SGD, X, Y

import gradhpo
from gradhpo.data.sources import Feed, as_source
from gradhpo.training import keeper
from gradhpo.training.checkpoint import checkpoints_in
from gradhpo.training.identity import identity
from gradhpo.training.responses import outer_response
from gradhpo.utils import sums
from gradhpo.utils.description import described_arrays, differences


DATA = gradhpo.ArrayData((X, Y), 4, jax.random.key(1))


def about(
    inner: Any = SGD, outer: Any = OUTER, data: Any = DATA, lr_hyper=None, start=None, hyper=-2.0,
    **fields,
):  # fmt: skip
    """The description of a run, as stored in a checkpoint."""
    optimizer = gradhpo.OneStepOptimizer(inner, outer, **fields)
    state = optimizer.init(jnp.zeros(3), jnp.full(3, hyper))
    feed = Feed(as_source(data, "train_data", 1), as_source((X, Y), "val_data", None))
    return json.loads(json.dumps(identity(optimizer, state, feed, lr_hyper, start)))


def run(directory, **settings):
    optimizer = settings.pop("optimizer", gradhpo.OneStepOptimizer(SGD, OUTER))
    state = settings.pop("state", None)
    state = optimizer.init(jnp.zeros(3), jnp.full(3, -2.0)) if state is None else state
    settings = {"num_steps": 6, "chunk_size": 3, "progress": False} | settings
    data = settings.pop("data", DATA)
    return gradhpo.run(
        optimizer, state, LOSSES, data, (X, Y), checkpoint=directory, **settings
    )  # fmt: skip


# -- data --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(2000, 32, 32, 3)).astype(np.float32)


def test_every_channel_of_images_is_compared(images):
    """A stride of six numbers once compared only the red one."""
    expected = described_arrays((jnp.asarray(images),))
    assert differences(expected, described_arrays((jnp.asarray(images.copy()),))) == []
    for channel in range(3):
        changed = images.copy()
        changed[..., channel] *= 1.01
        assert differences(expected, described_arrays((jnp.asarray(changed),)))
    for image in (0, 777, 1999):
        changed = images.copy()
        changed[image] = changed[image, ::-1]  # upside down, with the same norm
        assert differences(expected, described_arrays((jnp.asarray(changed),)))
    moved = images[np.random.default_rng(1).permutation(2000)]
    assert differences(expected, described_arrays((jnp.asarray(moved),)))


def test_every_number_of_labels_is_compared():
    labels = np.random.default_rng(0).integers(0, 10, 3 * 10**6).astype(np.uint8)
    expected = described_arrays(jnp.asarray(labels))
    for place in (0, 1, 1_234_567, len(labels) - 1):
        changed = labels.copy()
        changed[place] += 1
        assert differences(expected, described_arrays(jnp.asarray(changed)))
    assert differences(expected, described_arrays(jnp.asarray(labels[::-1].copy())))


def test_small_targets_beside_large_inputs_are_compared():
    found = differences(described_arrays((1e6 * X, Y)), described_arrays((1e6 * X, -Y)), "data")
    assert found == ["data holds other values (at [1])"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "complex64"])
def test_sums_of_the_host_and_of_the_device_are_the_same(dtype, monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3000)) * 1e3, dtype)
    expected = np.asarray(sums.float_sums(x))
    monkeypatch.setattr(sums, "_MOST_ON_HOST", 0)
    found = np.asarray(sums.float_sums(x))
    # Far below the tolerance of the comparison, 1e-4: sums of 1,024 numbers in float32.
    assert np.all(np.abs(found - expected) <= 1e-6 * expected[:, :1])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "bool"])
def test_checksums_of_the_host_and_of_the_device_are_the_same(dtype, monkeypatch):
    x = np.random.default_rng(0).integers(-100, 100, 5000).astype(dtype)
    expected = sums.checksum(x)
    monkeypatch.setattr(sums, "_MOST_ON_HOST", 0)
    assert sums.checksum(x) == expected


@pytest.mark.parametrize("shape", [(), (3, 700, 5), (9, 2_048)])
def test_arrays_of_several_processes_are_described_as_those_of_one(shape, monkeypatch):
    x = np.random.default_rng(0).normal(size=shape)
    x = x + 1j if len(shape) == 2 else np.asarray(x, np.float32)
    expected = sums.float_sums(x), sums.checksum_of_bits(x)
    monkeypatch.setattr(sums, "is_of_several", lambda x: True)
    x = jnp.asarray(x)
    # As above: sums of a block in float32.
    np.testing.assert_allclose(sums.float_sums(x), expected[0], rtol=1e-5, atol=1e-5)
    assert sums.checksum_of_bits(x) == expected[1]


def test_numbers_out_of_the_range_of_squares_are_compared():
    with np.errstate(all="raise"):
        tiny, huge = (described_arrays(np.asarray([size, -size])) for size in (1e-300, 1e300))
    assert differences(tiny, described_arrays(np.asarray([1e-300, 1e-300])))
    assert differences(huge, described_arrays(np.asarray([1e300, 1e300])))


def test_another_function_of_the_index_is_another_run():
    noisy = lambda size: lambda i: (
        X + size * jax.random.normal(jax.random.fold_in(jax.random.key(0), i), X.shape), Y,
    )  # fmt: skip
    assert differences(about(data=noisy(0.1)), about(data=noisy(0.1))) == []
    found = differences(about(data=noisy(0.1)), about(data=noisy(0.2)))
    assert found == ["train_data.batches holds other values (at ['batch 0'][0])"]


# -- optimizers, schedules and functions -------------------------------------------------------


def at_ease(schedule):
    """optax mixes dtypes internally."""

    def rate(step):
        with jax.numpy_dtype_promotion("standard"):
            return schedule(step)

    return rate


def warm_up(peak):
    return at_ease(optax.warmup_cosine_decay_schedule(0.0, peak, 1_000, 20_000))


def clipped(bound, inner):
    return relaxed(optax.chain(optax.clip_by_global_norm(bound), inner))


OTHERS = {
    "b1": [relaxed(optax.adam(0.1, b1=b1)) for b1 in (0.9, 0.5)],
    "b2": [relaxed(optax.adam(0.1, b2=b2)) for b2 in (0.999, 0.99)],
    "eps": [relaxed(optax.adam(0.1, eps=eps)) for eps in (1e-8, 1e-6)],
    "eps_root": [relaxed(optax.adam(0.1, eps_root=eps)) for eps in (1e-16, 1e-12)],
    "momentum": [relaxed(optax.sgd(0.1, momentum=m)) for m in (0.9, 0.5)],
    "nesterov": [relaxed(optax.sgd(0.1, momentum=0.9, nesterov=x)) for x in (False, True)],
    "clipping": [clipped(bound, optax.sgd(0.1)) for bound in (1.0, 1000.0)],
    "peak": [relaxed(optax.sgd(warm_up(peak))) for peak in (0.1, 10.0)],
    "weight decay": [relaxed(optax.adamw(0.1, weight_decay=x)) for x in (0.01, 0.1)],
    "a late schedule": [
        relaxed(optax.sgd(optax.piecewise_constant_schedule(0.1, {5_000: x}))) for x in (0.1, 0.5)
    ],
    "of a hyperparameter": [
        lambda h, power=power: relaxed(optax.sgd(jnp.exp(power * (h[0] + 2.0)))) for power in (1, 2)
    ],
    "line search": [
        relaxed(optax.polyak_sgd(scaling=scaling)) for scaling in (1.0, 0.5)
    ],
    "the longest step of a line search": [
        relaxed(optax.polyak_sgd(max_learning_rate=most)) for most in (1.0, 10.0)
    ],
    "the decay of a line search": [
        relaxed(optax.chain(optax.sgd(3.0), optax.scale_by_backtracking_linesearch(
            20, decrease_factor=factor, store_grad=False))) for factor in (0.8, 0.5)
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "setting", quick(list(OTHERS), keep=["b1", "peak", "of a hyperparameter", "line search"])
)
def test_another_inner_setting_is_another_run(setting):
    inner, other = OTHERS[setting]
    expected = about(inner=inner)
    assert expected["the update of inner_optimizer"] != {"unknown": True}
    assert differences(expected, about(inner=inner)) == []
    found = differences(expected, about(inner=other))
    assert found == ["the update of inner_optimizer holds other values"]


@pytest.mark.parametrize(
    "setting", quick(["b1", "clipping", "peak", "weight decay"], keep=["b1", "peak"])
)
def test_another_outer_setting_is_another_run(setting):
    outer, other = OTHERS[setting]
    found = differences(about(outer=outer), about(outer=other))
    assert found == ["the update of outer_optimizer holds other values"]


def test_another_schedule_of_the_outer_rate_is_another_run():
    of = lambda rate: about(outer=None, lr_hyper=rate)
    expected = of(warm_up(0.1))
    assert differences(expected, of(warm_up(0.1))) == []
    assert differences(expected, of(warm_up(10.0))) == ["lr_hyper holds other values"]
    later = at_ease(optax.piecewise_constant_schedule(0.1, {2_000: 0.5}))
    assert differences(of(optax.constant_schedule(0.1)), of(later))
    assert differences(of(0.1), of(0.2)) == ["lr_hyper was 0.1, and is 0.2"]
    assert differences(of(0.1), expected) == ["lr_hyper was 0.1, and is a schedule"]


def moving(rate):
    return lambda w, h, batch: w - rate * jnp.mean(batch[0]) * jnp.exp(h)


@pytest.mark.parametrize("name", quick(["update_fn", "grad_fn"], keep=["grad_fn"]))
@pytest.mark.parametrize("drawn", [False, True])
def test_another_function_of_the_users_is_another_run(name, drawn):
    """Judged by its output on a batch; with an iterator, which is not drawn from, by its code."""
    inner = None if name == "update_fn" else SGD
    batches = lambda: gradhpo.iterate([(np.ones((4, 3)), np.ones(4))])
    of = lambda function: about(inner=inner, data=batches() if drawn else DATA, **{name: function})
    assert differences(of(moving(0.1)), of(moving(0.1))) == []
    (found,) = differences(of(moving(0.1)), of(moving(0.2)))
    assert name in found
    same = lambda w, h, batch: w - jnp.exp(h) * jnp.mean(batch[0]) * 0.1
    assert bool(differences(of(moving(0.1)), of(same))) == drawn


def test_rounding_of_parameters_is_no_other_update():
    """An update is compared relative to the parameters that it is added to."""
    of = lambda move: about(inner=None, update_fn=lambda w, h, batch: w + move)
    assert differences(of(1e-3), of(1e-3 * (1 + 1e-6))) == []
    assert differences(of(1e-3), of(2e-3))


@pytest.mark.thorough
def test_another_start_of_episodes_is_another_run(tmp_path):
    start = lambda size: lambda key, h: size * jax.random.normal(key, (3,))
    episodes = {"steps_per_episode": 3, "key": jax.random.key(0)}
    run(tmp_path, start_fn=start(0.1), **episodes)
    run(tmp_path, start_fn=start(0.1), num_steps=9, **episodes)
    with pytest.raises(ValueError, match="start_fn holds other values"):
        run(tmp_path, start_fn=start(0.2), num_steps=9, **episodes)
    with pytest.raises(ValueError, match="another run: key holds other values"):
        run(tmp_path, start_fn=start(0.1), num_steps=9, steps_per_episode=3, key=jax.random.key(1))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("inner_opt_state", lambda s: jax.tree.map(lambda x: x + jnp.ones_like(x), s)),
        ("outer_opt_state", lambda s: jax.tree.map(lambda x: x + jnp.ones_like(x), s)),
    ],
)
def test_another_optimizer_state_at_the_start_is_another_run(tmp_path, field, change):
    optimizer = gradhpo.OneStepOptimizer(relaxed(optax.sgd(0.1, momentum=0.9)), OUTER)
    state = optimizer.init(jnp.zeros(3), jnp.full(3, -2.0))
    run(tmp_path, optimizer=optimizer, state=state)
    other = state.update(**{field: change(getattr(state, field))})
    with pytest.raises(ValueError, match=f"state.{field} holds other values"):
        run(tmp_path, optimizer=optimizer, state=other, num_steps=9)


def test_what_cannot_be_told_is_no_other_run():
    def fails(updates, state, params=None):
        raise RuntimeError("needs something else")

    inner = optax.GradientTransformation(lambda w: (), fails)
    assert about(inner=inner)["the update of inner_optimizer"] == {"unknown": True}
    assert differences(about(inner=inner), about(inner=SGD)) == []


def test_settings_of_tasks_are_compared(tmp_path):
    def of(momentum):
        inner = relaxed(optax.sgd(0.1, momentum=momentum))
        tasks = gradhpo.TaskBatched(gradhpo.OneStepOptimizer(inner, OUTER), 2)
        state = tasks.init(jnp.zeros(3), jnp.full(3, -2.0))
        batch = jax.tree.map(lambda x: jnp.stack([x, x]), (X, Y))
        feed = Feed(as_source(batch, "train_data", 1), as_source(batch, "val_data", None))
        return identity(tasks, state, feed, None, None)

    assert differences(of(0.9), of(0.9)) == []
    assert differences(of(0.9), of(0.5)) == ["the update of inner_optimizer holds other values"]


@pytest.mark.parametrize("average", ["hypergradients", "updates"])
def test_the_outer_optimizer_of_tasks_is_compared(average):
    def of(rate):
        outer = relaxed(optax.adam(rate))
        tasks = gradhpo.TaskBatched(gradhpo.OneStepOptimizer(SGD, outer), 2, average=average)
        return outer_response(tasks, tasks.init(jnp.zeros(3), jnp.full(3, -2.0)))

    assert differences(of(0.05), of(0.05)) == []
    assert differences(of(0.05), of(0.04)) == [" holds other values"]


# -- the same run ------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [1e-6, 1e-3])
def test_a_scalar_hyperparameter_is_compared_like_an_array(tmp_path, change):
    optimizer = gradhpo.OneStepOptimizer(SGD, OUTER)
    start = lambda value: optimizer.init(jnp.zeros(3), jnp.asarray(value))
    run(tmp_path, optimizer=optimizer, state=start(-2.0))
    again = {"optimizer": optimizer, "state": start(-2.0 * (1 + change)), "num_steps": 9}
    if change < 1e-4:
        run(tmp_path, **again)
    else:
        with pytest.raises(ValueError, match=r"state\.hyperparams holds other values"):
            run(tmp_path, **again)


@pytest.mark.thorough
def test_without_compilation_it_is_the_same_run(tmp_path):
    """Rounding differs without it, in the hyperparameters too."""
    made = lambda: jnp.log(jnp.sum(jnp.asarray([0.1, 0.02, 0.003], jnp.float32)))
    schedule = lambda step: 0.1 * jnp.exp(-0.01 * step.astype(jnp.float32))
    optimizer = gradhpo.OneStepOptimizer(relaxed(optax.adam(0.1)))
    start = lambda: optimizer.init(jnp.zeros(3), jnp.asarray(made(), float))
    run(tmp_path, optimizer=optimizer, state=start(), lr_hyper=schedule, num_steps=1, chunk_size=1)
    with jax.disable_jit():
        state, _ = run(
            tmp_path, optimizer=optimizer, state=start(), lr_hyper=schedule, num_steps=2,
            chunk_size=1,
        )  # fmt: skip
    assert state.step == 2


def test_an_upgrade_is_said_aloud(tmp_path, monkeypatch):
    versions = keeper._versions
    assert versions()["gradhpo"] == gradhpo.__version__
    monkeypatch.setattr(keeper, "_versions", lambda: versions() | {"jax": "0.1.2"})
    run(tmp_path)
    header = checkpoints_in(tmp_path)[-1].read_bytes().splitlines()[1]
    assert json.loads(header)["versions"] == {"gradhpo": gradhpo.__version__, "jax": "0.1.2"}
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=rf"jax was 0.1.2, and is {jax.__version__}"):
        state, _ = run(tmp_path, num_steps=9)
    assert state.step == 9
    # It has since been written with this version.
    run(tmp_path, num_steps=12)
