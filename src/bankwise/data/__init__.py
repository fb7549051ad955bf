"""Text: where it comes from, how it is split, and how it becomes training rows and token windows."""

from bankwise.data.collate import RowCollator
from bankwise.data.documents import Document, split_documents
from bankwise.data.held_out import document_windows, held_out_windows, probe_windows
from bankwise.data.mixture import TrainingRows, training_rows
from bankwise.data.sources import load_documents, load_split, source_name
from bankwise.data.tokenized import TokenizedDocuments
from bankwise.data.windows import mixed_windows, token_windows

__all__ = [
    "Document",
    "RowCollator",
    "TokenizedDocuments",
    "TrainingRows",
    "document_windows",
    "held_out_windows",
    "load_documents",
    "load_split",
    "mixed_windows",
    "probe_windows",
    "source_name",
    "split_documents",
    "token_windows",
    "training_rows",
]
