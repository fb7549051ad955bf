"""Text continuation with any causal LM, dense or sparse."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bankwise.errors import ConfigError


@torch.no_grad()
def generate_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The continuation of `prompt` (without the prompt) by a causal LM, dense or sparse; greedy at temperature 0."""
    if not prompt:
        raise ConfigError("the prompt is empty; give at least one word to continue")
    if max_new_tokens < 1 or temperature < 0:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} must be at least 1 and temperature={temperature} not negative"
        )
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    tokens = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **sampling,
    )
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
