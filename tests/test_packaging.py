"""The package around the code: one version, lower bounds that CI installs, a complete sdist."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import gradhpo


ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
REQUIREMENTS = [
    Requirement(line)
    for group in [PYPROJECT["project"]["dependencies"], *EXTRAS.values()]
    for line in group
]
# hatchling adds these to the sdist automatically.
ALWAYS_IN_SDIST = {"pyproject.toml", "README.md", "LICENSE", ".gitignore"}


def test_the_name_of_the_paper_is_the_same_class():
    assert gradhpo.HyperDistillOptimizer is gradhpo.OnlineHypergradientOptimizer
    assert gradhpo.HyperDistillOptimizer.__name__ == "OnlineHypergradientOptimizer"


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("CITATION.cff", r"^version: (\S+)$"),
        ("README.md", r"^  version = \{(\S+)\},$"),
    ],
)
def test_citations_have_the_version(file, pattern):
    found = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert found == [gradhpo.__version__]


def test_every_lower_bound_is_a_version_that_ci_installs():
    bounds = [
        f"{requirement.name}=={bound.version}"
        for requirement in REQUIREMENTS
        for bound in requirement.specifier
        if bound.operator == ">="
    ]
    lines = (ROOT / ".github" / "constraints-lowest.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == bounds


def test_every_requirement_has_a_lower_bound_or_a_pin():
    for requirement in REQUIREMENTS:
        operators = {bound.operator for bound in requirement.specifier}
        assert operators & {">=", "=="} or requirement.name == "gradhpo", requirement


def test_ci_runs_the_pythons_of_the_classifiers():
    classifiers = "\n".join(PYPROJECT["project"]["classifiers"])
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    tested = set(re.findall(r'- python: "(3\.\d+)"', workflow))
    assert tested == set(re.findall(r"Python :: (3\.\d+)", classifiers))


def test_pre_commit_runs_the_same_linter():
    (ruff,) = (requirement for requirement in REQUIREMENTS if requirement.name == "ruff")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    (version,) = re.findall(r"ruff-pre-commit\n +rev: v(\S+)", hooks)
    assert ruff.specifier == f"=={version}"


def test_sdist_has_what_tests_and_site_import_and_read():
    sdist = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]
    included = {entry.removeprefix("/") for entry in sdist["include"]}
    # `from benchmarks.x import y`, `ROOT / "docs"`, a key in a dictionary of pages.
    imports, paths, keys = r"^(?:from|import) ", r'(?:ROOT|parents\[1\]) / "', r'^    "'
    named = re.compile(rf"(?:{imports}|{paths}|{keys})([\w.-]+)", re.MULTILINE)
    files = [*ROOT.glob("tests/*.py"), *ROOT.glob("docs/*.py")]
    words = {word for file in files for word in named.findall(file.read_text())}
    words |= {word.split(".")[0] for word in words}
    needed = words & {path.name for path in ROOT.iterdir()}
    assert {"benchmarks", "docs", "examples", "CONTRIBUTING.md"} <= needed
    assert needed - ALWAYS_IN_SDIST <= included


def test_an_import_does_not_start_jax():
    """Devices and processes can be configured after importing, and forking is safe."""
    program = (
        "import gradhpo, gradhpo.extend, gradhpo.integrations.optuna, jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"  # an error once JAX has started
        "assert jax.device_count() == 3\n"
    )
    given = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=given)
