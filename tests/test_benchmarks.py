"""The benchmarks' own machinery; test_costs.py asserts what they measure."""

import re

import pytest

from benchmarks.__main__ import RESULTS, TABLES
from benchmarks.peers.environment import PeerError, python_of


READMES = [RESULTS.parent / name for name in ("README.md", "costs/README.md", "peers/README.md")]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_a_saved_result_and_its_place_in_a_readme(name):
    assert (RESULTS / f"{name}.txt").is_file()
    assert any(f"results/{name}.txt)" in readme.read_text() for readme in READMES[1:])


def test_every_saved_result_is_that_of_a_table():
    assert {path.stem for path in RESULTS.glob("*.txt")} == set(TABLES)
    assert {path.stem for path in RESULTS.glob("*/*.txt")} <= set(TABLES)  # of other machines


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_files_that_a_readme_links_to_exist(readme):
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", readme.read_text())
    assert links
    assert not [link for link in links if not (readme.parent / link).is_file()]


@pytest.mark.thorough
def test_a_peer_that_does_not_install_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.peers.environment.CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PeerError, match=r"does not install: .*no-such-package"):
        python_of(["no-such-package==1"])
    assert not any(tmp_path.iterdir())
