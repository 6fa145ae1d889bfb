"""Frozen leaves in `run`: under Reptile and tasks, and saved once in a checkpoint directory."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, quick
from problems import OUTER
from test_frozen import (
    ADAM,
    ALONE,
    BACKBONE,
    BATCH,
    CLOSED,
    DECAY,
    HEAD,
    LOSSES,
    MIB,
    PARAMS,
    SGD,
    WIDE,
    params_with,
)  # fmt: skip

import gradhpo
from gradhpo.core.inner_state import InnerState
from gradhpo.data.source import Fixed
from gradhpo.diagnostics.cost import Program
from gradhpo.training.chunk import Chunk


OPTIMIZER = gradhpo.OneStepOptimizer(ADAM, OUTER)
DATA = gradhpo.ArrayData(BATCH, 3, jax.random.key(1))
EPISODES = {"steps_per_episode": 4, "reptile_rate": 0.5}


def run(optimizer=OPTIMIZER, params=PARAMS, losses=LOSSES, num_steps=8, batches=None, **settings):
    settings = {"chunk_size": 2, "progress": False} | settings
    train, val = (DATA, BATCH) if batches is None else batches
    state = optimizer.init(params, DECAY)
    return gradhpo.run(optimizer, state, losses, train, val, num_steps=num_steps, **settings)


@pytest.mark.thorough
@pytest.mark.parametrize("tasks", [None, 2])
def test_reptile_moves_what_is_trained(tasks):
    optimizer, batches = OPTIMIZER, None
    if tasks:
        optimizer = together = gradhpo.TaskBatched(OPTIMIZER, tasks)
        batches = (jax.tree.map(lambda x: jnp.stack([x, 2 * x]), BATCH),) * 2
    (found, history), (expected, by_closure) = (
        run(optimizer, params, losses, batches=batches, **EPISODES)
        for params, losses in ((PARAMS, LOSSES), (ALONE, CLOSED))
    )
    assert_same(found.params["head"], expected.params["head"], rtol=1e-12, atol=1e-14)
    assert_same(found.hyperparams, expected.hyperparams, rtol=1e-12)
    np.testing.assert_allclose(history["param_norm"], by_closure["param_norm"], rtol=1e-12)
    if tasks:
        one = together.of_task(found, 1)  # pyright: ignore[reportPossiblyUnbound]
        assert_same(one.params["head"], jax.tree.map(lambda x: x[1], found.params["head"]))
        assert one.params["backbone"]["w"].array is BACKBONE["w"]
    backbone = gradhpo.unfrozen(found.params)["backbone"]
    assert backbone["w"] is BACKBONE["w"]
    assert found.params["head"]["w"].shape == ((2, 4) if tasks else (4,))


MARKS = {"frozen": gradhpo.frozen, "plain": lambda backbone: backbone}


@pytest.mark.parametrize("mark", quick(list(MARKS), keep=["plain"]))
def test_new_parameters_for_each_episode(mark):
    """Their `start_fn` may mark the backbone or not: it does not change."""

    def start_fn(key, decay):
        w = jnp.sqrt(jnp.exp(decay)) * jax.random.normal(key, (4,))
        return {"backbone": MARKS[mark](BACKBONE), "head": {"w": w, "b": jnp.zeros(())}}

    settings = {"steps_per_episode": 4, "key": jax.random.key(3)}
    optimizer = gradhpo.UnrolledOptimizer(SGD, OUTER, unroll_steps=2)
    found, _ = run(optimizer, start_fn=start_fn, **settings)
    head_alone = lambda key, decay: {"head": start_fn(key, decay)["head"]}
    expected, _ = run(optimizer, ALONE, CLOSED, start_fn=head_alone, **settings)
    assert_same(found.hyperparams, expected.hyperparams, rtol=1e-12)
    assert_same(found.params["head"], expected.params["head"], rtol=1e-12)
    assert gradhpo.unfrozen(found.params)["backbone"]["w"] is BACKBONE["w"]


def test_a_chunk_makes_no_copy_of_the_backbone():
    """Of 1 MiB."""
    head = {"w": jnp.zeros(512, jnp.float32)}
    loss = lambda params, decay, batch: (
        jnp.mean((batch @ params["backbone"] @ params["head"]["w"] - 1) ** 2)
        + decay * jnp.sum(params["head"]["w"] ** 2)
    )
    optimizer = gradhpo.OneStepOptimizer(SGD, SGD)
    params = {"backbone": gradhpo.frozen(2 * WIDE), "head": head}
    state = optimizer.init(params, jnp.asarray(0.1, jnp.float32))
    data = Fixed(jnp.ones((4, 512), jnp.float32))
    chunk = Chunk(optimizer, gradhpo.LossFunctions(loss, loss), data, data, None)
    rate, start = jnp.asarray(0.5), InnerState({"backbone": None, "head": head})
    of_steps = Program(lambda chunk, state: chunk.run_steps(state, 3), chunk, state)
    of_episodes = Program(
        lambda chunk, state, *at: chunk.run_episodes(state, *at, 2, 2, 2),
        chunk,
        state,
        start,
        rate,
    )
    for program in (of_steps, of_episodes):
        assert program.temporary_bytes < MIB / 4


# -- checkpoints --------------------------------------------------------------------------------


def stop_at(step):
    return lambda state, metrics: int(state.step) >= step


def saved(directory, **settings):
    checkpoint = gradhpo.Checkpoint(directory, every_steps=1, keep=3)
    best = gradhpo.BestState()
    return *run(
        checkpoint=checkpoint, callbacks=[best, *settings.pop("more", [])], **settings
    ), best


@pytest.mark.parametrize("tasks", [None, 2])
def test_a_resumed_run_is_the_uninterrupted_one(tasks, tmp_path):
    how = {}
    if tasks:
        batches = (jax.tree.map(lambda x: jnp.stack([x, 2 * x]), BATCH),) * 2
        how = {"optimizer": gradhpo.TaskBatched(OPTIMIZER, tasks), "batches": batches}
    whole, history = run(**how, **EPISODES)
    saved(tmp_path, more=[stop_at(6)], **how, **EPISODES)
    state, resumed, best = saved(tmp_path, **how, **EPISODES)
    assert_same(state, whole)
    np.testing.assert_array_equal(resumed["val_loss"], history["val_loss"])
    # Not loaded twice, since the state that is passed already has them.
    for found in (state, best.state):
        assert gradhpo.unfrozen(found.params)["backbone"]["w"] is BACKBONE["w"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    state, _, best = saved(directory)
    return directory, state, best


@pytest.fixture
def copied(finished, tmp_path):
    for path in finished[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_the_backbone_is_written_once(tmp_path):
    params = {"backbone": gradhpo.frozen(WIDE), "head": HEAD}  # of 1 MiB
    loss = lambda params, decay, batch: (
        jnp.sum(params["head"]["w"] ** 2 * decay) + params["backbone"][0, 0]
    )
    written = []
    look = lambda state, metrics: written.append((tmp_path / "frozen.ckpt").stat().st_mtime_ns)
    losses = gradhpo.LossFunctions(loss, loss)
    with jax.numpy_dtype_promotion("standard"):
        saved(tmp_path, params=params, losses=losses, batches=(None, None), more=[look])
    assert len(set(written)) == 1
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert MIB < sizes.pop("frozen.ckpt") < MIB + 1_000
    assert len(sizes) >= 4
    assert sum(sizes.values()) < 50_000  # three checkpoints, with a best state in each


def test_another_state_gets_the_backbone_of_the_run(finished):
    directory, expected, expected_best = finished
    other = OPTIMIZER.init(params_with(jax.tree.map(jnp.zeros_like, BACKBONE)), DECAY)
    best = gradhpo.BestState()
    state, history = gradhpo.load_checkpoint(directory, other, [best])
    assert_same(state, expected)
    assert_same(best.state, expected_best.state)
    assert len(history["val_loss"]) == 8
    again, _ = gradhpo.load_checkpoint(directory, OPTIMIZER.init(PARAMS, DECAY))
    assert again.params["backbone"]["w"].array is BACKBONE["w"]


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def of_another_run(path):
    other = params_with(jax.tree.map(lambda x: x + 1, BACKBONE))
    saved(path.parent / "other", params=other, num_steps=2)
    path.write_bytes((path.parent / "other" / "frozen.ckpt").read_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "frozen.ckpt, the frozen leaves of the run, is missing"),
        (flipped, "frozen.ckpt is damaged .its checksum does not match.*restore it from a copy"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "frozen.ckpt is damaged .it has"),
        (lambda path: path.write_bytes(b"PK"), "frozen.ckpt is not a checkpoint of gradhpo"),
        (of_another_run, "frozen.ckpt holds the frozen leaves of another run"),
    ],
)
def test_a_backbone_that_is_not_there_is_an_error(copied, change, message):
    change(copied / "frozen.ckpt")
    before = {path: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=message):
        saved(copied, num_steps=10)
    with pytest.raises(ValueError, match=message):
        gradhpo.load_checkpoint(copied, OPTIMIZER.init(PARAMS, DECAY))
    assert {path: path.read_bytes() for path in copied.iterdir() if path.is_file()} == before


def test_a_run_with_another_backbone_is_another_run(copied):
    other = jax.tree.map(lambda x: x + 1, BACKBONE)
    with pytest.raises(ValueError, match=r"the frozen part of state\.params holds other values"):
        saved(copied, params=params_with(other))
    thawed = {"backbone": BACKBONE, "head": HEAD}
    with pytest.raises(ValueError, match=r"frozen part of state\.params has another structure"):
        saved(copied, params=thawed)
    with pytest.raises(ValueError, match=r"another structure: .*\['w'\].* the same leaves frozen"):
        gradhpo.load_checkpoint(copied, OPTIMIZER.init(thawed, DECAY))
    picked = {"w": BACKBONE["w"], "picked": gradhpo.frozen(BACKBONE["picked"])}
    one = OPTIMIZER.init({"backbone": picked, "head": HEAD}, DECAY)
    with pytest.raises(ValueError, match="another structure"):
        gradhpo.load_checkpoint(copied, one)
    wider = params_with(BACKBONE | {"w": jnp.zeros((3, 6))})
    with pytest.raises(ValueError, match=r"frozen leaf \['backbone'\]\['w'\] is \[\[3, 5\]"):
        gradhpo.load_checkpoint(copied, OPTIMIZER.init(wider, DECAY))
    more = PARAMS | {"more": gradhpo.frozen(jnp.ones(2))}
    with pytest.raises(ValueError, match=r"froze other leaves: \['more'\] is frozen only here"):
        gradhpo.load_checkpoint(copied, OPTIMIZER.init(more, DECAY))


def test_a_foreign_file_is_left_alone(tmp_path):
    (tmp_path / "frozen.ckpt").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"frozen\.ckpt exists and was not written by gradhpo"):
        saved(tmp_path)
    assert (tmp_path / "frozen.ckpt").read_bytes() == b"mine"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved(tmp_path, params=ALONE, losses=CLOSED, num_steps=2)  # has nothing to keep there
    assert (tmp_path / "frozen.ckpt").read_bytes() == b"mine"


def test_a_run_killed_before_its_first_checkpoint_begins_anew(copied):
    for path in copied.iterdir():
        if path.name != "frozen.ckpt":
            path.unlink()
    other = params_with(jax.tree.map(lambda x: x + 1, BACKBONE))
    state, _, _ = saved(copied, params=other, num_steps=2)
    assert_same(gradhpo.load_checkpoint(copied, OPTIMIZER.init(PARAMS, DECAY))[0], state)
