"""Train a classifier of texts or of words on a MoE, and compare it with one on its dense parent:

accelerate launch training/classify.py --config training/recipes/classify.yaml --model FOLDER --output_dir OUT
"""

from functools import partial

from moe_hf.trainer.arguments import FinetuneArguments, ModelArguments, MoEArgumentParser
from moe_hf.trainer.classification import LabelledDataArguments, classifier_trainer, load_classifier, load_labelled
from moe_hf.trainer.comparison import train_beside_control
from moe_hf.trainer.programs import prepare_run, run_program, train_and_save


def main() -> None:
    """Run the program that the command line describes."""
    parser = MoEArgumentParser((ModelArguments, LabelledDataArguments, FinetuneArguments), description=__doc__)
    model_args, data_args, training_args = parser.parse()
    prepare_run(training_args)
    data = load_labelled(data_args)

    def train_one(model, tokenizer, args):
        trainer = classifier_trainer(model, tokenizer, args, data, data_args.task, data_args.max_length)
        return train_and_save(trainer)

    load = partial(load_classifier, data=data, task=data_args.task)
    train_beside_control(model_args, training_args, load, train_one)


if __name__ == "__main__":
    run_program(main)
