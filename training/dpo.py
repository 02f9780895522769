"""Preference training with TRL's DPO: of two answers the chosen one becomes more likely, beside the dense parent:

accelerate launch training/dpo.py --config training/recipes/preferences.yaml --model FOLDER --output_dir OUT
"""

from moe_hf.trainer.arguments import ModelArguments, MoEArgumentParser
from moe_hf.trainer.chats import ChatDataArguments, load_chat_model, load_chats
from moe_hf.trainer.checkpoints import resume_choice
from moe_hf.trainer.comparison import train_beside_control
from moe_hf.trainer.programs import evaluate_and_record, prepare_run, run_program
from moe_hf.trainer.trl_trainers import MoEDPOConfig, MoEDPOTrainer


def main() -> None:
    """Run the program that the command line describes."""
    parser = MoEArgumentParser((ModelArguments, ChatDataArguments, MoEDPOConfig), description=__doc__)
    model_args, data_args, training_args = parser.parse()
    prepare_run(training_args)
    train, held_out = load_chats(data_args, ("prompt", "chosen", "rejected"))

    def train_one(model, tokenizer, args):
        trainer = MoEDPOTrainer(model, args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume_choice(args))
        metrics = evaluate_and_record(trainer)
        trainer.save_model()
        return metrics

    train_beside_control(model_args, training_args, load_chat_model, train_one)


if __name__ == "__main__":
    run_program(main)
