"""The result of a scan: every value that was read, and what follows from them.

Differences are improvements in the metric's own unit, positive where the model got better, whichever direction the
metric runs. `gain` is what re-densifying a layer of the sparse model wins, `harm` what the same layer's sparsity costs
in the reference: a companion under an oracle's mask, or the sparse model with all its other layers dense.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from bankwise.errors import DataError
from bankwise.files import write_json
from bankwise.repair.statistics import Estimate, estimate, joint_z_scores

FORMAT = "bankwise-scan/1"
WIDER = ("1.5k", "2k", "dense")
"""Changes that give a layer more channels, from few to all."""
DAMAGE = "damage"
"""The change of the reference model."""
_SMALL_SHARE = 0.2  # of the gap; what a layer wins below this is no second fault
_LARGE_SHARE = 0.5  # of the gap; a fault of one layer is at least this much of it
Verdict = Literal["layer", "not layer-local", "upstream", "no affected band"]
Values = dict[str, list[float]]
"""By length (as text, a key of JSON), one value per sample."""


@dataclass(frozen=True, kw_only=True)
class LayerScore:
    """One line of the ranking; figures over the affected lengths, on the samples that screen."""

    layer: int
    change: str
    """Which number of channels certainly won most (mean less two standard errors): `1.5k`, `2k` or `dense`."""
    gain: Estimate
    harm: Estimate
    score: float
    """Sum of gain and harm, in standard deviations among the layers."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the evidence says."""

    verdict: Verdict
    layer: int | None
    lengths: tuple[int, ...]
    """The affected lengths."""
    reason: str


@dataclass(kw_only=True)
class Scan:
    """Layer x length x intervention x sample."""

    fingerprint: str
    """Hash of the model that was scanned."""
    metric: str
    better: str
    unit: str
    smallest_gap: dict[str, float]
    """By length, the loss against the reference that counts as a failure at all."""
    lengths: list[int]
    layers: list[int]
    active_per_bank: dict[str, int]
    """By layer, k."""
    num_sparse: int
    """Sparse layers of the model; a scan may leave some out."""
    bank_size: int
    samples: int
    seed: int
    permutation: str
    reference: str
    """`companion`, or `all layers dense`."""
    clusters: dict[str, list[str]]
    sparse: Values
    dense: Values
    """Of the reference."""
    changed: dict[str, dict[str, Values]] = field(default_factory=dict)
    """By change and layer."""

    @property
    def sign(self) -> float:
        return 1.0 if self.better == "lower" else -1.0

    def gap(self, length: int) -> Estimate:
        """How much worse the sparse model is than the reference."""
        return estimate(self._improvements(self.sparse, self.dense, [length]))

    @property
    def affected(self) -> tuple[int, ...]:
        """Lengths at which the gap is above three standard errors and large enough to matter."""
        gaps = {length: self.gap(length) for length in self.lengths}
        return tuple(
            length
            for length, gap in gaps.items()
            if gap.value > 3 * gap.standard_error and gap.value > self.smallest_gap[str(length)]
        )

    def gain(self, layer: int, change: str, lengths: Sequence[int] | None = None, half: int | None = None) -> Estimate:
        """What a change of a layer of the sparse model wins, over the samples of one half (0 screens, 1 confirms)."""
        return estimate(self.gains(layer, change, lengths, half))

    def gains(
        self, layer: int, change: str, lengths: Sequence[int] | None = None, half: int | None = None
    ) -> list[float]:
        """The same for each sample."""
        changed = self.changed[change][str(layer)]
        return self._improvements(self.sparse, changed, self.lengths if lengths is None else lengths, half)

    def harm(self, layer: int, lengths: Sequence[int] | None = None, half: int | None = None) -> Estimate:
        """What the layer's sparsity costs the reference."""
        changed = self.changed[DAMAGE][str(layer)]
        return estimate(self._improvements(changed, self.dense, self.lengths if lengths is None else lengths, half))

    def _improvements(
        self, before: Values, after: Values, lengths: Sequence[int], half: int | None = None
    ) -> list[float]:
        rows: list[float] = []
        for length in lengths:
            pairs = list(zip(before[str(length)], after[str(length)], strict=True))
            rows += [self.sign * (old - new) for old, new in (pairs if half is None else _half(pairs, half))]
        return rows

    @property
    def ranking(self) -> list[LayerScore]:
        """Layers, the most suspect first, over the affected lengths (all lengths where none is affected)."""
        return self._ranking(self.affected or tuple(self.lengths))

    def _ranking(self, lengths: Sequence[int]) -> list[LayerScore]:
        best = {layer: self._best_width(layer, lengths) for layer in self.layers}
        gains = {layer: self.gain(layer, best[layer], lengths, 0) for layer in self.layers}
        harms = {layer: self.harm(layer, lengths, 0) for layer in self.layers}
        scores = joint_z_scores(*([part[layer].value for layer in self.layers] for part in (gains, harms)))
        rows = [
            LayerScore(layer=layer, change=best[layer], gain=gains[layer], harm=harms[layer], score=scores[i])
            for i, layer in enumerate(self.layers)
        ]
        return sorted(rows, key=lambda row: (-row.score, row.layer))

    def _best_width(self, layer: int, lengths: Sequence[int]) -> str:
        # A layer that was trained sparse may dislike all its channels at once, or be pleased on some samples alone.
        gains = {change: self.gain(layer, change, lengths, 0) for change in WIDER}
        return max(WIDER, key=lambda change: gains[change].value - 2 * gains[change].standard_error)

    @property
    def finding(self) -> Finding:
        """The layer that breaks, if there is evidence: chosen on one half of the samples, confirmed on the other."""
        lengths = self.affected
        if not lengths:
            return Finding(
                verdict="no affected band",
                layer=None,
                lengths=(),
                reason="at no length is the sparse model worse than the reference by more than three standard errors "
                "and by enough to matter",
            )
        ranking = self._ranking(lengths)
        first = ranking[0]
        gap = estimate(self._improvements(self.sparse, self.dense, lengths, 1))
        gain = self.gain(first.layer, first.change, lengths, 1)
        problem = ""
        total = sum(max(0.0, self.gain(row.layer, row.change, lengths, 1).value) for row in ranking)
        if total < _LARGE_SHARE * gap.value and len(self.layers) == self.num_sparse:
            return Finding(
                verdict="upstream",
                layer=None,
                lengths=lengths,
                reason=f"more channels in all layers, one at a time, win {total:.3g} of the gap of {gap.value:.3g} in "
                "sum: the fault is in the weights or in the attention, not in the choice of channels",
            )
        if not gain.value > 2 * gain.standard_error:
            problem = f"more channels in layer {first.layer} win nothing that is certain on the other half"
        elif gain.value < _LARGE_SHARE * gap.value:
            problem = (
                f"layer {first.layer}, the most suspect, wins {gain.value:.3g} of the gap of {gap.value:.3g}, "
                "less than half"
            )
        elif len(ranking) > 1:
            second = max(ranking[1:], key=lambda row: row.gain.value)
            other = self.gain(second.layer, second.change, lengths, 1)
            lead = estimate(
                [
                    mine - its
                    for mine, its in zip(
                        self.gains(first.layer, first.change, lengths, 1),
                        self.gains(second.layer, second.change, lengths, 1),
                        strict=True,
                    )
                ]
            )
            if not lead.value > 2 * lead.standard_error:
                problem = f"layer {first.layer} does not win more than layer {second.layer} by two standard errors"
            elif other.value > _SMALL_SHARE * gap.value and other.value > 3 * other.standard_error:
                problem = (
                    f"layer {second.layer} too wins {other.value:.3g} of the gap of {gap.value:.3g}, "
                    f"beside layer {first.layer}"
                )
        if problem:
            return Finding(verdict="not layer-local", layer=None, lengths=lengths, reason=problem)
        return Finding(
            verdict="layer",
            layer=first.layer,
            lengths=lengths,
            reason=f"layer {first.layer} wins {gain.value:.3g} ± {gain.standard_error:.2g} of the gap of "
            f"{gap.value:.3g} with {first.change} channels, on samples that did not choose it",
        )

    def heat_map(self, change: str = "dense") -> dict[str, Any]:
        """The `scan` part of a report: change of the metric's value by layer and length."""
        values = [
            [-self.sign * self.gain(layer, change, [length]).value for length in self.lengths] for layer in self.layers
        ]
        return {"metric": self.metric, "lengths": self.lengths, "layers": self.layers, "values": values}

    def table(self) -> str:
        """The ranking and the verdict as text."""
        finding = self.finding
        lines = [
            f"{'length':>8} {'sparse':>10} {'reference':>10} {'gap':>10} {'± se':>8}  ({self.metric}, {self.unit})"
        ]
        for length in self.lengths:
            gap = self.gap(length)
            mark = "  affected" if length in self.affected else ""
            lines.append(
                f"{length:8} {_mean(self.sparse[str(length)]):10.4f} {_mean(self.dense[str(length)]):10.4f} "
                f"{gap.value:10.4f} {gap.standard_error:8.4f}{mark}"
            )
        changes = [change for change in ("1.5k", "2k", "dense", "oracle") if change in self.changed]
        header = "".join(f"{change:>10} {'± se':>8}" for change in changes)
        lines += ["", f"{'layer':>5} {'k':>3} {'score':>7}{header}{'harm':>10} {'± se':>8}"]
        lengths = self.affected or tuple(self.lengths)
        for row in self.ranking:
            cells = [self.gain(row.layer, change, lengths) for change in changes] + [self.harm(row.layer, lengths)]
            shown = "".join(f"{cell.value:10.4f} {cell.standard_error:8.4f}" for cell in cells)
            lines.append(f"{row.layer:5} {self.active_per_bank[str(row.layer)]:3} {row.score:7.2f}{shown}")
        verdict = finding.verdict if finding.layer is None else f"layer {finding.layer}"
        lines += ["", f"verdict: {verdict} ({finding.reason})"]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_json(Path(path), {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise KeyError("format")
            return cls(**values)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}); name the file that `bankwise scan` wrote"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no scan of this version; name the file that `bankwise scan` wrote") from error


def _half(pairs: list[tuple[float, float]], half: int) -> list[tuple[float, float]]:
    """Even samples screen, odd ones confirm."""
    return pairs[half::2]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
