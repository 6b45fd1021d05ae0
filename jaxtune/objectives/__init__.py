"""What is minimised: functions of a model and a batch that return a sum, a weight and metrics.

Sums, never means: the step divides once, after all micro-batches and devices have been added up, so
packing, accumulation and data parallelism change nothing.
"""

from types import MappingProxyType

from jaxtune.objectives.sft import sft

OBJECTIVES = MappingProxyType({"sft": sft})
