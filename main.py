"""Train a compact depthwise-separable CNN on CIFAR-10: this file is the whole run, from top to bottom.

    python main.py                      80 epochs with the settings of config.py
    python main.py --recipe fast        30 epochs, a quarter of the compute
    python main.py --resume             resume the newest unfinished run
    python main.py --help               all settings and commands

Images -> augmentation policies -> Net -> SGD -> cosine schedule -> epochs of training and testing -> logs, checkpoints,
weights, pictures. The loop is here, the network in model.py, the augmentation in augmentation.py, the optimizer in
tinycnn/training/optimizer.py, the learning rate in tinycnn/training/schedule.py, the loss in tinycnn/training/step.py. `compare`, `sweep` and
`--resume` notice edits of these, but not of this file.
"""

if __name__ == "__main__":  # before torch is loaded, so that --help and a wrong flag answer at once
    from tinycnn.commands.start import parse_or_exit
    arguments = parse_or_exit()

import math
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from config import SIDE, Config, UserError, available_cores, net_settings
from model import Net
from tinycnn.commands.start import STARTED, run_or_exit
from tinycnn.data.batches import Batches, check_policies, make_batches, make_policies, resolve_batches
from tinycnn.data.dataset import Images
from tinycnn.data.loading import load_images, resolve_dataset
from tinycnn.network.identity import describe_network
from tinycnn.network.summary import torch_summary
from tinycnn.runs.finding import REFERENCE, next_number, refuse_run_folder
from tinycnn.runs.record import make_record, read_run
from tinycnn.runs.resuming import Unfinished
from tinycnn.runs.tensorboard import check_tensorboard, event_writer, write_events
from tinycnn.runs.weights import Weights, check_teachers, find_teachers
from tinycnn.runs.writer import NoWriter, RunWriter, resume_run, start_run
from tinycnn.text import plural, printable
from tinycnn.training.capture import Step, make_step
from tinycnn.training.dilated import use_fast_dilated_convs
from tinycnn.training.distillation import Distillation
from tinycnn.training.distributed import ALONE, Processes, batch_sizes, synchronize_norms
from tinycnn.training.epoch import check_output, evaluate, train_epoch
from tinycnn.training.machine import (
    describe_device,
    find_device,
    instruction_set,
    keep_freed_memory,
    memory_format,
    seed_torch,
    set_determinism,
)
from tinycnn.training.metrics import Result
from tinycnn.training.optimizer import make_optimizer
from tinycnn.training.procedure import describe_procedure
from tinycnn.training.schedule import learning_rate, policy_name

NOT_MEASURED = Result(math.nan, math.nan)
EPOCH_BAR = "{desc} |{bar}| {remaining} left, {rate_noinv_fmt}{postfix}"
RUN_BAR = "{desc} |{bar}| {n_fmt} of {total_fmt} epochs, {remaining} left"


def train(config: Config, unfinished: Unfinished | None = None, processes: Processes = ALONE, images: Images | None = None,
          teachers: Sequence[Weights] = ()) -> Path:
    """Train a new run, or resume `unfinished`. Returns the run's folder. `processes`: the processes of this run. `images` and
    `teachers`: already loaded, by a sweep. Raises UserError for what the user can change, and Diverged where the loss is no
    longer finite."""
    in_sweep = images is not None
    refuse_run_folder(Path(config.log_dir))
    if config.tensorboard:
        check_tensorboard()
    teachers = teachers or processes.broadcast(lambda: find_teachers(config))  # before any image is downloaded
    set_determinism(config)
    device = find_device(processes.device_name(config.device))

    # Images, and what augments and normalizes them
    images = images or processes.load_images(load_images, config)
    config = resolve_dataset(config, images)
    images = images.hold_out(config.validation)
    mean, std = images.statistics
    policies = make_policies(config, mean, std)
    check_policies(policies, images)
    config = replace(config, batches=resolve_batches(config.batches, policies, images, device),
                     threads=config.threads or max(1, available_cores() // processes.local_size))

    # Network and optimizer. The learning rate of a step is set by tinycnn/training/schedule.py, the loss by tinycnn/training/step.py
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    seed_torch(config.seed, 0)
    net: nn.Module = Net(len(images.class_names), **net_settings(vars(config)))
    check_output(net, len(images.class_names), config.crop_size if policy_name(config, 0) == "train" else SIDE)
    network, network_summary = describe_network(net), torch_summary(net, str(device))
    net = net.to(device).to(memory_format=memory_format(device))
    use_fast_dilated_convs(net, device)
    net = synchronize_norms(net, processes, device)
    optimizer = make_optimizer(net, config, device)
    distillation = None
    if teachers:
        check_teachers(teachers, images)
        teacher_nets = [teacher.build_net().to(device).to(memory_format=memory_format(device)) for teacher in teachers]
        distillation = Distillation(teacher_nets, config.teacher_share, config.temperature)
    step = make_step(net, optimizer, device, config, distillation, processes)

    # Records: what the run is, and what it leaves on disk
    machine = {"device": describe_device(device), "instruction_set": instruction_set(), **processes.describe()}
    record = make_record(config, network, describe_procedure(), images, machine, next_number(Path(config.log_dir)),
                         ",".join(teacher.name for teacher in teachers))
    if not processes.is_first:
        writer: RunWriter = NoWriter()
    elif unfinished:
        writer = resume_run(unfinished, config, record, net, optimizer, teachers)
    else:
        writer = start_run(config, record, net, optimizer, teachers)

    with writer, closing(make_batches(config, images, policies, device, processes.share_of)) as batches:
        writer.start_log(network_summary)
        processes.broadcast_state(net, optimizer)
        run_epochs(config, images, batches, step, writer)
        if device.type == "cuda" and step.first_done and not in_sweep:
            writer.add_notes(f"from the program's start to the first step: {step.first_done - STARTED:.1f} s")
        writer.finish()
        if processes.is_first:
            print_result(writer.folder)
            if config.pictures:
                from tinycnn.commands.plot import draw_pictures  # loads Matplotlib, which would keep the first epoch waiting

                with closing(batches if processes.size == 1 else make_batches(config, images, policies, device)) as whole:
                    draw_pictures(net, whole, images, policies["train"], device, writer.folder)
            print("Next: python main.py test | predict IMAGE | export | compare")
    return writer.folder


def print_result(folder: Path) -> None:
    """Print the final accuracies of the run in `folder`, first the one to choose by, and where it stands beside the reference
    run."""
    run = read_run(folder)
    final, dataset = run.rows[-1], run.record["dataset"]["sha256"]
    accuracies = [f"{name} {final[column]:.2f} %" for name, column in (
        ("validation", "val_acc"), ("test", "test_acc"), ("train", "train_acc")) if column in final]
    print(f"\nFinal accuracy: {', '.join(accuracies)}, after {plural(len(run.rows), 'epoch')} in "
          f"{sum(row['seconds'] for row in run.rows):,.0f} s")
    with suppress(UserError):  # a reference run that is damaged or gone is no reason to end here
        reference = read_run(REFERENCE)
        if reference.record["dataset"]["sha256"] == dataset and reference.rows:
            accuracy = reference.rows[-1]["test_acc"]
            print(f"That is {final['test_acc'] - accuracy:+.2f} percentage points from the reference run, {accuracy:.2f} % "
                  f"after {plural(len(reference.rows), 'epoch')}")
    print(f"Everything is in {printable(str(folder))}")


def run_epochs(config: Config, images: Images, batches: Batches, step: Step, writer: RunWriter) -> None:
    """Train and test for the epochs that are left; after each, save its row of the log, and a checkpoint if one is due."""
    processes = step.processes
    first, noted = processes.broadcast(lambda: len(writer.rows)), ""
    progress = tqdm(total=config.epochs, initial=first, desc="run", leave=False, dynamic_ncols=True, bar_format=RUN_BAR,
                    disable=None if config.epochs > 1 and processes.is_first else True)
    with progress, event_writer(config.tensorboard and processes.is_first, writer.folder, writer.rows) as events:
        for epoch in range(first, config.epochs):
            last = epoch == config.epochs - 1
            row = run_epoch(config, images, batches, step, epoch, last)
            if step.note != noted:  # the capture of a batch of a new size may have changed it
                noted = step.note
                writer.add_notes(noted)
            line = writer.save_epoch(row, last)
            write_events(events, row)
            with progress.external_write_mode():  # above the bars
                print(line, flush=True)
            progress.update()


def run_epoch(config: Config, images: Images, batches: Batches, step: Step, epoch: int, last: bool) -> dict[str, float]:
    """Train for one epoch, then evaluate. Returns the epoch's row of the log."""
    started, net, device, processes = time.perf_counter(), step.net, step.device, step.processes
    seed_torch(config.seed, epoch + 1, processes.rank)

    def rate(images_trained_on: int) -> float:
        return learning_rate(config, epoch + images_trained_on / len(images.train))

    progress = tqdm(total=len(images.train), desc=f"epoch {epoch}", unit=" images", mininterval=1, leave=False,
                    dynamic_ncols=True, bar_format=EPOCH_BAR, disable=None if processes.is_first else True)
    with progress:
        train_result = train_epoch(step, batches.shuffled(policy_name(config, epoch), epoch), rate, progress,
                                   batch_sizes(len(images.train), config.batch_size))
    row = {"epoch": epoch, "lr": rate(0), "train_loss": train_result.loss, "train_acc": train_result.accuracy}
    if config.validation:
        row["val_loss"], row["val_acc"] = evaluate(net, batches.in_order("validation"), device, processes)
    # With a validation split, test only after the last epoch, so that no setting is chosen on the test images.
    hidden = config.validation and not last
    row["test_loss"], row["test_acc"] = NOT_MEASURED if hidden else evaluate(net, batches.in_order("test"), device, processes)
    row["seconds"] = time.perf_counter() - started
    return row


if __name__ == "__main__":
    run_or_exit(arguments, train)
