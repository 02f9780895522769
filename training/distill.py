"""Train a smaller student on the predictions of a MoE: the same MoE with fewer layers, or a dense model made from it.

moe-hf distill --config distill_moe --model TEACHER --output_dir OUT
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import moe_hf
from moe_hf.doctor.arguments import DoctorArguments
from moe_hf.trainer.arguments import DataArguments, ModelArguments, MoEArgumentParser
from moe_hf.trainer.comparison import print_comparison
from moe_hf.trainer.distillation import DistillationArguments, DistillationTrainer
from moe_hf.trainer.programs import (
    load_checkpoint,
    load_documents,
    make_trainer,
    prepare_run,
    run_program,
    train_and_save,
)


@dataclass
class StudentArguments:
    """What the student is made of."""

    student: str = field(
        default="moe",
        metadata={"help": "`moe`: the teacher with fewer layers; `dense`: a dense model; else a folder or a Hub id."},
    )
    drop_layers: int = field(default=1, metadata={"help": "Layers that a `moe` student has less, spread evenly."})
    dense_method: str = field(
        default="average", metadata={"help": "How a `dense` student starts: a method of moe_hf.to_dense."}
    )


def make_student(args: StudentArguments, teacher, model_args: ModelArguments, training_args: DistillationArguments):
    """The model that learns."""
    if args.student == "moe":
        return moe_hf.drop_layers(teacher, args.drop_layers)
    if args.student == "dense":
        return moe_hf.to_dense(teacher, args.dense_method)
    student_args = copy.copy(model_args)
    student_args.model, student_args.upcycle = args.student, None
    return load_checkpoint(student_args, training_args)[0]


def main() -> None:
    """Run the program that the command line describes."""
    parser = MoEArgumentParser(
        (ModelArguments, StudentArguments, DataArguments, DoctorArguments, DistillationArguments), description=__doc__
    )
    model_args, student_args, data_args, doctor, training_args = parser.parse()
    prepare_run(training_args)
    documents = load_documents(data_args)
    teacher, tokenizer = load_checkpoint(model_args, training_args)
    student = make_student(student_args, teacher, model_args, training_args)
    teacher_args = copy.copy(training_args)
    teacher_args.scope = None
    evaluation = make_trainer(teacher, tokenizer, teacher_args, data_args, documents, only_evaluate=True).evaluate()
    trainer = doctor.examined(make_trainer)(
        student,
        tokenizer,
        training_args,
        data_args,
        documents,
        trainer_class=DistillationTrainer,
        teacher=teacher,
    )
    before = trainer.evaluate()
    metrics = train_and_save(trainer)
    if training_args.process_index == 0:
        columns = {"student": metrics, "untrained student": before, "teacher": evaluation}
        print_comparison(columns, Path(training_args.output_dir))


if __name__ == "__main__":
    run_program(main)
