"""Evaluate a model on the held-out documents of each domain (token loss in nats/token, perplexity, accuracy):

moe-hf evaluate --model FOLDER --output_dir OUT
"""

from moe_hf.trainer.arguments import DataArguments, ModelArguments, MoEArgumentParser, MoETrainingArguments
from moe_hf.trainer.programs import (
    evaluate_and_record,
    load_checkpoint,
    load_documents,
    make_trainer,
    run_program,
)


def main() -> None:
    """Run the program that the command line describes."""
    parser = MoEArgumentParser((ModelArguments, DataArguments, MoETrainingArguments), description=__doc__)
    model_args, data_args, training_args = parser.parse()
    model, tokenizer = load_checkpoint(model_args, training_args)
    trainer = make_trainer(model, tokenizer, training_args, data_args, load_documents(data_args), only_evaluate=True)
    evaluate_and_record(trainer)


if __name__ == "__main__":
    run_program(main)
