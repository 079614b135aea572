"""How much of the project one has to load, and so to read, before a model runs or a token is decoded."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRINT = """
import sys, {module}
for name, module in sorted(sys.modules.items()):
    file = getattr(module, "__file__", None) or ""
    if file.startswith({root!r}) and "site-packages" not in file and not file.endswith("__init__.py"):
        print(name)
"""
OTHERS = ("page", "chat", "command", "display", "token", "bpe", "pieces", "train", "eval", "convert")


@pytest.mark.parametrize("module, budget", [("model", 6), ("decode", 20)])
def test_a_core_module_brings_few_others(module, budget):
    """No page, chat, command line or tokenizer among them; itself does not count."""
    code = PRINT.format(module=module, root=f"{ROOT}/")
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    brought = set(printed.split()) - {module}
    assert "common.config" in brought and len(brought) <= budget, sorted(brought)
    assert not [name for name in brought if any(part in name for part in OTHERS)]
