"""Claims: one holder at a time, whoever ends them, and no litter."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from config import UserError
from tinycnn.data.leftovers import DAY
from tinycnn.experiments.claims import CLAIMS, claim, remove_stale_claims

HOLD = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tinycnn.experiments.claims import claim
with claim(Path(sys.argv[1]), "run") as is_ours:
    print(is_ours, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the claim of "run" in tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def is_free(log_dir: Path, key: str = "run") -> bool:
    with claim(log_dir, key) as is_ours:
        return is_ours


def test_a_claim_has_one_holder_whose_death_ends_it(holder, tmp_path):
    assert not is_free(tmp_path)
    assert is_free(tmp_path, "another run")
    holder.kill()
    holder.wait()
    assert is_free(tmp_path)


def test_a_claim_ends_with_its_body(tmp_path):
    def fail() -> None:
        with claim(tmp_path, "run"):
            assert not is_free(tmp_path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert is_free(tmp_path)


def test_claims_older_than_a_day_that_nobody_holds_are_removed(tmp_path):
    old = time.time() - 2 * DAY
    path = tmp_path / "runs" / CLAIMS
    for key in ("old", "new", "held"):
        is_free(tmp_path, key)
        path.joinpath(f"{key}.lock").touch()  # Windows' are gone when they are released
    os.utime(path / "held.lock", (old, old))
    with claim(tmp_path, "held"):  # makes it young
        assert time.time() - (path / "held.lock").stat().st_mtime < DAY
        for key in ("old", "held"):
            os.utime(path / f"{key}.lock", (old, old))
        remove_stale_claims(tmp_path)
        assert {"new.lock", "held.lock"} == {each.name for each in path.iterdir()}


def test_a_log_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match="choose another --log-dir"):
        is_free(tmp_path)
