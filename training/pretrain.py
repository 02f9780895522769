"""Train a dense config or a `MoEConfig` from random weights:

moe-hf pretrain --config pretrain_dense --output_dir OUT
"""

from moe_hf.doctor.arguments import DoctorArguments
from moe_hf.trainer.arguments import ConfigArguments, DataArguments, MoEArgumentParser, MoETrainingArguments
from moe_hf.trainer.programs import build_model, load_documents, make_trainer, prepare_run, run_program, train_and_save


def main() -> None:
    """Run the program that the command line describes."""
    parser = MoEArgumentParser(
        (ConfigArguments, DataArguments, DoctorArguments, MoETrainingArguments), description=__doc__
    )
    config_args, data_args, doctor, training_args = parser.parse()
    prepare_run(training_args)
    documents = load_documents(data_args)
    model, tokenizer = build_model(config_args, documents[0])
    trainer = doctor.examined(make_trainer)(model, tokenizer, training_args, data_args, documents)
    train_and_save(trainer)


if __name__ == "__main__":
    run_program(main)
