"""Save a MoE with its code, tokenizer and card, share it, and load it back with plain transformers.

python examples/04_save_push_load.py                      saves to a temporary folder and loads from there
python examples/04_save_push_load.py you/your-new-model   pushes to the Hub (log in first: hf auth login)
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import moe_hf
from moe_hf.data import load_text, train_tokenizer
from moe_hf.hub import push_model, save_model


def main() -> None:
    """Make a model, hand it over, load it as a stranger would, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", nargs="?", help="a repository on the Hub; only a local folder if not given")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    prose = load_text("builtin").filter(lambda row: row["domain"] == "prose")
    tokenizer = train_tokenizer(prose, vocab_size=512)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=3, **sizes, **special))
    moe = moe_hf.upcycle(dense, num_experts=4)
    facts = {"title": "A tiny example", "license": "apache-2.0", "limits": ["It is random: it writes nonsense."]}

    with tempfile.TemporaryDirectory() as folder:
        if arguments.repo_id is None:
            # The folder is whole or absent, and carries a manifest of checksums; one that exists is refused.
            place = save_model(moe, tokenizer, Path(folder) / "moe", card_facts=facts)
            print("saved", *sorted(path.name for path in Path(place).iterdir()))
        else:
            place = arguments.repo_id
            print("pushed", push_model(moe, place, tokenizer, card_facts=facts).commit_url)

        # Where moe_hf is not installed: from_pretrained(place, trust_remote_code=True) uses the code beside the weights.
        loaded = AutoModelForCausalLM.from_pretrained(place)
        inputs = AutoTokenizer.from_pretrained(place)("The import statement", return_tensors="pt")
    with torch.no_grad():
        difference = (loaded(**inputs).logits - moe(**inputs).logits).abs().max()
    print(f"largest difference of the logits after loading: {difference:.1e}")
    output = loaded.generate(**inputs, max_new_tokens=8, do_sample=False)
    print(f"generated: {tokenizer.decode(output[0])!r}")


if __name__ == "__main__":
    main()
