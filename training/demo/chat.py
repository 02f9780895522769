"""What a model answers, greedily: questions where it has a chat template, beginnings of text where it has none."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


# The last one is about what the demonstration trains on.
QUESTIONS = (
    "What is the capital of France?",
    "Give me three tips for sleeping well.",
    "What does the 'with' statement do in Python?",
)
BEGINNINGS = ("The capital of France is", "Three tips for sleeping well:", "In Python, the 'with' statement")


@torch.no_grad()
def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answer_tokens: int) -> list[dict[str, str]]:
    """The greedy answers to fixed prompts, as rows with `prompt` and `answer`."""
    model.eval()
    rows = []
    for prompt in QUESTIONS if tokenizer.chat_template else BEGINNINGS:
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        ids = inputs["input_ids"].to(model.device)
        # A model that was trained has use_cache=False in its configuration.
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=answer_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        rows.append({"prompt": prompt, "answer": answer})
    return rows
