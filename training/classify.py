"""Train a classifier of texts or of words on a MoE, and compare it with one on its dense parent:

moe-hf classify --config classify_sequences --model FOLDER --output_dir OUT
"""

from dataclasses import replace

from moe_hf.doctor.arguments import DoctorArguments
from moe_hf.trainer.arguments import FinetuneArguments, ModelArguments, MoEArgumentParser
from moe_hf.trainer.classification import (
    LabelledDataArguments,
    classifier_trainer,
    load_classifier,
    load_labelled,
    tokenized_rows,
)
from moe_hf.trainer.comparison import ComparisonArguments, train_beside_control
from moe_hf.trainer.programs import evaluation_parts, prepare_run, run_program


def main() -> None:
    """Run the program that the command line describes."""
    types = (ModelArguments, ComparisonArguments, LabelledDataArguments, DoctorArguments, FinetuneArguments)
    parser = MoEArgumentParser(types, description=__doc__)
    model_args, comparison, data_args, doctor, training_args = parser.parse()
    prepare_run(training_args, comparison, model_args)
    data = load_labelled(data_args)
    validation, test = evaluation_parts(data.held_out, comparison, training_args, data_args.split_seed)
    data = replace(data, held_out=validation)
    form = {"task": data_args.task, "max_length": data_args.max_length}

    def make(loaded_args, args):
        model, tokenizer = load_classifier(loaded_args, args, data, data_args.task)
        return classifier_trainer(model, tokenizer, args, data, **form)

    def measure(trainer):
        return trainer.evaluate(tokenized_rows(test, trainer.processing_class, **form))

    train_beside_control(model_args, comparison, training_args, doctor.examined(make), measure, data_args)


if __name__ == "__main__":
    run_program(main)
