"""Adapters that load model versions and run batches."""

from __future__ import annotations

import os

# ONNX Runtime's own builds send events about their use to their makers unless this stands in the environment
# before the library is loaded. A fleet tells nobody; who wants to may set it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def is_retryable(error: BaseException) -> bool:
    """Whether a failed run may pass later: the error says so, or it is a timeout or an OSError.

    A handler marks an error by an attribute ``retryable``; ``False`` there also overrules the type.
    """
    marked = getattr(error, "retryable", None)
    if isinstance(marked, bool):
        return marked
    return isinstance(error, TimeoutError | OSError)
