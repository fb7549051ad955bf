"""A JSON value that knows where it stands, so that a damaged file is reported by the name of its field."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bankwise.errors import DataError


@dataclass(frozen=True)
class Node:
    """`value` and the path to it; each reader returns the value in one type or raises `DataError` with the path."""

    value: Any
    source: str
    path: str = ""

    def error(self, wanted: str) -> DataError:
        where = f"{self.source}: {self.path}" if self.path else self.source
        shown = "an object" if isinstance(self.value, dict) else "a list" if isinstance(self.value, list) else None
        given = shown or repr(self.value)[:80]
        return DataError(f"{where} is {given}, not {wanted}; write the file again with `bankwise eval`")

    @property
    def is_null(self) -> bool:
        return self.value is None

    def __getitem__(self, name: str) -> Node:
        """The field `name` of an object; a null node where the object lacks it."""
        path = f"{self.path}.{name}" if self.path else name
        return Node(self.object().get(name), self.source, path)

    def object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.error("an object")
        return self.value

    def fields(self) -> Iterator[tuple[str, Node]]:
        """Name and node of each field of an object; none where the object is missing."""
        if not self.is_null:
            for name in self.object():
                yield name, self[name]

    def fields_of(self, *names: str) -> dict[str, Any]:
        """The values of those of the fields that an object has."""
        return {name: value for name, value in self.object().items() if name in names}

    def items(self) -> list[Node]:
        """The nodes of a list; none where the list is missing."""
        if self.is_null:
            return []
        if not isinstance(self.value, list):
            raise self.error("a list")
        return [Node(item, self.source, f"{self.path}[{i}]") for i, item in enumerate(self.value)]

    def text(self, default: str | None = None) -> str:
        if self.is_null and default is not None:
            return default
        if not isinstance(self.value, str):
            raise self.error("a text")
        return self.value

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.error("true or false")
        return self.value

    def integer(self) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            raise self.error("a whole number")
        return self.value

    def integer_or_null(self) -> int | None:
        return None if self.is_null else self.integer()

    def number_or_null(self) -> float | None:
        """The number; None for null and for numbers that are not finite."""
        if self.is_null:
            return None
        if not isinstance(self.value, int | float) or isinstance(self.value, bool):
            raise self.error("a number or null")
        return self.value if math.isfinite(self.value) else None

    def number(self) -> float:
        number = self.number_or_null()
        if number is None:
            raise self.error("a finite number")
        return number
