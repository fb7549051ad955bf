"""The tasks of the offline set: where each one's documents are, what is measured on them and where it belongs.

`TASKS` are the names of `benchmarks.tasks`. Every other request file of the package is a task too, under the name
`<task>:<variant>` (`piqa:val_mc_5shot`), with the metrics its config.json asks for; `mmlu:<subject>` is one subject.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from bankwise.errors import ConfigError
from bankwise.evaluation.benchmarks.documents import (
    MISSING,
    DocumentSet,
    mmlu_subjects,
    package_root,
    read_copa,
    read_mmlu,
    read_requests,
    request_config,
    request_folders,
)

Kind = Literal["choice", "answer", "word"]

COMMONSENSE, READING, KNOWLEDGE, MATHS_AND_CODE = "commonsense", "reading", "knowledge", "maths and code"

_CHOICE_METRICS = {
    "acc_raw": "acc",
    "acc_per_char": "acc_per_char",
    "acc_per_token": "acc_per_token",
    "acc_uncond": "acc_pmi",
}
"""Our name of each primary metric that the config.json of a choice among answers can name."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task."""

    name: str
    kind: Kind
    """`choice`: the right one of several answers. `answer`: how likely the gold answer is. `word`: also, whether greedy
    decoding gives it."""
    group: str
    """Group of the report; empty: none."""
    read: Callable[[], DocumentSet]
    headline: str = ""
    """Metric that a summary shows, where it is not the primary metric of the documents."""
    with_pmi: bool = False
    """Whether the answers are also scored without the question. Done where the field compares by it: short answers,
    whose own frequency says much."""

    def headline_metric(self, source: DocumentSet) -> str:
        """Metric that a summary shows: by which these documents are usually compared."""
        # The primary metric of a gold answer can be one of generation (exact_match); what is scored here is its bits.
        return self.headline or (_CHOICE_METRICS[source.primary_metric] if self.kind == "choice" else "bits_per_byte")


def _requests(
    name: str, folder: str, group: str, *, kind: Kind = "choice", headline: str = "", with_pmi: bool = False
) -> Task:
    read = partial(read_requests, folder)
    return Task(name=name, kind=kind, group=group, read=read, headline=headline, with_pmi=with_pmi)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _requests("piqa", "piqa/rc_0shot", COMMONSENSE),
        _requests("socialiqa", "socialiqa/rc_0shot", COMMONSENSE),
        _requests("hellaswag", "hellaswag/rc_0shot", COMMONSENSE),
        _requests("winogrande", "winogrande/rc_0shot", COMMONSENSE),
        _requests("arc_easy", "arc_easy/rc_0shot", COMMONSENSE),
        _requests("arc_challenge", "arc_challenge/rc_0shot", COMMONSENSE, with_pmi=True),
        _requests("openbookqa", "openbookqa/rc_0shot", COMMONSENSE, with_pmi=True),
        _requests("sciq", "sciq/rc_0shot", COMMONSENSE),
        _requests("csqa", "csqa/rc_0shot", COMMONSENSE, with_pmi=True),
        Task(name="copa", kind="choice", group=COMMONSENSE, read=read_copa),
        _requests("boolq", "boolq/rc_0shot", READING),
        # The file is meant for bits per byte; the field compares LAMBADA by accuracy.
        _requests("lambada", "lambada/bpb_0shot", READING, kind="word", headline="acc"),
        _requests("squad_bpb", "squad/bpb_5shot", READING, kind="answer"),
        Task(name="mmlu", kind="choice", group=KNOWLEDGE, read=read_mmlu),
        _requests("gsm8k_bpb", "gsm8k/gold_bpb_5shot", MATHS_AND_CODE, kind="answer"),
        _requests("minerva_math_500_bpb", "minerva_math_500/gold_bpb_0shot", MATHS_AND_CODE, kind="answer"),
        _requests("humaneval_bpb", "codex_humaneval/gold_bpb_0shot", MATHS_AND_CODE, kind="answer"),
        _requests("mbpp_bpb", "codex_mbpp/gold_bpb_3shot", MATHS_AND_CODE, kind="answer"),
    )
}

_REFUSED = {"drop": "its answers are printed Python tuples, so that their likelihood means nothing"}

_GROUPS = {
    ("piqa", "socialiqa", "hellaswag", "winogrande", "arc_", "openbookqa", "sciq", "csqa"): COMMONSENSE,
    ("boolq", "lambada", "squad", "coqa", "qasper", "sciriff"): READING,
    ("medmcqa", "medqa", "naturalqs", "jeopardy", "lab_bench"): KNOWLEDGE,
    ("gsm8k", "minerva_math", "codex_", "mt_mbpp"): MATHS_AND_CODE,
}
"""Group of a `<task>:<variant>` by how the task's name begins; what is not here is in none."""


def find_task(name: str) -> Task:
    """The task of that name; an unknown one raises with the names that come close."""
    base, _, variant = name.partition(":")
    if base.removesuffix("_bpb") in _REFUSED:
        raise ConfigError(f"benchmarks.tasks: {name} is not offered: {_REFUSED[base.removesuffix('_bpb')]}")
    if name in TASKS:
        return TASKS[name]
    if not variant:
        close = difflib.get_close_matches(name, TASKS, n=3) or sorted(TASKS)
        raise ConfigError(
            f"benchmarks.tasks: {name!r} is not known; did you mean {_either(close)}? Further variants are named "
            "<task>:<variant>, for example piqa:val_mc_5shot"
        )
    if package_root() is None:
        raise ConfigError(MISSING)
    if base == "mmlu":
        return _subject(name, variant)
    folder = f"{base}/{variant}"
    folders = request_folders()
    if folder not in folders:
        variants = [known.partition("/")[2] for known in folders if known.startswith(f"{base}/")]
        names = [known.replace("/", ":") for known in folders]
        close = [f"{base}:{known}" for known in variants] or difflib.get_close_matches(name, names, n=3) or names[:3]
        raise ConfigError(f"benchmarks.tasks: {name!r} is not in the package; there is {_either(close)}")
    primary = str(request_config(folder)["primary_metric"])
    kind: Kind = "word" if base == "lambada" else "choice" if primary.startswith("acc") else "answer"
    group = next((group for starts, group in _GROUPS.items() if base.startswith(starts)), "")
    known = TASKS.get(base)
    return _requests(
        name,
        folder,
        group,
        kind=kind,
        headline=known.headline if known else "",
        with_pmi=primary == "acc_uncond" or (known is not None and known.with_pmi),
    )


def _subject(name: str, subject: str) -> Task:
    subjects = mmlu_subjects()
    if subject not in subjects:
        close = difflib.get_close_matches(subject, subjects, n=3) or subjects[:3]
        raise ConfigError(f"benchmarks.tasks: {name!r} is no subject of MMLU; there is {_either(close)}")
    return Task(name=name, kind="choice", group=KNOWLEDGE, read=partial(read_mmlu, (subject,)))


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
