"""A model template wraps the task alone; the answer prefix follows it."""

import copy

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from bankwise.errors import ConfigError
from bankwise.evaluation.ruler import BASE_TEMPLATE, generate, resolve_template
from bankwise.upcycle.loading import LoadedDense

LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{task_template}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def with_chat(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_empty_setting_is_the_base_template(smollm2: LoadedDense) -> None:
    assert resolve_template("", smollm2.tokenizer) == BASE_TEMPLATE == "{task_template}"
    assert resolve_template(LLAMA3, smollm2.tokenizer) == LLAMA3


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "fwe"])
def test_prefix_stands_at_the_start_of_the_assistants_turn(name: str, smollm2: LoadedDense) -> None:
    (row,) = generate(name, smollm2.tokenizer, max_seq_length=1024, num_samples=1, model_template=LLAMA3)
    assert row["input"].startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n")
    assert row["input"].endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert row["answer_prefix"][0] == " "
    assert row["length"] <= 1024


def test_demonstration_of_common_words_is_a_turn_of_its_own(smollm2: LoadedDense) -> None:
    (row,) = generate("cwe", smollm2.tokenizer, max_seq_length=2048, num_samples=1, model_template=LLAMA3)
    assert row["input"].count("<|start_header_id|>user<|end_header_id|>") == 2
    assert f"{row['answer_prefix']} 1. {row['details']['demo_answer'][0]} 2. " in row["input"]


def test_demonstration_of_variable_tracking_stands_inside_the_turn(smollm2: LoadedDense) -> None:
    (row,) = generate("vt", smollm2.tokenizer, max_seq_length=2048, num_samples=1, model_template=LLAMA3)
    assert row["input"].count("<|start_header_id|>user<|end_header_id|>") == 1
    assert row["input"].count("\n\nMemorize and track") == 2
    head, tail = row["input"].split("they are:  ")
    assert head.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nMemorize")
    assert "\n\nMemorize" in tail


def test_singular_rewrites_the_model_template_too(smollm2: LoadedDense) -> None:
    template = "You are an assistant. Some answers are all short.\n{task_template}\n"
    (row,) = generate("niah_single_1", smollm2.tokenizer, max_seq_length=1024, num_samples=1, model_template=template)
    assert row["input"].startswith("You is an assistant. A answer is short.\nA special magic number is hidden")


def test_chat_setting_takes_the_tokenizers_own_template(smollm2: LoadedDense) -> None:
    template = resolve_template("chat", smollm2.tokenizer)
    assert template.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert template.endswith("<|im_start|>user\n{task_template}<|im_end|>\n<|im_start|>assistant\n")
    (row,) = generate("vt", smollm2.tokenizer, max_seq_length=2048, num_samples=1, model_template=template)
    assert row["input"].endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_braces_of_a_chat_template_survive(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = with_chat(tokenizer, "{{ '{\"role\": 1}' }}{{ messages[0]['content'] }}{}")
    template = resolve_template("chat", chat)
    (row,) = generate("fwe", tokenizer, max_seq_length=1024, num_samples=1, model_template=template)
    assert row["input"].startswith('{"role": 1}Read the following')
    assert row["input"].endswith("coded text?{}")


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_is_left_to_a_tokenizer_that_adds_it(adds_bos: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = with_chat(tokenizer, "{{ bos_token }}{{ messages[0]['content'] }}")
    chat.bos_token = chat.eos_token
    if adds_bos:
        end = chat.eos_token_id
        chat.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
        )
    assert resolve_template("chat", chat) == ("" if adds_bos else "<|endoftext|>") + "{task_template}"


def test_settings_that_give_no_template_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"has no {task_template} in it"):
        resolve_template("User: {task}", tokenizer)
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        resolve_template("chat", tokenizer)
    twice = with_chat(tokenizer, "{{ messages[0]['content'] }}{{ messages[0]['content'] }}")
    with pytest.raises(ConfigError, match="shows the user's turn 2 times"):
        resolve_template("chat", twice)
