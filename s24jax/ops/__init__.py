"""The operations that have several implementations, one folder each.

Every folder has the same files: `api` (the public function and its contract) and one file per
implementation. `reference` is pure JAX, runs everywhere and defines what the others must give.
"""
