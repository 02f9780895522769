"""Proof of an upcycling: dense and MoE model run on the same tokens, and the difference of their logits.

Models are given in memory or as folders. A folder is run layer by layer from the disk, one model after the other, so
that models larger than memory are verified too.

Letters: B batch, S sequence, T tokens, D model width, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moe_hf.config_files import load_config
from moe_hf.dense_sources import load_dense, needs_conversion
from moe_hf.errors import MoEError
from moe_hf.gguf_files import gguf_file_of
from moe_hf.modeling.routing_ids import example_ids
from moe_hf.unwrapping import in_own_precision, unwrapped, whole_model
from moe_hf.upcycling.on_disk.layerwise import load_layerwise


EXACT_TOLERANCE = 1e-5
NUM_SEQUENCES, SEQUENCE_LENGTH = 2, 64

Observer = Callable[[PreTrainedModel], AbstractContextManager]


@dataclass(frozen=True)
class VerificationResult:
    """How far a MoE model's logits are from the dense model's.

    Attributes:
        relative_error: ||moe - dense|| / ||dense|| over all logits, computed in float32.
        max_abs_error: largest absolute difference of one logit.
        rounding_error: relative difference that the checkpoint's own dtype makes to the dense logits; 0 in float32.
        num_tokens: tokens compared.
        first_difference: name of the first decoder layer whose output differs by more than the tolerance, or None.
    """

    relative_error: float
    max_abs_error: float
    rounding_error: float
    num_tokens: int
    first_difference: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the relative error is within 1e-5."""
        return self.relative_error <= EXACT_TOLERANCE

    def to_dict(self) -> dict[str, float | int | str | None]:
        """Plain values, for a checkpoint's metadata."""
        return asdict(self)


def verification_inputs(vocab_size: int, seed: int, max_length: int | None = None) -> torch.Tensor:
    """2 x 64 seeded random token ids, shorter if the model's positions are fewer."""
    length = min(SEQUENCE_LENGTH, max_length or SEQUENCE_LENGTH)
    return torch.randint(0, vocab_size, (NUM_SEQUENCES, length), generator=torch.Generator().manual_seed(seed))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; not finite values give infinity."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def verify(
    dense: PreTrainedModel | str | Path,
    moe: PreTrainedModel | str | Path,
    inputs: torch.Tensor | None = None,
    *,
    seed: int = 0,
    observe: Observer = nullcontext,
) -> VerificationResult:
    """Compare the logits of a dense model and of the MoE made from it; neither is changed.

    16-bit models are compared in float32, so that the comparison shows the conversion and not their rounding, which is
    reported beside it: a folder is read into float32, of a model in memory a copy is made. The two are run one after the
    other; of the dense one, its logits and the outputs of its layers are kept.

    Args:
        dense, moe (`PreTrainedModel`, `str` or `Path`): causal language models, local folders of such, or GGUF files.
            Quantized ones are dequantized, whole in memory.
        inputs (`torch.Tensor`, *optional*): token ids, (B, S); compared besides 2 x 64 seeded random ids.
        seed (`int`): of the random ids.
        observe (`Callable`): `observe(model)` gives a context manager that is entered around the MoE's pass over
            `inputs`, or over the random ids when there are none; see `RoutingProbe`.

    Returns:
        `VerificationResult`, whose `exact` says whether they are equal.

    Raises:
        MoEError: when `inputs` are not token ids, or the vocabularies differ.
    """
    dense, moe = (in_own_precision(unwrapped(model, or_path=True)) for model in (dense, moe))
    dense_config, config = _config_of(dense), _config_of(moe)
    if dense_config.vocab_size != config.vocab_size:
        raise MoEError(
            f"The dense model has {dense_config.vocab_size} tokens and the MoE model {config.vocab_size}: "
            "they are not of one origin."
        )
    batches = [verification_inputs(config.vocab_size, seed, getattr(config, "max_position_embeddings", None))]
    if inputs is not None:
        if not isinstance(inputs, torch.Tensor) or inputs.dim() != 2 or inputs.is_floating_point():
            raise MoEError("verify inputs must be a (B, S) tensor of token ids.")
        batches.append(inputs)
    layers = _LayerOutputs()
    expected = _logits(dense, batches, layers.keep)
    rounding = 0.0
    if _dtype_of(dense, dense_config) != torch.float32:
        rounding = relative_error(_logits(dense, batches, own_dtype=True), expected)
    actual = _logits(moe, batches, layers.compare, observe)
    error = relative_error(actual, expected)
    return VerificationResult(
        relative_error=error,
        max_abs_error=float((actual - expected).abs().max()),
        rounding_error=rounding,
        num_tokens=sum(batch.numel() for batch in batches),
        first_difference=layers.first_difference if error > EXACT_TOLERANCE else None,
    )


@torch.no_grad()
def _logits(
    source: PreTrainedModel | str | Path,
    batches: list[torch.Tensor],
    watch: Observer = nullcontext,
    observe: Observer = nullcontext,
    *,
    own_dtype: bool = False,
) -> torch.Tensor:
    """All logits, flat, in float32; `watch` is entered for the first batch, and `observe` for the last."""
    logits = []
    with _opened(source, own_dtype) as model:
        device = "cpu" if model.device.type == "meta" else model.device
        for index, batch in enumerate(batches):
            with ExitStack() as stack:
                if index == 0:
                    stack.enter_context(watch(model))
                if index == len(batches) - 1:
                    stack.enter_context(observe(model))
                ids = example_ids(model.config, len(batch), device)
                logits.append(model(input_ids=batch.to(device), use_cache=False, **ids).logits.flatten().float().cpu())
    return torch.cat(logits)


@contextmanager
def _opened(source: PreTrainedModel | str | Path, own_dtype: bool) -> Iterator[PreTrainedModel]:
    """The model to run, in evaluation mode, in float32 unless `own_dtype`."""
    if not isinstance(source, nn.Module) and not needs_conversion(source):
        yield load_layerwise(source, None if own_dtype else torch.float32)
        return
    if not isinstance(source, nn.Module):
        source, _ = load_dense(source)
    is_wide = own_dtype or source.dtype == torch.float32
    model = source if is_wide else _float32_copy(whole_model(source, "Verifying a 16-bit model"))
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


class _LayerOutputs:
    """The outputs of the decoder layers in one model's pass, and the first that differ in another's."""

    def __init__(self):
        self.expected: list[torch.Tensor] = []
        self.first_difference: str | None = None

    @contextmanager
    def keep(self, model: PreTrainedModel) -> Iterator[None]:
        """Keep the outputs of each layer."""
        with _hooked(model, lambda name, output: self.expected.append(output.to("cpu", copy=True))):
            yield

    @contextmanager
    def compare(self, model: PreTrainedModel) -> Iterator[None]:
        """Compare each layer's outputs with those kept of the layer at its place."""
        outputs = iter(self.expected)

        def check(name: str, output: torch.Tensor) -> None:
            expected = next(outputs, output)
            if self.first_difference is None and relative_error(output.cpu(), expected.cpu()) > EXACT_TOLERANCE:
                self.first_difference = name

        with _hooked(model, check):
            yield


@contextmanager
def _hooked(model: PreTrainedModel, function: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `function(name, output)` after each decoder layer."""

    def hook(name: str):
        return lambda module, args, output: function(name, output[0] if isinstance(output, tuple | list) else output)

    handles = [layer.register_forward_hook(hook(name)) for name, layer in _decoder_layers(model.base_model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _decoder_layers(base_model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the decoder layers: the largest list as long as the decoder is deep."""
    depth = base_model.config.num_hidden_layers
    lists = [
        (name, module)
        for name, module in base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        return []
    name, layers = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [(f"{name}.{index}", layer) for index, layer in enumerate(layers)]


def _config_of(source: PreTrainedModel | str | Path) -> PreTrainedConfig:
    if isinstance(source, nn.Module):
        return source.config
    folder = Path(source).expanduser()
    if gguf_file_of(folder) is None and not (folder / "config.json").is_file():
        raise MoEError(
            f"{source} is not a folder with a config.json, and no GGUF file; give a model, or a folder that "
            "save_pretrained wrote."
        )
    return load_config(str(folder))


def _dtype_of(source: PreTrainedModel | str | Path, config: PreTrainedConfig) -> torch.dtype:
    return source.dtype if isinstance(source, nn.Module) else config.dtype or torch.float32


def _float32_copy(model: nn.Module) -> nn.Module:
    """A float32 copy made through the config, so that buffers such as rotary frequencies are computed, not cast."""
    config = copy.deepcopy(model.config)
    config.dtype = torch.float32
    wide = type(model)(config)
    wide.load_state_dict(model.state_dict())
    return wide.to(model.device, torch.float32)
