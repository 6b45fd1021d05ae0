"""The only layers that models may use; each takes a `Policy` and has slots for adapters."""
