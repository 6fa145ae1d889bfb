"""README and docstrings are programs: what they show runs."""

import contextlib
import inspect
import io
import os
import re
import textwrap
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import quick
from jaxtyping import Array
from processes import python

import gradhpo
from gradhpo.core.hooks import Hooks


ROOT = Path(__file__).parents[1]
CODE = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
# Pages whose reports hold times, and cut what they show.
TIMED = {"diagnostics.md", "training.md"}
# Pages that show memory as the compiler counts it, which jax 0.12 does up to 8 % lower than 0.10.
COMPILED = {"how_to/scaling.md"}
# Pages that switch float64 on, which the fixture below would prevent.
IN_FLOAT64 = {"how_to/from_a_scan.md", "how_to/from_jaxopt.md", "how_to/from_maml.md"}
ON_FOUR_DEVICES = {"how_to/population.md", "how_to/scaling.md"}
# Names for annotations: they are documented where they are used.
ALIASES = {
    "GradFn",
    "InnerOptimizer",
    "InnerSolver",
    "LossFn",
    "MetricDict",
    "RealScalarLike",
    "UpdateFn",
}
PUBLIC = sorted(set(gradhpo.__all__) - ALIASES)


pytestmark = pytest.mark.usefixtures("as_a_user_has_it")


def blocks(text):
    return [textwrap.dedent(code) for _, code in CODE.findall(text)]


def test_readme_runs_as_shown(capsys):
    readme = (ROOT / "README.md").read_text()
    codes = blocks(readme)
    assert len(codes) == 2
    namespace: dict = {}
    for code in codes:
        exec(compile(code, "README.md", "exec"), namespace)
    # README: "It prints -3.1 and 0.47".
    assert abs(float(namespace["history"]["val_loss"][-1]) - 0.47) < 0.1
    assert namespace["state"].metadata["rejected"] == 0


PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md"))
EXECUTED = {page for page in PAGES if "```python" in (ROOT / "docs" / page).read_text()}


# A program, and what the page says that it prints.
SHOWN = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


QUICK: set[str] = set()


@pytest.mark.parametrize(
    "page",
    quick(PAGES, keep=[page for page in PAGES if page in QUICK or page not in EXECUTED]),
)
def test_pages_run_as_shown(page):
    if page in ON_FOUR_DEVICES:
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
        python("-c", f"import test_docs; test_docs.run_as_shown({page!r})", compiled=flags)
    else:
        with jax.enable_x64(page in IN_FLOAT64):
            run_as_shown(page)


def run_as_shown(page):
    namespace: dict = {}
    for code, shown in SHOWN.findall((ROOT / "docs" / page).read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), namespace)
        if shown and page not in TIMED:
            assert_says_the_same(printed.getvalue(), shown, 0.1 if page in COMPILED else 0.05)


def assert_says_the_same(printed, shown, rtol):
    """The same words; numbers to 5 %, since their last digits differ between machines."""
    assert NUMBER.sub("", printed).split() == NUMBER.sub("", shown).split(), printed
    numbers = [[float(x.replace(",", "")) for x in NUMBER.findall(t)] for t in (printed, shown)]
    np.testing.assert_allclose(*numbers, rtol=rtol, atol=2e-3, err_msg=printed)


@pytest.mark.parametrize("page", PAGES)
def test_pages_show_pictures_that_are_there(page):
    file = ROOT / "docs" / page
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", file.read_text()):
        assert (file.parent / picture).is_file(), picture


def test_readme_example_is_short():
    first = blocks((ROOT / "README.md").read_text())[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 25


# Their examples compile large programs; each has a test file of its own.
LONG = {
    "BestState", "EarlyStopping", "check_hypergradient", "chunked_cross_entropy",
    "compare_hypergradients", "compare_over_batches", "cross_validation", "explain_horizon",
    "implicit_solution", "metasmoothness", "microbatched", "plan", "replay", "retraining_score",
}  # fmt: skip
OPTIMIZERS = [
    name
    for name in PUBLIC
    if inspect.isclass(getattr(gradhpo, name))
    and issubclass(getattr(gradhpo, name), gradhpo.BilevelOptimizer)
]
LONG |= {*OPTIMIZERS} - {"UnrolledOptimizer"}


@pytest.mark.parametrize("name", quick(PUBLIC, keep=[name for name in PUBLIC if name not in LONG]))
def test_docstring_example_runs(name):
    thing = getattr(gradhpo, name)
    codes = blocks(inspect.getdoc(thing) or "")
    assert codes, f"{name} has no example"
    if inspect.isclass(thing):
        own = [getattr(thing, method) for method in vars(thing) if not method.startswith("_")]
        codes += [code for method in own for code in blocks(inspect.getdoc(method) or "")]
    for code in codes:
        namespace = {
            "gradhpo": gradhpo, "jax": jax, "jnp": jnp, "np": np, "optax": optax, "eqx": eqx,
            "lx": lx, "Array": Array,
        }  # fmt: skip
        exec(compile(code, name, "exec"), namespace)


def test_public_methods_are_documented():
    for name in PUBLIC:
        thing = getattr(gradhpo, name)
        if not inspect.isclass(thing):
            continue
        for method, value in vars(thing).items():
            if not method.startswith("_") and callable(value):
                assert inspect.getdoc(getattr(thing, method)), f"{name}.{method}"


def test_reference_has_every_public_name_once():
    text = "".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    assert sorted(re.findall(r"^::: gradhpo\.(\w+)$", text, re.MULTILINE)) == sorted(
        gradhpo.__all__
    )


def test_reference_of_algorithm_has_all_that_it_may_override():
    hooks = [name for name in vars(Hooks) if not name.startswith("_")]
    page = (ROOT / "docs" / "api" / "extend.md").read_text()
    assert f"inherited_members: [{', '.join(hooks)}]" in page


def test_displayed_formulas_stand_alone():
    """Else they are shown as they are written: `$$`, and no formula."""
    texts = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/reading/*.py")]
    for file in [*ROOT.glob("gradhpo/**/*.py"), *texts]:
        parts = file.read_text().split("$$")
        for before, formula, after in zip(parts[:-2:2], parts[1::2], parts[2::2], strict=True):
            alone = before.rstrip(" ").endswith("\n\n") and re.match(r'\n\n|\n *"""', after)
            assert alone, f"{file}: a blank line before and after $${formula}$$"
