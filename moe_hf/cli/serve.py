"""`moe-hf serve`: transformers' own server, which knows our models here."""

from typing import Annotated

import typer

from moe_hf.cli.app import user_errors


def serve(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.")],
) -> None:
    """Serve a model with an OpenAI-compatible API; all further options are those of `transformers serve`."""
    with user_errors():
        from transformers.utils.import_utils import is_serve_available

        from moe_hf.errors import MoEError
        from moe_hf.inspection import load_config

        if not is_serve_available():
            raise MoEError("The server's packages are missing: pip install 'transformers[serving]'")
        load_config(source)
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import app as transformers_app

    from moe_hf.modeling.modeling_moe import MoEForCausalLM

    # The server looks for the class that the config names among those of transformers, and nowhere else.
    model_manager.transformers.MoEForCausalLM = MoEForCausalLM
    transformers_app(["serve", source, *context.args], prog_name="moe-hf")
