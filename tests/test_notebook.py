"""The notebook in examples/notebook: made from its script, and its outputs are current."""

import ast
import contextlib
import io
import json
import re
import runpy

import numpy as np
import pytest
from processes import EXAMPLES


FOLDER = EXAMPLES / "notebook"
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
# Durations; and what they are in units of another.
TOOK = re.compile(r"(?<![\w.])[\d.]+ ?(?:s|ms|us)\b(?: +\([\d.]+ x\))?")
# What the compiler counts, which changes with its version: flops and memory.
COUNTED = re.compile(r"[\d.]+ (?:k|[MGT]|(?:[KMG]i)?B)(?!\w)")


def cells_of_script():
    """Texts, codes and descriptions of `first_run.py`, in the percent format."""
    parts = re.split(r"^# %%", (FOLDER / "first_run.py").read_text(), flags=re.MULTILINE)[1:]
    cells = []
    for part in parts:
        head, body = part.split("\n", 1)
        if "[markdown]" in head:
            body = re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)
        alt = re.search(r'alt="(.*)"', head)
        kind = "markdown" if "[markdown]" in head else "code"
        cells.append((kind, body.strip(), alt and alt[1]))
    return cells


def cells_of_notebook():
    return json.loads((FOLDER / "first_run.ipynb").read_text())["cells"]


def test_it_has_the_cells_of_its_script():
    found = [
        (cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("alt"))
        for cell in cells_of_notebook()
    ]
    assert found == cells_of_script()


def test_it_ran_from_the_top_without_errors():
    codes = [cell for cell in cells_of_notebook() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in codes] == list(range(1, len(codes) + 1))
    outputs = [output for cell in codes for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_its_page_describes_pictures_and_has_no_prompts():
    pytest.importorskip("mkdocs")  # of the extra `docs`
    pytest.importorskip("latex2mathml")
    hooks = runpy.run_path(str(EXAMPLES.parent / "docs" / "hooks.py"))
    source = "examples/notebook/first_run.ipynb"
    page = hooks["_notebook"](source, (EXAMPLES.parent / source).read_text())
    pictures = re.findall(r"!\[(.*?)\]\(data:image/png", page)
    assert len(pictures) == page.count("data:image/png") == 1
    assert all(len(words.split()) > 7 for words in pictures)  # a description, not a name
    assert not re.search(r"^(In|Out) ?\[|<Figure size|step/s", page, re.MULTILINE)


def shown(cell):
    """What a cell printed, and the value of its last line; bars and pictures are left out."""
    texts = [
        "".join(output["text"])
        for output in cell["outputs"]
        if output["output_type"] == "stream" and output["name"] == "stdout"
    ]
    values = [
        "".join(output["data"]["text/plain"])
        for output in cell["outputs"]
        if output["output_type"] == "execute_result"
    ]
    return "".join(texts), "".join(values)


def run(code, namespace):
    """As a notebook runs a cell: a last line that is an expression is shown."""
    tree = ast.parse(code)
    last = None
    if isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(tree, "first_run", "exec"), namespace)
        value = None if last is None else eval(compile(last, "first_run", "eval"), namespace)
    return printed.getvalue(), "" if value is None else repr(value)


def compare(found, expected):
    """The same words, and numbers to 5 %: their last digits differ between machines.

    Of the costs in a report only the units are compared.
    """
    found, expected = (TOOK.sub("", text) for text in (found, expected))
    assert NUMBER.sub("", found).split() == NUMBER.sub("", expected).split(), found
    numbers = [
        [float(x.replace(",", "")) for x in NUMBER.findall(COUNTED.sub("", text))]
        for text in (found, expected)
    ]
    # Reports of diagnostics, which have a title, show differences of rounding, of 1e-5 at most.
    atol = 0.02 if "\n\n" in expected else 2e-3
    np.testing.assert_allclose(*numbers, rtol=0.05, atol=atol, err_msg=found)


def test_a_cosine_that_drifts_is_seen():
    shown = "Costs\n\none step  -0.975  {}  >1.19 M  112 KiB  571 us (1.9 x)"
    compare(shown.format(0.004), shown.format(0.005))
    compare("a\n\n2.2 M  124 KiB  3 us (1 x)", "a\n\n3.3 M  160 KiB  9 us (2 x)")
    with pytest.raises(AssertionError):
        compare(shown.format(-0.087), shown.format(0.087))
    with pytest.raises(AssertionError):
        compare(shown.format(0), shown.format(0).replace("-0.975", "-0.875"))


@pytest.mark.thorough
@pytest.mark.usefixtures("as_a_user_has_it")
def test_its_outputs_are_current():
    import matplotlib.pyplot as plt

    namespace: dict = {}
    try:
        for cell in cells_of_notebook():
            if cell["cell_type"] == "code":
                for found, expected in zip(
                    run("".join(cell["source"]), namespace), shown(cell), strict=True
                ):
                    compare(found, expected)
    finally:
        plt.close("all")
    assert namespace["history"]["val_loss"][-1] < namespace["untuned"]["val_loss"][-1]
