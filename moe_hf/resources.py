"""Find files that are not code (card template, recipes), in an installed wheel and in a checkout alike."""

from pathlib import Path, PurePosixPath

from moe_hf.errors import MoEError


_PACKAGE = Path(__file__).resolve().parent


def resource_path(name: str) -> Path:
    """Path of a file that is shipped with the project.

    Args:
        name (`str`): path below the project's root with forward slashes, such as `"model_cards/template.md"` or
            `"training/recipes/moe.yaml"`. The wheel carries the same paths inside the package folder.

    Raises:
        `MoEError`: the name leaves the project, or no such file is there.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise MoEError(
            f"A resource is named by a path inside the project, such as 'model_cards/template.md': {name!r}."
        )
    places = (_PACKAGE / parts, _PACKAGE.parent / parts)
    for place in places:
        if place.is_file():
            return place
    raise MoEError(
        f"{name!r} was not found at {' or '.join(str(place) for place in places)}: the installation of moe_hf is "
        "incomplete; install it again."
    )
