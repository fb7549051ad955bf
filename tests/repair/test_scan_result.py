"""What a scan concludes from its values; all values are made up."""

import random

import pytest

from bankwise.repair.scan_result import Scan

SAMPLES = 16
NOISE = 0.02


def made_up(
    gaps: dict[int, float], gains: dict[int, float], harms: dict[int, float] | None = None, *, better: str = "lower"
) -> Scan:
    """`gaps` by length; of each layer, the share of the gap that its channels win and that its damage costs."""
    generator = random.Random(0)
    sign = 1 if better == "lower" else -1
    harms = harms if harms is not None else gains

    def values(mean: float) -> list[float]:
        return [sign * (row + mean + generator.gauss(0, NOISE)) for row in rows]

    rows = [generator.gauss(3, 1) for _ in range(SAMPLES)]
    dense = {str(length): values(0) for length in gaps}
    changes = {"dense": 1.0, "2k": 0.8, "1.5k": 0.6, "oracle": 0.9}
    changed = {
        change: {
            str(layer): {str(length): values(gap - gain * share * gap) for length, gap in gaps.items()}
            for layer, gain in gains.items()
        }
        for change, share in changes.items()
    }
    changed["damage"] = {
        str(layer): {str(length): values(harm * gap) for length, gap in gaps.items()} for layer, harm in harms.items()
    }
    return Scan(
        fingerprint="0", metric="cwe_nll", better=better, unit="nats",
        smallest_gap={str(length): 0.1 for length in gaps}, lengths=list(gaps), layers=list(gains),
        num_sparse=len(gains),
        active_per_bank={str(layer): 16 for layer in gains}, bank_size=64, samples=SAMPLES, seed=0,
        permutation="per_sample", reference="companion",
        clusters={str(length): [str(row) for row in range(SAMPLES)] for length in gaps},
        sparse={str(length): values(gap) for length, gap in gaps.items()}, dense=dense, changed=changed,
    )  # fmt: skip


LOCAL = {0: 0.03, 1: 0.02, 2: 0.9, 3: 0.04}


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_layer_is_named_with_the_lengths_that_break(better: str) -> None:
    scan = made_up({512: 0.02, 1024: 1.0, 2048: 0.7}, LOCAL, better=better)
    assert scan.finding.verdict == "layer"
    assert scan.finding.layer == 2
    assert scan.finding.lengths == (1024, 2048) == scan.affected
    first = scan.ranking[0]
    assert (first.layer, first.change) == (2, "dense")
    assert first.gain.value == pytest.approx(0.9 * 0.85, abs=0.05)
    assert first.gain.z > 20
    assert "verdict: layer 2" in scan.table()


def test_sign_of_the_map_is_that_of_the_metric() -> None:
    for better, sign in (("lower", -1), ("higher", 1)):
        values = made_up({1024: 1.0}, LOCAL, better=better).heat_map()["values"]
        assert values[2][0] == pytest.approx(sign * 0.9, abs=0.05)


def test_nothing_is_affected_below_what_matters_or_what_is_certain() -> None:
    assert made_up({1024: 0.09}, LOCAL).finding.verdict == "no affected band"
    scan = made_up({1024: 0.5}, LOCAL)
    scan.sparse["1024"] = [scan.dense["1024"][0] + 8.0, *scan.dense["1024"][1:]]  # one row alone
    assert scan.gap(1024).value == pytest.approx(0.5)
    assert scan.finding.verdict == "no affected band"


@pytest.mark.parametrize(
    ("gains", "verdict", "reason"),
    [
        ({0: 0.55, 1: 0.02, 2: 0.35}, "not layer-local", "layer 2 too"),
        ({0: 0.48, 1: 0.02, 2: 0.48}, "not layer-local", "less than half|does not win more"),
        ({0: 0.2, 1: 0.2, 2: 0.25, 3: 0.2}, "not layer-local", "less than half"),
        ({0: 0.01, 1: 0.02, 2: 0.05}, "upstream", "in the weights or in the attention"),
    ],
)
def test_no_layer_is_named_where_no_single_one_is_at_fault(gains: dict[int, float], verdict: str, reason: str) -> None:
    finding = made_up({1024: 1.0}, gains).finding
    assert (finding.verdict, finding.layer) == (verdict, None)
    assert any(part in finding.reason for part in reason.split("|"))


def test_small_harm_of_another_layer_does_not_outvote_a_large_gain() -> None:
    scan = made_up({1024: 1.0}, {0: 0.9, 1: 0.02, 2: 0.0}, {0: 0.0, 1: 0.05, 2: 0.0})
    assert scan.finding.layer == 0


def test_choice_is_made_on_one_half_and_confirmed_on_the_other() -> None:
    """A layer whose gain shows on the choosing samples alone is not named."""
    scan = made_up({1024: 1.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    for row in range(0, SAMPLES, 2):
        scan.changed["dense"]["1"]["1024"][row] = scan.dense["1024"][row]
    assert scan.ranking[0].layer == 1
    assert scan.finding.layer is None
