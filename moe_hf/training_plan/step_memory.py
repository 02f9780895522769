"""How many bytes of tensors a training step holds at most: the real step, run on tensors without numbers.

The model's own forward and backward pass and the optimizer's update run under torch's `FakeTensorMode`, so that any
family, router or attention is counted as it is, and no formula is needed. What kernels use inside is not seen.

Letters: B batch, S sequence.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.finetuning import apply_scope


# As transformers' Trainer makes them by default: fused, without copies of all gradients.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, fused=True),
}


@dataclass(frozen=True)
class StepMemory:
    """Bytes of tensors in a training step on one device that holds everything.

    Attributes:
        weights: parameters and buffers, float32 masters of the trained ones included.
        gradients: of the trained parameters.
        optimizer: its state.
        peak: the most that was alive at once.
        shared_peaks: by number of devices that share gradients, the most of everything but weights and optimizer. A gradient
            counts for a device's part of it, also while the next micro-batch is added: the sum over devices is added there.
    """

    weights: int
    gradients: int
    optimizer: int
    peak: int
    shared_peaks: dict[int, int]


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive while it is active; gradients and fixed tensors apart."""

    def __init__(self, devices: tuple[int, ...] = ()):
        super().__init__()
        self._kinds: dict[int, tuple[str, int]] = {}
        self._deaths: dict[int, weakref.ref] = {}
        self.live = {"fixed": 0, "gradients": 0, "activations": 0}
        self.peak, self.shared_peaks, self.counts_shares = 0, dict.fromkeys(devices, 0), True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = _grouped_mm(*args) if func is torch.ops.aten._grouped_mm.default else func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor, kind: str = "activations") -> None:
        """Count a tensor's storage from now on until it dies; one that is counted already changes its kind."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._kinds:
            if kind != "activations":
                old, size = self._kinds[key]
                self.live[old] -= size
                self.live[kind] += size
                self._kinds[key] = kind, size
            return
        self._kinds[key] = kind, storage.nbytes()
        self._deaths[key] = weakref.ref(storage, lambda _: self._remove(key))
        self.live[kind] += storage.nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        for devices, most in self.shared_peaks.items() if self.counts_shares else ():
            own = self.live["activations"] + self.live["gradients"] // devices
            self.shared_peaks[devices] = max(most, own)

    def _remove(self, key: int) -> None:
        kind, size = self._kinds.pop(key)
        self.live[kind] -= size
        del self._deaths[key]

    def restart(self) -> None:
        """Forget what was the most so far."""
        self.peak, self.shared_peaks = sum(self.live.values()), dict.fromkeys(self.shared_peaks, 0)
        self.counts_shares = True


def _grouped_mm(first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor | None = None, *_) -> torch.Tensor:
    """The result without numbers of torch's grouped product, which checks for bfloat16 though kernels take more."""
    if first.dim() == 2 and second.dim() == 2:
        return first.new_empty(len(offsets), first.shape[0], second.shape[1])
    rows = first.shape[-2] if first.dim() == 2 or second.dim() == 3 else first.shape[1]
    shape = (rows, second.shape[-1])
    return first.new_empty((first.shape[0], *shape) if first.dim() == 3 and second.dim() == 3 else shape)


def step_memory(
    build: Callable[[], PreTrainedModel],
    *,
    batch: int,
    sequence: int,
    scope: str,
    optimizer: str,
    checkpointing: bool = False,
    accumulation: int = 1,
    devices: tuple[int, ...] = (1,),
) -> StepMemory:
    """Run training steps without numbers, and count.

    Args:
        build (`Callable`): makes the model, in the dtype that it is loaded in.
        batch, sequence (`int`): B and S of one micro-batch on one device.
        scope (`str`): what trains; see [`moe_hf.finetuning`].
        optimizer (`str`): a name of `OPTIMIZERS`.
        checkpointing (`bool`): gradient checkpointing of each decoder layer.
        accumulation (`int`): micro-batches of a step.
        devices (`tuple[int]`): numbers of devices to tell `shared_peaks` for.

    Raises:
        MoEError: an optimizer that there is not, or a model whose forward pass looks at numbers.
    """
    if optimizer not in OPTIMIZERS:
        raise MoEError(f"optimizer={optimizer!r}: choose one of {', '.join(OPTIMIZERS)}.")
    with torch.device("meta"):
        model = build().train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        loaded = model.dtype
        _lay_out(model)
        apply_scope(model, scope)
        if checkpointing:
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        is_mixed = loaded.itemsize < 4 and any(parameter.dtype == torch.float32 for parameter in trained)
        autocast = torch.autocast("cpu", loaded) if is_mixed else nullcontext()
        counter = LiveBytes(devices)
        weights = [*model.parameters(), *model.buffers()]
        for tensor in weights:
            counter.add(tensor, "fixed")
        stored = counter.live["fixed"]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda one: counter.add(one.grad, "gradients"))
        update = OPTIMIZERS[optimizer](trained)
        with _counting(model), counter:
            # The second step has the optimizer's state from its beginning.
            for _ in range(2):
                counter.restart()
                _step(model, update, batch, sequence, min(accumulation, 2), autocast, counter)
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        optimizer_bytes = counter.live["fixed"] - stored
    # In later micro-batches a device has its part of all gradients from the beginning.
    held = gradients if accumulation > 1 else 0
    shared_peaks = {devices: most + held // devices for devices, most in counter.shared_peaks.items()}
    return StepMemory(stored, gradients, optimizer_bytes, counter.peak, shared_peaks)


def forward_memory(build: Callable[[], PreTrainedModel], *, batch: int, sequence: int) -> StepMemory:
    """Run a forward pass without gradients and without numbers, and count; arguments and errors as of `step_memory`."""
    with torch.device("meta"):
        model = build().eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _lay_out(model)
        counter = LiveBytes()
        for tensor in (*model.parameters(), *model.buffers()):
            counter.add(tensor, "fixed")
        stored = counter.live["fixed"]
        with _counting(model), counter, torch.no_grad():
            ids = torch.zeros(batch, sequence, dtype=torch.long)
            result = model(input_ids=ids, use_cache=True)
            del result
    return StepMemory(stored, 0, 0, counter.peak, {})


def _lay_out(model: PreTrainedModel) -> None:
    """Give a model on the meta device its place in memory, without numbers, with the experts' usual kernels."""
    model.to_empty(device="cpu")
    model.tie_weights()
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("grouped_mm")


@contextmanager
def _counting(model: PreTrainedModel) -> Iterator[None]:
    """What a pass raises that looks at numbers, as one error."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise MoEError(
            f"The memory of {type(model).__name__} cannot be planned: its forward pass looks at numbers "
            f"({str(error).splitlines()[0]})."
        ) from error


def _step(
    model: PreTrainedModel,
    update: torch.optim.Optimizer,
    batch: int,
    sequence: int,
    micro_batches: int,
    autocast: Any,
    counter: LiveBytes,
) -> None:
    for _ in range(micro_batches):
        ids = torch.zeros(batch, sequence, dtype=torch.long)
        with autocast:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        del loss
        # A micro-batch that is added holds its own gradients beside the sum, undivided on one device only.
        counter.counts_shares = False
    update.step()
    for tensor in _state_tensors(update):
        counter.add(tensor, "fixed")
    update.zero_grad()


def _state_tensors(update: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    return (value for state in update.state.values() for value in state.values() if isinstance(value, torch.Tensor))
