"""Published models beside the code that they were published with. Collected where that code is there: `pip install 'moejax[parity]'`."""

import importlib.util

if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "peft", "safetensors")):
    collect_ignore_glob = ["test_*.py"]
