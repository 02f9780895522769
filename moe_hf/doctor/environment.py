"""`moe-hf doctor --environment`: the installed versions beside the tested ones, and a self-test on tiny models.

Letters: B batch, S sequence, V vocabulary, D model width, F expert width, E experts, K experts per token.
"""

import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from moe_hf.doctor.findings import ERROR, NOTE, WARNING, Report
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.trainer.router_losses import RouterLosses
from moe_hf.versions import TESTED, installed_versions


TOLERANCE = 1e-4
# No two sizes equal. F is a multiple of 8, since grouped_mm wants rows of a multiple of 16 bytes.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# A gate of SiLU, one of GELU, limits and biases, and ours.
GATES = {
    "silu": ("mixtral", {"hidden_act": "silu"}),
    "gelu": ("mixtral", {"hidden_act": "gelu"}),
    "gpt_oss": ("gpt_oss", {}),
}
IMPLEMENTATIONS = ("batched_mm", "grouped_mm")


def examine_environment() -> Report:
    """Compare the installed versions with the tested ones, and compute what must be equal on tiny models, in a few seconds.

    Returns:
        [`Report`]: an error for each computation that is wrong here.
    """
    report = Report("this environment", "environment")
    for name, version in installed_versions().items():
        oldest, newest = TESTED[name]
        inside = Version(oldest) <= Version(Version(version).public) <= Version(newest)
        report.add(
            NOTE if inside else WARNING,
            "version" if inside else "version-untested",
            f"{name} {version} is installed; tested were {oldest} to {newest}."
            + ("" if inside else f" What it computes may differ: pip install '{name}<={newest}'."),
            part=name,
        )
    report.examined["libraries"] = len(installed_versions())
    start, verbosity = time.monotonic(), logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            for name, test in _tests():
                _run(report, name, test)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    report.examined["seconds"] = round(time.monotonic() - start, 1)
    return report


def _run(report: Report, name: str, test: Callable[[], float]) -> None:
    try:
        error = test()
    except Exception as fault:  # noqa: BLE001  whatever another version raises is what is looked for
        reason = (str(fault).splitlines() or [""])[0]
        report.add(
            ERROR,
            "self-test",
            f"It fails here: {type(fault).__name__}: {reason} Install the tested versions.",
            part=name,
        )
        return
    if error <= TOLERANCE:
        report.add(NOTE, "self-test-passed", "It is right here.", part=name, figure=error)
    else:
        report.add(
            ERROR,
            "self-test",
            f"Its results differ by {error:.1e}, relative, above {TOLERANCE:.0e}: what is computed here is wrong. Install the tested versions.",
            part=name,
            figure=error,
        )


def _tests() -> Iterator[tuple[str, Callable[[], float]]]:
    for gate, (family, fields) in GATES.items():
        for implementation in IMPLEMENTATIONS:
            yield (
                f"experts implementation {implementation}, {gate}",
                lambda f=family, x=fields, i=implementation: _implementation_error(_native(f, x), i),
            )
        yield f"cache equals full pass, {family} {gate}", lambda f=family, x=fields: _cache_error(_native(f, x))
    for implementation in IMPLEMENTATIONS:
        yield (
            f"experts implementation {implementation}, moe_hf",
            lambda i=implementation: _implementation_error(_ours(), i),
        )
    yield "cache equals full pass, moe_hf", lambda: _cache_error(_ours())
    for name, make in (("mixtral", lambda: _native("mixtral", {})), ("moe_hf", _ours)):
        yield f"gradient checkpointing, {name}", lambda m=make: _checkpointing_error(m)
        yield f"save and load, {name}", lambda m=make: _saving_error(m())
        yield f"the balance loss's gradient, {name}", lambda m=make: _balance_error(m())


def _randomise(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # No norm stays one, and no bias zero.
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def _native(family: str, fields: dict) -> PreTrainedModel:
    defaults = AutoConfig.for_model(family)
    names = set(defaults.to_dict()) | set(defaults.attribute_map)
    own = {name: value for name, value in (SIZES | MOE | fields).items() if name in names}
    return _randomise(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **own), dtype=torch.float32))


def _ours() -> PreTrainedModel:
    config = MoEConfig(text_config={"model_type": "llama", **SIZES}, num_experts=4, num_experts_per_tok=2)
    return _randomise(MoEForCausalLM(config))


def _ids() -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(1))


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30))


@torch.no_grad()
def _implementation_error(model: PreTrainedModel, implementation: str) -> float:
    model.set_experts_implementation("eager")
    eager = model(input_ids=_ids(), use_cache=False).logits
    model.set_experts_implementation(implementation)
    return _difference(model(input_ids=_ids(), use_cache=False).logits, eager)


@torch.no_grad()
def _cache_error(model: PreTrainedModel) -> float:
    """Greedy decoding with the cache beside the whole row at once, through `generate`, which knows the cache's name."""
    ids = _ids()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    runs = [
        model.generate(ids, use_cache=use, return_dict_in_generate=True, **settings).logits for use in (True, False)
    ]
    return max(_difference(a, b) for a, b in zip(*runs, strict=True))


def _checkpointing_error(make: Callable[[], PreTrainedModel]) -> float:
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            # 5.24 renamed it.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(input_ids=_ids(), labels=_ids(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return max(_difference(gradients[1][name], grad) for name, grad in gradients[0].items() if grad.any())


@torch.no_grad()
def _saving_error(model: PreTrainedModel) -> float:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    return _difference(loaded(input_ids=_ids()).logits, model(input_ids=_ids()).logits)


def _balance_error(model: PreTrainedModel) -> float:
    """1 where the balance loss has no gradient in the routers; else how far a small step down it is from lowering it."""
    losses = RouterLosses(model, router_aux_loss_coef=1.0)
    losses.start()
    model.train()
    silenced = losses.silenced()
    with silenced:
        output = model(input_ids=_ids(), labels=_ids(), use_cache=False)
    loss = losses.loss()
    loss = loss if isinstance(loss, torch.Tensor) else getattr(output, "aux_loss", None)
    losses.stop()
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return 1.0
    loss.backward()
    routers = [p for name, p in model.named_parameters() if name.endswith(("gate.weight", "router.weight"))]
    moved = [p.grad for p in routers if p.grad is not None and bool(p.grad.any())]
    return 0.0 if routers and len(moved) == len(routers) else 1.0
