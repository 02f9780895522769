"""Which factor on the output of split experts is best: of a small dense model, at the start and after a short training.

    python -m benchmarks.split_scales --out DIR

With weights that sum to 1, K of E parts of an MLP are multiplied by K (they add up as in the dense MLP), by E (their mean over
choices is the dense output), or by the geometric mean of both. Finished runs in DIR are kept, as in `benchmarks.initialisers`.
"""

from typing import Any

from benchmarks.initialisers import Arm, InitialiserStudy
from benchmarks.initialisers_report import markdown_table
from benchmarks.runs import run_study, write_results
from benchmarks.study import Settings, parse_study, study_parser


PAIRS = ((4, 2), (8, 4), (8, 2), (16, 4))
DEFAULTS = Settings(parent_steps=600, steps=100, evaluations=1, evaluation_tokens=4096)


def _arm(experts: int, chosen: int, letters: str, scale: float) -> Arm:
    title = f"{chosen} of {experts}, scale {letters}"
    return Arm(title, "split", {"scale": scale}, {"num_experts": experts, "num_experts_per_tok": chosen})


ARMS = {
    f"{k}of{e}_{name}": _arm(e, k, letters, scale)
    for e, k in PAIRS
    for name, letters, scale in (("K", "K", k), ("mean", "sqrt(K E)", (k * e) ** 0.5), ("E", "E", e))
}


class SplitStudy(InitialiserStudy):
    """The study of scales."""

    table = ARMS


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the study, and write its results and table into the output folder."""
    given = study_parser(__doc__.splitlines()[0], DEFAULTS, ARMS).parse_args(arguments)
    settings = parse_study(given, DEFAULTS, ARMS)
    results = SplitStudy(settings, given.out, given.arms, given.seeds).run()
    write_results(results, markdown_table(results), given.out)
    return results


if __name__ == "__main__":
    run_study(main)
