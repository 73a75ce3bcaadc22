"""Whose the daemon's directories are: nobody else may put anything there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hibernode.config import Config
from hibernode.errors import Refused
from hibernode.service import Alone


def settings(tmp_path: Path) -> Config:
    return Config.model_validate({"state_dir": tmp_path / "state", "work_dir": tmp_path / "work"})


def refused(tmp_path: Path) -> Refused:
    with pytest.raises(Refused) as raised, Alone(settings(tmp_path)):
        raise AssertionError("it took them")
    return raised.value


def test_directories_that_are_not_there_are_made_and_are_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        with Alone(settings(tmp_path)):
            for name in ("state", "work"):
                assert (tmp_path / name).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["state", "work"])
@pytest.mark.parametrize(("owner", "mode"), [(65534, 0o700), (0, 0o777), (0, 0o770), (0, 0o702)])
def test_one_that_others_can_change_is_refused(tmp_path: Path, name: str, owner: int, mode: int) -> None:
    place = tmp_path / name
    place.mkdir()
    place.chmod(mode)
    os.chown(place, owner, -1)
    error = refused(tmp_path)
    assert (error.code, str(place) in error.message, str(owner) in str(error.details["found"])) == ("config", True, True)


def test_a_link_to_one_is_refused(tmp_path: Path) -> None:
    """Who made the link can make it lead elsewhere."""
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "work").symlink_to(tmp_path / "elsewhere")
    assert "link" in str(refused(tmp_path).details["found"])
