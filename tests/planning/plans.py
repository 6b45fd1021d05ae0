"""Plans made up for tests of what compares them."""

from typing import Any

from jaxtune.planning.account import Estimate, Plan
from jaxtune.schema import RunConfig


def made_up(cfg: RunConfig, *, total: int, limit: int, seconds: float = 1.0) -> Plan:
    """The plan of a step that needs `total` bytes, one micro-batch of them temporaries."""
    values: dict[str, Any] = dict.fromkeys(Plan.__dataclass_fields__, 0)
    values |= {"model": "made up", "topology": "none", "device": "none", "devices": 4}
    values |= {"mesh": cfg.mesh.axes(), "remat": cfg.model.remat, "received": []}
    values |= {"rows": 8, "length": cfg.data.max_seq_len, "unread_loops": [], "peak_seconds": None}
    values["micro_batch_size"] = cfg.train.micro_batch_size
    values["gradient_accumulation_steps"] = cfg.train.gradient_accumulation_steps
    values |= {"total": total, "temporaries": total, "limit": limit}
    values["estimate"] = Estimate(seconds, 0.0, 0.0, "compute", seconds, 100 / seconds)
    return Plan(**values)
