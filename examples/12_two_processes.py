"""One model in two processes: expert parallelism on a CPU, saved in parts, and resumed in one process.

python examples/12_two_processes.py [FOLDER]

It starts itself twice, by torchrun. Each process holds half of the experts, and tokens travel to theirs and back.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import moe_hf
from moe_hf.data import load_text, tokenize_and_pack, train_tokenizer
from moe_hf.trainer import MoETrainer, MoETrainingArguments


STEPS = 12


def make_trainer(folder: Path, world_size: int, **sizes: int) -> MoETrainer:
    """A run of `STEPS` steps of 8 rows, with a checkpoint in the middle."""
    prose = load_text("builtin").filter(lambda row: row["domain"] == "prose")
    tokenizer = train_tokenizer(prose, vocab_size=512)
    blocks = tokenize_and_pack(prose, tokenizer, block_size=64)
    torch.manual_seed(0)
    widths = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **widths))
    # A model that is too large for this is upcycled to disk, and each process loads its part of the folder with
    # from_pretrained(folder, distributed_config=arguments.layout()).
    model = moe_hf.upcycle(dense, num_experts=4, num_experts_per_tok=2, noise=0.1)
    arguments = MoETrainingArguments(
        output_dir=str(folder),
        scope="moe",
        max_steps=STEPS,
        per_device_train_batch_size=8 // world_size,
        learning_rate=3e-3,
        save_strategy="steps",
        save_steps=STEPS // 2,
        logging_steps=STEPS // 2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **sizes,
    )
    return MoETrainer(model, arguments, train_dataset=blocks)


def train_in_two(folder: Path) -> None:
    """What each of the two processes does."""
    trainer = make_trainer(folder, world_size=2, ep_size=2)
    # Launchers can start one process, or two that do not know of each other, without a word.
    assert dist.get_world_size() == 2
    experts = trainer.model.model.layers[0].mlp.experts
    assert experts.num_experts == 2
    assert experts.down_proj.to_local().shape[0] == 2
    trainer.train()
    if dist.get_rank() == 0:
        print(
            f"2 processes, {experts.num_experts} of 4 experts in each, loss {trainer.state.log_history[-2]['loss']:.4f}"
        )
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    """Train in two processes, then go on from the middle in this one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    # Without the variable accelerate looks for GPUs, and takes each process for a run of its own.
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(folder)], env=environment, check=True)
    trainer = make_trainer(folder / "alone", world_size=1)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}"))
    print(f"1 process, from the checkpoint of two: loss {trainer.state.log_history[-2]['loss']:.4f}")


if __name__ == "__main__":
    if "RANK" in os.environ:
        train_in_two(Path(sys.argv[1]))
    elif len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
