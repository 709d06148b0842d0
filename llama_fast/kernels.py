"""The Triton kernels: `kernels/` beside this package in a source tree, `llama_fast/kernels/` where it is installed.

Importing this imports no Triton; its modules do.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
__path__ = [str(next(p for p in (_HERE / "kernels", _HERE.parent / "kernels") if p.is_dir()))]
