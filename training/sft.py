"""Instruction tuning with TRL: chats, loss on the answers alone, answers measured beside the dense parent's:

moe-hf sft --config instructions --model FOLDER --output_dir OUT
"""

from moe_hf.doctor.arguments import DoctorArguments
from moe_hf.trainer.arguments import ModelArguments, MoEArgumentParser
from moe_hf.trainer.chats import ChatDataArguments, generated_answer_metrics, load_chat_model, load_chats
from moe_hf.trainer.comparison import ComparisonArguments, train_beside_control
from moe_hf.trainer.programs import evaluation_parts, prepare_run, run_program, trl_trainer
from moe_hf.trainer.trl_trainers import MoESFTConfig, MoESFTTrainer


COLUMNS = ("messages",)


def main() -> None:
    """Run the program that the command line describes."""
    types = (ModelArguments, ComparisonArguments, ChatDataArguments, DoctorArguments, MoESFTConfig)
    parser = MoEArgumentParser(types, description=__doc__)
    model_args, comparison, data_args, doctor, training_args = parser.parse()
    prepare_run(training_args, comparison, model_args)
    train, held_out = load_chats(data_args, COLUMNS)
    parts = evaluation_parts(held_out, comparison, training_args, data_args.split_seed)
    rows = [part.select_columns(list(COLUMNS)) for part in (train, *parts)]
    asked = rows[2]["messages"][: data_args.generated_answers]

    def make(loaded_args, args):
        model, tokenizer = load_chat_model(loaded_args, args)
        trainer, trainer.test_dataset = trl_trainer(MoESFTTrainer, model, tokenizer, args, rows[0], rows[1:])
        return trainer

    def measure(trainer):
        metrics = trainer.evaluate(trainer.test_dataset)
        if asked and trainer.is_world_process_zero():
            metrics |= generated_answer_metrics(
                trainer.model, trainer.processing_class, asked, data_args.max_new_tokens
            )
        return metrics

    train_beside_control(model_args, comparison, training_args, doctor.examined(make), measure, data_args)


if __name__ == "__main__":
    run_program(main)
