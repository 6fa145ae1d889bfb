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
    "besides": "in addition, apart from, also",
    "likewise": "also, in the same way",
    "makes? out of": "makes of, turns into",
    "(?:allow|permit|enable)s? to": "lets you, allows ...ing",
    "it is that": "name the thing",
    "becomes? to": "comes to, becomes",
    "until now|up to now": "so far",
    "in the last time": "recently",
    "different to": "different from",
    "independent from": "independent of",
    "depend(?:s|ing|ent)? from": "depends on",
}
# Phrases that are right where they stand: file, phrase and the reason.
ALLOWED: dict[tuple[str, str], str] = {}
# A line may end inside of a phrase: in a text, in a comment, in a message of several strings.
GAP = r'(?:\s+|\s*\n\s*# |\s*"\s*\n\s*f?")'
PHRASE = re.compile(rf"\b(?:{'|'.join(MARKERS)})\b".replace(" ", GAP))
# A docstring "Of each array: ..." for "The size of each array".
OPENING = re.compile(r'(?<=""")of [^"\s]+')


def read_by_users() -> list[Path]:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md")]
    rooms = ("gradhpo", "docs", "examples", "benchmarks")
    programs = [path for room in rooms for path in ROOT.glob(f"{room}/**/*.py")]
    hidden = lambda path: any(x.startswith(".") for x in path.relative_to(ROOT).parts)
    return sorted(path for path in [*pages, *programs] if not hidden(path))


def found_in(text: str) -> Iterator[tuple[int, str]]:
    """Where a phrase of the table stands: line, and the phrase."""
    text = text.lower()
    for pattern in (PHRASE, OPENING):
        for found in pattern.finditer(text):
            phrase = " ".join(re.findall(r"[\w']+", found[0].replace('f"', '"')))
            yield text.count("\n", 0, found.start()) + 1, phrase


def test_no_phrase_is_a_translation():
    allowed, wrong = set(), []
    for path in read_by_users():
        name = path.relative_to(ROOT).as_posix()
        for line, phrase in found_in(path.read_text()):
            if (name, phrase) in ALLOWED:
                allowed.add((name, phrase))
            else:
                wrong.append(f"{name}:{line}: {phrase}")
    assert not wrong, "\n".join(["write it as you would say it:", *wrong])
    assert allowed == set(ALLOWED)  # nothing outdated


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("a row is known by its settings", "is known by"),
        ("a page\nas often\nas it is read", "as often as"),
        ("    # The gradients are those\n    # of the last step.", "those of"),
        ('raise ValueError(\n    "not so "\n    f"many {name}"\n)', "so many"),
        ("Dearer than one step.", "dearer"),
        ('"""Of each array: its size."""', "of each"),
    ],
)
def test_a_phrase_is_seen_across_lines_and_strings(text, phrase):
    assert [words for _, words in found_in(text)] == [phrase]


@pytest.mark.parametrize(
    "text", ["the cost of which", "those offsets", "an independent form", "a dearth", "amended"]
)
def test_other_words_are_let_through(text):
    assert not list(found_in(text))
