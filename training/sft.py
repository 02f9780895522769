"""Instruction tuning with TRL: chats, loss on the answers alone, answers measured beside the dense parent's:

accelerate launch training/sft.py --config training/recipes/instructions.yaml --model FOLDER --output_dir OUT
"""

from moe_hf.trainer.arguments import ModelArguments, MoEArgumentParser
from moe_hf.trainer.chats import ChatDataArguments, generated_answer_metrics, load_chat_model, load_chats
from moe_hf.trainer.checkpoints import resume_choice
from moe_hf.trainer.comparison import train_beside_control
from moe_hf.trainer.programs import evaluate_and_record, prepare_run, run_program
from moe_hf.trainer.trl_trainers import MoESFTConfig, MoESFTTrainer


def main() -> None:
    """Run the program that the command line describes."""
    parser = MoEArgumentParser((ModelArguments, ChatDataArguments, MoESFTConfig), description=__doc__)
    model_args, data_args, training_args = parser.parse()
    prepare_run(training_args)
    train, held_out = load_chats(data_args, ("messages",))
    asked = held_out["messages"][: data_args.generated_answers]

    def train_one(model, tokenizer, args):
        trainer = MoESFTTrainer(model, args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume_choice(args))
        metrics = evaluate_and_record(trainer)
        if asked and trainer.is_world_process_zero():
            metrics |= generated_answer_metrics(trainer.model, tokenizer, asked, data_args.max_new_tokens)
        trainer.save_model()
        return metrics

    train_beside_control(model_args, training_args, load_chat_model, train_one)


if __name__ == "__main__":
    run_program(main)
