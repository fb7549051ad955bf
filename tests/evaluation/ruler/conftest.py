"""A data folder as NVIDIA's scripts leave it, with small texts, and a tokenizer that counts words."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ARTICLES, PARAGRAPHS = 4, 6


def sentences(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    words = ["ship", "rope", "Dr. Hale", "sea", "wind", "captain", "St. Ives", "storm", "anchor", "deck"]
    return [" ".join(["The", *generator.choices(words, k=8)]) + f" {index}." for index in range(count)]


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every run of characters between spaces is one token."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """PaulGrahamEssays.json, persuasion.txt, squad.json and hotpotqa.json."""
    essay = "  \n\n".join(sentences(1, 400))
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": essay}), encoding="utf-8")
    (tmp_path / "persuasion.txt").write_text("\n".join(sentences(2, 400)), encoding="utf-8")
    articles = []
    for article in range(ARTICLES):
        paragraphs = []
        for place in range(PARAGRAPHS):
            number = f"{article}-{place}"
            questions = [
                {"question": f"Q {number}?", "answers": [{"text": f"A {number}"}], "is_impossible": False},
                {"question": f"Trap {number}?", "answers": [], "is_impossible": True},
            ]
            context = f"Paragraph {number}. " + " ".join(sentences(10 * article + place, 3))
            paragraphs.append({"context": context, "qas": questions})
        articles.append({"title": str(article), "paragraphs": paragraphs})
    (tmp_path / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}), encoding="utf-8")
    entries = [
        {
            "question": f"H {number}?",
            "answer": f"answer {number}",
            "context": [[f"Title {number}.{place}", sentences(100 + place, 2)] for place in range(10)],
        }
        for number in range(5)
    ]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(entries), encoding="utf-8")
    return tmp_path
