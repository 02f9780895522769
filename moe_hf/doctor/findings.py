"""What an examination finds: findings with a severity, a code, a place and a figure, and a report of them."""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_hf.doctor.codes import CODES
from moe_hf.errors import MoEError


ERROR, WARNING, NOTE = SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: `"error"`, `"warning"` or `"note"`.
        code: of `CODES`; docs/doctor.md has a paragraph on each.
        message: what it is, what follows for the user, and what to do.
        layers: numbers of the decoder layers; empty where it is about the whole.
        experts: ids within their layers; empty where it is about no expert alone.
        figure: the number that shows it, or None.
        part: what else the place is called, such as a tensor or a step.
    """

    severity: str
    code: str
    message: str
    layers: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    figure: float | int | None = None
    part: str = ""

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES or self.code not in CODES:
            raise ValueError(f"{self.severity} {self.code} is no finding: see SEVERITIES and CODES.")

    @property
    def where(self) -> str:
        """The place in words: `layer 3, experts 1, 5-7`."""
        places = [_counted("layer", self.layers), _counted("expert", self.experts), self.part]
        return ", ".join(place for place in places if place) or "the whole"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "severity": self.severity,
            "code": self.code,
            "where": self.where,
            "layers": list(self.layers),
            "experts": list(self.experts),
            "figure": self.figure,
            "message": self.message,
        }


@dataclass
class Report:
    """The findings on one thing, worst first when they are shown.

    Attributes:
        name: what was examined.
        kind: what it turned out to be, such as `"checkpoint"` or `"adapter"`.
        findings: in the order in which they were found.
        examined: what was looked at, with counts; what is not named here was not looked at.
    """

    name: str
    kind: str
    findings: list[Finding] = field(default_factory=list)
    examined: dict[str, Any] = field(default_factory=dict)

    def add(self, severity: str, code: str, message: str, **place: Any) -> None:
        """Add a finding; `place` as the fields of [`Finding`]."""
        for name in ("layers", "experts"):
            if name in place:
                place[name] = tuple(sorted(set(place[name])))
        self.findings.append(Finding(severity, code, message, **place))

    def add_by_name(self, severity: str, code: str, names: Collection[str], message: str, **place: Any) -> None:
        """Add what was found of tensors or modules: the layers that their names speak of, and how many they are."""
        self.add(severity, code, message, layers=layer_numbers(names), figure=len(names), **place)

    def add_by_layer(self, severity: str, code: str, found: dict[int, Iterable[int]], message: str, **place) -> None:
        """Add what was found of experts by layer; layers with the same experts are one finding."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for layer, experts in found.items():
            groups.setdefault(tuple(sorted(set(experts))), []).append(layer)
        for experts, layers in groups.items():
            self.add(severity, code, message, layers=layers, experts=experts, **place)

    def of(self, *severities: str) -> list[Finding]:
        """The findings of these severities."""
        return [finding for finding in self.findings if finding.severity in severities]

    @property
    def errors(self) -> list[Finding]:
        """The findings that are errors."""
        return self.of(ERROR)

    @property
    def warnings(self) -> list[Finding]:
        """The findings that are warnings."""
        return self.of(WARNING)

    def fails(self, fail_on: str = ERROR) -> bool:
        """Whether a finding is as bad as `fail_on` or worse.

        Raises:
            MoEError: it is no severity.
        """
        if fail_on not in SEVERITIES:
            raise MoEError(f"fail_on is {fail_on!r}; it must be error, warning or note.")
        return bool(self.of(*SEVERITIES[: SEVERITIES.index(fail_on) + 1]))

    def sorted(self) -> list[Finding]:
        """Errors first, then warnings, then notes; otherwise as they were found."""
        return sorted(self.findings, key=lambda finding: SEVERITIES.index(finding.severity))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "findings": [finding.to_dict() for finding in self.sorted()],
            "examined": self.examined,
        }

    def to_json(self) -> str:
        """The same as `to_dict`, as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_text(self) -> str:
        """What the command prints."""
        lines = [f"{self.name} ({self.kind})"]
        for finding in self.sorted():
            figure = "" if finding.figure is None else f" [{finding.figure:.4g}]"
            lines += [f"{finding.severity.upper()} {finding.code}: {finding.where}{figure}", f"  {finding.message}"]
        counts = [(len(self.of(severity)), severity) for severity in SEVERITIES]
        lines.append(", ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts))
        looked_at = ", ".join(f"{value} {name}" for name, value in self.examined.items())
        return "\n".join([*lines, f"looked at: {looked_at}" if looked_at else "looked at nothing"])


def _counted(noun: str, numbers: Sequence[int]) -> str:
    if not numbers:
        return ""
    return f"{noun}{'' if len(numbers) == 1 else 's'} {ranges(numbers)}"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in words: `0, 2, 5-9`."""
    groups: list[list[int]] = []
    for number in sorted(set(numbers)):
        if groups and number == groups[-1][1] + 1:
            groups[-1][1] = number
        else:
            groups.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in groups)


def layer_numbers(names: Iterable[str]) -> list[int]:
    """The numbers of the layers that names speak of."""
    found = (re.search(r"(?:layers|h|blocks|blk|layer)\.(\d+)(?:\.|$)", name) for name in names)
    return sorted({int(match[1]) for match in found if match})
