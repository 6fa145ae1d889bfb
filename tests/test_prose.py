"""No phrase of translated English in what users read: docstrings, messages, comments and pages.

Each is a literal translation, and reads as one. Words that native speakers use as well ("that of",
"of which") are not in the table, which has no room for judgement.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# What must not be written, and words to try instead.
MARKERS = {
    "dear|dearer|dearest": "expensive, costs more, most expensive",
    "whatever": "any, no matter which",
    "what of": "which of, what happens to",
    "so many": "this many, as many, too many",
    "belongs? into": "belongs in",
    "mend|mends|mended|mending": "fix, repair",
    "those of": "name them again, or use a possessive",
    "another one than": "a different one from",
    "take this when": "use this if",
    "its time (?:was|is) over": "ran out of time",
    "lasts the night": "runs overnight",
    "the last that": "the last one to, the last",
    "as often as": "n times, every time, as many times as",
    "all the same": "anyway, nevertheless, equal",
    "one's own": "your own",
    "anew": "again, from scratch",
    "is known by": "is identified by",
    "finds? its way": "gets into, reaches",
    "by heart": "memorised",
    "besides": "in addition, apart from, also",
    "likewise": "also, in the same way",
    "makes? out of": "makes of, turns into",
    "(?:allow|permit|enable)s? to": "lets you, allows ...ing",
    "it is that": "name the thing",
    "becomes? to": "comes to, becomes",
    "in the last time": "recently",
    "different to": "different from",
    "independent from": "independent of",
    "depend(?:s|ing|ent)? from": "depends on",
    "trainings": "training runs",
}
# Phrases that are right where they stand: file, phrase and the reason.
ALLOWED: dict[tuple[str, str], str] = {}
# A line may end inside of a phrase: in a text, in a comment, in a message of several strings.
GAP = r"""(?:\s+|\s*\n\s*# |\s*["']\s*(?:\n\s*\+?|\+)\s*["']\s*)"""
PHRASE = re.compile(rf"\b(?:{'|'.join(MARKERS)})\b".replace(" ", GAP))
# A docstring "Of each array: ..." for "The size of each array".
OPENING = re.compile(r'(?<=""")of [^"\s]+')
# In a program: a comment, a docstring or a message; or else code.
PARTS = re.compile(r'''(#.*|"""[^"]*(?:"{1,2}[^"]+)*"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')''')


def read_by_users() -> list[Path]:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md")]
    rooms = ("gradhpo", "docs", "examples", "benchmarks")
    programs = [path for room in rooms for path in ROOT.glob(f"{room}/**/*.py")]
    hidden = lambda path: any(x.startswith(".") for x in path.relative_to(ROOT).parts)
    return sorted(path for path in [*pages, *programs] if not hidden(path))


def without_code(program: str) -> str:
    """With blanks for its names and numbers: line numbers stay, and what separates strings."""
    parts = PARTS.split(program)
    parts[::2] = [re.sub(r"\w", " ", code) for code in parts[::2]]
    return "".join(parts)


def found_in(text: str) -> Iterator[tuple[int, str]]:
    """Where a phrase of the table stands: line, and the phrase."""
    text = text.lower()
    for pattern in (PHRASE, OPENING):
        for found in pattern.finditer(text):
            phrase = " ".join(re.findall(r"\w[\w']*", found[0]))
            yield text.count("\n", 0, found.start()) + 1, phrase


def test_no_phrase_is_a_translation():
    allowed, wrong = set(), []
    for path in read_by_users():
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text()
        for line, phrase in found_in(text if path.suffix == ".md" else without_code(text)):
            if (name, phrase) in ALLOWED:
                allowed.add((name, phrase))
            else:
                wrong.append(f"{name}:{line}: {phrase}")
    assert not wrong, "\n".join(["write it as you would say it:", *wrong])
    assert allowed == set(ALLOWED)  # nothing outdated


@pytest.mark.parametrize(
    ("program", "phrase"),
    [
        ("# a row is known by its settings", "is known by"),
        ('"""A page\nas often\nas it is read."""', "as often as"),
        ("    # The gradients are those\n    # of the last step.", "those of"),
        ('raise ValueError(\n    "not so "\n    f"many {name}"\n)', "so many"),
        ('print("Dearer than one step.")', "dearer"),
        ("print('\"Dearer\" than one step.')", "dearer"),
        ('print("not so " + f"many {name}")', "so many"),
        ('said = (\n    "not so"\n    + " many"\n)', "so many"),
        ("said = 'not so ' + \"many\"", "so many"),
        ('"""Of each array: its size."""', "of each"),
    ],
)
def test_a_phrase_is_seen_across_lines_and_strings(program, phrase):
    assert [words for _, words in found_in(without_code(program))] == [phrase]


@pytest.mark.parametrize(
    "program",
    [
        '"""The cost of which? An independent form, amended."""',
        "whatever = jax.lax.cond(old, anew, lambda: besides)",
        'names = ["so",\n    "many"]',
        'said = "so " + name + " many"',
        "print('so', whatever, 'many')",
        """# the network's\nwhatever = anew  # the loss's""",
    ],
)
def test_other_words_and_names_in_code_are_let_through(program):
    assert not list(found_in(without_code(program)))
