"""Runs a script with FSDP allowed on CPUs: `accelerate launch ... on_cpu.py SCRIPT ARGUMENTS`."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed.back_ends import allow_fsdp_on_cpu

if __name__ == "__main__":
    allow_fsdp_on_cpu()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
