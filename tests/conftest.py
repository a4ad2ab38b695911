import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import: nothing here may ask the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers

import tests.distributed.launch  # noqa: F401 - decides which processes are measured

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
