"""What a CPU cannot show: half precision, kernels, compilation and attention on CUDA. `make test-gpu`; skipped without."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_hf import MoEConfig, MoEForCausalLM, MoETrainer, MoETrainingArguments, upcycle
from tests.tiny_models import random_ids, randomise_, tiny_config, tiny_dense, tiny_native_moe
from tests.trainer.runs import rows


pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]


def moe(dtype: torch.dtype = torch.float32, **fields) -> MoEForCausalLM:
    """A model of ours on the GPU."""
    defaults = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama", hidden_size=64), **(defaults | fields)))
    randomise_(model)
    return model.to("cuda", dtype).eval()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_half_precision_is_near_float32(implementation, dtype):
    ids = random_ids().cuda()
    expected = moe(dtype)
    expected = expected.float()(ids).logits
    model = moe(dtype)
    model.set_experts_implementation(implementation)
    # A choice of experts that is nearly a tie may fall the other way for a few tokens.
    assert relative(model(ids).logits, expected) <= (0.1 if dtype == torch.bfloat16 else 0.03)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upcycling_is_exact_in_half_precision(dtype):
    dense = tiny_dense("llama", hidden_size=64).to("cuda", dtype)
    model = upcycle(dense, num_experts=4, num_experts_per_tok=2)
    ids = random_ids().cuda()
    assert relative(model(ids).logits, dense(ids).logits) <= (2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
def test_grouped_mm_with_experts_that_get_no_token(dtype):
    fields = {"balance_strategy": "bias", "scoring_func": "sigmoid", "router_aux_loss_coef": 0.0}
    model, ids = moe(dtype, **fields).train(), random_ids(1, 5).cuda()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.tensor([100.0, 100.0] + [0.0] * 6))
    gradients = {}
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients[implementation] = model.model.layers[0].mlp.experts.down_proj.grad.clone()
    assert torch.isfinite(gradients["grouped_mm"]).all()
    assert float(gradients["grouped_mm"][2:].abs().max()) == 0
    assert relative(gradients["grouped_mm"], gradients["eager"]) <= (1e-5 if dtype == torch.float32 else 5e-2)


def test_inductor_computes_what_eager_does():
    model, ids = moe(), random_ids().cuda()
    expected = model(ids).logits
    compiled = torch.compile(model)
    assert relative(compiled(ids).logits, expected) <= 1e-5
    assert relative(compiled(ids).logits, expected) <= 1e-5


def test_sdpa_is_near_eager_attention():
    ids, model = random_ids().cuda(), moe()
    expected = model(ids).logits
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        # The fused kernel of float32 multiplies in parts of lower precision.
        assert relative(model(ids).logits, expected) <= 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_attention_is_near_sdpa(dtype):
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    ids, model = random_ids().cuda(), moe(dtype)
    model.set_attn_implementation("sdpa")
    expected = model(ids).logits
    model.set_attn_implementation("flash_attention_2")
    assert relative(model(ids).logits, expected) <= 0.1


@pytest.mark.parametrize("kind", ["ours", "mixtral"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_half_precision_lowers_the_loss(precision, kind, tmp_path, monkeypatch):
    # With several GPUs in sight Trainer would copy the model to each, which MoETrainer refuses.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    model = upcycle(tiny_dense("llama"), num_experts=4, noise=0.2) if kind == "ours" else tiny_native_moe("mixtral")
    data = rows(8, identical=True)
    args = MoETrainingArguments(
        output_dir=str(tmp_path), scope="moe", max_steps=20, per_device_train_batch_size=4, learning_rate=3e-3,
        logging_steps=1, save_strategy="steps", save_steps=20, report_to="none", **{precision: True},
    )  # fmt: skip
    trainer = MoETrainer(model, args, train_dataset=data)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] < 0.8 * logged[0]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-20")
    expected = trainer.model.state_dict()
    assert all(torch.equal(tensor, expected[name].cpu()) for name, tensor in again.state_dict().items())
