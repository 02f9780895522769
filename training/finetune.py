"""Fine-tune part of a MoE (expert-only by default) or of a dense model:

accelerate launch training/finetune.py --config training/recipes/finetune_moe.yaml --model FOLDER --output_dir OUT
"""

from moe_hf.trainer.arguments import DataArguments, FinetuneArguments, ModelArguments, MoEArgumentParser
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
    parser = MoEArgumentParser((ModelArguments, DataArguments, FinetuneArguments), description=__doc__)
    model_args, data_args, training_args = parser.parse()
    prepare_run(training_args)
    documents = load_documents(data_args)

    def train_one(model, tokenizer, args):
        return train_and_save(make_trainer(model, tokenizer, args, data_args, documents))

    train_beside_control(model_args, training_args, load_checkpoint, train_one)


if __name__ == "__main__":
    run_program(main)
