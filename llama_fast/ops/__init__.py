"""The ops: table, dispatch, implementations, and the documented public functions."""
