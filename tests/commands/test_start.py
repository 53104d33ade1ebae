"""The program's start: what it checks before torch is loaded, and how it ends."""

import ast
import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REFERENCE, ROOT, at_epoch, one_line, only_run, raising

from config import Config, UserError
from tinycnn.commands import compare
from tinycnn.commands.parser import parse
from tinycnn.commands.start import AVX2_VARIABLES, report, run_or_exit

CHOSEN = (*AVX2_VARIABLES, "OMP_WAIT_POLICY")  # by the program


def python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run code in the program's folder, in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env={name: value for name, value in os.environ.items() if name not in CHOSEN})


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="has no AVX2")
def test_avx2_is_what_pytorchs_libraries_are_told():
    """And what is registered to be done at the end is done, as profilers and coverage need it."""
    code = """if True:
        import atexit, os, runpy, sys
        sys.argv[0] = "main.py"
        names = "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "OMP_WAIT_POLICY"
        atexit.register(lambda: print(*map(os.environ.get, names), sys.modules["torch"].backends.cpu.get_cpu_capability()))
        runpy.run_path("main.py", run_name="__main__")"""
    done = python(code, "--log-dir", REFERENCE, "--instruction-set", "avx2")
    assert done.returncode == 2
    assert "is the folder of a run" in one_line(done.stderr)
    assert done.stdout == "avx2 AVX2 AVX2 PASSIVE AVX2\n"


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


def test_a_missing_package_and_a_missing_setting_are_named(capsys):
    assert report(ModuleNotFoundError("No module named 'scipy'", name="scipy")) == 2
    assert "the package scipy is not installed" in one_line(capsys.readouterr().err)
    for owner in (Config, Config()):
        with pytest.raises(AttributeError) as caught:
            _ = owner.gone
        assert report(caught.value) == 2
        assert "config.py has no setting gone" in one_line(capsys.readouterr().err)
    for bug in (ModuleNotFoundError("No module named 'tinycnn.gone'", name="tinycnn.gone"), AttributeError("gone", obj=3)):
        assert report(bug) is None


def test_the_program_ends_as_python_programs_do(monkeypatch, capsys):
    def leave(status):
        raise AssertionError("atexit, profilers and coverage would be left out")

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(compare, "run", lambda arguments: None)
    arguments = parse(["compare"])
    run_or_exit(arguments, None)  # python -i goes on from here
    monkeypatch.setattr(compare, "run", lambda arguments: 1)
    with pytest.raises(SystemExit) as end:
        run_or_exit(arguments, None)
    assert end.value.code == 1
    gc.unfreeze()


@pytest.mark.skipif(sys.platform == "win32", reason="no /dev/full")
@pytest.mark.parametrize(("shell", "status", "line"), [
    ("{} | true", 0, "stopped: the output was closed"), ("{} > /dev/full", 2, "No space left on device"),
    ("{} >&- 2>&-", 0, "")])
def test_an_output_that_fails_is_one_line(shell, status, line):
    code = ("import sys; sys.argv = ['main.py', 'compare']; from tinycnn.commands import start, compare\n"
            "compare.run = lambda _: print('x')\nstart.run_or_exit(start.parse_or_exit(), None)")
    line_of_shell = shell.format(f'"{sys.executable}" -c "$0"')
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["sh", "-c", line_of_shell, code], cwd=ROOT, env=buffered, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.count("\n") == bool(line)
    assert line in done.stderr


@pytest.mark.parametrize("options", [["-I"], ["-P"]])
def test_main_finds_its_folder_where_python_leaves_it_out(options, tmp_path):
    done = subprocess.run([sys.executable, *options, ROOT / "main.py", "--wrong"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown argument --wrong" in one_line(done.stderr)


def test_an_older_python_is_named():
    for name in ("main.py", "tinycnn/commands/start.py", "tinycnn/commands/__init__.py"):
        ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 8))
    done = python("import sys; sys.version_info = (3, 10, 0); import tinycnn.commands.start")
    assert done.returncode == 2
    assert "needs Python 3.11 or newer, and this is Python 3.10" in one_line(done.stderr)


def test_an_error_reaches_the_terminal_escaped(capsys):
    assert report(UserError("a\x1b[31m\u202eb\nc")) == 2
    assert capsys.readouterr().err == "error: a\\x1b[31m\\u202eb c\n"


@pytest.mark.parametrize(("error", "status", "last"), [
    ("1 / 0", 1, "ZeroDivisionError: division by zero"), ("raise MemoryError", 2, "error: out of memory"),
    ("raise KeyboardInterrupt", 130, "stopped by SIGINT")])
def test_errors_while_torch_is_loaded_have_their_line_and_a_bug_its_traceback(error, status, last):
    done = python("import sys; sys.argv = ['main.py']\nfrom tinycnn.commands.start import parse_or_exit\n"
                  f"parse_or_exit()\n{error}")
    assert done.returncode == status
    assert done.stderr.splitlines()[-1].startswith(last)
    assert ("Traceback" in done.stderr) == (status == 1)
