"""The command line, and the story of a run told in order: its parts, its records, its epochs, its final files.

    python main.py            trains; python main.py --help lists every setting and the other commands
"""

import contextlib
import io
import math
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config, UserError
from training import commands

if TYPE_CHECKING:  # what needs torch is imported where it is used, so that --help answers at once
    from training.batches import Batches
    from training.checkpoint import Checkpoints, Resumed
    from training.device_batches import DeviceBatches
    from training.parts import Parts
    from training.records import Log

REFERENCE = Path(__file__).parent / "logs" / "reference"
BAR = "{desc} |{bar:8}| {remaining} left, {rate_noinv_fmt}{postfix}"  # both fit into 80 columns
RUN_BAR = "{desc} |{bar:20}| {n_fmt} of {total_fmt} epochs, {remaining} left"


# ---------------------------------------------------------------- the command line

def main(arguments: list[str]) -> int:
    """Run the program; returns its exit status. Errors that a person can put right end in one line on stderr."""
    try:
        from training.faults import Stopped
        try:
            verb, rest = arguments[:1], arguments[1:]
            if verb == ["sweep"]:
                sweep(commands.parse_sweep(rest))
            elif verb == ["compare"]:
                compare(commands.parse_compare(rest))
            elif verb == ["plot"]:
                plot(commands.parse_plot(rest))
            elif verb in (["test"], ["predict"], ["export"]):
                use(verb[0], getattr(commands, f"parse_{verb[0]}")(rest))
            else:
                train_or_resume(*commands.parse(arguments))
        except Stopped as stop:
            return _complain(f"stopped by {stop.signal.name}", stop, stop.status)
    except (UserError, OSError) as error:  # an OSError that nobody foresaw is still the machine's, and names its file
        return _complain(f"error: {error}", error, 2)
    except KeyboardInterrupt as stop:  # before or after the handlers of stopping_on_signals are in place
        return _complain("stopped by SIGINT", stop, 130)
    return 0


def _complain(line: str, error: BaseException, status: int) -> int:
    """Print `line` and the notes on `error` as one line on stderr; returns `status`."""
    print(" ".join(("; ".join([line, *getattr(error, "__notes__", [])])).split()), file=sys.stderr)
    return status


def train_or_resume(given: dict[str, Any], resume: str | None) -> None:
    """`python main.py`: a new run with the settings `given`, or the run to resume, "" being the newest."""
    config = Config(**given) if resume is None else None  # a resumed run's settings are judged with its others
    from training.faults import stopping_on_signals

    with stopping_on_signals():
        if config:
            train(config)
        else:
            go_on(resume or "", given)


def go_on(name: str, given: dict[str, Any]) -> None:
    """Train the unfinished run `name`, or the newest if it is "", to its end."""
    from training.checkpoint import take_up

    resumed = take_up(name, given)
    train(resumed.config, resumed)


def sweep(configs: list[Config]) -> None:
    """`python main.py sweep`: the runs that have not been made, one after another, then the comparison of all."""
    from training.checkpoint import MOVABLE
    from training.differences import settings
    from training.faults import Diverged, stopping_on_signals
    from training.images import load
    from training.parts import demonstrates, demonstration
    from training.records import SUMMARY
    from training.sweep import made

    with stopping_on_signals():
        images = load(configs[0].dataset, configs[0].data_dir)
        kind = images.kind
        fingerprints = {count: images.hold_out(count).fingerprint() for count in {config.validation for config in configs}}
        del images  # each run loads its own
        for number, config in enumerate(configs, 1):
            folder = made(demonstration(config) if demonstrates(config, kind) else config, fingerprints[config.validation])
            changed = {name: value for name, value in settings(vars(config)).items() if value != getattr(Config, name)}
            print(f"\nRun {number} of {len(configs)}: " + "".join(f"{name} {value}, " for name, value in changed.items())
                  + f"seed {config.seed}", flush=True)
            try:
                if folder and (folder / SUMMARY).exists():
                    print(f"is finished: {folder.name}")
                elif folder:
                    go_on(str(folder), {name: getattr(config, name) for name in MOVABLE})
                else:
                    train(config)
            except Diverged as end:
                print(f"ended early: {end}")
            except BaseException as end:
                end.add_note("or repeat the sweep, which skips what is finished")
                raise
    compare(Namespace(log_dir=configs[0].log_dir, runs=[]))


def compare(asked: Namespace) -> None:
    """`python main.py compare`: runs side by side."""
    from training.comparison import compare as compare_runs

    compare_runs(asked.log_dir, asked.runs, REFERENCE)


def plot(asked: Namespace) -> None:
    """`python main.py plot`: the pictures of a finished run, from its weights and its images."""
    from inference.verbs import trained
    from model import Net

    if asked.run and asked.run.endswith(".safetensors"):
        raise UserError(f"{asked.run} is no run: pictures are drawn of a run; name its folder")
    weights, parts = trained(asked, Net)
    draw(parts, weights.path.parent)


def use(verb: str, asked: Namespace) -> None:
    """`python main.py test`, `predict` or `export`: a trained network put to use."""
    from inference import verbs
    from model import Net

    getattr(verbs, verb)(asked, Net)


# ---------------------------------------------------------------- a run

def train(config: Config, resumed: "Resumed | None" = None) -> None:
    """One run, new or resumed: its parts, its records, its epochs, its final files. Raises UserError, and what bugs
    raise, with a note on what is safe and how to go on."""
    from model import Net
    from training.events import check_package
    from training.faults import named_faults
    from training.parts import build

    if config.tensorboard:
        check_package()
    with named_faults():
        parts = build(config, Net)
        log, checkpoints = open_records(parts, resumed)
    try:
        with named_faults():
            run_epochs(parts, log, checkpoints)
        finish(parts, log)
    except BaseException as end:
        checkpoints.rescue(end)
        with contextlib.suppress(Exception):  # `end` may have come between an epoch's checkpoint and its row
            del log.rows[checkpoints.saved:]
            log.update()
        raise
    if parts.config.pictures:
        draw(parts, log.folder)
    print("Next: python main.py test, predict IMAGE, export --to onnx; or compare, with other runs")


def open_records(parts: "Parts", resumed: "Resumed | None") -> tuple["Log", "Checkpoints"]:
    """The log and the checkpoints: of a new run, in a folder of its own, or of a resumed one, whose state the parts
    then have. Raises UserError where nothing can be written, or the state doesn't fit."""
    import model
    from training import checkpoint, records
    from training.loop import describe
    from training.summary import torch_summary

    config, images = parts.config, parts.images
    record = records.record(config, model.facts(parts.net), {
        "kind": images.kind, "class_names": list(images.class_names), "sha256": images.fingerprint(),
        "train": len(images.train), "validation": len(images.validation), "test": len(images.test),
        "mean": list(parts.mean), "deviation": list(parts.deviation)}, describe(parts.device),
        parts.teacher.name if parts.teacher else "")
    places = {name: getattr(config, name) for name in (*records.PLACES, "teacher")}  # as typed, to find them again
    if resumed:
        folder, lock, rows = resumed.folder, resumed.lock, resumed.state["rows"]
        with resumed.fitting():
            record = resumed.continued(record)
            parts.restore(resumed.state)
    else:
        rows = []
        first = parts.state() | {"rows": rows, "record": record, "places": places}
        folder = records.new_folder(Path(config.log_dir), config.name, {
            records.CONFIG: records.as_json(record), checkpoint.NEWEST: checkpoint.pack(first)})
        lock = checkpoint.lock(folder)
    log = records.Log(folder, Path(config.log_dir), record, rows)
    log.start(torch_summary(parts.net, model.convolutions(parts.net), str(parts.device)))
    print("\n".join(log.comments), end="\n\n", flush=True)
    return log, checkpoint.Checkpoints(folder, lock, places, saved=len(rows))


def run_epochs(parts: "Parts", log: "Log", checkpoints: "Checkpoints") -> None:
    """The epochs, from the one that the scheduler is at to the last; after each a checkpoint and a row in the log."""
    from tqdm import tqdm

    from training.events import event_files, write_row

    print(log.header(), flush=True)
    first, epochs = parts.scheduler.last_epoch, parts.config.epochs
    with (contextlib.closing(parts.batches()) as batches, event_files(parts.config.tensorboard, log.folder, first) as events,
          tqdm(total=epochs, initial=first, desc="run", unit=" epochs", disable=None if epochs > 1 else True, leave=False,
               dynamic_ncols=True, bar_format=RUN_BAR) as bar):
        for epoch in range(first, epochs):
            last = epoch == epochs - 1
            row = run_epoch(parts, batches, epoch, last)
            best = "val_acc" in row and all(row["val_acc"] > earlier["val_acc"] for earlier in log.rows)
            log.rows.append(row)
            if best:  # before the checkpoint: after a crash in between, the epoch is repeated, and this with it
                save(parts, log, "best.safetensors")
            checkpoints.epoch_ended(parts.state(), log, last)
            log.update()
            write_row(events, row)
            with bar.external_write_mode():  # above the bars
                print(log.last_row(), flush=True)
            bar.update()


def run_epoch(parts: "Parts", batches: "Batches | DeviceBatches", epoch: int, last: bool) -> dict[str, float]:
    """Train one epoch, then test: the epoch's row of the log."""
    from tqdm import tqdm

    from training.loop import seed_torch, test, train_epoch

    config, net, device = parts.config, parts.net, parts.device
    started, images = time.perf_counter(), len(parts.images.train)
    row: dict[str, float] = {"epoch": epoch, "lr": float(parts.scheduler.get_last_lr()[0])}
    seed_torch(config.seed, epoch + 1)
    with tqdm(total=images, desc=f"epoch {epoch}", unit=" images", mininterval=1, disable=None, leave=False,
              dynamic_ncols=True, bar_format=BAR) as bar:
        row["train_loss"], row["train_acc"] = train_epoch(parts.step, batches.shuffled("train", epoch), bar)
    parts.scheduler.step()
    if config.validation:
        row["val_loss"], row["val_acc"] = test(net, batches.in_order("validation"), device)
    # Who chooses settings by the validation images must not see the test images before the end.
    hidden = config.validation and not last
    row["test_loss"], row["test_acc"] = (math.nan, math.nan) if hidden else test(net, batches.in_order("test"), device)
    row["seconds"] = time.perf_counter() - started
    return row


def finish(parts: "Parts", log: "Log") -> None:
    """The final weights, and last the summary, which marks the run as finished."""
    from training import records

    save(parts, log, records.FINAL)
    log.update(durable=True)
    summary = records.summarize(log.rows)
    records.write(log.folder / records.SUMMARY, records.as_json(summary), durable=True)
    print(f"\nFinal test accuracy {summary['test_acc']:.2f} %, train {summary['train_acc']:.2f} %, "
          f"after {summary['epochs']} epochs in {summary['seconds']:,.0f} s\nEverything is in {log.folder}")


def draw(parts: "Parts", folder: Path) -> None:
    """The pictures of a finished run, into its folder."""
    from model import convolutions
    from training.loop import predict
    from training.plots import draw_all
    from training.records import read_run

    with contextlib.closing(parts.batches()) as batches:
        logits, _ = predict(parts.net, batches.in_order("test"), parts.device)
    stages = {layer.name.split(".")[0].replace("_", " "): layer.receptive_field for layer in convolutions(parts.net)
              if layer.receptive_field and layer.output[1:] != (1, 1)}  # the last of each block counts
    names = draw_all(read_run(folder), parts.images, parts.policies["train"], logits.softmax(1).cpu().numpy(), stages)
    print(f"Pictures: {', '.join(names)}")


def save(parts: "Parts", log: "Log", name: str) -> None:
    """The weights as they are, with what is needed to use them; the number of workers, which changes nothing, left out."""
    from training.weights import save_weights

    save_weights(log.folder / name, parts.net, {
        "class_names": parts.images.class_names, "mean": parts.mean, "standard_deviation": parts.deviation,
        "images": log.record["dataset"]["sha256"],
        "config": {key: value for key, value in log.record["config"].items() if key != "workers"}})


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes may hold what a terminal can't show
    status = main(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a closed pipe, a full disk: main() has said so
            stream.flush()
    os._exit(status)  # all is on disk and no worker is left; with torch, Python's own way out takes more than a second
