"""Preference training with TRL's DPO: of two answers the chosen one becomes more likely, beside the dense parent:

moe-hf dpo --config preferences --model FOLDER --output_dir OUT
"""

from moe_hf.doctor.arguments import DoctorArguments
from moe_hf.trainer.arguments import ModelArguments, MoEArgumentParser
from moe_hf.trainer.chats import ChatDataArguments, load_chat_model, load_chats
from moe_hf.trainer.comparison import ComparisonArguments, train_beside_control
from moe_hf.trainer.programs import evaluation_parts, prepare_run, run_program, trl_trainer
from moe_hf.trainer.trl_trainers import MoEDPOConfig, MoEDPOTrainer


COLUMNS = ("prompt", "chosen", "rejected")


def main() -> None:
    """Run the program that the command line describes."""
    types = (ModelArguments, ComparisonArguments, ChatDataArguments, DoctorArguments, MoEDPOConfig)
    parser = MoEArgumentParser(types, description=__doc__)
    model_args, comparison, data_args, doctor, training_args = parser.parse()
    prepare_run(training_args, comparison, model_args)
    train, held_out = load_chats(data_args, COLUMNS)
    parts = evaluation_parts(held_out, comparison, training_args, data_args.split_seed)
    rows = [part.select_columns(list(COLUMNS)) for part in (train, *parts)]

    def make(loaded_args, args):
        model, tokenizer = load_chat_model(loaded_args, args)
        trainer, trainer.test_dataset = trl_trainer(MoEDPOTrainer, model, tokenizer, args, rows[0], rows[1:])
        return trainer

    def measure(trainer):
        metrics = trainer.evaluate(trainer.test_dataset)
        return metrics

    train_beside_control(model_args, comparison, training_args, doctor.examined(make), measure, data_args)


if __name__ == "__main__":
    run_program(main)
