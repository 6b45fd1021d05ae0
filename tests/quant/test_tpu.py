"""What XLA for TPU makes of a dequantized kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune.planning.topology import DEVICELESS

ROWS, COLUMNS = 4096, 14336  # smaller ones fit the memory on the chip, whatever XLA does


@pytest.mark.slow
def test_dequantize_holds_only_its_result():
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs: pip install jax[tpu]")
    program = Path(__file__).with_name("compile_tpu.py")
    result = subprocess.run(
        [sys.executable, program, str(ROWS), str(COLUMNS)],
        env=os.environ | DEVICELESS | {"PYTHONPATH": str(program.parents[2])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found) == 5
    for format, program in found.items():
        assert program["temp"] < ROWS * COLUMNS / 8, format
        assert not program["gather"], format
