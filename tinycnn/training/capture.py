"""A training step recorded once as a CUDA graph, then replayed: one launch instead of some hundred."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tinycnn.device import after_this, milliseconds, side_stream, wait_for
from tinycnn.training.machine import float32_steps
from tinycnn.training.self_check import BATCHES, Errors, State, addresses, put_back, snapshot, step_state, vary, with_sums

WARM_UP = 3  # steps before a recording, in which libraries choose their kernels and momentum gets its memory
Step = Callable[[Tensor, Tensor], Tensor]  # images and labels of a batch, to the sums that main.train_step returns


class Recording(NamedTuple):
    """A recorded step: where it reads images and labels, where it writes its sums, and what replays it."""

    images: Tensor
    labels: Tensor
    sums: Tensor
    replay: Callable[[], object]


class CapturedStep:
    """Trains as the `eager` step that it is made of. A batch of a new shape, such as an epoch's short last one, is recorded on
    its own, and checked (self_check.py). Where a recording fails, or isn't right, one line says so and all steps run eager from
    then on. `note` is given a line for the log: which it was, and the largest error as a share of what the check allows.

    `fused` computes what `eager` does, by other kernels. Full batches use it where its recording is right, too, and faster."""

    def __init__(self, eager: Step, net: nn.Module, optimizer: torch.optim.Optimizer, fused: Step | None = None,
                 note: Callable[[str], object] = print) -> None:
        self.eager, self.net, self.optimizer, self.fused, self.note = eager, net, optimizer, fused, note
        self.device = next(net.parameters()).device
        self.recordings: dict[torch.Size, Recording] = {}
        self.record = _graph if self.device.type == "cuda" else _eager_twin
        # What a recording reads in place of the floats in the optimizer, a rate for each group of parameters
        self.rates = [torch.zeros((), device=self.device) for _ in optimizer.param_groups]
        self.rates_now: list[float] = []
        self.settings = self._settings()
        self.can_capture = True
        self.error = 0.0  # the largest that a check has found, as a share of what it allows
        self.fused_outcome = ""  # what became of the fused kernels, for the note
        self.noted = ""

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on images float32 N x 3 x H x W and labels int64 N, both on the device. Returns what main.train_step does."""
        if self.can_capture and self._settings() != self.settings:  # which recordings have as numbers
            self._give_up("a setting of the optimizer has changed")
        if self.can_capture and images.shape not in self.recordings:
            self._prepare(images, labels)
        if not self.can_capture:
            return self.eager(images, labels)
        self._set_rates([group["lr"] for group in self.optimizer.param_groups])
        recording = self.recordings[images.shape]
        recording.images.copy_(images)
        recording.labels.copy_(labels)
        recording.replay()
        return recording.sums.clone()  # the next replay overwrites them

    def _prepare(self, images: Tensor, labels: Tensor) -> None:
        """Warm up, record, check the recording, then put everything back as it was."""
        if {each for group in self.optimizer.param_groups for each in group["params"]} - {*self.net.parameters()}:
            return self._give_up("the optimizer has parameters that are not the network's")
        inputs = (images.clone(), labels.clone())
        before = snapshot(step_state(self.net, self.optimizer))
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                _warm_up(lambda: self.eager(*inputs), WARM_UP, self.device)  # what fails here would fail uncaptured too
                reason = self._capture(*inputs, self.eager) or self._check(*inputs)
                full = next(iter(self.recordings), images.shape)[0]  # of images: each epoch begins with a full batch
                if self.fused and not reason and len(labels) == full:
                    self.fused_outcome, reason = self._try_fused(*inputs, self.fused)
        finally:
            with torch.no_grad():
                put_back(step_state(self.net, self.optimizer), before)
            self.optimizer.zero_grad()
        line = f"captured{self.fused_outcome}; a replay's error is at most {self.error:.2f} of what is allowed"
        if reason:
            self._give_up(reason)
        elif line != self.noted:
            self.noted = line
            self.note(line)

    def _give_up(self, reason: str) -> None:
        self.can_capture = False
        self.recordings.clear()
        tqdm.write(f"Steps are not captured: {reason}.")
        self.note(f"not captured: {reason}")

    def _settings(self) -> list[dict[str, Any]]:
        """The optimizer's settings but for the learning rates."""
        return [{name: value for name, value in group.items() if name not in ("params", "lr")}
                for group in self.optimizer.param_groups]

    def _try_fused(self, images: Tensor, labels: Tensor, fused: Step) -> tuple[str, str]:
        """Record a step by the fused kernels, in place of PyTorch's recording if it agrees with an eager step and is faster.
        Returns what became of it, for the note; and why steps can't be captured any more, or ""."""
        plain, error_before = self.recordings[images.shape], self.error
        try:
            reason = self._capture(images, labels, fused)
            if reason:  # PyTorch's recording used the random generator that the failed capture has replaced: record it again
                return f" without fused kernels ({reason})", (
                    self._capture(images, labels, self.eager) or self._check(images, labels))
            reason = self._check(images, labels)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of Triton, its compiler or the driver
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        if not reason:
            times = [milliseconds(recording.replay, self.device) for recording in (self.recordings[images.shape], plain)]
            reason = "{:.2f} ms a step, {:.2f} with PyTorch's".format(*times)
            if times[0] < times[1]:
                return f" with fused kernels ({reason})", ""
        self.recordings[images.shape], self.error = plain, error_before
        return f" without fused kernels ({reason})", ""

    def _capture(self, images: Tensor, labels: Tensor, step: Step) -> str:
        """Record a step on these tensors. Returns why that failed, or ""."""
        before = addresses(step_state(self.net, self.optimizer))
        self._set_rates([group["lr"] for group in self.optimizer.param_groups])

        def run() -> Tensor:
            return self._at_rates(self.rates, lambda: step(images, labels))

        try:
            _warm_up(run, 1, self.device)  # with learning rates that lie on the device
            self.recordings[images.shape] = Recording(images, labels, *self.record(run))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if stop := _stop_behind(error):
                raise stop from None
            cause = str(error.__context__ or error) or type(error).__name__  # CUDA's last word is that something failed before
            return f"the capture failed ({cause.splitlines()[0]})"
        moved = [name for name, place in addresses(step_state(self.net, self.optimizer)).items() if before.get(name) != place]
        return f"a step replaces {moved[0]} instead of changing it in place" if moved else ""

    @torch.no_grad()
    def _check(self, images: Tensor, labels: Tensor) -> str:
        """Train on other batches and at other learning rates than those recorded, each time captured, eager, and eager in
        float32, from the same state. Returns what is wrong with the recording, or ""."""
        state, recording, errors = step_state(self.net, self.optimizer), self.recordings[images.shape], Errors()
        start, given = snapshot(state), (images.clone(), labels.clone())

        def run(step: Callable[[], Tensor], rates: list[float]) -> State:
            put_back(state, start)
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), torch.enable_grad():
                sums = self._at_rates(rates, step)
            return snapshot(with_sums(state, sums))

        def replayed() -> Tensor:
            recording.replay()
            return recording.sums

        def eager() -> Tensor:
            return self.eager(images, labels)

        for number in range(BATCHES):
            for place, tensor in zip((images, labels), vary(*given, number), strict=True):
                place.copy_(tensor)
            rates = [0.1 / (1 + number + group) for group in range(len(self.rates))]  # not too small for float32 to show
            self._set_rates(rates)
            with float32_steps():
                right = run(eager, rates)
            errors.add(start, right, run(eager, rates), run(replayed, rates))
        error, name = errors.worst()
        self.error = max(self.error, error)
        return "" if error <= 1 else f"a replay's {name} is wrong, by {error:.2g} times the error allowed"

    def _at_rates(self, rates: list[Tensor] | list[float], run: Callable[[], Tensor]) -> Tensor:
        """Run with these learning rates in the optimizer."""
        groups = self.optimizer.param_groups
        floats = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            return run()
        finally:
            for group, rate in zip(groups, floats, strict=True):
                group["lr"] = rate

    def _set_rates(self, floats: list[float]) -> None:
        """Write the learning rates to where a recording reads them."""
        if floats != self.rates_now:
            for tensor, rate in zip(self.rates, floats, strict=True):
                tensor.fill_(rate)
            self.rates_now = floats


def _stop_behind(error: BaseException) -> BaseException | None:
    """The StopRequested or KeyboardInterrupt that made a capture fail, or None."""
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


def _graph(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    """Record what `run` launches. Returns the tensor that it returned, and what replays it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            sums = run()
    except RuntimeError:  # a failed capture leaves its stream current and the generator in capture mode
        torch.cuda.set_stream(stream)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return sums, graph.replay


def _eager_twin(run: Callable[[], Any]) -> tuple[Tensor, Callable[[], object]]:
    """The stand-in for a CUDA graph on a CPU: the same step, eager, on the same memory."""
    sums = run()
    return sums, lambda: sums.copy_(run())
