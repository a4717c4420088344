"""Other programs that do the work of the quantizer ``gptq``; each runs in a process of its own. Light."""

from __future__ import annotations
