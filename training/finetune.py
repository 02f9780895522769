"""Fine-tune part of a MoE (expert-only by default) or of a dense model:

moe-hf finetune --config finetune_moe --model FOLDER --output_dir OUT

In several processes it takes a layout: `moe-hf finetune --processes 8 --layout ep ...`, or `accelerate launch` of this file with
--fsdp_size, --ep_size, --tp_size, --dp_replicate_size (training/accelerate).
"""

from moe_hf.doctor.arguments import DoctorArguments
from moe_hf.trainer.arguments import FinetuneArguments
from moe_hf.trainer.programs import finetune, run_program


def main() -> None:
    """Run the program that the command line describes."""
    finetune(__doc__, FinetuneArguments, DoctorArguments)


if __name__ == "__main__":
    run_program(main)
