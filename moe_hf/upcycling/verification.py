"""Proof of an upcycling: dense and MoE model run on the same tokens; the difference of their logits, and of their losses.

Models are given in memory or as folders. A folder is run layer by layer from the disk, one model after the other, so
that models larger than memory are verified too.

Letters: B batch, S sequence, T tokens, D model width, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from moe_hf.config_files import load_config
from moe_hf.dense_sources import load_dense, needs_conversion
from moe_hf.errors import MoEError
from moe_hf.gguf_files import gguf_file_of
from moe_hf.modeling.routing_ids import example_ids
from moe_hf.unwrapping import in_own_precision, unwrapped, whole_model
from moe_hf.upcycling.on_disk.layerwise import load_layerwise
from moe_hf.upcycling.router_init.hidden_states import check_token_ids
from moe_hf.upcycling.sample_text import GIVEN_IDS, SampleText, sample_text, tokenizer_of


EXACT_TOLERANCE = 1e-5
NUM_SEQUENCES, SEQUENCE_LENGTH = 2, 64
# Of one forward pass: 256 MiB in float32. Whole rows, since a model on the disk is read once for each pass.
LOGITS_PER_PASS = 1 << 26
# In nats/token, or half the way to a uniform guess where that is less: what noise and rounding never do.
ALLOWED_RISE, LEAST_RISE = 0.5, 0.1

logger = logging.get_logger(__name__)
Observer = Callable[[PreTrainedModel], AbstractContextManager]


@dataclass(frozen=True)
class VerificationResult:
    """How far a MoE model is from the dense model.

    Attributes:
        relative_error: ||moe - dense|| / ||dense|| over all logits that were compared, computed in float32.
        max_abs_error: largest absolute difference of one logit.
        rounding_error: relative difference that the checkpoint's own dtype makes to the dense logits; 0 in float32.
        num_tokens: tokens whose logits were compared.
        first_difference: name of the first decoder layer whose output differs by more than the tolerance, or None.
        loss_before: of the dense model on text, in nats/token, in float32; None where no text was there.
        loss_after: of the MoE on the same text.
        uniform_loss: ln V, that of a uniform guess.
        text: what the text is.
        text_tokens: tokens that the losses are the mean of.
    """

    relative_error: float
    max_abs_error: float
    rounding_error: float
    num_tokens: int
    first_difference: str | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    uniform_loss: float | None = None
    text: str | None = None
    text_tokens: int = 0

    @property
    def exact(self) -> bool:
        """Whether the relative error is within 1e-5."""
        return self.relative_error <= EXACT_TOLERANCE

    @property
    def loss_text(self) -> str:
        """One sentence on the losses."""
        if self.loss_before is None:
            return "loss on text: not measured, since there is no tokenizer"
        return (
            f"loss on text: {self.loss_before:.3f} before, {self.loss_after:.3f} after, in nats/token ({self.text}, "
            f"{self.text_tokens} tokens)"
        )

    @property
    def loss_warning(self) -> str | None:
        """One sentence where the loss rose so far that the model has lost much of what it knew, or None.

        That is by more than 0.5 nats/token, or than half the way to a uniform guess where that is less.
        """
        if self.loss_before is None:
            return None
        rise, way = self.loss_after - self.loss_before, self.uniform_loss - self.loss_before
        if rise <= max(LEAST_RISE, min(ALLOWED_RISE, way / 2)):
            return None
        if way <= 0 or rise >= way:
            meaning = f"worse than a uniform guess over all tokens, {self.uniform_loss:.2f}"
        else:
            meaning = f"{rise / way:.0%} of the way to a uniform guess, {self.uniform_loss:.2f}"
        return f"The loss on text rose from {self.loss_before:.2f} to {self.loss_after:.2f} nats/token, {meaning}."

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
    data: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    observe: Observer = nullcontext,
) -> VerificationResult:
    """Compare a dense model and the MoE made from it, by logits and by their loss on text; neither is changed.

    16-bit models are compared in float32, so that the comparison shows the conversion and not their rounding, which is
    reported beside it: a folder is read into float32, of a model in memory a copy is made. The two are run one after the
    other; of the dense one, its logits and the outputs of its layers are kept.

    Args:
        dense, moe (`PreTrainedModel`, `str` or `Path`): causal language models, local folders of such, or GGUF files.
            Quantized ones are dequantized, whole in memory.
        inputs (`torch.Tensor`, *optional*): token ids of your text, (B, S); compared besides 2 x 64 seeded random ids.
        data (`str` or `Path`, *optional*): text to measure the loss on: a file, a folder, or a dataset of the Hub, of which
            the first 4 x 256 tokens or so are taken. `inputs` if not given, or else prose that every Python carries.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for the text; that beside the weights if not given. Where there
            is none, and no `inputs`, no loss is measured.
        seed (`int`): of the random ids.
        observe (`Callable`): `observe(model)` gives a context manager that is entered around the MoE's passes over the
            text, or over the random ids when there is none; see `RoutingProbe`.

    Returns:
        `VerificationResult`, whose `exact` says whether they are equal.

    Raises:
        MoEError: when `inputs` are not token ids, the vocabularies differ, or `data` cannot be read.
    """
    dense, moe = (unwrapped(model, or_path=True) for model in (dense, moe))

    def find_tokenizer() -> PreTrainedTokenizerBase | None:
        return tokenizer or tokenizer_of(dense, moe)

    text = sample_text(_config_of(dense), find_tokenizer, data) if data is not None or inputs is None else None
    return compare(dense, moe, inputs, text, seed=seed, observe=observe)


def compare(
    dense: PreTrainedModel | str | Path,
    moe: PreTrainedModel | str | Path,
    inputs: torch.Tensor | None,
    text: SampleText | None,
    *,
    seed: int = 0,
    observe: Observer = nullcontext,
) -> VerificationResult:
    """`verify` on a text that is chosen; where it is None, `inputs` are the text."""
    if inputs is not None:
        check_token_ids("verify inputs", inputs)
    dense, moe = (in_own_precision(unwrapped(model, or_path=True)) for model in (dense, moe))
    dense_config, config = _config_of(dense), _config_of(moe)
    if dense_config.vocab_size != config.vocab_size:
        raise MoEError(
            f"The dense model has {dense_config.vocab_size} tokens and the MoE model {config.vocab_size}: "
            "they are not of one origin."
        )
    random = verification_inputs(config.vocab_size, seed, getattr(config, "max_position_embeddings", None))
    compared = [random]
    if inputs is not None and text is None:
        text = SampleText(inputs, GIVEN_IDS, compared=tuple(inputs.shape))
    elif inputs is not None:
        compared.append(inputs)
    layers = _LayerOutputs()
    expected, loss_before = _outputs(dense, compared, text, layers.keep)
    rounding = 0.0
    if _dtype_of(dense, dense_config) != torch.float32:
        rounded, _ = _outputs(dense, [random], None, own_dtype=True)
        rounding = relative_error(rounded, expected[: len(rounded)])
    actual, loss_after = _outputs(moe, compared, text, layers.compare, observe)
    error = relative_error(actual, expected)
    is_measured = loss_before is not None
    if not is_measured:
        logger.warning_once(
            "The model has no tokenizer of its own, so that its loss on text was not measured, nor what its routers do on "
            "text: pass tokenizer, or token ids of your text."
        )
    return VerificationResult(
        relative_error=error,
        max_abs_error=float((actual - expected).abs().max()),
        rounding_error=rounding,
        num_tokens=len(actual) // config.vocab_size,
        first_difference=layers.first_difference if error > EXACT_TOLERANCE else None,
        loss_before=loss_before,
        loss_after=loss_after,
        uniform_loss=math.log(config.vocab_size) if is_measured else None,
        text=text.name if is_measured else None,
        text_tokens=text.input_ids[:, 1:].numel() if is_measured else 0,
    )


@torch.no_grad()
def _outputs(
    source: PreTrainedModel | str | Path,
    compared: list[torch.Tensor],
    text: SampleText | None,
    watch: Observer = nullcontext,
    observe: Observer = nullcontext,
    *,
    own_dtype: bool = False,
) -> tuple[torch.Tensor, float | None]:
    """All logits that are compared, flat, in float32, and the loss on the text, in nats/token.

    `watch` is entered for the first batch, and `observe` for the text, or for the last batch.
    """
    logits, loss, scored = [], 0.0, 0
    with _opened(source, own_dtype) as model:

        def run(batch: torch.Tensor) -> torch.Tensor:
            device = "cpu" if model.device.type == "meta" else model.device
            ids = example_ids(model.config, len(batch), device)
            return model(input_ids=batch.to(device), use_cache=False, **ids).logits

        for index, batch in enumerate(compared):
            with ExitStack() as stack:
                if index == 0:
                    stack.enter_context(watch(model))
                if text is None and index == len(compared) - 1:
                    stack.enter_context(observe(model))
                logits.append(run(batch).flatten().float().cpu())
        if text is not None:
            # It takes a second to import.
            from moe_hf.metrics import token_statistics

            rows = max(1, LOGITS_PER_PASS // (text.input_ids.shape[1] * model.config.vocab_size))
            with observe(model):
                for start in range(0, len(text.input_ids), rows):
                    batch = text.input_ids[start : start + rows]
                    found = run(batch)
                    seen = found[: max(0, text.compared[0] - start), : text.compared[1]]
                    logits.append(seen.flatten().float().cpu())
                    loss += float(token_statistics(found, batch.long())[:, :, 0].cpu().double().sum())
                    scored += batch[:, 1:].numel()
    # Of more digits the last depend on where tensors lie in memory.
    return torch.cat(logits), round(loss / scored, 4) if scored else None


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
