"""A training step recorded once as a CUDA graph, then replayed: one launch instead of some hundred."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config
from training.loop import Step, TrainStep
from training.teacher import Teacher

WARM_UP = 3  # steps before a recording, in which libraries choose their kernels and momentum gets its memory
Recorded = tuple[Tensor, Tensor, Callable[[], object]]  # where images and labels go, and what runs the step on them


def make_step(net: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, config: Config,
              teacher: Teacher | None = None) -> Step:
    """A step of training, captured if the config wants it and the device can; a line says so if it can't."""
    step = TrainStep(net, optimizer, device, config.label_smoothing, teacher)
    if config.capture and device.type == "cuda" and config.batches == "device":
        return CapturedStep(step)
    if config.capture:
        print("Steps are not captured: that needs CUDA, and batches made on the device.")
    return step


class CapturedStep:
    """Called as the TrainStep it is made of. A batch of another shape than before, an epoch's short last one, is recorded on
    its own. Where recording fails, one line says so and the plain step runs from then on."""

    def __init__(self, step: TrainStep) -> None:
        self.step, self.net, self.figures, self.device = step, step.net, step.figures, step.device
        self.recorded: dict[torch.Size, Recorded] = {}
        self.record = _graph if step.device.type == "cuda" else _eager_twin
        # What a recording reads in place of the floats in the optimizer, a rate for each group of parameters
        self.rates = [torch.zeros((), device=step.device) for _ in step.optimizer.param_groups]
        self.rates_now: list[float] = []
        self.possible = True

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        if self.possible and images.shape not in self.recorded:
            self._record(images, labels)
        if not self.possible:
            return self.step(images, labels)
        self._set_rates()
        images_place, labels_place, replay = self.recorded[images.shape]
        images_place.copy_(images)
        labels_place.copy_(labels)
        replay()

    def _record(self, images: Tensor, labels: Tensor) -> None:
        """Warm up, put everything back as it was, record."""
        inputs = (images.clone(), labels.clone())
        before = {id(tensor): tensor.clone() for tensor in self._changing()}
        self._set_rates()
        try:
            try:
                with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                    _warm_up(lambda: self._step(*inputs), self.device)
            finally:
                with torch.no_grad():
                    for tensor in self._changing():  # a momentum that was not there before is as good as zero
                        tensor.copy_(before[id(tensor)]) if id(tensor) in before else tensor.zero_()
            self.step.optimizer.zero_grad()
            self.recorded[images.shape] = (*inputs, self.record(lambda: self._step(*inputs)))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.possible = False
            cause = str(error.__context__ or error) or type(error).__name__  # CUDA's last word is that something failed before
            tqdm.write(f"This step can't be captured, so it runs uncaptured ({cause.splitlines()[0]})")

    def _step(self, images: Tensor, labels: Tensor) -> None:
        """The step with its learning rates read from the device."""
        groups = self.step.optimizer.param_groups
        floats = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = rate
            self.step(images, labels)
        finally:
            for group, rate in zip(groups, floats, strict=True):
                group["lr"] = rate

    def _set_rates(self) -> None:
        floats = [group["lr"] for group in self.step.optimizer.param_groups]
        if floats != self.rates_now:
            for tensor, rate in zip(self.rates, floats, strict=True):
                tensor.fill_(rate)
            self.rates_now = floats

    def _changing(self) -> Iterator[Tensor]:
        """Everything that a step changes."""
        yield from self.net.parameters()
        yield from self.net.buffers()
        yield self.figures.sums
        for state in self.step.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _warm_up(run: Callable[[], object], device: torch.device) -> None:
    """Run a few times, on CUDA in a stream of its own, as captures want it."""
    if device.type != "cuda":
        for _ in range(WARM_UP):
            run()
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
    finally:  # whoever puts things back has to come after what has been launched
        torch.cuda.current_stream(device).wait_stream(stream)


def _graph(run: Callable[[], object]) -> Callable[[], object]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # a capture that fails leaves its stream current, and the generator in its hands
        torch.cuda.set_stream(stream)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph.replay


def _eager_twin(run: Callable[[], object]) -> Callable[[], object]:
    """What stands for a graph where there is none: the same step on the same memory."""
    return run
