"""`--doctor` of the training programs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer

from moe_hf.doctor.trainers import examine_trainer
from moe_hf.errors import MoEError


@dataclass
class DoctorArguments:
    """Whether a trainer is examined before it trains."""

    doctor: bool = field(
        default=False,
        metadata={
            "help": "Take one step that changes nothing before training, print what would be lost, and stop where that is an error."
        },
    )

    def examined(self, make: Callable[..., Trainer]) -> Callable[..., Trainer]:
        """`make`, whose first trainer is examined where that is asked for."""
        left = [self.doctor]

        def with_doctor(*args: Any, **kwargs: Any) -> Trainer:
            trainer = make(*args, **kwargs)
            if left.pop() if left else False:
                self.look_at(trainer)
            return trainer

        return with_doctor

    def look_at(self, trainer: Trainer) -> None:
        """Print the findings on a trainer.

        Raises:
            MoEError: there is an error among them, or the program runs in several processes.
        """
        if trainer.args.world_size > 1:
            raise MoEError("--doctor takes its step in one process: run the program without a launcher once, with it.")
        report = examine_trainer(trainer)
        print(report.to_text())
        if report.errors:
            raise MoEError(
                f"--doctor found {report.errors[0].code}: {report.errors[0].message} Nothing was trained; leave --doctor out to "
                "train all the same."
            )
