"""Runs the recipe of image classifiers in each of several processes."""

import sys

from nso_hf.running.program import leave_process_group
from recipes.image_classification import main
from tests.distributed.back_ends import allow_fsdp_on_cpu

if __name__ == "__main__":
    allow_fsdp_on_cpu()
    main(sys.argv[1:])
    leave_process_group()
