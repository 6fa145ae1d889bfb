"""Grammar of pages and docstrings, by Harper: a few rules without false alarms.

`python .ci/prose.py` prints what it finds, and fails if there is anything.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from harper import Linter


ROOT = Path(__file__).parents[1]
# Harper has 900 rules, many about style, idioms or brands; others stumble over mathematics. Each of
# these has a sentence that it must object to, so that a new version cannot drop it unnoticed.
RULES = {
    "AdjectiveDoubleDegree": "More faster than that.",
    "AllowTo": "This allows to tune it.",
    "AnA": "It is a example.",
    "AnotherThings": "Another things happen.",
    "ComprisesOf": "It comprises of two parts.",
    "CriteriaPhenomena": "This is one criteria.",
    "DespiteOf": "Despite of that, it works.",
    "DidPast": "It did found the optimum.",
    "DoubleModal": "You may can call it.",
    "HowItLooksLike": "This shows how it looks like.",
    "ItsContraction": "Its a loss.",
    "ModalOf": "It could of been faster.",
    "RepeatedWords": "The the loss is small.",
    "SinceDuration": "It runs since three hours.",
    "TheAnother": "The another loss is larger.",
    "ThenThan": "It is faster then before.",
    "VeryKnown": "It is very known.",
}
PAGES = [
    *("*.md", ".github/*.md", "benchmarks/*.md", "benchmarks/*/*.md"),
    *("docs/**/*.md", "examples/**/*.md"),
]
OF_PAGES_ALONE = {"AnA"}  # "a weight sigmoid(a_i)": docstrings do not mark formulas
ALLOWED = {"A is faster"}


def only(linter: Linter, rules: set[str]) -> None:
    linter.set_lint_config({rule: rule in rules for rule in linter.get_lint_config()})


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def found(linter: Linter, path: Path, line: int, text: str) -> Iterator[str]:
    for rule, lints in linter.organized_lints(text).items():
        for lint in lints:
            around = " ".join(text[max(0, lint.span.start - 30) : lint.span.end + 30].split())
            if not any(phrase in around for phrase in ALLOWED):
                at = line + text.count("\n", 0, lint.span.start)
                yield f"{path.relative_to(ROOT)}:{at}: {lint.message} ({rule}) ... {around} ..."


def main() -> None:
    linter, wrong = Linter(), []
    only(linter, {*RULES})
    for rule, sentence in RULES.items():
        if rule not in linter.organized_lints(sentence):
            wrong.append(f"{rule} no longer objects to: {sentence}")
    for path in [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]:
        wrong += found(linter, path, 1, path.read_text())
    only(linter, {*RULES} - OF_PAGES_ALONE)
    for path in [*sorted(ROOT.glob("gradhpo/**/*.py")), *sorted(ROOT.glob("examples/*.py"))]:
        for line, text in docstrings(path):
            wrong += found(linter, path, line, text)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
