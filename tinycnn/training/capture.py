"""A training step recorded once as a CUDA graph, then replayed: one launch instead of some hundred."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config
from tinycnn.streams import after_this, side_stream, wait_for
from tinycnn.timing import milliseconds
from tinycnn.training.distillation import Distillation
from tinycnn.training.distributed import ALONE, Processes
from tinycnn.training.machine import has_bfloat16
from tinycnn.training.self_check import TOLERANCE, addresses, largest_difference, put_back, snapshot, step_state
from tinycnn.training.step import Forward, Loss, TrainStep

WARM_UP = 3  # steps before a recording, in which libraries choose their kernels and momentum gets its memory
# Before this release a failed capture left the allocator in capture mode (pytorch #180395). Compare it with torch.__version__,
# which is no plain text: 2.9 comes before 2.13
FAILURES_END_CLEANLY = "2.13"
Kernels = tuple[Forward, Loss | None]  # what a step computes its forward pass and its loss with; None: its own loss
Recording = tuple[Tensor, Tensor, Callable[[], object]]  # where images and labels go, and what replays the step on them


class CapturedStep:
    """Trains as the TrainStep that it is made of. A batch of a new shape, such as an epoch's short last one, is recorded on its
    own. A recording must agree with an eager step. Where one fails, or doesn't agree, one line says so and all steps run
    eager from then on. `note` says which it was, and how near captured steps are to eager ones.

    `fused` computes what the step's network and loss do, by other kernels. Full batches use it where its recording, too, agrees
    with an eager step, and is the faster one."""

    def __init__(self, step: TrainStep, fused: Kernels | None = None) -> None:
        self.step, self.net, self.optimizer, self.fused = step, step.net, step.optimizer, fused
        self.own: Kernels = (step.net, None)
        self.metrics, self.device, self.processes = step.metrics, step.device, step.processes
        self.note = ""
        self.first_done = 0.0
        self.recordings: dict[torch.Size, Recording] = {}
        self.capture = _graph if step.device.type == "cuda" else _eager_twin
        # What a recording reads in place of the floats in the optimizer, a rate for each group of parameters
        self.rates = [torch.zeros((), device=step.device) for _ in self.optimizer.param_groups]
        self.rates_now: list[float] = []
        self.possible = True
        self.difference = 0.0  # the largest that a self-check has found
        self.fused_outcome = ""  # what became of the fused kernels, for the note

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Train on images float32 N x 3 x H x W and labels int64 N, both on the device."""
        if self.possible and images.shape not in self.recordings:
            self._prepare(images, labels)
        if not self.possible:
            return self.step(images, labels)
        self._set_rates([group["lr"] for group in self.optimizer.param_groups])
        static_images, static_labels, replay = self.recordings[images.shape]
        static_images.copy_(images)
        static_labels.copy_(labels)
        replay()

    def _prepare(self, images: Tensor, labels: Tensor) -> None:
        """Warm up, record, check the recording, then put everything back as it was."""
        inputs = (images.clone(), labels.clone())
        before = snapshot(step_state(self.step))
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                _warm_up(lambda: self.step(*inputs), WARM_UP, self.device)  # what fails here would fail uncaptured too
                reason = self._capture(*inputs, self.own) or self._check(*inputs)
                full = next(iter(self.recordings), images.shape)[0]  # of images: each epoch begins with a full batch
                if self.fused and not reason and len(labels) == full:
                    self.fused_outcome, reason = self._try_fused(*inputs, self.fused)
        finally:
            with torch.no_grad():
                put_back(step_state(self.step), before)
            self.optimizer.zero_grad()
        self.note = (f"captured{self.fused_outcome}; a replay and an eager step differ by at most "
                     f"{100 * self.difference:.2g} % of a tensor's change")
        if reason:
            self.possible, self.note = False, f"not captured: {reason}"
            self.recordings.clear()
            tqdm.write(f"Steps are not captured: {reason}.")

    def _try_fused(self, images: Tensor, labels: Tensor, fused: Kernels) -> tuple[str, str]:
        """Record a step by the fused kernels, in place of PyTorch's recording if it agrees with an eager step and is faster.
        Returns what became of it, for the note; and why steps can't be captured any more, or ""."""
        plain, difference = self.recordings[images.shape], self.difference
        try:
            reason = self._capture(images, labels, fused)
            if reason:  # PyTorch's recording used the random generator that the failed capture has replaced: record it again
                return f" without fused kernels ({reason})", (
                    self._capture(images, labels, self.own) or self._check(images, labels))
            reason = self._check(images, labels)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of Triton, its compiler or the driver
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        if not reason:
            times = [milliseconds(recording[2], self.device) for recording in (self.recordings[images.shape], plain)]
            reason = "{:.2f} ms a step, {:.2f} with PyTorch's".format(*times)
            if times[0] < times[1]:
                return f" with fused kernels ({reason})", ""
        self.recordings[images.shape], self.difference = plain, difference
        return f" without fused kernels ({reason})", ""

    def _capture(self, images: Tensor, labels: Tensor, kernels: Kernels) -> str:
        """Record a step on these tensors, with these kernels. Returns why that failed, or ""."""
        places = addresses(step_state(self.step))
        self._set_rates([group["lr"] for group in self.optimizer.param_groups])
        try:
            _warm_up(lambda: self._step(images, labels, kernels), 1, self.device)  # with learning rates that lie on the device
            self.recordings[images.shape] = (images, labels, self.capture(lambda: self._step(images, labels, kernels)))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if stop := _stop_behind(error):
                raise stop from None
            cause = str(error.__context__ or error) or type(error).__name__  # CUDA's last word is that something failed before
            return f"the capture failed ({cause.splitlines()[0]})"
        moved = [name for name, place in addresses(step_state(self.step)).items() if places.get(name) != place]
        return f"a step replaces {moved[0]} instead of changing it in place" if moved else ""

    @torch.no_grad()
    def _check(self, images: Tensor, labels: Tensor) -> str:
        """Compare a replay with an eager step from the same state, on other inputs and at other learning rates than those
        recorded. Returns how they disagree, or ""."""
        state = step_state(self.step)
        start, floats = snapshot(state), [group["lr"] for group in self.optimizer.param_groups]
        images.copy_(images.flip(-1))
        labels.copy_(labels.roll(1))
        ends = []
        for run in (self.recordings[images.shape][2], lambda: self.step(images, labels)):
            put_back(state, start)
            self._set_rates([rate / 4 for rate in floats])
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), torch.enable_grad():
                self._at_rates([rate / 4 for rate in floats], run)
            ends.append(snapshot(state))
        difference, name = largest_difference(start, ends[0], ends[1], len(labels))
        self.difference = max(self.difference, difference)
        if difference <= TOLERANCE:
            return ""
        return f"a replay's {name} and an eager step's differ by {100 * difference:.2g} % of the change"

    def _step(self, images: Tensor, labels: Tensor, kernels: Kernels) -> None:
        """The step with these kernels and its learning rates read from the device."""
        self.step.forward, self.step.loss = kernels
        try:
            self._at_rates(self.rates, lambda: self.step(images, labels))
        finally:
            self.step.forward, self.step.loss = self.own

    def _at_rates(self, rates: list[Tensor] | list[float], run: Callable[[], object]) -> None:
        """Run with these learning rates in the optimizer."""
        groups = self.optimizer.param_groups
        floats = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            run()
        finally:
            for group, rate in zip(groups, floats, strict=True):
                group["lr"] = rate

    def _set_rates(self, floats: list[float]) -> None:
        """Write the learning rates to where a recording reads them."""
        if floats != self.rates_now:
            for tensor, rate in zip(self.rates, floats, strict=True):
                tensor.fill_(rate)
            self.rates_now = floats


Step = TrainStep | CapturedStep


def make_step(net: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, config: Config,
              distillation: Distillation | None = None, processes: Processes = ALONE) -> Step:
    """A training step, captured where `config.capture` wants it and the device can. Prints why not where it was asked for."""
    step = TrainStep(net, optimizer, device, config.label_smoothing, distillation, processes)
    reason = ""
    if config.capture == "off":
        reason = "--capture is off"
    elif device.type != "cuda" or config.batches != "device":
        reason = "that needs CUDA, and batches made on the device"
    elif processes.size > 1:
        reason = "that needs a run of one process"
    elif config.capture == "auto" and torch.__version__ < FAILURES_END_CLEANLY:
        reason = f"PyTorch {torch.__version__} can't go on after a failed capture"
    if not reason:
        return CapturedStep(step, fused_kernels(step) if config.kernels == "fused" else None)
    if config.kernels == "fused":
        print(f"Steps use PyTorch's kernels: the fused ones need captured steps, and {reason}.")
    if config.capture == "on":
        print(f"Steps are not captured: {reason}.")
    if device.type == "cuda" and config.capture != "off":
        step.note = f"not captured: {reason}"
    return step


def fused_kernels(step: TrainStep) -> Kernels | None:
    """The step's forward pass and loss by the kernels of training/fused. None, and a line that says why, where they can't
    compute it."""
    reason, forward = "", None
    if not has_bfloat16(step.device):
        reason = "this GPU has no bfloat16"
    else:
        try:
            from tinycnn.kernels.loss import fused_loss
            from tinycnn.kernels.network import fuse
            forward = fuse(step.net)
            reason = "" if forward else "they can't compute what model.py does"
        except ImportError as error:
            reason = f"they need Triton ({error})"
    if forward:
        return forward, fused_loss(step)
    print(f"Steps use PyTorch's kernels, not the fused ones: {reason}.")
    return None


def _stop_behind(error: BaseException) -> BaseException | None:
    """The signal's exception, which is no Exception, behind an error of the capture that it has ended."""
    cause = error.__context__
    while isinstance(cause, Exception):
        cause = cause.__context__
    return cause


def _warm_up(run: Callable[[], object], times: int, device: torch.device) -> None:
    """Run a few times, on CUDA in a stream of its own, as captures want it."""
    stream = side_stream(device, "captures")
    try:
        with after_this(stream):
            for _ in range(times):
                run()
    finally:  # restoring the state must wait for what was launched
        wait_for(stream)


def _graph(run: Callable[[], object]) -> Callable[[], object]:
    """Record what `run` launches; returns what replays it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # a failed capture leaves its stream current and the generator in capture mode
        torch.cuda.set_stream(stream)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph.replay


def _eager_twin(run: Callable[[], object]) -> Callable[[], object]:
    """The stand-in for a CUDA graph on a CPU: the same step, eager, on the same memory."""
    return run
