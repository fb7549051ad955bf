"""`repair`: mend the layer that a scan found, and only it; or say why not, and change nothing.

Diagnosis and the choice among remedies use the scan's own samples. What is accepted is judged on samples that no choice
has seen; each attempt gets new ones.
"""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bankwise.config import DataSource
from bankwise.config.evaluation import EvaluationPlan
from bankwise.errors import ConfigError, DataError
from bankwise.evaluation.reading_cache import model_fingerprint
from bankwise.repair.acceptance import guard_drops, judge
from bankwise.repair.changes import all_dense, check_sparse, find_layer
from bankwise.repair.diagnose import CLOSED, Diagnosis, diagnose
from bankwise.repair.guards import check_guards, default_guards, run_guards
from bankwise.repair.metrics import Metric, Sample, SampleSource, find_metric
from bankwise.repair.patch import LayerState, Patch
from bankwise.repair.prefix import PrefixReader
from bankwise.repair.remedies import RepairSettings, Workshop
from bankwise.repair.scan_result import Scan
from bankwise.repair.scanning import check_lengths
from bankwise.repair.statistics import estimate

_PYDOC = DataSource(path="package:pydoc")
_SEED_STEP = 1009  # between the samples of two attempts
_MOST_DRAWN = 4096  # samples, to find enough that were not read
_RUN = 32  # tokens that two windows of text must not share


def repair(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scan: Scan | str | Path,
    *,
    layer: int | None = None,
    companion: PreTrainedModel | None = None,
    data: Sequence[DataSource] = (_PYDOC,),
    held_out_fraction: float = 0.05,
    data_dir: str = "",
    samples: int = 32,
    guards: EvaluationPlan | None = None,
    settings: RepairSettings | None = None,
    seed: int = 0,
    bf16: bool = False,
    batch_tokens: int = 4096,
    say: Callable[[str], None] | None = None,
) -> Patch:
    """The patch that mends the layer which `scan` found in this model; its remedy is `none` where nothing is mended.

    `layer` overrides the scan's choice. `data` is natural text: its training split trains, its held-out split guards;
    empty: synthetic text alone. `samples` of each affected length judge a remedy; `guards` is what must not get worse
    (default: `guards.default_guards`). The model is left as it was: `patch.apply(model)` repairs it.
    """
    say = say or _say_nothing
    check_sparse(model)
    if not isinstance(scan, Scan):
        scan = Scan.load(scan)
    base = model_fingerprint(model)
    if scan.fingerprint != base:
        raise ConfigError(
            f"the scan is of another model (sha256 {scan.fingerprint[:12]}...), not of this one ({base[:12]}...); scan "
            "this model first"
        )
    if (companion is None) != (scan.reference != "companion"):
        raise ConfigError(
            f"the scan's reference was {scan.reference}; pass "
            + ("the same companion=" if companion is None else "no companion")
        )
    if samples < 2:
        raise ConfigError(f"samples={samples} is too few to judge a repair; use 2 or more, better 32")
    target = None if layer is None else find_layer(model, layer)
    finding = scan.finding
    if not finding.lengths or (target is None and finding.layer is None):
        say(f"nothing to repair: {finding.verdict} ({finding.reason})")
        return Patch(
            base=base, layer=layer, remedy="none", reason=f"{finding.verdict}: {finding.reason}",
            figures={"scan": _scan_figures(scan)},
        )  # fmt: skip
    if target is None:
        assert finding.layer is not None
        target = find_layer(model, finding.layer)
    # A scan read from its file has the permutation as plain text.
    source = SampleSource(
        tokenizer=tokenizer, permutation=scan.permutation, data_dir=data_dir, data=data,  # type: ignore[arg-type]
        held_out_fraction=held_out_fraction,
    )  # fmt: skip
    metric = find_metric(scan.metric)
    check_lengths(model, metric, source, finding.lengths)
    plan = guards or default_guards(
        tokenizer, lengths=scan.lengths, affected=finding.lengths, samples=samples, data=data,
        held_out_fraction=held_out_fraction, seed=scan.seed + 1,
    )  # fmt: skip
    check_guards(plan, model, tokenizer)
    bench = _Bench(model, companion, tokenizer, metric, source, scan, finding.lengths, bf16, batch_tokens)
    workshop = Workshop(
        model=model, companion=companion, tokenizer=tokenizer, layer=target, seq_len=max(finding.lengths), data=data,
        held_out_fraction=held_out_fraction, settings=settings or RepairSettings(), batch_tokens=batch_tokens,
        seed=seed,
    )  # fmt: skip
    patch = _attempt(bench, workshop, plan, base, samples, say)
    patch.figures["scan"] = _scan_figures(scan)
    return patch


def _attempt(
    bench: "_Bench", workshop: Workshop, plan: EvaluationPlan, base: str, samples: int, say: Callable[[str], None]
) -> Patch:
    """Diagnose, and try remedies until one is accepted."""
    model, layer = workshop.model, workshop.layer
    chosen = bench.scanned()
    reference = bench.reference(chosen)
    before = bench.losses(chosen)
    diagnosis = diagnose(layer, lambda: bench.losses(chosen), reference)
    say(f"layer {layer.layer}: {diagnosis.fault} " + _gains(diagnosis))
    figures: dict[str, Any] = {"diagnosis": {"fault": diagnosis.fault, "gap": diagnosis.gap, "gains": diagnosis.gains}}
    state = LayerState.of(model, layer)
    guarded = None
    tried: list[dict[str, Any]] = []
    figures["tried"] = tried
    attempts = workshop.attempts(diagnosis.fault)
    try:
        for number, (remedy, description) in enumerate(attempts):
            after = bench.losses(chosen)
            closed = estimate([old - new for old, new in zip(before, after, strict=True)]).value / diagnosis.gap
            row = {"remedy": remedy, "description": description, "closed_on_choosing_samples": closed}
            tried.append(row)
            say(f"  {description}: closes {closed:.0%} of the gap on the samples that choose")
            if closed >= CLOSED:
                fresh = bench.fresh(samples, number)
                repaired_losses = bench.losses(fresh)
                repaired_guards = run_guards(plan, bench.engine())
                patch_state = LayerState.of(model, layer)
                state.restore(model, layer)
                if guarded is None:
                    guarded = run_guards(plan, bench.engine())
                verdict = judge(
                    bench.losses(fresh), repaired_losses, bench.reference(fresh), [s.cluster for s in fresh],
                    guard_drops(guarded, repaired_guards), seed=workshop.seed,
                )  # fmt: skip
                row["acceptance"] = verdict.to_dict()
                say(f"  {'accepted' if verdict.accepted else 'refused'}: {verdict.reason}")
                if verdict.accepted:
                    patch_state.restore(model, layer)
                    patch = Patch.of(model, layer, state, base, remedy, f"{diagnosis.fault}: {description}")
                    patch.figures = figures
                    return patch
            state.restore(model, layer)
    finally:
        attempts.close()
        state.restore(model, layer)
    reason = f"{diagnosis.fault}: " + (
        "no remedy passed the acceptance tests" if tried else "no remedy of this layer can help"
    )
    say(f"nothing is changed; {reason}")
    return Patch(base=base, layer=layer.layer, remedy="none", reason=reason, figures=figures)


class _Bench:
    """Reads samples with the model as it is now."""

    def __init__(
        self,
        model: PreTrainedModel,
        companion: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        metric: Metric,
        source: SampleSource,
        scan: Scan,
        lengths: Sequence[int],
        bf16: bool,
        batch_tokens: int,
    ) -> None:
        self._model = model
        self._companion = companion
        self._tokenizer = tokenizer
        self._metric = metric
        self._source = source
        self._scan = scan
        self._lengths = lengths
        self._reading: dict[str, Any] = {"bf16": bf16, "batch_tokens": batch_tokens}
        self._seen = {piece for sample in self.scanned() for piece in _pieces(sample)}

    def engine(self, model: PreTrainedModel | None = None) -> PrefixReader:
        return PrefixReader(model or self._model, self._tokenizer, **self._reading)

    def scanned(self) -> list[Sample]:
        """The scan's samples of the affected lengths."""
        return [
            sample
            for length in self._lengths
            for sample in self._metric.samples(self._source, length, self._scan.samples, self._scan.seed)
        ]

    def fresh(self, count: int, attempt: int) -> list[Sample]:
        """`count` samples of each affected length that were not read before."""
        found: list[Sample] = []
        seed = self._scan.seed + _SEED_STEP * (attempt + 1)
        for length in self._lengths:
            # Twice as many: windows of text that overlap those of the scan fall away.
            wanted = 2 * (count + self._scan.samples)
            new = self._unread(length, wanted, seed)
            while len(new) < count and wanted < _MOST_DRAWN:
                # Text gives the first windows of its documents whatever the seed, and earlier attempts read those.
                wanted += count
                try:
                    new = self._unread(length, wanted, seed)
                except DataError:  # there is no more text
                    break
            if len(new) < count:
                raise DataError(
                    f"there are only {len(new)} samples of {length} tokens that the scan and earlier attempts did not "
                    f"read, and {count} are to judge the repair; use fewer samples, or more text"
                )
            found += new[:count]
        for sample in found:
            self._seen |= _pieces(sample)
        return found

    def _unread(self, length: int, count: int, seed: int) -> list[Sample]:
        """Of `count` drawn samples, those that share nothing with what was read."""
        drawn = self._metric.samples(self._source, length, count, seed)
        return [sample for sample in drawn if not _pieces(sample) & self._seen]

    def losses(self, samples: Sequence[Sample]) -> list[float]:
        """What the model loses on each sample; more is worse."""
        return self._read(self.engine(), samples)

    def reference(self, samples: Sequence[Sample]) -> list[float]:
        """What the reference loses."""
        if self._companion is not None:
            return self._read(self.engine(self._companion), samples)
        with all_dense(self._model):
            return self.losses(samples)

    def _read(self, reader: PrefixReader, samples: Sequence[Sample]) -> list[float]:
        values: list[float] = []
        for length in dict.fromkeys(sample.length for sample in samples):
            own = [sample for sample in samples if sample.length == length]
            count = max(1, self._reading["batch_tokens"] // length)
            for start in range(0, len(own), count):
                values += self._metric.values(reader, own[start : start + count])
        return [self._metric.sign * value for value in values]


def _pieces(sample: Sample) -> set[Hashable]:
    """What two samples share if they are one text in part: runs of tokens of a window; a row is one piece."""
    if isinstance(sample.content, dict):
        return {sample.content["input"]}
    tokens = sample.content.tolist()
    return {tuple(tokens[start : start + _RUN]) for start in range(max(1, len(tokens) - _RUN + 1))}


def _gains(diagnosis: Diagnosis) -> str:
    parts = ", ".join(f"{name} {gain:+.3g}" for name, gain in diagnosis.gains.items())
    return f"(of a gap of {diagnosis.gap:.3g}: {parts})"


def _scan_figures(scan: Scan) -> dict[str, Any]:
    finding = scan.finding
    return {
        "metric": scan.metric, "lengths": scan.lengths, "affected": list(finding.lengths), "samples": scan.samples,
        "seed": scan.seed, "permutation": scan.permutation, "verdict": finding.verdict, "reason": finding.reason,
    }  # fmt: skip


def _say_nothing(text: str) -> None:
    pass
