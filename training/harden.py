"""Fine-tune router and experts in turns against small changes of the input embeddings (AdvMoE), beside a dense control:

accelerate launch training/harden.py --config training/recipes/harden.yaml --model FOLDER --output_dir OUT
"""

from moe_hf.trainer.adversarial import AdversarialArguments, AdversarialTrainer
from moe_hf.trainer.arguments import DataArguments, ModelArguments, MoEArgumentParser
from moe_hf.trainer.comparison import train_beside_control
from moe_hf.trainer.programs import (
    load_checkpoint,
    load_documents,
    make_trainer,
    prepare_run,
    run_program,
    train_and_save,
)


def main() -> None:
    """Run the program that the command line describes."""
    parser = MoEArgumentParser((ModelArguments, DataArguments, AdversarialArguments), description=__doc__)
    model_args, data_args, training_args = parser.parse()
    prepare_run(training_args)
    documents = load_documents(data_args)

    def train_one(model, tokenizer, args):
        trainer = make_trainer(model, tokenizer, args, data_args, documents, trainer_class=AdversarialTrainer)
        return train_and_save(trainer)

    train_beside_control(model_args, training_args, load_checkpoint, train_one)


if __name__ == "__main__":
    run_program(main)
