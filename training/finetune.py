"""Fine-tune part of a MoE (expert-only by default) or of a dense model:

accelerate launch training/finetune.py --config training/recipes/finetune_moe.yaml --model FOLDER --output_dir OUT

In several processes it takes a layout: --fsdp_size, --ep_size, --tp_size, --dp_replicate_size (training/accelerate).
"""

from moe_hf.trainer.arguments import DataArguments, FinetuneArguments, ModelArguments, MoEArgumentParser
from moe_hf.trainer.programs import (
    given_dtype,
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
    model, tokenizer = load_checkpoint(model_args, training_args)
    saved_in, documents = given_dtype(model_args, training_args), load_documents(data_args)
    trainer = make_trainer(model, tokenizer, training_args, data_args, documents, given_dtype=saved_in)
    train_and_save(trainer)


if __name__ == "__main__":
    run_program(main)
