"""Train the network on CIFAR-10 and write what happened to logs/.

    python main.py                              the baseline: 80 epochs with the settings of config.py
    python main.py --epochs 8 --lr 0.05         every setting is a flag of the same name
    python main.py --data-dir ~/data            where cifar-10-batches-py is, or shall be downloaded to
    python main.py --dataset folder --data-dir pictures     your own: pictures/train/<class>/*, pictures/test/<class>/*
    python main.py --resume                     go on with the newest unfinished run

Read logs/model_accuracy.log, an aligned row an epoch, and logs/torch_summary.log, the network layer by layer.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from config import RECIPES, Config, UserError

if TYPE_CHECKING:  # what needs torch is imported where it is used, so that --help answers at once
    import albumentations as A
    import torch

    from training.batches import Batches
    from training.capture import CapturedStep
    from training.checkpoint import Checkpoints, Resumed
    from training.device_batches import DeviceBatches
    from training.images import Images
    from training.loop import TrainStep
    from training.records import Log

DEMONSTRATION_EPOCHS = 5
BAR = "{desc} |{bar:8}| {remaining} left, {rate_noinv_fmt}{postfix}"  # fits into 80 columns
BANNER = """
********************************************************************************
*  DEMONSTRATION on built-in drawn shapes, because there is no CIFAR-10 here.  *
*  No figure of this run says anything about CIFAR-10.                         *
********************************************************************************
"""


# ---------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python main.py --help lists all settings)")


def parse(arguments: list[str]) -> tuple[dict[str, Any], str | None]:
    """The settings that the command line gives, recipe included, and the run to resume ("" for the newest, None for
    none). Raises UserError."""
    parser = Parser(prog="python main.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="baseline", help="a named set of settings; flags override it")
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN",
                        help="go on with an unfinished run, the newest if none is named")
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        meaning = f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=meaning)
        else:
            parser.add_argument(flag, type=field.type, default=argparse.SUPPRESS, metavar="VALUE", help=meaning)
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    return RECIPES[given.pop("recipe")] | given, resume


def main(arguments: list[str]) -> int:
    """Run the program; returns its exit status. Errors that a person can put right end in one line on stderr."""
    try:
        given, resume = parse(arguments)
        config = Config(**given) if resume is None else None  # a resumed run's settings are judged with its others
        from training.checkpoint import take_up  # torch loads here, too slow for --help
        from training.faults import Stopped, stopping_on_signals
        try:
            with stopping_on_signals():
                if config:
                    train(config)
                else:
                    resumed = take_up(resume or "", given)
                    train(resumed.config, resumed)
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


# ---------------------------------------------------------------- a run

def train(config: Config, resumed: "Resumed | None" = None) -> None:
    """One run, new or resumed: its parts, its records, its epochs, its final files. Raises UserError, and what bugs
    raise, with a note on what is safe and how to go on."""
    from training.faults import named_faults

    with named_faults():
        parts = build(config)
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


@dataclasses.dataclass
class Parts:
    """What a run is made of. `mean` and `deviation` are each channel's, as fractions of 255."""

    config: Config
    images: "Images"
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    policies: "dict[str, A.Compose]"
    device: "torch.device"
    net: "torch.nn.Module"
    optimizer: "torch.optim.SGD"
    scheduler: "torch.optim.lr_scheduler.CosineAnnealingLR"
    step: "TrainStep | CapturedStep"

    def state(self) -> dict[str, Any]:
        """What training changes. The scheduler alone counts the epochs. No state of a random generator is in it: every
        random number is a function of (seed, epoch, image)."""
        return {name: getattr(self, name).state_dict() for name in ("net", "optimizer", "scheduler")}

    def restore(self, state: dict[str, Any]) -> None:
        """Set what training changes. Raises RuntimeError or ValueError where `state` is another network's."""
        for name in ("net", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])


def build(config: Config) -> Parts:
    """The parts of a run as they are before its first epoch. What config leaves to `auto` is settled in theirs.
    Raises UserError for images or a device that can't be had."""
    import torch

    from model import Net
    from training.augment import test_policy, train_policy
    from training.capture import make_step
    from training.device_batches import settled
    from training.images import load
    from training.loop import find_device, keep_freed_memory, seed_torch

    device = find_device(config.device)
    images = load(config.dataset, config.data_dir)
    if config.dataset == "auto" and images.kind == "synthetic":
        print(BANNER)
        config = dataclasses.replace(config, epochs=min(config.epochs, DEMONSTRATION_EPOCHS))
    config = dataclasses.replace(config, dataset=images.kind, threads=config.threads or cores())
    images = images.hold_out(config.validation)
    mean, deviation = images.statistics()
    normalization = test_policy(mean, deviation)
    policies = {"train": train_policy(config, mean, deviation), "validation": normalization, "test": normalization}
    config = dataclasses.replace(config, batches=settled(config.batches, policies, images.train, device))
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    seed_torch(config.seed, 0)
    net = Net(len(images.class_names), config.dropout).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
                                weight_decay=config.weight_decay, fused=device.type == "cuda")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs, eta_min=config.min_lr)
    return Parts(config, images, mean, deviation, policies, device, net, optimizer, scheduler,
                 make_step(net, optimizer, device, config))


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_records(parts: Parts, resumed: "Resumed | None") -> tuple["Log", "Checkpoints"]:
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


def run_epochs(parts: Parts, log: "Log", checkpoints: "Checkpoints") -> None:
    """The epochs, from the one that the scheduler is at to the last; after each a checkpoint and a row in the log."""
    print(log.header(), flush=True)
    with contextlib.closing(make_batches(parts)) as batches:
        for epoch in range(parts.scheduler.last_epoch, parts.config.epochs):
            last = epoch == parts.config.epochs - 1
            row = run_epoch(parts, batches, epoch, last)
            best = "val_acc" in row and all(row["val_acc"] > earlier["val_acc"] for earlier in log.rows)
            log.rows.append(row)
            if best:  # before the checkpoint: after a crash in between, the epoch is repeated, and this with it
                save(parts, log, "best.safetensors")
            checkpoints.epoch_ended(parts.state(), log, last)
            log.update()
            print(log.last_row(), flush=True)


def make_batches(parts: Parts) -> "Batches | DeviceBatches":
    """The batches of all three splits, made on the device or by worker processes."""
    from training.batches import Batches
    from training.device_batches import DeviceBatches

    config, images = parts.config, parts.images
    splits = {"train": images.train, "validation": images.validation, "test": images.test}
    if config.batches == "device":
        return DeviceBatches(splits, parts.policies, config.batch_size, config.seed, parts.device)
    return Batches(splits, parts.policies, config.batch_size, config.seed, config.workers,
                   pin_memory=parts.device.type == "cuda")


def run_epoch(parts: Parts, batches: "Batches | DeviceBatches", epoch: int, last: bool) -> dict[str, float]:
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


def finish(parts: Parts, log: "Log") -> None:
    """The final weights, and last the summary, which marks the run as finished."""
    from training import records

    save(parts, log, "final.safetensors")
    log.update(durable=True)
    summary = records.summarize(log.rows)
    records.write(log.folder / records.SUMMARY, records.as_json(summary), durable=True)
    print(f"\nFinal test accuracy {summary['test_acc']:.2f} %, train {summary['train_acc']:.2f} %, "
          f"after {summary['epochs']} epochs in {summary['seconds']:,.0f} s\nEverything is in {log.folder}")


def save(parts: Parts, log: "Log", name: str) -> None:
    """The weights as they are, with what is needed to use them; the number of workers, which changes nothing, left out."""
    from training.checkpoint import save_weights

    save_weights(log.folder / name, parts.net, {
        "class_names": parts.images.class_names, "mean": parts.mean, "standard_deviation": parts.deviation,
        "config": {key: value for key, value in log.record["config"].items() if key != "workers"}})


if __name__ == "__main__":
    status = main(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a closed pipe, a full disk: main() has said so
            stream.flush()
    os._exit(status)  # all is on disk and no worker is left; with torch, Python's own way out takes more than a second
