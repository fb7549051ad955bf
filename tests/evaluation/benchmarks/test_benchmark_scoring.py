"""The metrics on readings made by hand: ties, lengths, unconditional scores, and what a measure says of itself."""

import math
from collections.abc import Sequence

import pytest

from bankwise.evaluation.benchmarks.catalogue import Task, find_task
from bankwise.evaluation.benchmarks.documents import Document, DocumentSet
from bankwise.evaluation.benchmarks.scoring import (
    Answer,
    draw,
    majority,
    measure_task,
    part_accuracies,
    read_answers,
)
from bankwise.evaluation.engine import ContinuationScore, Prompt, Reading
from bankwise.evaluation.measures import Measure


def score(*logprobs: float, is_greedy: bool = False) -> ContinuationScore:
    return ContinuationScore(token_ids=tuple(range(len(logprobs))), logprobs=logprobs, is_greedy=is_greedy)


def question(*continuations: str, gold: int = 0, number: int = 0, **more: str) -> Document:
    return Document(id=str(number), contexts=("Q:",), continuations=continuations, gold=gold, **more)


def answer(document: Document, *scores: ContinuationScore, plain: Sequence[ContinuationScore] = ()) -> Answer:
    return Answer(document=document, scores=scores, unconditional=tuple(plain))


def measured(task: str, answers: Sequence[Answer], primary: str = "acc_raw") -> dict[str, Measure]:
    source = DocumentSet(
        documents=tuple(one.document for one in answers),
        primary_metric=primary,
        split="test",
        shots=3,
        file="file",
        sha256="0",
    )
    return {measure.metric: measure for measure in measure_task(find_task(task), source, answers, 100)}


def test_each_accuracy_divides_by_its_own_length() -> None:
    # " ab": 3 characters with the space, 2 without, 2 tokens; " abcdef": 7, 6 and 6.
    document = question(" ab", " abcdef")

    def hits(short: float, long: float) -> dict[str, float]:
        given = answer(document, score(short / 2, short / 2), score(*[long / 6] * 6))
        measures = measured("piqa", [given], "acc_per_token")
        return {name: measure.value for name, measure in measures.items() if name.startswith("acc")}

    assert hits(-3.0, -6.5) == {"acc": 100, "acc_per_char": 0, "acc_norm": 0, "acc_per_token": 0}
    assert hits(-3.0, -8.0) == {"acc": 100, "acc_per_char": 100, "acc_norm": 0, "acc_per_token": 0}
    assert hits(-3.0, -9.5) == {"acc": 100, "acc_per_char": 100, "acc_norm": 100, "acc_per_token": 100}
    assert hits(-4.0, -3.5) == {"acc": 0, "acc_per_char": 0, "acc_norm": 0, "acc_per_token": 0}


def test_tokens_are_counted_not_characters() -> None:
    document = question(" ab", " abcdef")
    measures = measured("piqa", [answer(document, score(-2.0), score(-1.0, -1.0))], "acc_per_token")
    assert measures["acc_per_token"].value == 0
    assert measures["acc_per_token"].is_headline
    assert not measures["acc"].is_headline


@pytest.mark.parametrize("gold", [0, 3])
def test_tie_counts_against_the_gold_answer_wherever_it_stands(gold: int) -> None:
    document = question(" a", " b", " c", " d", gold=gold)
    tied = measured("sciq", [answer(document, *[score(-1.0)] * 4)])
    assert tied["acc"].value == 0
    scores = [score(-2.0)] * 4
    scores[gold] = score(-1.0)
    assert measured("sciq", [answer(document, *scores)])["acc"].value == 100


def test_unconditional_scores_only_shift_the_comparison() -> None:
    document = question(" rare", " common", unconditional="Answer:")
    given = answer(document, score(-5.0), score(-4.0), plain=(score(-9.0), score(-2.0)))
    measures = measured("arc_challenge", [given])
    assert measures["acc"].value == 0
    assert measures["acc_pmi"].value == 100
    assert measures["acc_pmi"].n == measures["acc"].n == 1


def test_bits_per_byte_counts_bytes_and_averages_over_documents() -> None:
    first = answer(question(" é", number=0), score(-2.0, -1.0))  # 3 bytes
    second = answer(question(" abcd", number=1), score(-1.0))  # 5 bytes
    measure = measured("squad_bpb", [first, second], "logits_per_byte")["bits_per_byte"]
    assert measure.value == pytest.approx((3 / 3 + 1 / 5) / 2 / math.log(2))
    assert measure.unit == "bits/byte"
    assert (measure.better, measure.recovery, measure.chance) == ("lower", "inverse", None)
    assert measure.is_headline
    assert measure.items == ("squad_bpb/0", "squad_bpb/1")
    assert measure.group == "reading"


def test_bits_per_byte_of_a_choice_is_that_of_the_gold_answer() -> None:
    given = answer(question(" a", " b", gold=1), score(-1.0), score(-2.0))
    assert measured("piqa", [given])["bits_per_byte"].value == pytest.approx(2 / 2 / math.log(2))


def test_lambada_is_right_where_greedy_decoding_gives_the_word() -> None:
    answers = [
        answer(question(" signs", number=0), score(-1.0, -2.0, is_greedy=True)),
        answer(question(" menu", number=1), score(-5.0)),
    ]
    measures = measured("lambada", answers, "logits_per_byte")
    assert measures["acc"].amounts == (1.0, 0.0)
    assert measures["acc"].is_headline
    assert measures["perplexity"].value == pytest.approx(math.exp((3 + 5) / 2))
    assert (measures["perplexity"].better, measures["perplexity"].recovery) == ("lower", "inverse")
    assert measures["acc"].chance is None


def test_chance_is_the_mean_over_documents() -> None:
    answers = [
        answer(question(" a", " b", " c", number=0), *[score(-1.0)] * 3),
        answer(question(" a", " b", " c", " d", " e", number=1), *[score(-1.0)] * 5),
    ]
    measure = measured("arc_easy", answers)["acc"]
    assert measure.chance == pytest.approx(100 * (1 / 3 + 1 / 5) / 2)
    assert (measure.scale, measure.unit, measure.recovery, measure.section) == (100, "%", "ratio", "benchmarks")
    assert measure.note.startswith("3-shot")


def test_accuracies_that_cannot_differ_are_left_out_unless_they_lead() -> None:
    given = [answer(question(" A", " B", number=number), score(-1.0), score(-2.0)) for number in range(2)]
    assert list(measured("piqa:val_mc_5shot", given)) == ["acc", "bits_per_byte"]
    assert list(measured("medmcqa:mc_5shot", given, "acc_per_char")) == ["acc", "acc_per_char", "bits_per_byte"]


def test_majority_of_yes_and_no_is_noted() -> None:
    answers = [
        answer(question(" yes", " no", gold=int(number > 2), number=number), score(-1.0), score(-2.0))
        for number in range(4)
    ]
    assert majority(answers) == 75
    assert "always giving the most frequent answer scores 75.0 %" in measured("boolq", answers)["acc"].note
    others = [answer(question(f" {number}", " b", number=number), score(-1.0), score(-2.0)) for number in range(4)]
    assert majority(others) is None
    assert "most frequent" not in measured("piqa", others)["acc"].note


def test_mean_of_subjects_weighs_them_alike() -> None:
    right, wrong = (score(-1.0), score(-2.0)), (score(-2.0), score(-1.0))
    answers = [
        answer(question(" A", " B", number=number, part=part), *scores)
        for number, (part, scores) in enumerate([("art", right), ("law", right), ("law", wrong), ("law", wrong)])
    ]
    measures = measured("mmlu", answers)
    assert measures["acc"].value == pytest.approx(50)
    assert measures["acc_mean_of_subjects"].value == pytest.approx(100 * (1 + 1 / 3) / 2)
    assert [measure.is_headline for measure in measures.values()] == [True, False, False]
    assert part_accuracies(answers) == {"art": {"acc": 100, "n": 1}, "law": {"acc": pytest.approx(100 / 3), "n": 3}}


# What is asked of the engine


class StandIn:
    """Reads nothing: the score of an answer is minus the length of its context and of itself."""

    def __init__(self, context: int | None = None) -> None:
        self.context = context
        self.prompts: list[Prompt] = []

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def read(self, prompts: Sequence[Prompt], *, label: str = "") -> list[Reading]:
        self.prompts = list(prompts)
        return [
            Reading(
                prompt_tokens=len(prompt.text),
                truncated=self.context is not None and len(prompt.text) > self.context,
                continuations=tuple(score(-float(len(prompt.text) + len(text))) for text in prompt.continuations),
                probes=(),
                generated="",
                new_tokens=0,
            )
            for prompt in prompts
        ]


def read(engine: StandIn, documents: Sequence[Document], *, with_pmi: bool = False) -> list[Answer]:
    return read_answers(engine, documents, with_pmi=with_pmi, label="")  # type: ignore[arg-type]


def test_answers_share_their_context_and_equal_ones_are_scored_once() -> None:
    engine = StandIn()
    (given,) = read(engine, [question(" a", " bb", " a")])
    assert engine.prompts == [Prompt(text="Q:", continuations=(" a", " bb"))]
    assert [one.logprob for one in given.scores] == [-4, -5, -4]


def test_contexts_of_winogrande_are_read_apart() -> None:
    engine = StandIn()
    document = Document(id="0", contexts=("Ann", "Barbara"), continuations=(" won.", " won."), gold=0)
    (given,) = read(engine, [document])
    assert [prompt.text for prompt in engine.prompts] == ["Ann", "Barbara"]
    assert [one.logprob for one in given.scores] == [-8, -12]
    assert measured("winogrande", [given])["acc"].value == 100


def test_unconditional_prompts_are_read_only_where_asked_and_count_as_no_document() -> None:
    engine = StandIn()
    documents = [question(" a", " bb", number=number, unconditional="Answer:") for number in range(2)]
    assert not any(given.unconditional for given in read(engine, documents))
    assert len(engine.prompts) == 2
    answers = read(engine, documents, with_pmi=True)
    assert [prompt.text for prompt in engine.prompts] == ["Q:", "Answer:"] * 2
    assert [one.logprob for one in answers[1].unconditional] == [-9, -10]
    assert len(answers) == 2
    assert all(measure.n == 2 for measure in measured("csqa", answers).values())


def test_long_contexts_are_cut_for_each_answer_and_counted() -> None:
    engine = StandIn(context=20)
    long = Document(id="0", contexts=("x" * 30,), continuations=(" a", " bb"), gold=0)
    answers = read(engine, [long, question(" a", " bb", number=1)])
    assert [len(prompt.continuations) for prompt in engine.prompts] == [1, 1, 2]
    assert [given.truncated for given in answers] == [True, False]
    assert [one.logprob for one in answers[0].scores] == [-32, -33]
    assert "1 of 2 contexts cut on the left to fit 100 tokens" in measured("piqa", answers)["acc"].note


def test_draw_is_seeded_ordered_and_without_repeats() -> None:
    items = list(range(1000))
    drawn = draw(items, 50, 0)
    assert drawn == draw(items, 50, 0) == sorted(set(drawn))
    assert len(drawn) == 50
    assert drawn != draw(items, 50, 1)
    assert drawn != items[:50]
    assert draw(items, 0, 0) == draw(items, 5000, 0) == items


def test_headline_follows_the_documents() -> None:
    task: Task = find_task("piqa")
    given = [answer(question(" a", " bb"), score(-1.0), score(-2.0, -1.0))]
    for primary, metric in {"acc_raw": "acc", "acc_per_char": "acc_per_char"}.items():
        leading = [name for name, measure in measured(task.name, given, primary).items() if measure.is_headline]
        assert leading == [metric]
