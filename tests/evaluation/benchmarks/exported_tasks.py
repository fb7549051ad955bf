"""Writes documents of the offline set as lm-eval tasks: the same contexts and answers, read from local files."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from bankwise.evaluation.benchmarks.catalogue import find_task
from bankwise.evaluation.benchmarks.documents import Document
from bankwise.evaluation.benchmarks.scoring import draw

PREFIX = "exported_"


def export(folder: Path, names: Sequence[str], limit: int) -> dict[str, list[Document]]:
    """The documents of every task; `folder` then holds the tasks `exported_<name>`."""
    exported = {}
    for name in names:
        documents = [
            document for document in draw(find_task(name).read().documents, 3 * limit, 0) if _has_one(document)
        ]
        exported[name] = documents[:limit]
        rows = [_row(document) for document in exported[name]]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "task": PREFIX + name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "num_fewshot": 0,
            **_form(exported[name][0]),
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return exported


def _has_one(document: Document) -> bool:
    """Whether no other answer reads like the gold one: lm-eval gives such a tie to the first, we to none."""
    return len(document.contexts) > 1 or document.continuations.count(document.continuations[document.gold]) == 1


def _row(document: Document) -> dict[str, object]:
    answers = [text.removeprefix(" ") for text in document.continuations]
    if len(document.contexts) > 1:
        return {"number": document.gold, "contexts": list(document.contexts), "ending": answers[0]}
    return {"query": document.contexts[0], "choices": answers, "gold": document.gold, "answer": f" {answers[0]}"}


def _form(document: Document) -> dict[str, object]:
    accuracies = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    if len(document.contexts) > 1:
        fields = {"doc_to_text": "number", "doc_to_choice": "contexts", "doc_to_target": "ending"}
        return {"output_type": "multiple_choice", **fields, "metric_list": accuracies[:1]}
    if len(document.continuations) > 1:
        fields = {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"}
        return {"output_type": "multiple_choice", **fields, "metric_list": accuracies}
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    fields = {"doc_to_text": "query", "doc_to_target": "answer"}
    return {"output_type": "loglikelihood", **fields, "metric_list": [perplexity, accuracies[0]]}
