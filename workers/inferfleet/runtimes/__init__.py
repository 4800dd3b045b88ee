"""Adapters that load model versions and run batches."""

from __future__ import annotations


def is_retryable(error: BaseException) -> bool:
    """Whether a failed run may pass later: the error says so, or it is a timeout or an OSError.

    A handler marks an error by an attribute ``retryable``; ``False`` there also overrules the type.
    """
    marked = getattr(error, "retryable", None)
    if isinstance(marked, bool):
        return marked
    return isinstance(error, TimeoutError | OSError)
