"""What a model answers in a chat, by its own template and the tokens at which it stops."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_hf.chat.answer_masks import mask_answers, special_tokens
from moe_hf.chat.rendered_chat import TEMPLATE_ERRORS, UnmarkableChat


def answer_end_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> list[int]:
    """Tokens that end an answer: `eos_token_id` of the model's generation config, the tokenizer's, and the token that its
    template writes behind an answer.
    """
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        special = special_tokens(tokenizer)
        masked = mask_answers(tokenizer, chat, special=special)
    except UnmarkableChat:
        masked = None
    if masked is not None and masked.ends:
        own = [token for token, learnt in zip(masked.input_ids, masked.mask, strict=True) if learnt]
        ids += [token for token in own if token in special][-1:]
    return sorted({token for token in ids if token is not None})


@torch.no_grad()
def generated_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: list[dict], max_new_tokens: int
) -> str:
    """The greedy answer to a chat, without its special tokens.

    Args:
        messages: the chat before the answer.
        max_new_tokens (`int`): longest answer, in tokens.

    Raises:
        UnmarkableChat: the chat template does not take the chat.
    """
    try:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
    except TEMPLATE_ERRORS as error:
        raise UnmarkableChat(f"The chat template does not take this chat: {error}.") from error
    ends = answer_end_ids(tokenizer, model)
    training = model.training
    model.eval()
    try:
        output = model.generate(
            **prompt,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=next((i for i in (tokenizer.pad_token_id, *ends) if i is not None), None),
        )
    finally:
        model.train(training)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
