"""The package around the code: one version."""

import re
from pathlib import Path

import pytest

import gradhpo


ROOT = Path(__file__).parents[1]


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
