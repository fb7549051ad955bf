"""CWE-lite: the common-words task on short lists, for models that RULER's own sizes leave at the floor.

RULER's wording with the number of common words in place of 10, and a solved demonstration of the same kind. Each row is
drawn from a stream of its own, so layouts differ from row to row and a row does not depend on any other. Not
RULER-compatible.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from bankwise.errors import ConfigError
from bankwise.evaluation.ruler.catalogue import RulerTask, find_task
from bankwise.evaluation.ruler.cwe import CommonWords
from bankwise.evaluation.ruler.family import Streams, Window
from bankwise.evaluation.ruler.generate import token_counter
from bankwise.evaluation.ruler.prompts import PROMPTS
from bankwise.evaluation.ruler.templates import BASE_TEMPLATE, full_template

_OFFICIAL = find_task("cwe")
_OFFICIAL_COUNT = int(_OFFICIAL.arguments["num_cw"])


@dataclass(frozen=True, kw_only=True)
class LitePreset:
    """Sizes of a CWE-lite task."""

    words: int
    """Distinct words of the list."""
    repeats: tuple[int, int]
    """How often each common and each uncommon word stands in the list."""
    common: int
    """Common words, which the answer names."""
    demo_repeats: tuple[int, int]
    demo_words: int = 20

    @property
    def tokens_to_generate(self) -> int:
        """RULER's 120 for ten words, in proportion."""
        return self.common * _OFFICIAL.tokens_to_generate // _OFFICIAL_COUNT


LITE_PRESETS = {
    "lite-20-3": LitePreset(words=20, repeats=(10, 1), common=3, demo_repeats=(5, 1)),
    "lite-40-3": LitePreset(words=40, repeats=(10, 1), common=3, demo_repeats=(5, 1)),
    "lite-52-10": LitePreset(words=52, repeats=(6, 1), common=10, demo_repeats=(3, 1)),
    "lite-200-10": LitePreset(words=200, repeats=(6, 1), common=10, demo_repeats=(3, 1)),
}


def generate(
    preset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    seed: int = 42,
    model_template: str = BASE_TEMPLATE,
) -> list[dict[str, Any]]:
    """Rows of a preset, with the keys of `ruler.generate`'s; `length` counts the prompt and the answer's room."""
    sizes = find_preset(preset)
    prompt = PROMPTS[_OFFICIAL.family]
    prefix = _for_count(prompt.prefix, sizes.common)
    template = full_template(_OFFICIAL, model_template).removesuffix(prompt.prefix) + prefix
    template = template.replace(prompt.template, _for_count(prompt.template, sizes.common))
    count = token_counter(tokenizer)
    family = _LiteWords(preset, sizes, template, count)
    rows = []
    for row in range(num_samples):
        draft = family.build(sizes.words, _row_streams(preset, seed, row), row)
        length = count(draft.text) + sizes.tokens_to_generate
        rows.append(
            {
                "index": row,
                "input": draft.text.removesuffix(prefix),
                "outputs": list(draft.outputs),
                "length": length,
                "length_w_model_temp": length,
                "answer_prefix": prefix,
                "details": {
                    "task": preset,
                    "row": row,
                    "units": sizes.words,
                    "ruler_compatible": False,
                    "permutation": "per_sample",
                    **draft.details,
                },
            }
        )
    return rows


def find_preset(name: str) -> LitePreset:
    """The preset of that name."""
    if name not in LITE_PRESETS:
        raise ConfigError(f"there is no CWE-lite preset {name!r}; the presets are {', '.join(LITE_PRESETS)}")
    return LITE_PRESETS[name]


class _LiteWords(CommonWords):
    """RULER's common words in other sizes."""

    def __init__(self, preset: str, sizes: LitePreset, template: str, count: Callable[[str], int]) -> None:
        task = RulerTask(
            name=preset,
            family="common_words_extraction",
            tokens_to_generate=sizes.tokens_to_generate,
            metric="all",
            arguments={"freq_cw": sizes.repeats[0], "freq_ucw": sizes.repeats[1], "num_cw": sizes.common},
            ruler_compatible=False,
        )
        window = Window(task=preset, max_seq_length=0, template_tokens=0, new_tokens=sizes.tokens_to_generate)
        super().__init__(task, window, template, count, second_words=None)
        self._repeats = sizes.repeats
        self._demo_size, self._demo_repeats = sizes.demo_words, sizes.demo_repeats


def _row_streams(preset: str, seed: int, row: int) -> Streams:
    own = random.Random(f"{preset}/{seed}/{row}")
    return Streams(main=own, fresh=lambda: own, five_digits=lambda: own.randrange(10000, 99999))


def _for_count(text: str, common: int) -> str:
    return text.replace(f" {_OFFICIAL_COUNT} ", f" {common} ")
