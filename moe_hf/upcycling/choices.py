"""What a user chooses by name and options, and a checkpoint's metadata records: initialisers of experts and of routers."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, TypeVar

from moe_hf.errors import MoEError


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A method whose options are the fields of a frozen dataclass.

    `name` is what a user types, `equation` and `paper` go into a checkpoint's metadata.
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    paper: ClassVar[str]

    def options(self) -> dict[str, Any]:
        """Its options as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """Name, options, equation and source, for a checkpoint's metadata."""
        return {"name": self.name, "options": self.options(), "equation": self.equation, "paper": self.paper}


SomeChoice = TypeVar("SomeChoice", bound=Choice)


def make_choice(
    argument: str,
    given: str | SomeChoice,
    options: Mapping[str, Any] | None,
    table: Mapping[str, type[SomeChoice]],
    kind: type[SomeChoice],
) -> SomeChoice:
    """The choice that `given` names in `table`, with its options; an instance of `kind` is returned as it is.

    Args:
        argument (`str`): what the user's argument is called, for the errors.

    Raises:
        MoEError: for an unknown name or option, a missing option, or options beside an instance.
    """
    if isinstance(given, kind):
        if options:
            raise MoEError(
                f"{argument} is a {type(given).__name__}, which has its options already; got {sorted(options)} too."
            )
        return given
    if not isinstance(given, str) or given not in table:
        raise MoEError(f"{argument} is {given!r}; it must be one of {list(table)}, or a {kind.__name__}.")
    known = [field.name for field in fields(table[given])]
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise MoEError(f"{argument}={given!r} has no option {unknown}; it has {known or 'none'}.")
    required = [f.name for f in fields(table[given]) if f.default is MISSING and f.default_factory is MISSING]
    missing = sorted(set(required) - set(options or {}))
    if missing:
        raise MoEError(f"{argument}={given!r} needs the option {missing}; it has {known}.")
    return table[given](**(options or {}))
