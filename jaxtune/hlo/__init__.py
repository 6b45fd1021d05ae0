"""What the scheduled text of a compiled program says: work, traffic, collectives, time.

XLA's own account counts the body of a loop once and knows nothing of Pallas kernels for GPUs.
"""
