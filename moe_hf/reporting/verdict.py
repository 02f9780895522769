"""One sentence about a routing report: what is wrong first, or that nothing is, by thresholds on measured figures."""

from moe_hf.reporting.statistics import LayerStatistics, RoutingStatistics


# An even share of the choices that a layer's experts must have had, before one without any is called dead: an expert that is
# as likely as others then has none once in e^20 texts.
LEAST_EVEN_SHARE = 20
# Of the even share: from here on an expert is overloaded. `make demo` ends at 1.7 in its worst layer.
OVERLOADED = 2.0
# Of the weights' norm: below it experts have hardly moved. bfloat16 rounds by 0.002; `make demo` ends at 0.15.
HARDLY_MOVED = 0.02
# Of ln E: above it routers are as good as undecided. A router that has just been made is at 0.99 and more, `make demo` ends at 0.9.
UNDECIDED = 0.98
# Experts that the sentence names.
NAMED = 3

THRESHOLDS = (
    f"Dead: no choice where an even share would be {LEAST_EVEN_SHARE}. Overloaded: {OVERLOADED:g} times an even share. Hardly "
    f"moved: less than {HARDLY_MOVED:.0%} of the weights' norm from how they were made, mean over experts. Undecided: an entropy "
    f"above {UNDECIDED:g} of ln E, mean over layers."
)


def verdict(statistics: RoutingStatistics) -> str:
    """What the figures of a report say, in one sentence; `THRESHOLDS` explains its words."""
    found = [_dead(statistics.layers), _saturated(statistics.layers), _overloaded(statistics.layers)]
    found += [_moved(statistics), _undecided(statistics)]
    problems = [words for words in found if words]
    sentence = "; ".join(problems) if problems else _good(statistics)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _measured(layers: tuple[LayerStatistics, ...]) -> list[LayerStatistics]:
    """Layers with enough choices to say that an expert gets none."""
    return [layer for layer in layers if int(layer.choices.sum()) >= LEAST_EVEN_SHARE * layer.num_experts]


def _dead(layers: tuple[LayerStatistics, ...]) -> str:
    if not _measured(layers):
        least = max(LEAST_EVEN_SHARE * layer.num_experts for layer in layers)
        return f"the text is too short to tell: a layer makes fewer than the {least:,} choices that its experts need"
    return _named([(layer, layer.dead) for layer in _measured(layers)], "no tokens")


def _saturated(layers: tuple[LayerStatistics, ...]) -> str:
    return _named([(layer, layer.saturated) for layer in _measured(layers)], "nearly all tokens")


def _overloaded(layers: tuple[LayerStatistics, ...]) -> str:
    worst = max(_measured(layers), key=lambda layer: layer.max_violation, default=None)
    if worst is None or worst.max_violation + 1 < OVERLOADED or worst.num_experts <= worst.mean_active:
        return ""
    expert = int(worst.load.argmax())
    return (
        f"expert {expert} of layer {worst.label} gets {worst.max_violation + 1:.1f} times an even share of the tokens"
    )


def _named(found: list[tuple[LayerStatistics, list[int]]], what: str) -> str:
    found = [(layer, experts) for layer, experts in found if experts]
    if not found:
        return ""
    layer, experts = max(found, key=lambda one: len(one[1]))
    shown = [str(expert) for expert in experts[:NAMED]]
    if len(experts) > NAMED:
        shown = [", ".join(shown), f"{len(experts) - NAMED} more"]
    elif len(shown) > 2:
        shown = [", ".join(shown[:-1]), shown[-1]]
    words = f"expert{'s' if len(experts) > 1 else ''} {' and '.join(shown)} of layer {layer.label} "
    others = sum(len(experts) for _, experts in found) - len(experts)
    beside = f", as {'do' if others > 1 else 'does'} {others} of other layers" if others else ""
    return words + f"get{'' if len(experts) > 1 else 's'} {what}{beside}"


def _moved(statistics: RoutingStatistics) -> str:
    drift = _mean_drift(statistics)
    if drift is None or drift >= HARDLY_MOVED:
        return ""
    return f"the experts have hardly moved ({drift:.2%} of their weights): train longer, or at a higher rate"


def _undecided(statistics: RoutingStatistics) -> str:
    layers = [layer for layer in statistics.layers if layer.num_experts > 1]
    entropy = sum(layer.relative_entropy for layer in layers) / max(len(layers), 1)
    return f"the routers are undecided (entropy {entropy:.3f} of ln E)" if entropy > UNDECIDED else ""


def _good(statistics: RoutingStatistics) -> str:
    largest = max(layer.max_violation for layer in statistics.layers) + 1
    entropy = sum(layer.relative_entropy for layer in statistics.layers) / len(statistics.layers)
    drift = _mean_drift(statistics)
    apart = (
        "; how far the experts have moved is not known without the dense origin"
        if drift is None
        else f" and apart: the experts have moved by {drift:.1%} of their weights"
    )
    return f"balanced (at most {largest:.1f} times an even share), decided (entropy {entropy:.2f} of ln E){apart}"


def _mean_drift(statistics: RoutingStatistics) -> float | None:
    drift = [float(layer.mean()) for layer in statistics.drift]
    return sum(drift) / len(drift) if drift else None
