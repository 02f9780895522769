"""How many tokens a run may train on, so that all stages end in the minutes that are given, and how long each takes.

What a stage costs follows from what the stages before it took on this machine: a token in training and in evaluation, what a
model costs to load, save and check, and an answer.
"""

import math
import time
from dataclasses import dataclass

from transformers import TrainerCallback

from moe_hf.errors import MoEError


# Of the minutes; the rest is for a machine that becomes slower.
USED_SHARE = 0.9
LEAST_STEPS = 4


class StepTimes(TrainerCallback):
    """Seconds of each training step, in order."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._start)

    def typical(self) -> float:
        """The median of all steps but the first, which allocates what the others reuse."""
        return sorted(self.seconds[1:])[len(self.seconds[1:]) // 2]


@dataclass(frozen=True)
class Speed:
    """What was measured before the runs, in seconds; by `"moe"` and `"dense"` where both have their own.

    Attributes:
        training, evaluation: of a token.
        handling: to upcycle, check and save the MoE: an upper bound for loading a model and saving it.
        chat: to answer all prompts.
    """

    training: dict[str, float]
    evaluation: dict[str, float]
    handling: float
    chat: float


@dataclass(frozen=True)
class Work:
    """A stage of the whole run.

    Attributes:
        name: of the stage.
        start: `"moe"` or `"dense"`, the model that it runs.
        trains, reads: whether it trains on the tokens of a run, which are to be found, or reads them without gradients.
        evaluated: tokens without gradients.
        handled: how often a model is loaded, saved or changed.
        chats: how often all prompts are answered.
    """

    name: str
    start: str = "moe"
    trains: bool = False
    reads: bool = False
    evaluated: int = 0
    handled: float = 1.0
    chats: int = 0

    def seconds(self, speed: Speed, tokens: int) -> float:
        """How long it takes where each run trains on `tokens`."""
        return (
            self.trains * tokens * speed.training[self.start]
            + (self.reads * tokens + self.evaluated) * speed.evaluation[self.start]
            + self.handled * speed.handling
            + self.chats * speed.chat
        )


def token_budget(work: list[Work], speed: Speed, *, minutes: float, spent: float, step: int, most: int) -> int:
    """Tokens of each training run, in whole steps.

    Args:
        work (`list[Work]`): the stages that are left.
        speed (`Speed`): of this machine.
        minutes (`float`): for everything, of which `spent` seconds have passed.
        step (`int`): tokens of a step.
        most (`int`): tokens of text for one run.

    Raises:
        MoEError: less than `LEAST_STEPS` steps for each run; with the minutes that are enough, or for want of text.
    """
    least = LEAST_STEPS * step
    if most < least:
        raise MoEError(
            f"There are {most:,} tokens of text for a run, and {least:,} are the least: raise code_characters."
        )
    fixed = sum(one.seconds(speed, 0) for one in work)
    per_token = sum(one.seconds(speed, 1) - one.seconds(speed, 0) for one in work)
    available = USED_SHARE * 60 * minutes - spent - fixed
    tokens = min(int(available / per_token), most) // step * step
    if tokens < least:
        wanted = math.ceil((spent + fixed + least * per_token) / (60 * USED_SHARE))
        raise MoEError(
            f"{minutes:g} minutes are too few on this machine: {spent / 60:.1f} have passed, the stages besides training "
            f"take {fixed / 60:.1f}, and {LEAST_STEPS} steps of each run {least * per_token / 60:.1f}. Run the same command "
            f"with --minutes {wanted} or more; what is done is kept."
        )
    return tokens
