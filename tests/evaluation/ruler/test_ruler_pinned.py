"""Rows beyond the golden ones equal those of a second implementation of upstream's rules, by hash.

That implementation shares no code with the package; both were also compared over some hundred random windows, seeds and
templates. The essay and question files are those of `data_dir`.
"""

import hashlib
import json
from pathlib import Path

import pytest

from bankwise.evaluation.ruler import BASE_TEMPLATE, generate
from bankwise.upcycle.loading import LoadedDense

LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{task_template}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
PINNED = [
    ("cwe", 1024, 7, 4, BASE_TEMPLATE, "129884e713cb7f6a"),
    ("cwe", 2048, 8, 2, LLAMA3, "52dadd89aa81164e"),
    ("cwe", 16384, 9, 1, BASE_TEMPLATE, "1b5adea01f682f95"),
    ("fwe", 256, 7, 4, BASE_TEMPLATE, "d1663a97e6edf2ff"),
    ("fwe", 2048, 8, 2, LLAMA3, "ed7e5be2de1453b9"),
    ("fwe", 16384, 9, 1, BASE_TEMPLATE, "d5d74df9ac2fd455"),
    ("vt", 900, 7, 4, BASE_TEMPLATE, "1be3c1e53a125de3"),
    ("vt", 2048, 8, 2, LLAMA3, "0d75aad4029d1f5b"),
    ("vt", 16384, 9, 1, BASE_TEMPLATE, "feeb154fed0df0aa"),
    ("niah_single_1", 512, 7, 4, BASE_TEMPLATE, "8f180f6374a2faf2"),
    ("niah_single_1", 16384, 9, 1, BASE_TEMPLATE, "bf76e5424b3834d8"),
    ("niah_multikey_2", 1024, 7, 4, LLAMA3, "34190b6477855150"),
    ("niah_multikey_3", 1024, 7, 4, BASE_TEMPLATE, "c6d36c7a2b16ab8e"),
    ("niah_multikey_3", 16384, 9, 1, BASE_TEMPLATE, "aa709284e78d1310"),
    ("niah_single_2", 2048, 7, 3, BASE_TEMPLATE, "ef64183fc2a1bf64"),
    ("niah_single_3", 4096, 8, 3, LLAMA3, "e05e6d9be50bb077"),
    ("niah_multikey_1", 3000, 9, 3, BASE_TEMPLATE, "31a16e11030b0ba5"),
    ("niah_multivalue", 4096, 10, 3, BASE_TEMPLATE, "f71566caeae9d04a"),
    ("niah_multiquery", 4096, 11, 3, BASE_TEMPLATE, "d4f346a1a94b04d0"),
    ("qa_1", 900, 7, 4, BASE_TEMPLATE, "70887ab9721b1c2d"),
    ("qa_1", 1024, 7, 4, LLAMA3, "82071fd732db3912"),
    ("qa_2", 2048, 7, 4, BASE_TEMPLATE, "61b5995ef34c91a3"),
]


@pytest.mark.parametrize(("name", "window", "seed", "samples", "template", "wanted"), PINNED)
def test_rows_equal_the_second_implementations(
    name: str,
    window: int,
    seed: int,
    samples: int,
    template: str,
    wanted: str,
    data_dir: Path,
    smollm2: LoadedDense,
) -> None:
    rows = generate(
        name,
        smollm2.tokenizer,
        max_seq_length=window,
        num_samples=samples,
        seed=seed,
        data_dir=data_dir,
        model_template=template,
    )
    lines = [json.dumps({key: value for key, value in row.items() if key != "details"}) for row in rows]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == wanted
