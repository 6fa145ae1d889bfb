"""README and docstrings are programs: what they show runs."""

import contextlib
import inspect
import io
import os
import pydoc
import re
import runpy
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
import gradhpo.extend
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
    first, model, loop = codes
    namespace: dict = {}
    exec(compile(first, "README.md", "exec"), namespace)
    rest = namespace["x"][120:], namespace["y"][120:]
    fixed = gradhpo.FixedOptimizer(optax.adam(0.01), inner_steps=20)
    untuned = fixed.init(jnp.zeros(10), jnp.full(10, -3.0))
    untuned, _ = gradhpo.run(
        fixed, untuned, namespace["losses"], namespace["train"], namespace["val"],
        num_steps=200, progress=False,
    )  # fmt: skip
    errors = [
        float(namespace["error"](s.params, None, rest)) for s in (namespace["state"], untuned)
    ]
    assert f"is {errors[0]:.3f}, against {errors[1]:.3f} with the" in readme

    namespace = {}
    for code in (model, loop):
        exec(compile(code, "README.md", "exec"), namespace)
    # README: "It prints -3.1 and 0.47".
    assert abs(float(namespace["history"]["val_loss"][-1]) - 0.47) < 0.1
    assert namespace["state"].metadata["rejected"] == 0


PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md"))
EXECUTED = {page for page in PAGES if "```python" in (ROOT / "docs" / page).read_text()}


# A program, and its output as shown on the page.
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


# A link, in a text, to a file of the repository; a code block may hold `list[int](x)`.
LINKED = re.compile(r"\]\((?!\w+:)([^()\s#]+)(?:#[^()\s]*)?\)")
FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
TEXTS = [
    *ROOT.glob("*.md"),
    *(x for room in (".github", "docs", "examples") for x in ROOT.glob(f"{room}/**/*.md")),
    *ROOT.glob("benchmarks/*.md"),
    *ROOT.glob("benchmarks/[!.]*/*.md"),
]


def test_links_lead_to_files():
    """In a clone too: the site's build turns them into links between pages, and checks those."""
    links = [
        (path, link) for path in TEXTS for link in LINKED.findall(FENCED.sub("", path.read_text()))
    ]
    assert len(links) > 100
    assert not [f"{path}: {link}" for path, link in links if not (path.parent / link).exists()]


def test_readme_example_is_short():
    first = blocks((ROOT / "README.md").read_text())[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 25


# Their examples compile large programs; each has a separate test file.
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


# A list below "**Arguments:**" ("**Fields:**" of records), or the rest of its line.
LISTED = re.compile(r"\*\*(?:Arguments|Fields):\*\*(?:\n\n((?:(?:- | +\S).*\n)+)|((?: .+\n)+))")
ELSEWHERE = re.compile(r"\bas for\b|\b(?:as|like) (?:in|of|with) \[`")
WITH_METHODS = re.compile(
    r"^::: gradhpo\.(\w+)\n    options:\n(?:      .*\n)*?      members: \[(.+)\]", re.MULTILINE
)


def arguments_not_documented(parameters, doc):
    """Those without an entry of their own, or whose entry sends the reader to another docstring."""
    said = {}
    for listed, inline in LISTED.findall(inspect.cleandoc(doc) + "\n"):
        entries = re.split(r"^- ", listed, flags=re.MULTILINE) if listed else inline.split("; ")
        for names, _, text in (entry.partition(":") for entry in entries):
            said |= dict.fromkeys(re.findall(r"`(\w+)`", names), " ".join(text.split()))
    return [name for name in parameters if not said.get(name) or ELSEWHERE.search(said[name])]


def called_by_users():
    """Public classes and functions, and the methods that the reference names on its pages."""
    text = "".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    methods = {name: re.findall(r"\w+", names) for name, names in WITH_METHODS.findall(text)}
    for name in filter(lambda name: callable(getattr(gradhpo, name)), PUBLIC):
        thing = getattr(gradhpo, name)
        yield name, thing
        for method in methods.get(name, []):
            if callable(getattr(thing, method)):
                yield f"{name}.{method}", getattr(thing, method)


CALLED = dict(called_by_users())


def test_docstrings_name_every_argument():
    """Each in its own docstring, which is all that an editor shows."""
    missing = {}
    for name, thing in CALLED.items():
        parameters = [x for x in inspect.signature(thing).parameters if x != "self"]
        missing[name] = arguments_not_documented(parameters, inspect.getdoc(thing) or "")
    assert {"UnrolledOptimizer", "run", "BilevelOptimizer.step"} <= missing.keys()
    assert {name: found for name, found in missing.items() if found} == {}


@pytest.mark.parametrize(
    ("doc", "missing"),
    [
        ("**Arguments:**\n\n- `a`: one.\n- `b`, `c`: two\n    and three.", []),
        ("**Arguments:** `a`: one; `b`, `c`: two.", []),
        ("**Arguments:** as for [`run`][gradhpo.run].", ["a", "b", "c"]),
        ("**Arguments:**\n\n- `a`: one.\n- `b`, `c`: as for\n    [`run`][run].", ["b", "c"]),
        ("**Arguments:**\n\n- `a`: calls `b`.\n\nAfterwards:\n\n- `b`, `c`: no.", ["b", "c"]),
        ("`a`, `b`, `c`: these.", ["a", "b", "c"]),
    ],
)
def test_an_argument_that_a_docstring_leaves_out_is_seen(doc, missing):
    assert arguments_not_documented(["a", "b", "c"], doc) == missing


def in_reference():
    """Everything that has a heading on a page of the reference, by its full name."""
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            thing = pydoc.locate(name)
            yield name, thing
            if inspect.isclass(thing):
                own = [method for method in vars(thing) if not method.startswith("_")]
                yield from ((f"{name}.{method}", getattr(thing, method)) for method in own)


def test_docstrings_begin_in_plain_words():
    """Search results and editors show the first paragraph as text, formulas included."""
    docs = {name: inspect.getdoc(thing) or "" for name, thing in in_reference()}
    assert {"gradhpo.run", "gradhpo.extend.InnerUpdate.step"} <= docs.keys()
    assert [name for name, doc in docs.items() if "$" in doc.split("\n\n")[0]] == []


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


def test_reference_has_every_name_for_extensions():
    documented_as_ours = {*gradhpo.__all__, "SINGULAR"}
    page = (ROOT / "docs" / "api" / "extend.md").read_text()
    names = re.findall(r"^::: gradhpo\.extend\.(\w+)$", page, re.MULTILINE)
    assert sorted(names) == sorted({*gradhpo.extend.__all__} - documented_as_ours)
    hooks = [name for name in vars(Hooks) if not name.startswith("_")]
    named = re.findall(r"^::: gradhpo\.extend\.Algorithm\.(\w+)$", page, re.MULTILINE)
    assert sorted(named) == sorted(hooks)


def test_reference_has_short_groups():
    """A list that nobody reads to its end needs headings."""
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for group in re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE):
            assert len(re.findall(r"^::: ", group, re.MULTILINE)) <= 7, f"{page.name}: {group}"


def test_displayed_formulas_stand_alone():
    """Otherwise they are shown verbatim, with `$$`."""
    texts = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/reading/*.py")]
    for file in [*ROOT.glob("gradhpo/**/*.py"), *texts]:
        parts = file.read_text().split("$$")
        for before, formula, after in zip(parts[:-2:2], parts[1::2], parts[2::2], strict=True):
            alone = before.rstrip(" ").endswith("\n\n") and re.match(r'\n\n|\n *"""', after)
            assert alone, f"{file}: a blank line before and after $${formula}$$"


def test_navigation_has_every_page_in_groups_of_at_most_seven():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1].split("\n\n")[0]
    open_groups: dict[int, int] = {}  # entries so far, by depth
    for line in nav.splitlines():
        depth = len(line) - len(line.lstrip())
        open_groups = {x: count for x, count in open_groups.items() if x <= depth}
        open_groups[depth] = open_groups.get(depth, 0) + 1
        assert open_groups[depth] <= 7, line
    named = {re.split(r"[ -]+", line)[-1] for line in nav.splitlines()}
    assert not set(PAGES) - named


def test_pages_of_examples_have_the_result_before_the_program_and_no_progress():
    pytest.importorskip("mkdocs")  # of the extra `docs`
    pytest.importorskip("latex2mathml")
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    for name in hooks["EXAMPLES"]:
        source = f"examples/{name}.py"
        shown, program = hooks["_example"](source, (ROOT / source).read_text()).split(
            "\n## The program"
        )
        assert "![" not in program
        assert shown.index("![") < shown.index("\n|" if "\n|" in shown else "```text"), name
        assert not re.search(r"^ *(seed \d|pictures? in )|\(\d+ s\)$", shown, re.MULTILINE), name
    printed = hooks["_results"]("penalty_methods", "..")[1]
    assert printed.count("T1-T2 with Adam (SAMA), fused: ") == 1  # once, not with every seed
    results = ["found in: 30 s", "lowest: 2", "lowest: 2"]
    assert hooks["_without_progress"](results) == results
    reports = ["seed 0: 3 s", "no such row", "  unrolled: 75 s", "no such row", "found in: 30 s"]
    assert hooks["_without_progress"](reports) == ["no such row", "found in: 30 s"]
