"""Losses in pieces: the same numbers with less memory."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, quick, relative_error
from problems import OUTER, relaxed
from test_contract import ADAM, OF_ANY_LOSS, build

import gradhpo


EXAMPLES, WIDTH, LENGTH, WORDS, LAYERS = 64, 16, 8, 50, 2
NUM = 8


def transformer(key):
    draw = iter(jax.random.split(key, 5 * LAYERS + 1))
    matrix = lambda n, m: jax.random.normal(next(draw), (n, m)) / np.sqrt(n)
    shapes = {name: (WIDTH, WIDTH) for name in "qkv"}
    shapes |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    layer = lambda: {name: matrix(*shape) for name, shape in shapes.items()}
    return {"words": matrix(WORDS, WIDTH), "layers": [layer() for _ in range(LAYERS)]}


def normed(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def logits(params, tokens):
    x = params["words"][tokens]
    before = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    for layer in params["layers"]:
        q, k, v = (normed(x) @ layer[name] for name in "qkv")
        scores = jnp.where(before, q @ jnp.swapaxes(k, -1, -2) / np.sqrt(WIDTH), -1e9)
        x = x + jax.nn.softmax(scores) @ v
        x = x + jax.nn.gelu(normed(x) @ layer["up"]) @ layer["down"]
    return x @ params["words"].T


def weighted(params, log_weights, batch):
    """A weighted mean over examples, and a penalty."""
    tokens, indices, scale = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, tokens[:, :-1]), tokens[:, 1:]
    ).mean(axis=1)
    loss = scale * jnp.mean(jnp.exp(log_weights[indices]) * losses)
    return loss + 1e-3 * jnp.sum(params["words"] ** 2), {"plain": jnp.mean(losses)}


PARAMS = transformer(jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (EXAMPLES, LENGTH + 1), 0, WORDS)
BATCH = TOKENS, jnp.arange(EXAMPLES), jnp.asarray(0.5)
LOG_WEIGHTS = 0.1 * jax.random.normal(jax.random.key(2), (EXAMPLES,))


def compiled(optimizer, loss):
    """The hypergradient, and the temporary memory of its program in bytes."""
    state, losses = optimizer.init(PARAMS, LOG_WEIGHTS), gradhpo.LossFunctions(loss, loss)
    compute = lambda state, batch: optimizer.compute_hypergradient(state, batch, batch, losses)
    program = jax.jit(compute).lower(state, BATCH).compile()
    return program(state, BATCH), program.memory_analysis().temp_size_in_bytes


@pytest.mark.thorough
@pytest.mark.parametrize(
    "optimizer",
    [
        gradhpo.OneStepOptimizer(optax.sgd(0.1), OUTER),
        gradhpo.UnrolledOptimizer(relaxed(optax.adam(1e-2, eps_root=1e-8)), unroll_steps=4),
    ],
    ids=["one step", "unrolled"],
)
def test_a_transformer_in_eight_pieces(optimizer):
    """Equal to 1e-12; memory at most 1.1 times (an eighth + 10 times the parameters)."""
    whole, of_whole = compiled(optimizer, weighted)
    pieces, of_pieces = compiled(optimizer, gradhpo.microbatched(weighted, NUM))
    assert relative_error(pieces, whole) < 1e-12
    params = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
    assert of_pieces < 1.1 * (of_whole / NUM + 10 * params)
    assert of_pieces < 0.4 * of_whole


def simple(w, h, batch):
    x, y = batch
    return jnp.mean(jnp.exp(h[0]) * (x @ w - y) ** 2) + h[1] * jnp.sum(w**2)


X = jax.random.normal(jax.random.key(3), (12, 3))
Y = jnp.sin(X @ jnp.ones(3))


@pytest.mark.parametrize(
    "name",
    quick(
        [name for name in OF_ANY_LOSS if name != "first order"],  # it sees only validation
        keep=["HyperDistill"],
    ),
)
def test_every_optimizer_takes_them(name):
    optimizer = build(name, ADAM)
    batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (X, Y)) if name == "tasks" else (X, Y)
    w, h = jnp.array([0.5, -0.2, 0.1]), jnp.array([0.1, 0.2])
    of_one, of_pieces = (
        optimizer.step(optimizer.init(w, h), batch, batch, loss, loss)
        for loss in (simple, gradhpo.microbatched(simple, 4))
    )
    assert_same(of_pieces, of_one, rtol=1e-9, atol=1e-12)


def test_keys_are_split_and_those_of_examples_stay_with_them():
    key = jax.random.key(0)
    seen = lambda w, h, batch: (w + 0.0, {"drawn": jax.random.normal(batch["key"])})
    for given in (key, jax.random.key_data(key)):
        batch = {"key": given, "x": jnp.ones(8)}
        _, beside = gradhpo.microbatched(seen, 4)(jnp.ones(()), None, batch)
        draws = [jax.random.normal(key) for key in jax.random.split(given, 4)]
        np.testing.assert_allclose(beside["drawn"], np.mean(draws))
    own = lambda w, h, b: jnp.mean(jax.vmap(jax.random.normal)(b["keys"]) * b["x"]) * w
    batch = {"keys": jax.random.split(key, 12), "x": jnp.arange(12.0)}
    given = jnp.ones(()), None, batch
    np.testing.assert_allclose(gradhpo.microbatched(own, 3)(*given), own(*given))


def test_bfloat16_adds_up_in_float32():
    """4,096 pieces of 1: in bfloat16 the sum would stall at 256."""
    loss = lambda w, h, batch: jnp.mean(batch) * w
    batch = jnp.ones((4096,), jnp.bfloat16)
    found = gradhpo.microbatched(loss, 4096)(jnp.ones((), jnp.bfloat16), None, batch)
    assert found.dtype == jnp.bfloat16
    assert found == 1


def test_losses_that_are_modules_and_whole_models():
    model = eqx.nn.Linear(3, "scalar", key=jax.random.key(0))
    loss = gradhpo.model_loss(lambda model, b: jnp.mean((jax.vmap(model)(b[0]) - b[1]) ** 2))
    params, hyperparams = gradhpo.partition(model, lambda m: m.bias)
    in_pieces = gradhpo.microbatched(loss, 3)
    given = params, hyperparams, (X, Y)
    np.testing.assert_allclose(in_pieces(*given), loss(*given))
    of_numpy = params, hyperparams, (np.asarray(X), np.asarray(Y))
    np.testing.assert_allclose(in_pieces(*of_numpy), loss(*given))


def dividing(w, h, batch):
    weights, losses = batch
    return jnp.sum(weights * losses * w) / jnp.sum(weights)


def test_a_mean_that_divides_by_its_own_weights_is_another():
    """As its docstring says: the mean of the pieces' means."""
    batch = jnp.array([1.0, 1.0, 3.0, 1.0]), jnp.array([1.0, 2.0, 3.0, 4.0])
    given = jnp.ones(()), None
    found = gradhpo.microbatched(dividing, 2)(*given, batch)
    pieces = [tuple(x[i::2] for x in batch) for i in range(2)]
    np.testing.assert_allclose(found, np.mean([dividing(*given, piece) for piece in pieces]))
    assert abs(found - dividing(*given, batch)) > 0.05


BAD = {
    "pieces that do not come out even": (
        lambda: gradhpo.microbatched(simple, 5)(jnp.ones(3), jnp.ones(2), (X, Y)),
        ValueError,
        r"microbatched\(loss, num=5\) must divide the 12 examples",
    ),
    "arrays of no example": (
        lambda: gradhpo.microbatched(simple, 3)(jnp.ones(3), jnp.ones(2), (X, Y[:6])),
        ValueError,
        r"batch\[0\]: 12, batch\[1\]: 6",
    ),
    "nothing to divide": (
        lambda: gradhpo.microbatched(lambda w, h, b: w, 3)(jnp.ones(()), None, jax.random.key(0)),
        ValueError,
        "no array of examples",
    ),
    "two examples, or a key": (
        lambda: gradhpo.microbatched(simple, 2)(
            jnp.ones(3), jnp.ones(2), (X[:2], jnp.array([0, 1], jnp.uint32))
        ),
        ValueError,
        r"batch\[1\] may be a key.*jax\.random\.key, and examples int32",
    ),
    "a model state": (
        lambda: gradhpo.microbatched(simple, 3)(jnp.ones(3), jnp.ones(2), (X, Y), jnp.ones(())),
        ValueError,
        "takes no model_state.*LayerNorm",
    ),
    "a loss of a model": (
        lambda: gradhpo.microbatched(lambda model, batch: 0.0, 3),
        TypeError,
        r"loss\(params, hyperparams, batch\)",
    ),
    "no number": (lambda: gradhpo.microbatched(simple, 0), ValueError, "num must be at least 1"),
    "chunks that do not come out even": (
        lambda: gradhpo.chunked_cross_entropy(X, jnp.ones((5, 3)), jnp.zeros(12, int), 5),
        ValueError,
        r"chunked_cross_entropy\(num=5\) must divide the 12 tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_misuse_is_named(case):
    act, error, said = BAD[case]
    with pytest.raises(error, match=said):
        act()


# -- cross-entropy -----------------------------------------------------------------------------


def plain_cross_entropy(features, head, labels, smoothing):
    logits = features @ head.T
    targets = optax.smooth_labels(jax.nn.one_hot(labels, len(head)), smoothing[..., None])
    return optax.softmax_cross_entropy(logits, targets)


FEATURES = jax.random.normal(jax.random.key(4), (4, 6, 5))
HEAD = jax.random.normal(jax.random.key(5), (30, 5))
LABELS = jax.random.randint(jax.random.key(6), (4, 6), 0, 30)


@pytest.mark.thorough
def test_chunks_have_the_same_loss_and_derivatives_of_both_orders():
    smoothing = jnp.linspace(0, 0.5, 4)[:, None]
    chunked = lambda x, w, s: gradhpo.chunked_cross_entropy(x, w, LABELS, 4, s)
    plain = lambda x, w, s: plain_cross_entropy(x, w, LABELS, s)
    given = FEATURES, HEAD, smoothing
    np.testing.assert_allclose(chunked(*given), plain(*given), rtol=1e-12)
    cost = lambda f: lambda *x: jnp.sum(jnp.sin(f(*x)))
    gradients = [jax.jit(jax.grad(cost(f), argnums=(0, 1, 2)))(*given) for f in (chunked, plain)]
    assert relative_error(*gradients) < 1e-12
    along = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=float)).reshape(x.shape), given)
    for second in (
        lambda f: jax.jvp(jax.grad(cost(f), argnums=(0, 1, 2)), given, along)[1],
        lambda f: jax.vjp(jax.grad(cost(f), argnums=(0, 1, 2)), *given)[1](along),
    ):
        product = jax.jit(second, static_argnums=0)
        assert relative_error(product(chunked), product(plain)) < 1e-11


def test_chunks_never_hold_all_logits():
    tokens, vocabulary, width = 256, 1000, 8
    x, head = jnp.ones((tokens, width)), jnp.ones((vocabulary, width))
    labels = jnp.zeros(tokens, int)

    def memory(loss):
        product = lambda x, v: jax.jvp(jax.grad(lambda x: jnp.mean(loss(x))), (x,), (v,))[1]
        return jax.jit(product).lower(x, x).compile().memory_analysis().temp_size_in_bytes

    all_logits = 8 * tokens * vocabulary
    workspace = 2**25 if jax.default_backend() == "gpu" else 0  # requested by cuBLAS
    assert memory(lambda x: plain_cross_entropy(x, head, labels, jnp.zeros(tokens))) > all_logits
    chunked = lambda x: gradhpo.chunked_cross_entropy(x, head, labels, 16)
    assert memory(chunked) < 0.6 * all_logits + workspace


@pytest.mark.thorough
def test_low_precision_logits_are_float32():
    x, head = FEATURES.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16)
    found = gradhpo.chunked_cross_entropy(x, head, LABELS, 2)
    assert found.dtype == jnp.float32
    wide = plain_cross_entropy(x.astype(float), head.astype(float), LABELS, jnp.zeros((4, 6)))
    np.testing.assert_allclose(found, wide, rtol=1e-5)
    # The gradient of the head adds up in float32, over 24 chunks as over one.
    mean = lambda head, num: jnp.mean(gradhpo.chunked_cross_entropy(x, head, LABELS, num))
    gradients = [jax.grad(mean)(head, num) for num in (24, 1)]
    assert all(g.dtype == jnp.bfloat16 for g in gradients)
    assert relative_error(*jax.tree.map(lambda g: g.astype(float), gradients)) < 5e-3
    unsigned = gradhpo.chunked_cross_entropy(x, head, LABELS.astype(jnp.uint16), 2, 0)
    np.testing.assert_array_equal(unsigned, found)


def test_a_loss_with_running_state_is_refused_at_once():
    loss = lambda w, h, batch, model_state: (jnp.sum(w), model_state)
    with pytest.raises(TypeError, match=r"takes no model_state.*LayerNorm"):
        gradhpo.microbatched(loss, 2)
