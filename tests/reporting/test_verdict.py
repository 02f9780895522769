"""The report's first sentence names what is wrong, the worst first, from measured figures; cells show digits that differ."""

import dataclasses
import json

import pytest
import torch
from matplotlib.figure import Figure

from moe_hf import routing_statistics, upcycle
from moe_hf.reporting.plots import cell_scale, heat_map
from moe_hf.reporting.report import report_page, write_report
from moe_hf.reporting.statistics import LayerStatistics, RoutingStatistics
from moe_hf.reporting.verdict import THRESHOLDS, verdict
from tests.tiny_models import random_ids, tiny_dense


def layer(number: int, choices: list[int], *, tokens: int = 1000, entropy: float = 0.7, used=None) -> LayerStatistics:
    counts = torch.tensor(choices)
    return LayerStatistics(
        name=f"layers.{number}.mlp",
        num_tokens=tokens,
        choices=counts,
        dropped=torch.zeros_like(counts),
        mean_weight=torch.full((len(choices),), 0.5, dtype=torch.float64),
        entropy=entropy * float(torch.log(torch.tensor(float(len(choices))))),
        top_1_probability=0.5,
        active=torch.tensor([0, 0, tokens] + [0] * (len(choices) - 2)),
        together=torch.diag(counts if used is None else torch.tensor(used)),
        groups={},
    )


def statistics(*layers: LayerStatistics, drift: float | None = None) -> RoutingStatistics:
    moved = (
        () if drift is None else tuple(torch.full((one.num_experts,), drift, dtype=torch.float64) for one in layers)
    )
    return RoutingStatistics("model", 1000, layers, {}, drift=moved, origin=None if drift is None else "dense")


EVEN = [500, 500, 500, 500]


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            statistics(layer(4, EVEN), drift=0.15),
            "Balanced (at most 1.0 times an even share), decided (entropy 0.70 of ln E) and apart: the experts have moved by "
            "15.0% of their weights.",
        ),
        (
            statistics(layer(4, EVEN)),
            "Balanced (at most 1.0 times an even share), decided (entropy 0.70 of ln E); how far the experts have moved is not "
            "known without the dense origin.",
        ),
        (
            statistics(layer(4, EVEN), drift=0.012),
            "The experts have hardly moved (1.20% of their weights): train longer, or at a higher rate.",
        ),
        (
            statistics(layer(4, [400, 400, 400, 0, 400, 0, 400]), layer(7, [400] * 5)),
            "Experts 3 and 5 of layer 4 get no tokens.",
        ),
        (
            statistics(layer(1, [0, 700, 700, 600]), layer(4, [700, 700, 0, 700]), drift=0.001),
            "Expert 0 of layer 1 gets no tokens, as does 1 of other layers; the experts have hardly moved (0.10% of their "
            "weights): train longer, or at a higher rate.",
        ),
        (
            statistics(layer(2, [500] * 3 + [0] * 5)),
            "Experts 3, 4, 5 and 2 more of layer 2 get no tokens; expert 0 of layer 2 gets 2.7 times an even share of the tokens.",
        ),
        (
            statistics(layer(2, [100, 80, 80, 800, 80, 860])),
            "Expert 5 of layer 2 gets 2.6 times an even share of the tokens.",
        ),
        (
            statistics(layer(0, [950, 350, 350, 350])),
            "Expert 0 of layer 0 gets nearly all tokens.",
        ),
        (statistics(layer(0, EVEN, entropy=0.99)), "The routers are undecided (entropy 0.990 of ln E)."),
        (
            statistics(layer(0, [9, 0, 9, 0], tokens=9)),
            "The text is too short to tell: a layer makes fewer than the 80 choices that its experts need.",
        ),
    ],
)
def test_the_sentence_says_what_the_figures_say(found, sentence):
    assert verdict(found) == sentence


def test_an_expert_without_tokens_is_not_called_dead_on_a_text_too_short_for_it():
    assert "no tokens" not in verdict(statistics(layer(0, [20, 0, 20, 19])))
    assert "no tokens" in verdict(statistics(layer(0, [40, 0, 20, 20])))


def test_page_and_terminal_open_with_it_and_the_page_explains_its_words():
    model = upcycle(tiny_dense("llama"), num_experts=4)
    found = routing_statistics(model, [{"input_ids": random_ids(4, 64)}], origin=tiny_dense("llama"))
    page = report_page(found)
    assert verdict(found) in page and THRESHOLDS.replace("'", "&#39;") in page
    assert "hardly moved (0.00% of their weights)" in verdict(found)
    assert page.index(verdict(found)) < page.index('class="tiles"')


@pytest.mark.parametrize("size", [0.9, 0.15, 0.0123, 0.00071, 3e-9])
def test_cells_that_differ_by_a_hundredth_look_different(size, tmp_path):
    """In drift pictures all cells said 0.01."""
    values = size * torch.tensor([[1.0, 0.985], [0.97, 0.955]], dtype=torch.float64)
    axes = Figure().subplots()
    heat_map(axes, values, ["0", "1"], ["0", "1"], title="drift", centre=None)
    texts = [text.get_text() for text in axes.texts]
    assert len(set(texts)) == 4
    unit, _, words = cell_scale(size)
    assert [float(text) * unit for text in texts] == pytest.approx(values.flatten().tolist(), rel=0.006)
    assert (words in axes.get_title()) and (unit == 1 or words)
    found = dataclasses.replace(statistics(layer(0, EVEN)), drift=(size * torch.linspace(0.9, 1, 4),), origin="dense")
    write_report(found, tmp_path)
    assert json.loads((tmp_path / "routing.json").read_text())["summary"]["largest drift"] == pytest.approx(size)
    shown = report_page(found).split("distance from the start")[1]
    cells = [cell.split(">")[1] for cell in shown.split("</td>")[:4]] if words else None
    assert (words in shown) and (cells is None or len(set(cells)) == 4)
