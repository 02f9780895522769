"""What the processes of `test_hub.py` do against the fake Hub; each prints one JSON object as its last line.

They are processes of their own because the Hub's client reads its endpoint when it is imported.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast


CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
PROMPT = "the cat sat"


def tiny_tokenizer(num_words: int = 40) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template, smaller than the tiny models' vocabulary."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *PROMPT.split(), *(f"word{i}" for i in range(num_words))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def weights_hash(model: PreTrainedModel) -> str:
    """sha256 over names, types, shapes and bits of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def facts_of(model: PreTrainedModel) -> dict:
    """What must be the same on both sides of a push."""
    model.eval()
    ids = torch.tensor([[4, 5, 6, 11]])
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    return {
        "weights": weights_hash(model),
        "tokens": tokens[0].tolist(),
        "logits": model(ids).logits.double().sum().item(),
    }


def _error(action) -> str:
    from moe_hf import MoEError

    try:
        action()
    except MoEError as error:
        return str(error)
    return "no error"


def push_ours(work: str) -> dict:
    """Upcycle from a folder, push with the model's own method, and again."""
    import moe_hf
    from moe_hf.hub import push_model, save_model
    from tests.tiny_models import tiny_dense

    tokenizer = tiny_tokenizer()
    dense = Path(work, "dense")
    tiny_dense("llama").save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    model = moe_hf.upcycle(dense, num_experts=4, noise=0.1)
    facts = facts_of(model)
    first = model.push_to_hub("tester/ours", max_shard_size="200KB")
    second = model.push_to_hub("tester/ours", max_shard_size="200KB")
    saved = save_model(model, tokenizer, Path(work, "saved"), card_facts={"license": "mit"})
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    push_model(model, "tester/faulty", tokenizer=False)
    push_model(model, "tester/cut", tokenizer=False)
    model.push_to_hub("ours", tags=["extra"], revision="next", max_shard_size="200KB", commit_message="other weights")
    return facts | {
        "oids": [first.oid, second.oid],
        "saved": sorted(file.name for file in saved.iterdir()),
        "card": (saved / "README.md").read_text(),
        "changed": facts_of(model)["weights"],
    }


def push_native(work: str) -> dict:
    """Push a native MoE of transformers with tokenizer and facts; collect the messages of pushes that must fail."""
    from moe_hf.hub import push_model, save_model
    from tests.tiny_models import tiny_native_moe

    tokenizer, large = tiny_tokenizer(), tiny_tokenizer(500)
    model = tiny_native_moe("mixtral")
    facts = {"license": "apache-2.0", "evaluation": [{"data": "prose", "nats/token": 1.5}]}
    push_model(model, "tester/native", tokenizer, card_facts=facts)
    push_model(model, "tester/secret", tokenizer, private=True)
    push_model(model, "tester/edited", tags=["extra"], commit_message="kept")
    push_model(model, "tester/edited", overwrite_card=True, commit_message="replaced")
    errors = {
        "wrong token": _error(lambda: push_model(model, "tester/other", token="hf_wrong")),
        "bad name": _error(lambda: push_model(model, "a/b/c")),
        "foreign namespace": _error(lambda: push_model(model, "somebody/model")),
        "public": _error(lambda: push_model(model, "tester/native", private=True)),
        "tokenizer": _error(lambda: push_model(model, "tester/other", large)),
        "fact": _error(lambda: push_model(model, "tester/other", card_facts={"licence": "mit"})),
        "broken card": _error(lambda: push_model(model, "tester/broken")),
        "forbidden commit": _error(lambda: push_model(model, "tester/forbidden", tokenizer=False)),
        "existing folder": _error(lambda: save_model(model, tokenizer, work)),
        "save fact": _error(lambda: save_model(model, tokenizer, Path(work, "none"), card_facts={"licence": "mit"})),
        "save tokenizer": _error(lambda: save_model(model, large, Path(work, "none"))),
    }
    del os.environ["HF_TOKEN"]
    errors["no token"] = _error(lambda: push_model(model, "tester/other"))
    return facts_of(model) | {"errors": errors, "left": sorted(entry.name for entry in Path(work).iterdir())}


def load(work: str) -> dict:
    """Load what was pushed, with the package."""
    import moe_hf

    ours = AutoModelForCausalLM.from_pretrained("tester/ours")
    assert isinstance(ours, moe_hf.MoEForCausalLM)
    branch = AutoModelForCausalLM.from_pretrained("tester/ours", revision="next")
    native = AutoModelForCausalLM.from_pretrained("tester/native")
    tokenizer = AutoTokenizer.from_pretrained("tester/ours")
    return {
        "ours": facts_of(ours),
        "branch": weights_hash(branch),
        "native": facts_of(native),
        "secret": weights_hash(AutoModelForCausalLM.from_pretrained("tester/secret")),
        "ids": tokenizer(PROMPT).input_ids,
        "chat_template": tokenizer.chat_template,
    }


def load_isolated(work: str) -> dict:
    """Load with the code from the Hub where moe_hf cannot be imported; save, reload, and push again."""
    sys.modules["moe_hf"] = None
    model = AutoModelForCausalLM.from_pretrained("tester/ours", trust_remote_code=True)
    facts = facts_of(model)
    again = Path(work, "again")
    model.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    model.push_to_hub("tester/handed-on")
    return facts | {"again": facts_of(reloaded), "module": type(model).__module__}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](sys.argv[2])))
