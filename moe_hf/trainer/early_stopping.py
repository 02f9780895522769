"""Stops training when the loss on held-out text moves away from that on training text."""

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from moe_hf.errors import MoEError


class HeldOutGapCallback(TrainerCallback, ExportableState):
    """Stops when the gap, held-out minus training loss, has grown: sparse models overfit small tasks (ST-MoE, figure 3).

    The gap is compared with the smallest one so far. It counts from the first evaluation after a step. The logged
    training loss holds the router losses and dropout too; a gap of like with like needs a piece of the training text among
    the evaluation sets, `eval_dataset={"train": ..., "held_out": ...}`, and `train_metric="eval_train_loss",
    held_out_metric="eval_held_out_loss"`.

    Args:
        patience (`int`): how many evaluations in a row it may stay larger.
        min_growth (`float`): what it must have grown by to count, in the units of the loss (nats per token).
        train_metric, held_out_metric (`str`): names of the losses in the log.

    Raises:
        MoEError: a patience below 1 or a negative growth; in training, an evaluation before any training loss.

    Source: ST-MoE, section 4.1 (https://huggingface.co/papers/2202.08906), for the overfitting; the rule is ours.
    """

    def __init__(
        self,
        patience: int = 3,
        min_growth: float = 0.01,
        train_metric: str = "loss",
        held_out_metric: str = "eval_loss",
    ) -> None:
        if patience < 1 or not 0 <= min_growth < float("inf"):
            raise MoEError(
                f"patience is {patience} and min_growth {min_growth}; they must be at least 1, and at least 0 and finite."
            )
        self.patience, self.min_growth = patience, min_growth
        self.train_metric, self.held_out_metric = train_metric, held_out_metric
        self.smallest_gap: float | None = None
        self.times_larger = 0
        self._seen: dict[str, tuple[int, float]] = {}
        self._judged_step = 0

    def state(self) -> dict:
        """What a resumed run goes on with."""
        return {
            "args": {
                "patience": self.patience,
                "min_growth": self.min_growth,
                "train_metric": self.train_metric,
                "held_out_metric": self.held_out_metric,
            },
            "attributes": {"smallest_gap": self.smallest_gap, "times_larger": self.times_larger, "_seen": self._seen},
        }

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs) -> None:
        """Take in what was logged, and judge once both losses of an evaluation are known."""
        step = state.global_step
        for name in (self.train_metric, self.held_out_metric):
            if name in (logs or {}):
                self._seen[name] = (step, logs[name])
        if step == 0 or step == self._judged_step or self._step_of(self.held_out_metric) != step:
            return
        if self.train_metric.startswith("eval_"):
            if self._step_of(self.train_metric) != step:
                return  # the other evaluation set comes next
        elif self.train_metric not in self._seen:
            raise MoEError(
                f"{self.held_out_metric!r} was evaluated at step {step} before any {self.train_metric!r} was logged. Set "
                "logging_steps to at most eval_steps."
            )
        self._judged_step = step
        self._judge(self._seen[self.held_out_metric][1] - self._seen[self.train_metric][1], control)

    def _step_of(self, name: str) -> int | None:
        return self._seen[name][0] if name in self._seen else None

    def _judge(self, gap: float, control) -> None:
        if self.smallest_gap is None or gap < self.smallest_gap:
            self.smallest_gap = gap
        is_larger = gap > self.smallest_gap + self.min_growth
        self.times_larger = self.times_larger + 1 if is_larger else 0
        if self.times_larger >= self.patience:
            control.should_training_stop = True
