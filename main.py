"""The command line, and the story of a run told in order: its parts, its records, its epochs, its final files.

    python main.py            trains; python main.py --help lists every setting and the other commands
"""

import contextlib
import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config, UserError
from training.commands import parse, parse_compare, parse_plot, parse_sweep

if TYPE_CHECKING:  # what needs torch is imported where it is used, so that --help answers at once
    import albumentations as A
    import torch

    from training.batches import Batches
    from training.checkpoint import Checkpoints, Resumed
    from training.device_batches import DeviceBatches
    from training.images import Images
    from training.loop import Step
    from training.records import Log

REFERENCE = Path(__file__).parent / "logs" / "reference"
DEMONSTRATION_EPOCHS = 5
BAR = "{desc} |{bar:8}| {remaining} left, {rate_noinv_fmt}{postfix}"  # fits into 80 columns
BANNER = """
********************************************************************************
*  DEMONSTRATION on built-in drawn shapes, because there is no CIFAR-10 here.  *
*  No figure of this run says anything about CIFAR-10.                         *
********************************************************************************
"""


# ---------------------------------------------------------------- the command line

def main(arguments: list[str]) -> int:
    """Run the program; returns its exit status. Errors that a person can put right end in one line on stderr."""
    try:
        from training.faults import Stopped
        try:
            if arguments[:1] == ["compare"]:
                from training.comparison import compare

                compare(*parse_compare(arguments[1:]), REFERENCE)
            elif arguments[:1] == ["plot"]:
                plot(*parse_plot(arguments[1:]))
            elif arguments[:1] == ["sweep"]:
                sweep(parse_sweep(arguments[1:]))
            else:
                train_or_resume(*parse(arguments))
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
    from training.comparison import compare, settings
    from training.faults import Diverged, stopping_on_signals
    from training.images import load
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
    compare(configs[0].log_dir, [], REFERENCE)


def plot(log_dir: str, name: str | None, data_dir: str | None) -> None:
    """`python main.py plot`: the pictures of a finished run, from its weights and its images."""
    from training.checkpoint import config_of, load_weights
    from training.comparison import finished
    from training.records import find_runs, named_run, read_run

    runs = [read_run(named_run(Path(log_dir), name))] if name else finished(find_runs(Path(log_dir)))[0]
    run = next((run for run in runs if run.summary), None)
    if run is None:
        raise UserError(f"{name or f'in {log_dir}/runs there'} is no finished run: pictures are drawn of finished ones")
    parts = build(config_of(run.record, {"data_dir": data_dir} if data_dir else {}, run.folder))
    if parts.images.fingerprint() != run.record["dataset"]["sha256"]:
        raise UserError(f"the images in {parts.config.data_dir} are not those of run {run.folder.name}: name their folder with "
                        "--data-dir")
    load_weights(run.folder / "final.safetensors", parts.net)
    draw(parts, run.folder)


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
    if parts.config.pictures:
        draw(parts, log.folder)


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
    step: "Step"

    def state(self) -> dict[str, Any]:
        """What training changes. The scheduler alone counts the epochs. No state of a random generator is in it: every
        random number is a function of (seed, epoch, image)."""
        return {name: getattr(self, name).state_dict() for name in ("net", "optimizer", "scheduler")}

    def restore(self, state: dict[str, Any]) -> None:
        """Set what training changes. Raises RuntimeError or ValueError where `state` is another network's."""
        for name in ("net", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        for group in self.optimizer.param_groups:  # what the device at hand is best at, not the one of before
            group["fused"] = self.device.type == "cuda"


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
    if demonstrates(config, images.kind):
        print(BANNER)
        config = demonstration(config)
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


def demonstrates(config: Config, kind: str) -> bool:
    """Whether a run of this config, which got images of this kind, was meant for CIFAR-10, where there is none."""
    return config.dataset == "auto" and kind == "synthetic"


def demonstration(config: Config) -> Config:
    """A config for such a run: a few epochs show how the program works."""
    return dataclasses.replace(config, epochs=min(config.epochs, DEMONSTRATION_EPOCHS))


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


def draw(parts: Parts, folder: Path) -> None:
    """The pictures of a finished run, into its folder."""
    from model import convolutions
    from training.loop import predict
    from training.plots import draw_all
    from training.records import read_run

    with contextlib.closing(make_batches(parts)) as batches:
        probabilities, _ = predict(parts.net, batches.in_order("test"), parts.device)
    stages = {layer.name.split(".")[0].replace("_", " "): layer.receptive_field for layer in convolutions(parts.net)
              if layer.receptive_field and layer.output[1:] != (1, 1)}  # the last of each block counts
    names = draw_all(read_run(folder), parts.images, parts.policies["train"], probabilities.numpy(), stages)
    print(f"Pictures: {', '.join(names)}")


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
