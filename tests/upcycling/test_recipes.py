"""Recipes: the one generator of numbers against naive float64 loops, whatever the size of its blocks."""

import pytest
import torch

from moe_hf import MoEConfig
from moe_hf.modeling.dense_mlp import find_mlp_sites, holder_of
from moe_hf.upcycling import recipes
from moe_hf.upcycling.gaussians import GaussianStream
from moe_hf.upcycling.recipes import (
    DensePiece,
    ExpertRecipe,
    Slot,
    block_tensors,
    dense_pieces,
    moments,
    slot_rows,
)
from tests.tiny_models import tiny_dense


KEY = (7, 1, 2)


def made(piece, tensor, recipe, rows, dtype=torch.float32):
    return torch.cat(list(slot_rows(Slot(0, rows, piece, recipe), DensePiece(tensor), dtype)))


def pieces_of(family="gpt2"):
    dense = tiny_dense(family)
    (site, *_) = find_mlp_sites(dense.base_model)
    return site, dense_pieces(holder_of(dense.base_model, site), site)


def naive(piece, tensor, recipe):
    """The recipe, value by value, in float64; a redrawn value is NaN."""
    axis = 1 if piece == "down" else 0
    neurons = torch.arange(tensor.shape[axis]) if recipe.neurons is None else recipe.neurons
    redrawn = set(recipe.redrawn.get(piece, torch.empty(0)).tolist())
    scale = {"down": recipe.output_scale, "down_bias": recipe.bias_scale}.get(piece, 1.0)
    if piece == "down_bias":
        return tensor.double() * scale
    made = []
    for position, neuron in enumerate(neurons.tolist()):
        values = tensor.double().select(axis, max(neuron, 0)) * scale
        values = values * 0 if neuron < 0 else values * float("nan") if position in redrawn else values
        made.append(values)
    stacked = torch.stack(made)
    return stacked.t() if piece == "down" else stacked


RECIPES = {
    "as it is": ExpertRecipe(),
    "scaled": ExpertRecipe(output_scale=0.7, bias_scale=0.3),
    "chosen": ExpertRecipe(neurons=torch.tensor([5, 3, 80, 0, 41]), output_scale=3.0),
    "filled up": ExpertRecipe(neurons=torch.tensor([5, -1, 80, 0, -1]), output_scale=3.0),
    "redrawn": ExpertRecipe(
        neurons=torch.arange(89).sub(1),
        redrawn={"up": torch.tensor([1, 60, 61]), "down": torch.tensor([3, 88]), "up_bias": torch.tensor([1, 60, 61])},
        output_scale=0.7,
        key=KEY,
    ),
}


@pytest.mark.parametrize("block_bytes", [recipes.BLOCK_BYTES, 2000], ids=["one block", "many blocks"])
@pytest.mark.parametrize("piece", ["up", "down", "up_bias", "down_bias"])
@pytest.mark.parametrize("name", RECIPES)
def test_rows_are_those_of_a_loop_over_neurons(name, piece, block_bytes, monkeypatch):
    monkeypatch.setattr(recipes, "BLOCK_BYTES", block_bytes)
    _, pieces = pieces_of()
    recipe, tensor = RECIPES[name], pieces[piece]
    expected = naive(piece, tensor, recipe)
    actual = made(piece, tensor, recipe, len(expected))
    new = expected.isnan()
    assert actual.shape == expected.shape and actual.isfinite().all()
    torch.testing.assert_close(actual[~new].double(), expected[~new], rtol=1e-7, atol=0)
    count = len(recipe.redrawn.get(piece, ()))
    assert new.sum() == count * (48 if tensor.dim() == 2 else 1)
    if name in ("as it is", "chosen", "filled up") and piece != "down":
        assert torch.equal(actual[~new].double(), expected[~new])


def test_redrawn_values_have_the_moments_of_those_they_replace_and_a_stream_of_their_own():
    tensor = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 3 + 1
    tensor[:32] += 10
    positions = torch.arange(0, 32)
    rows = made("up", tensor, ExpertRecipe(redrawn={"up": positions}, key=KEY), 64)
    replaced = tensor[:32].double()
    noise = GaussianStream(*KEY, "up").draw((32, 50)).double()
    expected = replaced.mean() + replaced.std(correction=0) * noise
    torch.testing.assert_close(rows[:32].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(rows[32:], tensor[32:])
    drawn = rows[:32].double()
    assert abs(drawn.mean() - replaced.mean()) < 4 * replaced.std() / 40
    assert abs(drawn.std() / replaced.std() - 1) < 0.08


def test_noise_is_relative_to_the_whole_piece_and_leaves_zeros():
    tensor = torch.randn(400, 50, generator=torch.Generator().manual_seed(0)) * 7
    neurons = torch.cat([torch.arange(399, -1, -1), torch.full((10,), -1)])
    recipe = ExpertRecipe(neurons=neurons, noise=0.1, output_scale=0.5, key=KEY)
    difference = made("up", tensor, recipe, 410) - tensor[neurons]
    assert float(difference[:400].std() / tensor.std()) == pytest.approx(0.1, rel=0.02)
    assert (made("up", tensor, recipe, 410)[400:] == 0).all()
    scaled = made("down", tensor.t().contiguous(), recipe, 50) - 0.5 * tensor.t()[:, neurons]
    assert float(scaled[:, :400].std() / tensor.std()) == pytest.approx(0.05, rel=0.02)


def test_an_expert_does_not_depend_on_those_made_before_it():
    tensor = torch.randn(40, 8)
    first = made("up", tensor, ExpertRecipe(noise=0.1, key=(0, 0, 1)), 40)
    torch.manual_seed(5)
    made("up", tensor, ExpertRecipe(noise=0.1, key=(0, 0, 0)), 40)
    assert torch.equal(first, made("up", tensor, ExpertRecipe(noise=0.1, key=(0, 0, 1)), 40))
    others = [((0, 0, 2), "up"), ((0, 1, 1), "up"), ((1, 0, 1), "up"), ((0, 0, 1), "gate")]
    assert not any(
        torch.equal(first, made(piece, tensor, ExpertRecipe(noise=0.1, key=key), 40)) for key, piece in others
    )


@pytest.mark.parametrize("piece", ["up", "down"])
def test_blocks_are_small_whatever_the_tensor(piece, monkeypatch):
    monkeypatch.setattr(recipes, "BLOCK_BYTES", 1 << 12)
    tensor = torch.randn(300, 20, dtype=torch.float32).bfloat16()
    recipe = ExpertRecipe(neurons=torch.randperm(20 if piece == "down" else 300), output_scale=0.3, noise=0.1, key=KEY)
    blocks = list(slot_rows(Slot(0, 300, piece, recipe), DensePiece(tensor), torch.bfloat16))
    assert sum(len(block) for block in blocks) == 300
    assert all(
        4 * block.numel() <= 1 << 12 and block.is_contiguous() and block.dtype == torch.bfloat16 for block in blocks
    )


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_each_row_of_each_tensor_has_one_slot(family):
    dense = tiny_dense(family)
    (site, *_) = find_mlp_sites(dense.base_model)
    fields = {"num_experts": 3, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 40}
    config = MoEConfig(text_config=dense.config, **fields)
    tensors = block_tensors([ExpertRecipe()] * 3, ExpertRecipe(), config, site)
    for tensor in tensors.values():
        rows = torch.Size(tensor.shape).numel() // (1 if tensor.is_bias else tensor.shape[-1])
        covered = [row for slot in tensor.slots for row in range(slot.start, slot.start + slot.rows)]
        assert covered == list(range(rows))


def test_fingerprints_are_equal_for_equal_numbers_alone():
    neurons = torch.arange(5)
    assert (
        ExpertRecipe(neurons=neurons, key=(1,)).fingerprint
        == ExpertRecipe(neurons=neurons.clone(), key=(2,)).fingerprint
    )
    others = [ExpertRecipe(), ExpertRecipe(neurons=neurons.flip(0)), ExpertRecipe(neurons=neurons, output_scale=0.5)]
    others += [ExpertRecipe(neurons=neurons, source=1), ExpertRecipe(neurons=neurons, bias_scale=0.5)]
    prints = {recipe.fingerprint for recipe in [ExpertRecipe(neurons=neurons), *others]}
    assert len(prints) == 6
    assert ExpertRecipe(noise=0.1).fingerprint is None
    assert ExpertRecipe(redrawn={"up": torch.tensor([1])}).fingerprint is None
    assert ExpertRecipe(redrawn={"up": torch.tensor([], dtype=torch.long)}).fingerprint == ExpertRecipe().fingerprint


@pytest.mark.parametrize("by_column", [False, True])
def test_moments_are_those_of_float64_in_any_number_of_blocks(by_column, monkeypatch):
    tensor = (torch.randn(60, 30) * 1e-3 + 5).bfloat16()
    chosen = torch.tensor([29, 3, 11])
    part = tensor.double()[:, chosen] if by_column else tensor.double()[chosen]
    for block_bytes in (recipes.BLOCK_BYTES, 1000):
        monkeypatch.setattr(recipes, "BLOCK_BYTES", block_bytes)
        assert moments(tensor, chosen, by_column) == pytest.approx((float(part.mean()), float(part.std(correction=0))))
        assert moments(tensor)[0] == pytest.approx(float(tensor.double().mean()))
