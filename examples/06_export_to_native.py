"""Export a moe_hf model as a native MoE of transformers, that servers read without moe_hf, and take it back.

python examples/06_export_to_native.py            a tiny random Llama with experts, made on the spot
python examples/06_export_to_native.py FOLDER     a moe_hf checkpoint of yours
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moe_hf


def main() -> None:
    """Say what is exact, export, compare the logits with transformers' own model, and import again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moe", nargs="?", help="a folder; a tiny random model if not given")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(arguments.moe) if arguments.moe else Path(scratch) / "moe"
        if not arguments.moe:
            sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
            dense = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=3, **sizes)).eval()
            moe_hf.upcycle(dense, noise=0.1).save_pretrained(source)
        model = moe_hf.MoEForCausalLM.from_pretrained(source).eval()

        # Each native family can express some models and not others; the config alone tells, with the reason.
        for target, reason in moe_hf.exact_targets(model.config).items():
            print(f"{target:18} {'exact' if reason is None else reason}")

        # Tensors are copied under the family's own names, so the numbers stay the same, bit by bit. What a family
        # cannot express is refused: nothing is exported that computes something else.
        folder = moe_hf.export_native(source, Path(scratch) / "native")
        native = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = torch.randint(3, model.config.vocab_size, (2, 32))
        with torch.no_grad():
            expected, actual = model(ids).logits, native(ids).logits
        print(f"exported as {type(native).__name__}, which needs no code of moe_hf")
        print(f"relative difference of the logits: {float((expected - actual).norm() / expected.norm()):.1e}")

        # The way back, also for native models that were never ours: to train their experts here, say.
        back = moe_hf.MoEForCausalLM.from_pretrained(moe_hf.import_native(folder, Path(scratch) / "back"))
        state = back.state_dict()
        same = all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        print(f"imported again: {'every number is the same' if same else 'numbers differ'}")


if __name__ == "__main__":
    main()
