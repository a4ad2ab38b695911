import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import: nothing here may ask the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # another process of tests is at work beside this one

from contextlib import contextmanager

import pytest
import torch
import transformers

import tests.distributed.launch  # noqa: F401 - decides which processes are measured

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture
def interrupt_at(monkeypatch):
    """A function: inside its context, training is interrupted after a step, once it has saved."""
    original = transformers.Trainer._maybe_log_save_evaluate

    @contextmanager
    def interrupting(step):
        def interrupt(self, *args, **kwargs):
            original(self, *args, **kwargs)
            if self.state.global_step == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(transformers.Trainer, "_maybe_log_save_evaluate", interrupt)
            yield

    return interrupting


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
