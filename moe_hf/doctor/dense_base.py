"""The dense parent of a MoE as a base: one MLP per layer, of which each expert may be a copy.

Letters: D model width, F expert width.
"""

import torch
from transformers import PreTrainedModel

from moe_hf.doctor.opening import Opened
from moe_hf.errors import MoEError
from moe_hf.modeling.dense_mlp import MLPSite, find_mlp_sites, holder_of
from moe_hf.upcycling.on_disk.dense_checkpoint import DenseCheckpoint
from moe_hf.upcycling.recipes import dense_pieces


PROJECTIONS = ("gate", "up", "down")


class DenseBase:
    """The MLPs of a dense model by layer, read one at a time.

    Raises:
        MoEError: it is no dense decoder whose MLPs are known, or lies in a form that only loading it whole reads.
    """

    def __init__(self, opened: Opened):
        self._checkpoint: DenseCheckpoint | None = None
        if opened.folder is not None:
            self._checkpoint = DenseCheckpoint(opened.folder)
        model = opened.model if self._checkpoint is None else self._checkpoint.model
        if model is None:
            raise MoEError(f"{opened.name} is a dense GGUF file: convert it with moe_hf.convert_source first.")
        self._model: PreTrainedModel = model
        self._sites: dict[int, MLPSite] = {site.layer_index: site for site in find_mlp_sites(model.base_model)}

    def matrices(self, layer: int) -> dict[str, torch.Tensor]:
        """gate (F, D), up (F, D) and down (D, F) of a layer; no gate where the MLP has none, and {} without an MLP."""
        site = self._sites.get(layer)
        if site is None:
            return {}
        names = PROJECTIONS if site.gated else PROJECTIONS[1:]
        if self._checkpoint is not None:
            return {name: self._checkpoint.piece(site, name) for name in names}
        pieces = dense_pieces(holder_of(self._model.base_model, site), site)
        return {name: pieces[name].detach() for name in names}

    def close(self) -> None:
        """Close its files."""
        if self._checkpoint is not None:
            self._checkpoint.reader.close()
