"""The program's start: what it checks before torch is loaded, and how it ends."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, at_epoch, one_line, only_run, raising

from config import UserError
from tinycnn.commands.start import AVX2_VARIABLES, report
from tinycnn.runs.record import read_run


def python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run code in the program's folder, in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env={name: value for name, value in os.environ.items() if name not in AVX2_VARIABLES})


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="has no AVX2")
def test_avx2_is_what_pytorchs_libraries_are_told(pictures, tmp_path):
    code = """if True:
        import os, runpy, sys
        leave, sys.argv = os._exit, ["main.py", *sys.argv[1:]]
        os._exit = lambda status: (print({name: os.environ.get(name) for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA",
                                                                                 "MKL_ENABLE_INSTRUCTIONS")}, flush=True),
                                   leave(status))
        runpy.run_path("main.py", run_name="__main__")"""
    done = python(code, "--dataset", "folder", "--data-dir", pictures, "--log-dir", tmp_path / "logs", "--epochs", "1", *SMALL,
                  "--instruction-set", "avx2")
    assert (done.returncode, done.stderr) == (0, "")
    assert read_run(only_run(tmp_path)).record["machine"]["instruction_set"] == "AVX2"
    assert done.stdout.splitlines()[-1] == str(
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"})


def test_a_resumed_run_keeps_its_instruction_set(run, tmp_path, monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    at_epoch(monkeypatch, 1, raising(KeyboardInterrupt()))
    assert run("--epochs", "2")[0] == 130
    path = only_run(tmp_path) / "config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"config": record["config"] | {"instruction_set": "avx2"}}))
    status, _, err = run("--resume")  # PyTorch is loaded, so it is too late to ask for it
    assert status == 2
    assert "--instruction-set avx2 must be known before PyTorch is loaded" in one_line(err)


def test_a_missing_package_is_named():
    done = python("""if True:
        import importlib.util, sys
        find, sys.argv = importlib.util.find_spec, ["main.py"]
        importlib.util.find_spec = lambda name, *given: None if name == "scipy" else find(name, *given)
        from tinycnn.commands.start import parse_or_exit
        parse_or_exit()""")
    assert done.returncode == 2
    assert "the package scipy is not installed" in one_line(done.stderr)


def test_an_older_python_is_named():
    for name in ("main.py", "tinycnn/commands/start.py", "tinycnn/commands/__init__.py"):
        ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 8))
    done = python("import sys; sys.version_info = (3, 10, 0); import tinycnn.commands.start")
    assert done.returncode == 2
    assert "needs Python 3.11 or newer, and this is Python 3.10" in one_line(done.stderr)


def test_an_error_reaches_the_terminal_escaped(capsys):
    assert report(UserError("a\x1b[31m\u202eb\nc")) == 2
    assert capsys.readouterr().err == "error: a\\x1b[31m\\u202eb c\n"


def test_a_bug_has_its_traceback_and_status_1():
    done = python("import sys; sys.argv = ['main.py']; from tinycnn.commands.start import parse_or_exit; parse_or_exit(); 1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
