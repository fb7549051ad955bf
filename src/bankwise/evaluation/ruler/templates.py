"""Model templates: what a chat model needs around a task.

The template wraps the task alone and the answer prefix follows it, so the prefix stands at the start of the assistant's
turn. As upstream, the braces of a template are read twice: by its own formatting, and by that of the prompt.
"""

from transformers import PreTrainedTokenizerBase

from bankwise.errors import ConfigError
from bankwise.evaluation.ruler.catalogue import RulerTask
from bankwise.evaluation.ruler.prompts import PROMPTS

PLACE = "{task_template}"
BASE_TEMPLATE = PLACE
"""The task as it is: for models without a chat format."""

_SENTINEL = "TASKTEMPLATE"


def resolve_template(setting: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The model template of a setting: empty for the base template, `chat` for the tokenizer's own, else itself."""
    if setting == "chat":
        return chat_template(tokenizer)
    if setting and PLACE not in setting:
        raise ConfigError(f"ruler.template={setting!r} has no {PLACE} in it; leave it empty for the base template")
    return setting or BASE_TEMPLATE


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template around a single user turn, up to the start of the assistant's.

    A bos that the tokenizer puts before every text by itself is left out.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("ruler.template=chat, but the tokenizer has no chat template; leave the setting empty")
    turns = [{"role": "user", "content": _SENTINEL}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    if text.count(_SENTINEL) != 1:
        raise ConfigError(
            f"the tokenizer's chat template shows the user's turn {text.count(_SENTINEL)} times; "
            f"write the template out in ruler.template, with {PLACE} in it"
        )
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(bos)
    return text.replace("{", "{{{{").replace("}", "}}}}").replace(_SENTINEL, PLACE)


def full_template(task: RulerTask, model_template: str) -> str:
    """Task and answer prefix of a task, wrapped by a model template."""
    prompt = PROMPTS[task.family]
    try:
        template = model_template.format(task_template=prompt.template) + prompt.prefix
        template.format(context="", query="", type_needle_v="", num_v="")
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"the model template {model_template!r} cannot be filled in ({type(error).__name__}: {error}); its only "
            f"place is {PLACE}, and a brace of its own is written four times"
        ) from error
    if prompt.template not in template:
        raise ConfigError(f"the model template {model_template!r} has no {PLACE} in it")
    return template
