"""Layering: imports point down, and the generic rooms know no algorithm."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import pytest

import gradhpo
from gradhpo.core.memory import MemoryOfEach
from gradhpo.core.wrapper import Wrapper
from gradhpo.extend import Algorithm, BilevelOptimizer, Memory


PACKAGE = Path(gradhpo.__file__).parent
# integrations -> diagnostics -> training -> algorithms, data -> core, solvers -> utils; algorithms
# use `extend`.
BELOW = {
    "utils": set(),
    "core": {"utils"},
    "solvers": {"utils"},
    "algorithms": {"extend"},
    "wrappers": {"core", "utils"},
    "data": {"core", "utils"},
    "training": {"algorithms", "core", "data", "utils"},
    "diagnostics": {"algorithms", "core", "data", "training", "utils"},
    "integrations": {"core", "training", "utils"},
}


def imported(node: ast.AST, room: str) -> list[str]:
    """The parts of gradhpo that a node imports, in full: `gradhpo.core.base.BilevelOptimizer`."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        above = ["gradhpo", room][: 3 - node.level] if node.level else []
        module = ".".join([*above, *filter(None, [node.module])])
        names = [f"{module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Call) and re.search("import_(module|_)$", ast.unparse(node.func)):
        names = [str(x.value) for x in node.args if isinstance(x, ast.Constant)]
    return [name for name in names if name.split(".")[0] == "gradhpo"]


def rooms_of(source: str, room: str) -> set[str]:
    """The other rooms that a file imports from, anywhere; `gradhpo` is the package itself."""
    names = [name for node in ast.walk(ast.parse(source)) for name in imported(node, room)]
    return {[*name.split("."), "gradhpo"][1] for name in names} - {room}


@pytest.mark.parametrize("room", list(BELOW))
def test_imports_point_down(room):
    for file in (PACKAGE / room).rglob("*.py"):
        above = rooms_of(file.read_text(), room) - BELOW[room]
        assert not above, f"{file} imports {above}"


@pytest.mark.parametrize(
    "line",
    [
        "from gradhpo.training.loop import run",
        "import gradhpo.training.loop as loop",
        "from gradhpo import training",
        "import gradhpo",
        "from ..training import loop",
        "def f():\n    from gradhpo.training.loop import run",
        "if TYPE_CHECKING:\n    from gradhpo.training.loop import run",
        "loop = importlib.import_module('gradhpo.training.loop')",
    ],
)
def test_an_import_that_points_up_is_seen(line):
    assert rooms_of(line, "core") - BELOW["core"]


# -- generic rooms ---------------------------------------------------------------------------------

GENERIC = ["core", "training", "data", "diagnostics", "integrations"]


def _modules_of_algorithms() -> list[type]:
    """Every module in `algorithms/` and `wrappers/`: optimizers, their memories, parts of both."""
    found = []
    for file in [*(PACKAGE / "algorithms").glob("*.py"), *(PACKAGE / "wrappers").glob("*.py")]:
        name = f"gradhpo.{file.parent.stem}.{file.stem}"
        classes = [x for x in vars(importlib.import_module(name)).values() if isinstance(x, type)]
        found += [x for x in classes if issubclass(x, eqx.Module) and x.__module__ == name]
    return found


def _own_names() -> set[str]:
    """Settings, public methods and fields of memories, except what all algorithms have."""
    common = {*dir(Algorithm), *dir(Wrapper), *dir(Memory)}
    common |= {"inner_optimizer", "grad_fn", "update_fn", "optimizer"}
    common |= set(MemoryOfEach.__annotations__)
    # Everyday words: settings of mutations, `Path.parent`, `EarlyStopping.best`.
    common |= {"kind", "scale", "function", "parent", "best", "fraction"}
    # Settings that are also words for parts of every tree and many losses.
    common |= {"structure", "decay", "predict", "noise", "draws", "perturbed"}
    names = set()
    for cls in _modules_of_algorithms():
        names |= set(cls.__dataclass_fields__)
        if issubclass(cls, BilevelOptimizer):
            names |= {name for name in vars(cls) if not name.startswith("_")}
    return names - common


CLASSES = {cls.__name__ for cls in _modules_of_algorithms()}
NAMES = CLASSES | _own_names()
# Words of the whole library that memories and settings also use: a PRNG key, an inner step's
# number, an average. They count only as fields of an object.
WORDS = {"key", "t", "average"}
PROSE = re.compile(
    r"\w*(distill|t1-?t2|drmad|darts|greedy|neumann|nystr[oö]m|f2sa|implicit|unroll"
    r"|(forward|reverse)[ _-]?mode|first[ _-]order|one-step|truncation|truncated)\w*",
    re.IGNORECASE,
)
# Exceptions in the generic rooms, by place and exact form.
ALLOWED = {
    "core/checkpoints.py": {
        "def unrolled": "reverse mode is the tool of several algorithms and of the reference",
    },
    "core/inner_state.py": {"self.key": "the PRNG key of a Start"},
    "core/draws.py": {"jax.random.key": "makes a PRNG key"},
    "core/start.py": {"jax.random.key": "makes a PRNG key"},
    "training/start.py": {"('key')": "the argument of run"},
    "training/identity.py": {
        "('key')": "the argument of run",
        "start.key": "the PRNG key of a Start",
    },
    "training/responses.py": {"start.key": "the PRNG key of a Start"},
    "training/boundaries.py": {"Caller('store')": "the argument of replay"},
    "training/replay.py": {
        "(store)": "where it keeps its own states",
        "store": "the same",
        "store=": "the same",
    },
    "data/arrays.py": {
        "self.key": "the PRNG key of ArrayData",
        "data.key": "the PRNG key of ArrayData",
    },
    "core/exact.py": {
        "import gradhpo.core.checkpoints.unrolled": "the exact reference, by reverse mode",
        "unrolled": "the exact reference, by reverse mode",
    },
    "diagnostics/finite_difference.py": {
        "epsilon": "the step of its own differences",
        "(epsilon)": "the step of its own differences",
        "check_setting('epsilon')": "the step of its own differences",
    },
    "diagnostics/metasmooth.py": {
        "epsilon": "the step of its own differences",
        "jax.random.key": "makes a PRNG key",
    },
    "diagnostics/health.py": {
        "(perturb)": "the change of hyperparameters that a caller has in mind",
        "perturb": "the same",
        "jax.random.key": "makes a PRNG key",
    },
    "diagnostics/nearby.py": {
        "(perturb)": "the change of hyperparameters that a caller has in mind",
        "perturb": "the same",
        "def perturb": "the same, where the caller names none",
        "jax.random.key": "makes a PRNG key",
    },
    "diagnostics/nonfinite.py": {"step.t": "the number of a PulledStep"},
    "diagnostics/checkup.py": {
        "text: epsilon": "the setting that `with_difference_step` scales, as its users know it",
    },
    "diagnostics/precision.py": {
        "text: epsilon": "the same",
    },
    "diagnostics/cost.py": {
        "unroll": "the parameter of a scan in JAX's traced programs",
        "('unroll')": "the parameter of a scan in JAX's traced programs",
    },
    "diagnostics/drawing.py": {"text: truncation": "of the sum that a Horizon shows"},
    "diagnostics/horizon.py": {
        "import gradhpo.algorithms.shares.StepWeights": "the room that knows the methods",
        "import gradhpo.algorithms.shares.short_horizons": "the room that knows the methods",
        "(greedy_gamma)": "handed on to that room",
        "greedy_gamma": "handed on to that room",
        "(distill_gamma)": "handed on to that room",
        "distill_gamma": "handed on to that room",
    },
    "diagnostics/perturbations.py": {
        "check_arity('perturb')": "the argument of retraining_score",
        "text: perturb": "the same",
    },
    "diagnostics/planning.py": {
        "def checkpoints": "the public name of one of the `memory_settings` in a Plan",
        "algorithm_of(self.optimizer).memory_settings.get('checkpoints')": "the same",
    },
    "diagnostics/retraining.py": {
        "(perturb)": "its own argument",
        "perturb": "the same",
    },
}


def knows(source: str, room: str) -> Iterator[tuple[int, str]]:
    """Where a file names an algorithm, or something only some algorithms have: line and form."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    first = [node.body[0] for node in nodes if isinstance(node, documented) and node.body]
    docstrings = {id(node.value) for node in first if isinstance(node, ast.Expr)}
    callers = {
        id(argument): ast.unparse(node.func)
        for node in nodes
        if isinstance(node, ast.Call)
        for argument in node.args
    }
    named = lambda name: name in NAMES - WORDS or PROSE.search(name)
    for node in nodes:
        forms = []
        for name in imported(node, room):
            if {"algorithms", "wrappers"} & set(name.split(".")) or named(name.split(".")[-1]):
                forms.append(f"import {name}")
        if isinstance(node, ast.Attribute) and (node.attr in WORDS or named(node.attr)):
            forms.append(ast.unparse(node))
        if isinstance(node, ast.Name) and named(node.id):
            forms.append(node.id)
        if isinstance(node, ast.arg) and named(node.arg):
            forms.append(f"({node.arg})")
        if isinstance(node, ast.keyword) and named(node.arg or ""):
            forms.append(f"{node.arg}=")
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and named(node.name):
            forms.append(f"def {node.name}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in NAMES | {"unroll"}:
                forms.append(f"{callers.get(id(node), '')}({node.value!r})")
            elif id(node) not in docstrings:
                words = set(re.findall(r"\w+", node.value)) & (NAMES - WORDS)
                words |= {found[0] for found in PROSE.finditer(node.value)}
                forms += [f"text: {word}" for word in words]
        for form in forms:
            yield getattr(node, "lineno", 0), form


def test_generic_rooms_know_no_algorithm():
    found = {}
    for room in GENERIC:
        for file in (PACKAGE / room).rglob("*.py"):
            place = file.relative_to(PACKAGE).as_posix()
            for line, form in knows(file.read_text(), room):
                if (room, form) == ("training", "text: checkpoints"):
                    continue  # a run's, on disk
                assert form in ALLOWED.get(place, {}), f"{place}:{line}: {form}"
                found.setdefault(place, set()).add(form)
    assert found == {place: set(forms) for place, forms in ALLOWED.items()}  # nothing outdated


@pytest.mark.parametrize(
    "line",
    [
        'hasattr(method, "epsilon")',
        'hasattr(method, "checkpoints")',
        'getattr(method, "truncation", None)',
        '"theta" in vars(memory)',
        "method.checkpoints",
        "method.epsilon",
        "memory.t",
        "memory.distilled.key",
        "optimizer.estimate_theta(state)",
        "dataclasses.replace(method, gamma=0.5)",
        "isinstance(memory, HyperDistillMemory)",
        'type(method).__name__ == "GreedyOptimizer"',
        "from gradhpo.algorithms.online import HyperDistillMemory",
        "import gradhpo.algorithms.unrolled",
        "from gradhpo import algorithms",
        "from gradhpo import ImplicitOptimizer",
        "def f():\n    from gradhpo.algorithms.shares import spread",
        "if TYPE_CHECKING:\n    from gradhpo.wrappers.tasks import TaskMemory",
        "importlib.import_module('gradhpo.algorithms.forward')",
        "def f(state, truncation): pass",
        "def f(state, *, unroll_steps=1): pass",
        "def f(implicit_solver): pass",
        "lambda gamma: 0",
        "def is_implicit(method): pass",
        'raise ValueError("use implicit differentiation")',
        'raise ValueError(f"{name} unrolls all of its steps")',
        'raise ValueError("forward mode has no such product")',
        'raise ValueError("reverse-mode through the steps")',
        'raise ValueError("a Neumann series diverges")',
        'raise ValueError("pass a larger damping")',
        'warn("HyperDistill fits theta first")',
        'warn("the greedy sum points uphill")',
    ],
)
def test_what_knows_an_algorithm_is_seen(line):
    """In every file of the generic rooms, without exception."""
    for room in GENERIC:
        forms = {form for _, form in knows(line, room)}
        for file in (PACKAGE / room).rglob("*.py"):
            assert forms - set(ALLOWED.get(file.relative_to(PACKAGE).as_posix(), {})), file
