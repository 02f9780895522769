"""`upcycle_checkpoint`: a dense checkpoint on disk in, a verified MoE checkpoint on disk out, for models beyond memory."""

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from moe_hf.dense_sources import TOKENIZER_FILES, quantized_as
from moe_hf.errors import MoEError
from moe_hf.hub import check_vocabulary
from moe_hf.reporting.card import model_card
from moe_hf.saving import refuse_existing
from moe_hf.source_folders import SourceFolders, fingerprint_of
from moe_hf.unwrapping import path_of
from moe_hf.upcycling.initialisers import Initialiser
from moe_hf.upcycling.observations import observe
from moe_hf.upcycling.on_disk.dense_checkpoint import DenseCheckpoint
from moe_hf.upcycling.on_disk.layerwise import load_layerwise
from moe_hf.upcycling.on_disk.partial_folder import PartialFolder
from moe_hf.upcycling.on_disk.weight_stream import WeightStream
from moe_hf.upcycling.prepare import prepare
from moe_hf.upcycling.router_init import RouterInit
from moe_hf.upcycling.sample_text import SampleText, sample_text
from moe_hf.upcycling.upcycle import check_result, source_facts
from moe_hf.weight_writer import FileLayout, FileWriter, file_layouts, write_index


logger = logging.get_logger(__name__)


def upcycle_checkpoint(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    num_experts: int | None = None,
    num_experts_per_tok: int | None = None,
    preset: str | None = None,
    init: str | Initialiser = "copy",
    router_init: str | RouterInit = "normal",
    noise: float = 0.0,
    shared_share: float = 0.5,
    seed: int = 0,
    inputs: torch.Tensor | None = None,
    data: str | Path | None = None,
    verify_inputs: torch.Tensor | None = None,
    verify: bool = True,
    allow_inexact: bool = False,
    max_shard_size: int | str = "5GB",
    restart: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **config_fields,
) -> Path:
    """Turn a dense checkpoint into a MoE checkpoint, tensor by tensor, without a whole model in memory.

    The folder is what [`upcycle`] and [`save_model`] make, byte by byte: weights, configuration, code, tokenizer, card
    and manifest. Until it is whole it grows in `.NAME.partial` beside `output_dir`, and appears there in one step. After
    a kill or a full disk the same call continues where it stopped.

    Args:
        source (`str` or `os.PathLike`): a folder with a config and safetensors files, a GGUF file, or a Hub id, which is
            fetched first. What is quantized is converted first, beside `output_dir`, see [`convert_source`].
        output_dir (`str` or `os.PathLike`): must not exist.
        num_experts (`int`, *optional*): E, experts per layer; 8, or the preset's.
        num_experts_per_tok (`int`, *optional*): K, experts per token; 2, or the preset's.
        preset (`str`, *optional*): the MoE of a paper; see [`upcycle`].
        init, router_init, noise, shared_share, seed: how the experts and the routers start; see [`upcycle`].
        inputs (`torch.Tensor`, *optional*): token ids (B, S) of the user's data, for methods that look at what the dense
            model does on them.
        data, verify_inputs: text to measure the loss on before and after, and token ids whose logits are compared besides;
            see [`upcycle`].
        verify (`bool`): run the dense and the MoE checkpoint layer by layer on the same tokens before anything is
            published; the figures go into `upcycling.verification` of the config. None is stored without it.
        allow_inexact (`bool`): publish a model that should be the dense one's equal and is not.
        max_shard_size (`int` or `str`): bytes of tensors in one file.
        restart (`bool`): throw away what an interrupted call with other arguments left.
        progress (`Callable`, *optional*): `progress(done, total)`, in bytes of weights; a progress bar with the time left
            if not given, unless transformers' progress bars are disabled.
        **config_fields: further fields of [`MoEConfig`]; see [`upcycle`].

    Returns:
        `pathlib.Path` of the folder.

    Raises:
        MoEError: the destination exists or is the source, another process writes it, an interrupted call had other
            arguments, there is too little space, the source is no dense decoder or changes in the meantime, or the
            result should be exact and is not; `NotStreamableError` when [`upcycle`] can do it and this cannot. Nothing is
            published then.
    """
    if data is not None and not verify:
        raise MoEError("data is text for the check, and verify=False leaves that out: leave one of them out.")
    output_dir = Path(output_dir).expanduser()
    _check_destination(source, output_dir)
    arguments = {
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "preset": preset,
        "init": init,
        "router_init": router_init,
        "noise": noise,
        "shared_share": shared_share,
        "seed": seed,
        "allow_inexact": allow_inexact,
        "config_fields": config_fields,
    }
    with ExitStack() as stack:
        partial = stack.enter_context(PartialFolder(output_dir, restart=restart))
        job = _Job(stack, source, SourceFolders(partial, source, arguments), inputs, data, arguments)
        layouts = file_layouts(job.stream.tensors, max_shard_size)
        facts = job.facts() | {"max_shard_size": max_shard_size}
        partial.begin(facts)
        _check_space(partial, layouts)
        with job.writing_weights(partial, layouts, progress):
            job.write_other_files(partial.folder)
        if job.fingerprints() != facts["sources"]:
            partial.discard()
            raise MoEError(
                f"{source} changed while it was read: nothing was published. Call again when it is at rest."
            )
        if verify:
            # The figures go into the config and the card, which are written a second time.
            job.verify(partial, verify_inputs, allow_inexact)
            job.write_other_files(partial.folder)
        partial.publish()
    return output_dir


class _Job:
    """One conversion: what is read, how, and the model that comes out, on the meta device."""

    def __init__(
        self,
        stack: ExitStack,
        source: str | os.PathLike,
        sources: SourceFolders,
        inputs: torch.Tensor | None,
        data: str | Path | None,
        arguments: dict[str, Any],
    ):
        self.sources = sources
        self.dense: list[DenseCheckpoint] = []

        def open_source(given: str | os.PathLike) -> tuple[str, PreTrainedModel]:
            folder = sources.folder(given)
            self.dense.append(stack.enter_context(DenseCheckpoint(folder)))
            return str(folder), self.dense[-1].model

        ready = prepare(source, open_source, **arguments)
        self.method, self.config, self.moe, self.sites = ready.method, ready.config, ready.moe, ready.sites[0]
        for dense, sites in zip(self.dense, ready.sites, strict=True):
            for site in sites:
                dense.check_mlp(site)
        folder, given = sources.folders[0], sources.given[0]
        self.tokenizer = _tokenizer(folder)
        check_vocabulary(self.moe, self.tokenizer)
        self.inputs = inputs
        # Before anything is written, since it may not be there.
        self.data = None if data is None else sample_text(self.config, lambda: self.tokenizer, data)
        seen = observe(
            self.method,
            self.config,
            lambda: load_layerwise(folder),
            self.sites,
            inputs,
            lambda: self.tokenizer,
            lambda: self.text,
        )
        # The Hub's cache calls a folder by its commit.
        revision = {"revision": given.name} if given.parent.name == "snapshots" else {}
        recorded = {**source_facts(str(source), quantized_as(given)), **revision, **self.method.to_dict()}
        self.config.upcycling = {**recorded, **seen.facts, "verification": None}
        self.stream = WeightStream(self.dense, ready.sites, self.moe, self.method, seen.layers)

    @cached_property
    def text(self) -> SampleText | None:
        """The first of the inputs, or prose."""
        return sample_text(self.config, lambda: self.tokenizer, inputs=self.inputs)

    def fingerprints(self) -> list[dict[str, Any]]:
        """What tells whether the sources are still the same files."""
        return [fingerprint_of(path) for path in self.sources.given]

    def facts(self) -> dict[str, Any]:
        """All that decides the bytes of the weights."""
        return {
            "sources": self.fingerprints(),
            "config": json.loads(self.config.to_json_string(use_diff=False)),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    @contextmanager
    def writing_weights(
        self, partial: PartialFolder, layouts: list[FileLayout], progress: Callable[[int, int], None] | None
    ) -> Iterator[None]:
        """Write the files that are not finished yet, and the index; the block runs while the last one is flushed."""
        total = sum(spec.nbytes for spec in self.stream.tensors.values())
        flushed: list[Future] = []

        def finish(file: FileWriter) -> None:
            file.close()
            partial.finish(file.layout.name, file.checksum)

        with _progress(progress, total) as advance, ThreadPoolExecutor(1) as flushing:
            for layout in layouts:
                if layout.name in partial.finished:
                    advance(sum(spec.nbytes for spec in layout.tensors.values()))
                    continue
                if len(flushed) > 1:
                    # Copies of one file may go on beside the next one. Of more, none would be finished if the process dies.
                    flushed[-2].result()
                file = FileWriter(partial.folder, layout, advance)
                try:
                    self.stream.write(file)
                except BaseException:
                    file.abandon()
                    raise
                flushed.append(flushing.submit(finish, file))
            write_index(partial.folder, layouts, self.moe.num_parameters())
            yield
            for future in flushed:
                future.result()

    def write_other_files(self, folder: Path) -> None:
        """Write configuration, code, tokenizer and card."""
        card = model_card(self.moe, tokenizer=self.tokenizer)
        # save_pretrained removes weight files that it did not write, so it gets a folder of its own.
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, _no_progress_bar():
            self.moe.save_pretrained(scratch, state_dict={})
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(scratch)
            card.save(Path(scratch) / "README.md")
            shutil.copytree(scratch, folder, dirs_exist_ok=True)

    def verify(
        self,
        partial: PartialFolder,
        verify_inputs: torch.Tensor | None,
        allow_inexact: bool,
    ) -> None:
        """Compare source and result, and record the figures in the configuration."""
        try:
            check_result(
                self.sources.folders[0],
                partial.folder,
                self.config,
                self.moe.dtype,
                self.method,
                self.sites,
                verify_inputs,
                self.data or self.text,
                allow_inexact,
            )
        except MoEError:
            partial.discard()
            raise


def _check_destination(source: str | os.PathLike, output_dir: Path) -> None:
    """Refuse a destination that exists, or lies in the source."""
    given = Path(path_of(source, "upcycle(model) takes a model in memory")).expanduser()
    mine, its = given.resolve(), output_dir.resolve()
    if mine == its or mine in its.parents:
        raise MoEError(f"{output_dir} is in the source {source}: nothing was written. Choose another folder.")
    refuse_existing(output_dir)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder)


def _check_space(partial: PartialFolder, layouts: list[FileLayout]) -> None:
    """Refuse to start what the disk has no room for."""
    needed = sum(layout.size for layout in layouts if layout.name not in partial.finished)
    free = shutil.disk_usage(partial.path).free
    if needed > free:
        if not partial.finished:
            partial.discard()
        raise MoEError(
            f"{partial.destination} needs {needed / 1e9:.2f} GB more, and its file system has {free / 1e9:.2f} GB free: "
            "nothing was written. Make room, or choose another file system."
        )


@contextmanager
def _progress(progress: Callable[[int, int], None] | None, total: int) -> Iterator[Callable[[int], None]]:
    """A function that is told the bytes of each piece, from whatever thread."""
    lock, done = threading.Lock(), 0
    with logging.tqdm(
        total=total, unit="B", unit_scale=True, desc="Writing experts", disable=progress is not None
    ) as bar:

        def advance(num_bytes: int) -> None:
            nonlocal done
            with lock:
                done += num_bytes
                bar.update(num_bytes)
                if progress is not None:
                    progress(done, total)

        yield advance


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
