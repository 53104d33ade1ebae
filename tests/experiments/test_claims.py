"""Claims: one holder at a time, whoever ends them, and no litter."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from tinycnn.data.leftovers import DAY
from tinycnn.experiments.claims import claim, remove_stale_claims

HOLD = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tinycnn.experiments.claims import claim
with claim(Path(sys.argv[1]), "run") as is_ours:
    print(is_ours, flush=True)
    sys.stdin.read()
"""


def try_elsewhere(log_dir: Path) -> str:
    """Claim "run" for a moment in another process: "True" or "False"."""
    command = [sys.executable, "-c", HOLD.format(root=str(ROOT)), log_dir]
    return subprocess.run(command, input="", capture_output=True, text=True).stdout.strip()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the claim of "run" in tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(root=str(ROOT)), tmp_path], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def test_a_claim_has_one_holder_at_a_time(holder, tmp_path):
    with claim(tmp_path, "run") as is_ours, claim(tmp_path, "another run") as another:
        assert (is_ours, another) == (False, True)
    holder.communicate("")
    with claim(tmp_path, "run") as is_ours:
        assert is_ours


def test_a_killed_holder_holds_nothing(holder, tmp_path):
    holder.kill()
    holder.wait()
    with claim(tmp_path, "run") as is_ours:
        assert is_ours


def test_a_claim_ends_with_its_body(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path, "run"):
        raise ZeroDivisionError
    assert try_elsewhere(tmp_path) == "True"


def test_claims_older_than_a_day_that_nobody_holds_are_removed(holder, tmp_path):
    for key in ("old", "new"):
        with claim(tmp_path, key):
            pass
    folder = tmp_path / "runs" / ".claims"
    for name in ("old.lock", "run.lock"):
        os.utime(folder / name, (time.time() - 2 * DAY,) * 2)
    remove_stale_claims(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["new.lock", "run.lock"]
    holder.communicate("")
    remove_stale_claims(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["new.lock"]


def test_claiming_anew_makes_an_old_file_young(tmp_path):
    with claim(tmp_path, "run"):
        pass
    path = tmp_path / "runs" / ".claims" / "run.lock"
    os.utime(path, (time.time() - 2 * DAY,) * 2)
    with claim(tmp_path, "run"):
        assert time.time() - path.stat().st_mtime < DAY


def test_a_claim_on_a_file_that_was_just_removed_is_none(tmp_path, monkeypatch):
    """Between its opening and its locking another process removed it, and a third one made a new file of that name."""
    from tinycnn.experiments import claims

    lock_file, removed = claims.lock_file, []

    def lock_after_removal(path):
        file = lock_file(path)
        if not removed:
            removed.append(path)
            path.unlink()
            path.touch()
        return file

    monkeypatch.setattr(claims, "lock_file", lock_after_removal)
    with claim(tmp_path, "run") as is_ours:
        assert is_ours
        assert removed[0].exists()
        monkeypatch.undo()
        assert try_elsewhere(tmp_path) == "False"
