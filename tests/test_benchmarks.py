"""The benchmarks' own machinery; what they measure is asserted in test_costs.py."""

import pytest

from benchmarks.__main__ import TABLES, place_of
from benchmarks.peers.environment import PeerError, python_of


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_its_place_in_the_readme(name):
    place_of(name)


def test_a_peer_that_does_not_install_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.peers.environment.CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PeerError, match=r"does not install: .*no-such-package"):
        python_of(["no-such-package==1"])
    assert not any(tmp_path.iterdir())
