"""What a wrong CWE answer did wrong: a class for each item, and one for the whole answer.

Pure functions over the text of an answer and the words of its row. Case never matters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from bankwise.evaluation.ruler.score import occurs, parse_items, postprocess

ItemClass = Literal["correct", "repeat", "rare", "demo", "near", "off_list"]
ITEM_CLASSES: tuple[ItemClass, ...] = get_args(ItemClass)
AnswerClass = Literal["null", "unparsed", "demo_copy", "loop", "short", "ok"]
ANSWER_CLASSES: tuple[AnswerClass, ...] = get_args(AnswerClass)

_CYCLES = 3  # repetitions that make a loop


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer, read."""

    items: tuple[str, ...]
    """As parsed, in lower case."""
    item_classes: tuple[ItemClass, ...]
    """
    correct   one of the common words, not given before
    repeat    equal to an earlier item
    rare      an uncommon word of the list
    demo      a word of the demonstration's list
    near      contains, lies in, or is one edit away from a word of either list
    off_list  anything else

    The first that fits.
    """
    answer_class: AnswerClass
    """
    null       nothing
    unparsed   no item
    demo_copy  at least half of the demonstration's answer (5 of 10 words), as items of class `demo`
    loop       items that repeat as a cycle, three times in a row
    short      fewer items than common words
    ok         none of these

    The first that fits.
    """
    substring_only: int
    """References that the official rule finds somewhere in the text, but that are no item."""


def read_answer(prediction: str, words: Mapping[str, Sequence[str]]) -> Answer:
    """`words`: the `details` of a CWE row (`common`, `rest`, `demo_words`, `demo_answer`)."""
    text = postprocess(prediction)
    items = parse_items(text)
    common, demo_answer = _lower(words["common"]), set(_lower(words["demo_answer"]))
    classes = classify_items(items, common, _lower(words["rest"]), _lower(words["demo_words"]))
    copied = sum(kind == "demo" and item in demo_answer for item, kind in zip(items, classes, strict=True))
    answer_class: AnswerClass = "ok"
    if not text:
        answer_class = "null"
    elif not items:
        answer_class = "unparsed"
    elif 2 * copied >= len(demo_answer):
        answer_class = "demo_copy"
    elif has_loop(items):
        answer_class = "loop"
    elif len(items) < len(common):
        answer_class = "short"
    return Answer(
        items=tuple(items),
        item_classes=tuple(classes),
        answer_class=answer_class,
        substring_only=sum(occurs(word, text) and word not in items for word in common),
    )


def classify_items(
    items: Sequence[str], common: Sequence[str], rest: Sequence[str], demo_words: Sequence[str]
) -> list[ItemClass]:
    """The class of each item; everything in lower case."""
    common_words, rare_words, shown_words = set(common), set(rest), set(demo_words)
    listed = common_words | rare_words | shown_words
    classes: list[ItemClass] = []
    given: set[str] = set()
    for item in items:
        if item in given:
            classes.append("repeat")
        elif item in common_words:
            classes.append("correct")
        elif item in rare_words:
            classes.append("rare")
        elif item in shown_words:
            classes.append("demo")
        elif any(word in item or item in word or within_one_edit(item, word) for word in listed):
            classes.append("near")
        else:
            classes.append("off_list")
        given.add(item)
    return classes


def within_one_edit(a: str, b: str) -> bool:
    """Whether one letter inserted, dropped or changed makes `a` into `b`, or none."""
    if abs(len(a) - len(b)) > 1:
        return False
    same = next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[same + 1 :] == b[same + 1 :] or a[same:] == b[same + 1 :] or a[same + 1 :] == b[same:]


def has_loop(items: Sequence[str]) -> bool:
    """Whether some run of items stands three times in a row."""
    for period in range(1, len(items) // _CYCLES + 1):
        same = 0
        for item, later in zip(items, items[period:], strict=False):
            same = same + 1 if item == later else 0
            if same == (_CYCLES - 1) * period:
                return True
    return False


def _lower(words: Sequence[str]) -> list[str]:
    return [word.lower() for word in words]
