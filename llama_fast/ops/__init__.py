"""The ops: table, dispatch, implementations, and the documented public functions.

Importing this package registers the primitives with torch, which a program of `torch.export.save` needs to be loaded.
"""

from llama_fast.ops import dispatch as dispatch
