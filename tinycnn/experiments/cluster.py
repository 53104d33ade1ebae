"""The runs of a sweep as tasks of Ray, on this machine or on a cluster."""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config import Config, UserError
from tinycnn.cores import available_cores
from tinycnn.data.dataset import Dataset
from tinycnn.errors import StopRequested, as_user_errors, stop_on_signals
from tinycnn.experiments.claims import CLAIMS, claim
from tinycnn.experiments.comparison import JUDGED_BY, metric_of
from tinycnn.experiments.sweep import Outcome, PlannedRun, find_matching_run, make_claimed_run, plan_runs
from tinycnn.runs.files import make_run_folder
from tinycnn.runs.finding import CHECKPOINT, PREVIOUS_CHECKPOINT, PROGRAM, RunState, next_number
from tinycnn.runs.record import CONFIG, as_json, read_summary
from tinycnn.runs.run import LOCK
from tinycnn.runs.weights import NamedWeights, load_weights

OUTPUT = "output.txt"  # in a run's folder: what it printed
RETRIES = 3  # of a run whose worker or node died
GRACE = 30.0  # seconds that runs have to save their epochs after Ctrl-C
LEFT_BEHIND = (CHECKPOINT, PREVIOUS_CHECKPOINT, LOCK)  # what of a run made elsewhere doesn't come back
INSTALL = "python -m pip install -r requirements-ray.txt"
ENDED = {RunState.FINISHED: Outcome.PRESENT, RunState.DIVERGED: Outcome.DIVERGED}
BAR = "{desc} |{bar}| {n_fmt} of {total_fmt} runs, {remaining} left"


@dataclass(frozen=True)
class RunResult:
    """What a worker returns of a run. `files` holds the run's folder where the log folder is not shared with the worker."""

    outcome: Outcome
    message: str = ""  # why it failed
    folder: str = ""  # its name
    files: dict[str, bytes] = field(default_factory=dict)


# ---------------------------------------------------------------- in a worker

def train_run(planned: PlannedRun, images: Dataset, weights: NamedWeights, marker: str) -> RunResult:
    """Train the run in a worker of Ray, in the shared log folder or else in one that is deleted afterwards. `marker`: a file in
    the log folder, with a name that there is once; a worker that finds it there shares the folder."""
    import main  # which nothing else imports; a worker loads it by name
    from tinycnn.inference.result import train_and_show

    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # Ray's shared memory, which is only read
    train = partial(train_and_show, main.train, dataset=images, weights=weights)
    if Path(marker).exists():
        return _train_in(Path(marker).parents[2], planned, train)
    with tempfile.TemporaryDirectory(prefix="sweep-", ignore_cleanup_errors=True) as log_dir:
        result = _train_in(Path(log_dir), planned, train)
        folder = Path(log_dir, "runs", result.folder)
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in LEFT_BEHIND}
        return replace(result, files=files if result.outcome in (Outcome.TRAINED, Outcome.DIVERGED) else {})


def _train_in(log_dir: Path, planned: PlannedRun, train: Any) -> RunResult:
    """Make the run in `log_dir`. Its output is written to a file, which is added to the run's folder."""
    planned = replace(planned, config=replace(planned.config, log_dir=str(log_dir)))
    output = log_dir / "runs" / CLAIMS / f"{planned.key}.txt"
    output.parent.mkdir(parents=True, exist_ok=True)
    message = ""
    with open(output, "a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            with as_user_errors():
                outcome = make_claimed_run(planned, train)
        except (UserError, OSError) as error:
            outcome, message = Outcome.FAILED, str(error)
            print("; ".join([f"error: {error}", *getattr(error, "__notes__", [])]))
        except Exception as error:  # a bug stops no other run either
            outcome, message = Outcome.FAILED, f"{type(error).__name__}: {error}"
            traceback.print_exc()
    state, folder = find_matching_run(planned)
    if state is RunState.FOREIGN:
        return RunResult(outcome, message or "it left no folder")
    if outcome is not Outcome.ELSEWHERE:
        with open(folder / OUTPUT, "a") as file:
            file.write(output.read_text())
    output.unlink()
    return RunResult(outcome, message, folder.name)


# ---------------------------------------------------------------- in the process that the user started

def make_runs_on_ray(configs: Sequence[Config], on: str, cpus: int, gpus: float | None,
                     variables: Mapping[str, str]) -> tuple[list[PlannedRun], list[Outcome]]:
    """Make the runs that `configs` describe as tasks of Ray. Returns the plan and what became of each run.

    `on`: "ray", or the address of a cluster. Each run has `cpus` cores, which are its threads, and `gpus` GPUs (None: one,
    where the cluster has any). `variables` are added to the environment of the workers.
    """
    address = os.environ.get("RAY_ADDRESS") if on == "ray" else on
    ray = _import_ray(address)
    plan, images = plan_runs([replace(config, threads=cpus) for config in configs])
    with ExitStack() as stack:
        outcomes = [_claim(planned, stack) for planned in plan]
        if None in outcomes:
            signals: list[int] = []  # noted: an exception from a signal handler breaks Ray's calls
            stack.enter_context(stop_on_signals(signals.append))
            stack.enter_context(_connected(ray, address, variables))
            _make_missing(ray, plan, images, outcomes, cpus, gpus, signals)
    # By now a run may have ended elsewhere
    return plan, [ENDED.get(find_matching_run(planned)[0], outcome) if outcome is Outcome.ELSEWHERE else outcome
                  for planned, outcome in zip(plan, outcomes, strict=True) if outcome]


def _claim(planned: PlannedRun, stack: ExitStack) -> Outcome | None:
    """Claim the run until the end of the sweep. None where it is to be made."""
    if not stack.enter_context(claim(Path(planned.config.log_dir), planned.key)):
        return Outcome.ELSEWHERE
    state, folder = find_matching_run(planned)
    if state is RunState.FINISHED:
        print(f"{planned.description}: already finished, {folder.name}")
    return ENDED.get(state)


def _make_missing(ray: Any, plan: Sequence[PlannedRun], images: Dataset, outcomes: list[Outcome | None], cpus: int,
                  gpus: float | None, signals: list[int]) -> None:
    """Make the runs that have no outcome yet, and fill it in as each ends. Stops when there is something in `signals`."""
    total = ray.cluster_resources()
    gpus = gpus if gpus is not None else min(1, total.get("GPU", 0))
    for name, wanted in (("CPU", cpus), ("GPU", gpus)):
        if max((node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]), default=0) < wanted:
            raise UserError(f"--{name.lower()}s-per-run is {wanted:g}, but no machine of the cluster has as many: lower it")
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(train_run)
    images_there = ray.put(images)
    configs = {(planned.config.init, planned.config.teacher): planned.config for planned in plan}
    weights_there = {key: ray.put(load_weights(config)) for key, config in configs.items()}
    with _marked(Path(plan[0].config.log_dir)) as marker:
        running = {task.remote(planned, images_there, weights_there[planned.config.init, planned.config.teacher], marker):
                   number for number, planned in enumerate(plan) if outcomes[number] is None}
        print(f"{len(running)} runs on Ray: {total.get('CPU', 0):g} CPU cores, {total.get('GPU', 0):g} GPUs", flush=True)
        with tqdm(total=len(running), desc="sweep", disable=None, leave=False, dynamic_ncols=True, bar_format=BAR) as bar:
            while running and not signals:
                for reference in ray.wait(list(running), timeout=0.5)[0]:
                    number = running.pop(reference)
                    outcomes[number], line = _collect(ray, reference, plan[number])
                    with bar.external_write_mode():
                        print(f"{plan[number].description}: {line}", flush=True)
                    bar.update()
        if running:
            for reference in running:
                ray.cancel(reference, force=False)  # as Ctrl-C, after which a run saves its epochs
            ray.wait(list(running), num_returns=len(running), timeout=GRACE)
            error = StopRequested(signals[0])
            error.add_note("runs in a shared log folder have saved their epochs; repeat the sweep to resume them")
            raise error


def _collect(ray: Any, reference: Any, planned: PlannedRun) -> tuple[Outcome, str]:
    """The outcome of a run that has ended, and a line that reports it. Puts its folder in place where it was made elsewhere."""
    try:
        result: RunResult = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # outside of the run: a package that is missing there, say
        return Outcome.FAILED, f"failed: {type(error.cause).__name__}: {' '.join(str(error.cause).split())}"
    except ray.exceptions.RayError as error:
        return Outcome.FAILED, f"failed: its worker was lost ({str(error).splitlines()[0]})"
    name, log_dir = result.folder, Path(planned.config.log_dir)
    if result.files:
        record = json.loads(result.files[CONFIG]) | {"number": next_number(log_dir)}
        name = make_run_folder(log_dir, name, result.files | {CONFIG: as_json(record).encode()}).name
    if result.outcome is Outcome.FAILED:
        return result.outcome, f"failed: {result.message}"
    if result.outcome not in (Outcome.TRAINED, Outcome.PRESENT):
        return result.outcome, f"{result.outcome.value}, {name}"
    metric = metric_of(planned.config.validation)
    return result.outcome, f"{read_summary(log_dir / 'runs' / name)[metric]:.2f} % {JUDGED_BY[metric]} accuracy, {name}"


@contextmanager
def _marked(log_dir: Path) -> Iterator[str]:
    """The path of a marker in the log folder for the body; see train_run."""
    path = log_dir.absolute() / "runs" / CLAIMS / f"shared-{secrets.token_hex(16)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


def _import_ray(address: str | None) -> Any:
    """Import Ray. Without the address of a cluster it will listen on the loopback interface only."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports home otherwise
    if not address:  # this is the default on macOS and Windows; on Linux Ray would listen on all interfaces
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a later default, which Ray otherwise announces
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--on ray needs the package ray: {INSTALL}") from error
    return ray


@contextmanager
def _connected(ray: Any, address: str | None, variables: Mapping[str, str]) -> Iterator[None]:
    """Join the cluster, or start Ray on this machine, on the loopback interface, for the body."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR",
                               "runtime_env": _environment(address, variables)}
    if address:
        options["address"] = address
    else:
        options |= {"address": "local", "include_dashboard": False, "num_cpus": available_cores(),
                    "_node_ip_address": "127.0.0.1"}
    _check_address(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(f"Ray can't be reached at {address}: start it there (ray start --head), set its "
                        f"RAY_AUTH_MODE and RAY_AUTH_TOKEN here too, or leave the address out "
                        f"({str(error).splitlines()[0]})" if address else f"Ray can't be started ({error})") from error
    finally:
        for number, handler in handlers.items():  # Ray has its own
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str | None) -> None:
    """Raise UserError where nothing answers at the host and port of an address: Ray would wait for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:(\d{1,5})", address or "")
    if not found:  # none, or "auto"
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=5).close()
    except (OSError, OverflowError, ValueError) as error:  # a host name may be none
        raise UserError(f"Ray can't be reached at {address}: start it there (ray start --head), or leave the address out "
                        f"({error})") from error


def _environment(address: str | None, variables: Mapping[str, str]) -> dict[str, Any]:
    """How workers find this program: where it is, or in a copy that Ray sends to the machines of a cluster."""
    if not address:
        return {"env_vars": {**variables, "PYTHONPATH": os.pathsep.join([str(PROGRAM), os.environ.get("PYTHONPATH", "")])}}
    folders = [path.name for path in PROGRAM.iterdir() if path.is_dir() and not (path / "__init__.py").exists()]
    return {"env_vars": dict(variables), "working_dir": str(PROGRAM), "excludes": [f"/{name}" for name in folders]}
