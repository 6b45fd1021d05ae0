"""Planned failures, so that tests can break a run at a named point.

`JAXTUNE_FAULT=<point>[@step]=<kill|raise|hang|enospc|nan>` takes effect only with `JAXTUNE_TEST=1`.
Points are the literal names given to `fault` in the code: `grep -rn 'fault("'` lists them.
"""

import errno
import os
import signal
import time


def fault(point: str, step: int | None = None) -> bool:
    """Fails here if the environment plans it; True asks the caller to inject NaN.

    Raises:
        RuntimeError: the planned action is `raise`, or the plan cannot be read.
        OSError: the planned action is `enospc`.
    """
    if os.environ.get("JAXTUNE_TEST") != "1" or "JAXTUNE_FAULT" not in os.environ:
        return False
    where, _, action = os.environ["JAXTUNE_FAULT"].partition("=")
    planned_point, _, planned_step = where.partition("@")
    if planned_point != point or (planned_step and planned_step != str(step)):
        return False
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        while True:
            time.sleep(3600)
    if action == "enospc":
        raise OSError(errno.ENOSPC, f"planned fault at {where}")
    if action == "nan":
        return True
    raise RuntimeError(f"planned fault at {where}: {action or 'no action given'}")
