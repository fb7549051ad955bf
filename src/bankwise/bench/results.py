"""One row per measurement, as CSV and as a table."""

import csv
import dataclasses
import datetime
import importlib.metadata
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bankwise.bench.timing import Timing, quantiles
from bankwise.kernels.cpu import library


@dataclass(kw_only=True)
class BenchResult:
    """A measurement: an implementation, or with `baseline` also how many times as long the baseline took."""

    commit: str = ""
    dirty: bool = False
    utc: str = ""
    bench: str
    impl: str
    baseline: str = ""
    phase: str = "decode"
    batch: int = 1
    tokens: int = 1
    D: int = 0
    F: int = 0
    S: int = 64
    K: int = 16
    R: int = 0
    dtype: str = "bfloat16"
    device: str = "cpu"
    isa: str = ""
    threads: int = 0
    torch: str = ""
    triton: str = ""
    driver: str = ""
    pairs: int = 0
    p10_ms: float = 0.0
    p50_ms: float = 0.0
    p90_ms: float = 0.0
    base_p50_ms: float = 0.0
    ratio_p10: float = 0.0
    ratio_p50: float = 0.0
    ratio_p90: float = 0.0
    bytes: int = 0
    """What the implementation must read; over p50_ms it gives the rate."""
    status: str = "ok"
    reason: str = ""


def stamped(result: BenchResult) -> BenchResult:
    """The result with commit, time, versions and threads of this process."""
    result.commit, result.dirty = _commit()
    result.utc = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result.threads = torch.get_num_threads()
    result.torch = torch.__version__
    if result.device == "cpu":
        result.isa = library.current_isa()
    else:
        result.triton = importlib.metadata.version("triton")
    return result


def wrong_row(impl: str, error: float, allowed: float, fields: dict[str, Any]) -> BenchResult:
    """The row of an implementation whose result is off by a relative error of more than is allowed."""
    reason = f"differs from the reference: relative error {error:.2e}, allowed {allowed:.2e}"
    return stamped(BenchResult(impl=impl, status="wrong", reason=reason, **fields))


def timed_row(impl: str, baseline: str, timing: Timing, moved: int, fields: dict[str, Any]) -> BenchResult:
    """The row of one pair of implementation and baseline; `moved` are the bytes that the implementation must read."""
    p10, p50, p90 = (1e3 * value for value in quantiles(timing.seconds))
    ratio_p10, ratio_p50, ratio_p90 = quantiles(timing.ratios())
    return stamped(
        BenchResult(
            impl=impl, baseline=baseline, pairs=len(timing.seconds), p10_ms=p10, p50_ms=p50, p90_ms=p90,
            base_p50_ms=1e3 * quantiles(timing.base_seconds)[1], ratio_p10=ratio_p10, ratio_p50=ratio_p50,
            ratio_p90=ratio_p90, bytes=moved, **fields,
        )
    )  # fmt: skip


def write_csv(results: list[BenchResult], path: Path) -> None:
    """All results, one row each."""
    rows = [
        {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in dataclasses.asdict(result).items()
        }
        for result in results
    ]
    write_rows(rows, path, [field.name for field in dataclasses.fields(BenchResult)])


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path, fields: Sequence[str] | None = None) -> None:
    """Rows as CSV under the names of `fields`, by default those of the first row; a value that a row lacks is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(fields or rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_table(results: list[BenchResult]) -> None:
    """The same rows for reading: times of the implementation, and baseline / implementation by pairs."""
    print(
        f"{'impl':22} {'baseline':24} {'tokens':>6} {'p50 ms':>9} {'base ms':>9} {'ratio':>7} {'p10':>7} {'p90':>7} "
        f"{'GB/s':>6}"
    )
    for row in results:
        if row.status != "ok":
            print(f"{row.impl:22} {row.baseline:24} {row.status}: {row.reason}")
            continue
        rate = row.bytes / row.p50_ms / 1e6 if row.p50_ms else 0.0
        print(
            f"{row.impl:22} {row.baseline:24} {row.tokens:6} {row.p50_ms:9.3f} {row.base_p50_ms:9.3f} "
            f"{row.ratio_p50:7.2f} {row.ratio_p10:7.2f} {row.ratio_p90:7.2f} {rate:6.1f}"
        )
    spread = max((row.p90_ms / row.p10_ms for row in results if row.status == "ok" and row.p10_ms), default=1.0)
    if spread > 1.5:
        print(
            f"noisy machine: a p90 is {spread:.1f} times its p10; trust the ratios of neighbouring pairs, not the times"
        )


def _commit() -> tuple[str, bool]:
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
            ).stdout.strip()
        except FileNotFoundError:
            return ""

    return git("rev-parse", "--short=12", "HEAD"), bool(git("status", "--porcelain"))
