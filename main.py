"""The command line, and the story of a run told in order: its parts, its records, its epochs, its final files.

    python main.py            trains; python main.py --help lists every setting and the other commands
"""

import contextlib
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config, UserError
from training import commands

if TYPE_CHECKING:  # what needs torch is imported where it is used, so that --help answers at once
    from inference.weights import Weights
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
            verb, rest = (arguments[0], arguments[1:]) if arguments[:1] and arguments[0] in VERBS else ("", arguments)
            if verb:
                VERBS[verb](getattr(commands, f"parse_{verb}")(rest))
            else:
                train_or_resume(*commands.parse(rest))
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
    from training.comparison import settings
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
                    go_on(str(folder), {})
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


# ---------------------------------------------------------------- a finished run

def plot(asked: Namespace) -> None:
    """`python main.py plot`: the pictures of a finished run, from its weights and its images."""
    weights, parts = trained(asked)
    draw(parts, weights.path.parent)


def test(asked: Namespace) -> None:
    """`python main.py test`: what trained weights are worth on the test images of their run."""
    from inference.test import report

    weights, parts = trained(asked)
    with contextlib.closing(parts.batches()) as batches:
        print(f"{weights.path} on the {len(parts.images.test):,} test images of {parts.config.dataset}:\n"
              + report(parts.net, batches, parts.device, weights.class_names, asked.flip))


def predict(asked: Namespace) -> None:
    """`python main.py predict`: what a trained network takes images for."""
    from inference import weights
    from inference.classifier import Classifier
    from inference.predict import as_json, as_text, image_files, predictions
    from model import Net
    from training.loop import find_device

    files, device = image_files(asked.images), find_device(asked.device)
    found = weights.read(weights.find(Path(asked.log_dir), asked.run))
    net = Net(len(found.class_names), found.config["dropout"])
    found.load_into(net)
    classifier, unreadable = Classifier(net, found.mean, found.deviation).to(device), list[UserError]()
    predicted = predictions(files, classifier, found.class_names, device, unreadable)
    if asked.json:
        print(as_json(list(predicted), asked.top))
    else:
        for path, prediction in predicted:
            print(as_text(path, prediction, asked.top))
    if unreadable:
        others = f", and {len(unreadable) - 1:,} more of {len(files):,} files" if len(unreadable) > 1 else ""
        raise UserError(f"{unreadable[0]}{others}")


def export(asked: Namespace) -> None:
    """`python main.py export`: a trained network as one file that runs without this program."""
    from inference.classifier import Classifier
    from inference.export import FILES, check_packages
    from inference.export import export as make
    from training.loop import predict
    from training.records import write

    check_packages(asked.to)
    weights, parts = trained(Namespace(**vars(asked), device="cpu"))
    with contextlib.closing(parts.batches()) as batches:
        logits, _ = predict(parts.net, batches.in_order("test"), parts.device)
    data, comparison = make(asked.to, Classifier(parts.net, weights.mean, weights.deviation), weights.class_names,
                            parts.images.train, parts.images.test, logits)
    path = weights.path.parent / FILES[asked.to]
    write(path, data, durable=True)
    print(f"{path}: {len(data):,} bytes\n{comparison}")


def trained(asked: Namespace) -> "tuple[Weights, Parts]":
    """The weights that are asked for, and the parts of their run with these weights and on the device that is asked for. Raises
    UserError, also where the images are not those that the weights were trained on."""
    from inference import weights
    from model import Net
    from training.checkpoint import config_of
    from training.parts import build

    found = weights.read(weights.find(Path(asked.log_dir), asked.run))
    here = {"data_dir": asked.data_dir, "log_dir": asked.log_dir, "device": asked.device, "threads": 0, "batches": "auto"}
    parts = build(config_of({"config": found.config | here}, {}, found.path.parent), Net)
    if not found.trained_on(parts.images):
        raise UserError(f"the images in {asked.data_dir} are not those that {found.path} was trained on: name their folder "
                        "with --data-dir")
    found.load_into(parts.net)
    return found, parts


VERBS: dict[str, Callable[[Any], None]] = {
    "sweep": sweep, "compare": compare, "plot": plot, "test": test, "predict": predict, "export": export}


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
        "mean": list(parts.mean), "deviation": list(parts.deviation)}, describe(parts.device))
    places = {name: getattr(config, name) for name in records.PLACES}
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

    save(parts, log, "final.safetensors")
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
    from training.checkpoint import save_weights

    save_weights(log.folder / name, parts.net, {
        "class_names": parts.images.class_names, "mean": parts.mean, "standard_deviation": parts.deviation,
        "images": log.record["dataset"]["sha256"],
        "config": {key: value for key, value in log.record["config"].items() if key != "workers"}})


if __name__ == "__main__":
    status = main(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a closed pipe, a full disk: main() has said so
            stream.flush()
    os._exit(status)  # all is on disk and no worker is left; with torch, Python's own way out takes more than a second
