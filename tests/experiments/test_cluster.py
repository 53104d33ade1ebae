"""Sweeps on Ray: the same bits as here, whatever becomes of a worker or a node; the log folder shared or not.

Ray's nodes are processes of this machine that listen on the loopback interface alone."""

import dataclasses
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
from conftest import REFERENCE, SMALL, one_line, start_program, weights_of

from config import UserError
from tinycnn.commands.parser import parse
from tinycnn.data.loading import load_dataset
from tinycnn.errors import Diverged
from tinycnn.experiments import cluster
from tinycnn.experiments.claims import claim
from tinycnn.experiments.cluster import train_run
from tinycnn.experiments.sweep import Outcome, find_matching_run, plan_runs
from tinycnn.runs.finding import RunState, find_runs, run_state
from tinycnn.runs.record import read_record, read_run
from tinycnn.runs.run import is_running

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # before Ray is imported
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None or sys.platform == "win32",
                               reason="Ray is not installed")
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100_000_000}


@pytest.fixture
def line(pictures, tmp_path):
    """The command line of a sweep on the small folder: line("--lr", "0.1,0.2"); logs in tmp_path/logs."""
    def line(*arguments: str, logs: str = "logs") -> list[str]:
        return ["sweep", "--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path / logs), *SMALL,
                *arguments]

    return line


@pytest.fixture
def planned(line):
    """A planned run, its images, and a marker in its log folder."""
    plan = plan_runs(parse(line("--seeds", "2", "--epochs", "1")).configs)[0]
    config = plan[0].config
    with ExitStack() as stack:
        yield plan[0], load_dataset(config.dataset, config.data_dir), stack.enter_context(cluster._marked(Path(config.log_dir)))


class AtOnce:
    """In place of Ray, where a task's reference is its result."""

    get = staticmethod(lambda reference: reference)
    exceptions = type("exceptions", (), {"RayError": KeyError, "RayTaskError": KeyError})


def by_settings(log_dir: Path) -> dict[tuple, bytes]:
    """The weights of each run, byte for byte."""
    runs = {folder: read_record(folder)["config"] for folder in find_runs(log_dir)}
    return {(config["lr"], config["seed"]): weights_of(folder) for folder, config in runs.items()}


# ---------------------------------------------------------------- the command line

@pytest.mark.parametrize(("arguments", "words"), [
    (["--on", "mars"], "--on is 'mars', but must be"), (["--cpus-per-run", "2"], "are for --on ray"),
    (["--on", "ray", "--cpus-per-run", "0"], "--cpus-per-run is 0"), (["--on", "ray", "--gpus-per-run", "1.5"], "a fraction"),
    (["--on", "ray", "--cpus-per-run", "2"], "so leave one out")])
def test_what_a_cluster_cannot_be_asked_is_refused(line, arguments, words):
    with pytest.raises(UserError, match=words):
        parse(line("--seeds", "2", *arguments))


def test_a_runs_cores_are_its_threads(line):
    without = [argument for argument in line("--seeds", "2") if argument not in ("--threads", "1")]
    assert parse([*without, "--on", "ray"]).cpus_per_run == 1
    assert parse([*without, "--on", "ray", "--threads", "3"]).cpus_per_run == 3
    assert parse([*without, "--on", "ray", "--cpus-per-run", "4"]).cpus_per_run == 4


def test_the_install_line_is_told_where_ray_is_missing(line, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    status, _, err = command(*line("--seeds", "2", "--on", "ray"))
    assert status == 2
    assert "python -m pip install -r requirements-ray.txt" in one_line(err)


def test_a_cluster_that_does_not_answer_is_told_at_once(line, command, monkeypatch):
    pytest.importorskip("ray")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and doesn't listen
        address = "127.0.0.1:{1}".format(*unused.getsockname())
        for given, variable in ((f"ray://{address}", ""), ("ray", address)):
            monkeypatch.setenv("RAY_ADDRESS", variable)
            started = time.monotonic()
            status, _, err = command(*line("--seeds", "2", "--on", given))
            assert status == 2
            assert f"Ray can't be reached at {variable or given}: start it there" in one_line(err)
            assert time.monotonic() - started < 5


# ---------------------------------------------------------------- what a worker does

def test_a_worker_writes_to_the_log_folder_where_it_is_shared(planned):
    one, images, marker = planned
    result = train_run(one, images, None, marker)
    folder = Path(one.config.log_dir) / "runs" / result.folder
    assert (result.outcome, result.files) == (Outcome.TRAINED, {})
    assert run_state(folder) is RunState.FINISHED
    assert "test_acc" in (folder / "output.txt").read_text()
    [held_out], _ = plan_runs([dataclasses.replace(one.config, validation=6)])
    for each, name, metric in ((one, "test", "test_acc"), (held_out, "validation", "val_acc")):
        outcome, told = cluster._collect(AtOnce, train_run(each, images, None, marker), each)
        assert outcome in (Outcome.TRAINED, Outcome.PRESENT)
        assert told.startswith(f"{read_run(find_matching_run(each)[1]).summary[metric]:.2f} % {name} accuracy, ")


def test_a_run_made_elsewhere_comes_back_whole(planned, tmp_path):
    one, images, marker = planned
    here = train_run(one, images, None, marker)
    log_dir = Path(one.config.log_dir)
    result = train_run(one, images, None, str(tmp_path / "on another machine"))
    assert find_runs(log_dir) == [log_dir / "runs" / here.folder]
    assert not {"checkpoint.pt", "checkpoint.previous.pt", ".lock"} & result.files.keys()

    outcome, told = cluster._collect(AtOnce, result, one)
    new, old = find_runs(log_dir)
    assert outcome is Outcome.TRAINED
    assert new.name in told
    assert run_state(new) is RunState.FINISHED
    assert weights_of(new) == weights_of(old)
    assert [read_record(folder)["number"] for folder in (new, old)] == [2, 1]
    assert not list((log_dir / "runs").glob(".new-*"))


def test_a_marker_is_there_for_as_long_as_the_sweep(tmp_path):
    with cluster._marked(tmp_path) as marker, cluster._marked(tmp_path) as another:
        assert Path(marker).exists()
        assert marker != another
    assert not Path(marker).exists()


def test_a_run_that_ended_elsewhere_meanwhile_is_told_as_finished(line, monkeypatch, tmp_path):
    configs = parse(line("--seeds", "2", "--epochs", "1")).configs
    plan, _ = plan_runs([dataclasses.replace(config, threads=1) for config in configs])

    def train_the_others(ray, plan, images, outcomes, *_) -> None:
        assert outcomes == [Outcome.ELSEWHERE, None]
        with cluster._marked(tmp_path / "logs") as marker:
            outcomes[1] = train_run(plan[1], images, None, marker).outcome
            train_run(plan[0], images, None, marker)

    monkeypatch.setattr(cluster, "_import_ray", lambda address: None)
    monkeypatch.setattr(cluster, "_connected", lambda *_: nullcontext())
    monkeypatch.setattr(cluster, "_make_missing", train_the_others)
    with claim(tmp_path / "logs", plan[0].key):
        _, outcomes = cluster.make_runs_on_ray(configs, "ray", 1, 0, {})
    assert outcomes == [Outcome.PRESENT, Outcome.TRAINED]


@pytest.mark.parametrize(("error", "outcome", "words"), [
    (Diverged("the loss became nan"), Outcome.DIVERGED, ""), (UserError("no room: make some"), Outcome.FAILED, "no room"),
    (ZeroDivisionError("a bug"), Outcome.FAILED, "ZeroDivisionError: a bug")])
def test_what_goes_wrong_in_a_run_is_its_own(planned, monkeypatch, error, outcome, words):
    import main

    def fail(*_):
        raise error

    one, images, marker = planned
    monkeypatch.setattr(main, "train_epoch", fail)
    result = train_run(one, images, None, marker)
    assert result.outcome is outcome
    assert words in result.message
    (folder,) = find_runs(Path(one.config.log_dir))
    assert str(error) in (folder / "output.txt").read_text()


def test_a_worker_needs_neither_images_nor_teachers_files(line, monkeypatch):
    from tinycnn.runs import inputs
    from tinycnn.runs.weights import load_weights

    plan = plan_runs(parse(line("--seeds", "2", "--epochs", "1")).configs)[0]
    config = plan[0].config
    images, given = load_dataset(config.dataset, config.data_dir), []
    monkeypatch.setattr(inputs, "load_dataset", lambda *_: pytest.fail("images were read"))
    monkeypatch.setattr(inputs, "load_weights", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(inputs, "check_held_out", lambda weights, *_: given.append(weights) or pytest.skip("it is there"))
    weights = load_weights(dataclasses.replace(config, teacher=str(REFERENCE / "final.safetensors")))
    with cluster._marked(Path(config.log_dir)) as marker, pytest.raises(pytest.skip.Exception):
        train_run(plan[0], images, weights, marker)
    assert given == [weights]


@needs_ray
def test_a_worker_that_keeps_dying_and_a_task_that_fails_are_told(planned, monkeypatch):
    import ray

    missing = ray.exceptions.RayTaskError("train_run", "Traceback", ModuleNotFoundError("no module x"))
    for error, line in ((missing, "failed: ModuleNotFoundError: no module x"),
                        (ray.exceptions.WorkerCrashedError(), "failed: its worker was lost (The worker died")):
        monkeypatch.setattr(ray, "get", lambda _, error=error: (_ for _ in ()).throw(error))
        outcome, said = cluster._collect(ray, None, planned[0])
        assert outcome is Outcome.FAILED
        assert said.startswith(line)


# ---------------------------------------------------------------- Ray

@pytest.fixture(scope="module")
def two_nodes():
    """A cluster of two nodes of one core."""
    from ray.cluster_utils import Cluster

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    nodes = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    nodes.add_node(**NODE)
    for number, handler in handlers.items():  # Ray's would end the tests' process
        signal.signal(number, handler)
    yield nodes
    nodes.shutdown()


@pytest.fixture
def on_ray(two_nodes, monkeypatch):
    """Where the sweep goes."""
    monkeypatch.setenv("RAY_ADDRESS", two_nodes.address)
    return ["--on", "ray", "--seeds", "2", "--lr", "0.02,0.05"]


def listening() -> set[str]:
    """The addresses other than loopback on which Ray's processes listen."""
    rows = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    addresses = {row.split()[3] for row in rows if "ray" in row or "gcs_server" in row}
    return {address for address in addresses if "127.0.0.1" not in address}


@needs_ray
def test_a_sweep_on_two_nodes_gives_the_bits_of_one_here(line, on_ray, command, tmp_path):
    assert command(*line("--epochs", "1", "--seeds", "2", "--lr", "0.02,0.05", logs="here"))[0] == 0
    status, out, err = command(*line("--epochs", "1", *on_ray))
    assert (status, err) == (0, "")
    assert by_settings(tmp_path / "logs") == by_settings(tmp_path / "here")
    assert len(by_settings(tmp_path / "here")) == 4
    assert out.count("% test accuracy, ") == 4
    status, out, _ = command(*line("--epochs", "1", *on_ray))  # nothing is left to do
    assert status == 0
    assert out.count(": already finished, ") == 4


def kill_a_worker(raylet: int) -> None:
    """SIGKILL a worker of this raylet that trains."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent, title = int(stat.read_text().rsplit(")", 1)[1].split()[1]), (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        if parent == raylet and "train_run" in title:
            os.kill(int(stat.parent.name), signal.SIGKILL)
            return
    pytest.fail("no worker trains")


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux")
@pytest.mark.parametrize("lost", ["worker", "node"])
def test_it_does_with_a_worker_or_a_node_lost(line, on_ray, two_nodes, tmp_path, lost):
    """Of four runs of 40 epochs."""
    here = start_program(*line("--epochs", "40", "--seeds", "2", "--lr", "0.02,0.05", logs="here"))
    assert here.wait(300) == 0
    node = two_nodes.add_node(**NODE) if lost == "node" else None
    program = start_program(*line("--epochs", "40", *on_ray), interval=0)
    try:
        logs = tmp_path / "logs"
        end = time.monotonic() + 120
        while not any(len(read_run(folder).rows) > 3 for folder in find_runs(logs) if (folder / "model_accuracy.log").exists()):
            assert time.monotonic() < end
            time.sleep(0.2)
        if node:
            two_nodes.remove_node(node, allow_graceful=False)
        else:
            kill_a_worker(two_nodes.head_node.all_processes["raylet"][0].process.pid)
        out, err = program.communicate(timeout=300)
    finally:
        program.kill()
    assert (program.returncode, err) == (0, ""), out
    assert by_settings(logs) == by_settings(tmp_path / "here")


@needs_ray
@pytest.mark.slow
def test_ctrl_c_ends_all_runs_and_repeating_goes_on(line, on_ray, tmp_path):
    program = start_program(*line("--epochs", "60", *on_ray[:4]))
    logs, end = tmp_path / "logs", time.monotonic() + 120
    while not any(len(read_run(folder).rows) > 3 for folder in find_runs(logs) if (folder / "model_accuracy.log").exists()):
        assert time.monotonic() < end
        time.sleep(0.2)
    program.send_signal(signal.SIGINT)
    _, err = program.communicate(timeout=60)
    assert program.returncode == 130
    assert "stopped by SIGINT; runs in a shared log folder have saved their epochs; repeat the sweep" in one_line(err)
    for folder in find_runs(logs):
        assert run_state(folder) is RunState.UNFINISHED
        assert not is_running(folder)  # no worker goes on
    before = len(find_runs(logs))
    program = start_program(*line("--epochs", "60", *on_ray[:4]))
    out, err = program.communicate(timeout=300)
    assert (program.returncode, err) == (0, ""), out
    assert len(find_runs(logs)) == 2 >= before
    assert all(run_state(folder) is RunState.FINISHED for folder in find_runs(logs))


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads ss")
def test_ray_that_is_started_here_listens_on_the_loopback_interface(line):
    program = start_program(*line("--epochs", "200", "--seeds", "2", "--on", "ray"))
    try:
        end, seen = time.monotonic() + 60, set()
        while program.poll() is None and time.monotonic() < end and "runs on Ray" not in (program.stdout.readline()):
            pass
        for _ in range(20):
            seen |= listening()
            time.sleep(0.2)
    finally:
        program.send_signal(signal.SIGINT)
        program.communicate(timeout=60)
    assert seen == set()


def test_status_1_names_what_failed(line, command, monkeypatch):
    plan = plan_runs(parse(line("--seeds", "2")).configs)[0]
    monkeypatch.setattr("tinycnn.experiments.cluster.make_runs_on_ray", lambda *_: (plan, [Outcome.FAILED, Outcome.ELSEWHERE]))
    monkeypatch.setattr("tinycnn.experiments.selection.compare_runs", lambda *_: None)
    status, out, _ = command(*line("--seeds", "2", "--on", "ray"))
    assert status == 1
    assert "1 failed (seed 0)" in out
