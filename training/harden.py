"""Fine-tune router and experts in turns against small changes of the input embeddings (AdvMoE), beside a dense control:

moe-hf harden --config harden --model FOLDER --output_dir OUT
"""

from moe_hf.doctor.arguments import DoctorArguments
from moe_hf.trainer.adversarial import AdversarialArguments, AdversarialTrainer
from moe_hf.trainer.programs import finetune, run_program


def main() -> None:
    """Run the program that the command line describes."""
    finetune(__doc__, AdversarialArguments, DoctorArguments, AdversarialTrainer)


if __name__ == "__main__":
    run_program(main)
