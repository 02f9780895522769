"""A tiny model in a GGUF file, as llama.cpp's converter would write it: quantised weights, a real tokenizer, a chat template."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedModel

from tests.tiny_models import tiny_dense


NAME = "tiny.gguf"
# Fixed text in the language of people, which the tokenizer learns its merges from.
PROSE = Path(__file__).parents[1] / "LICENSE"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# A block of a quantised tensor is 32 numbers of one row, so all widths are multiples of it, and no two are equal.
SIZES = {
    "vocab_size": 384,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


def write_tiny_gguf(
    folder: Path,
    name: str = NAME,
    *,
    tied: bool = True,
    matrices: str = "Q4_1",
    embedding: str = "Q8_0",
    fields: Callable[[gguf.GGUFWriter], None] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write a llama of 3 layers with byte-level BPE; the norms are F32.

    Args:
        folder (`Path`): where; it is made.
        name (`str`): of the file.
        tied (`bool`): without a head of its own.
        matrices, embedding (`str`): how they are stored: `"F32"`, `"F16"`, or a type that gguf can quantise to.
        fields (`Callable`, *optional*): adds further metadata to the writer.
        tensors (`Mapping[str, np.ndarray | None]`, *optional*): tensors beside the model's, or in the place of one;
            `None` leaves it out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dense = tiny_dense("llama", **SIZES | {"tie_word_embeddings": tied})
    writer = gguf.GGUFWriter(folder / name, "llama")
    _add_metadata(writer, dense)
    if fields is not None:
        fields(writer)
    for tensor_name, values in (_tensors(dense) | dict(tensors or {})).items():
        if values is not None:
            _add_tensor(writer, tensor_name, values, embedding if tensor_name == "token_embd.weight" else matrices)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / name


def _add_metadata(writer: gguf.GGUFWriter, dense: PreTrainedModel) -> None:
    config = dense.config
    writer.add_name("Tiny llama")
    writer.add_license("apache-2.0")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_quantization_version(2)
    tokens, merges = _vocabulary(config.vocab_size)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _vocabulary(size: int) -> tuple[list[str], list[str]]:
    """The tokens by id, and the merges, best first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE.read_text(encoding="utf-8")], trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tokenizer.id_to_token(index) for index in range(size)], [" ".join(pair) for pair in merges]


def _tensors(dense: PreTrainedModel) -> dict[str, np.ndarray]:
    """The weights under their names in a GGUF, with rotary pairs side by side, as llama.cpp has them."""
    config = dense.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, parameter in dense.named_parameters():
        values = parameter.detach().numpy()
        count = heads.get(name.split(".")[-2])
        if count is not None:
            halves = values.reshape(count, 2, values.shape[0] // count // 2, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        tensors[names.get_name(name, try_suffixes=(".weight",))] = np.ascontiguousarray(values)
    return tensors


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, stored_as: str) -> None:
    kind = gguf.GGMLQuantizationType[stored_as] if values.ndim > 1 else gguf.GGMLQuantizationType.F32
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
