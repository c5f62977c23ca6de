"""Errors of the libraries underneath."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def as_value_error(what: str) -> Iterator[None]:
    """Whatever is raised inside becomes a ValueError of one line: `what`, a colon and the reason."""
    try:
        yield
    except Exception as error:  # every model, transform and reader has its own kinds
        raise ValueError(f"{what}: {' '.join(str(error).split())[:300] or type(error).__name__}") from error
