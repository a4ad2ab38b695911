"""Two processes under DistributedDataParallel against the single-process formula."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.reference import (
    config,
    largest_difference,
    reference_nso,
    tiny_llama,
    token_data,
    train,
)

pytestmark = pytest.mark.distributed
STEPS, SIGMA, TOLERANCE = 3, 0.05, 1e-6  # the tolerance of the single-process test
NSO = {"sigma": SIGMA, "num_perturbations": 2, "clean_weight": 0.3}
ALTERNATE = {"sigma": SIGMA, "sign": "alternate"}
CASES = {
    "accumulation 1": {**NSO, "per_device_train_batch_size": 4},
    "accumulation 2": {**NSO, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "static graph": {**NSO, "per_device_train_batch_size": 4, "ddp_static_graph": True},
    "sharpness": {"sigma": SIGMA, "per_device_train_batch_size": 4, "log_sharpness": True},
    "alternate over replicas": {**ALTERNATE, "per_device_train_batch_size": 4},
    "alternate over both": {
        **ALTERNATE,
        "num_perturbations": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
}


def run_processes(program, processes=2, timeout=120):
    """`torchrun` on the CPU with a port of its own; its output. All processes end with the call."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        f"--master_port={port}",
        *program,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = started.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, output[-6000:]
    return output


def launch(cases, directory, processes=2):
    """Run the worker; the results of each rank."""
    directory = Path(directory)
    (directory / "cases.json").write_text(json.dumps(cases))
    run_processes(
        ["-m", "tests.distributed.worker", str(directory / "cases.json"), str(directory)], processes
    )
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch(CASES, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_the_formula(ranks, name):
    results = [rank[name] for rank in ranks]
    for result in results:
        assert result["world_size"] == 2
        assert result["distributed_type"] == "MULTI_CPU"
        assert result["wrapped"] == "DistributedDataParallel"
        assert result["backend"] == "Replicated"
    case = CASES[name]
    reference = tiny_llama()
    micro_batches = 2 * case.get("gradient_accumulation_steps", 1)
    losses = reference_nso(
        reference,
        token_data(48),
        steps=STEPS,
        global_batch=8,
        learning_rate=1.0,
        sigma=SIGMA,
        k=case.get("num_perturbations", 1),
        lam=case.get("clean_weight", 0.0),
        alternate_micro_batches=micro_batches if case.get("sign") == "alternate" else 0,
    )
    plain = tiny_llama()
    reference_nso(plain, token_data(48), steps=STEPS, global_batch=8, learning_rate=1.0, sigma=0.0)
    assert largest_difference(plain, reference) > 1e-3
    for result in results:
        for p, w in zip(reference.parameters(), result["weights"], strict=True):
            assert (p - w).abs().max() <= TOLERANCE
    assert results[0]["losses"] == pytest.approx(losses, abs=1e-5)
    # W + U on one rank and W - U on the other round differently, by 6e-8 of the weights.
    assert results[0]["norms"] == pytest.approx(results[1]["norms"], rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_reduced_once_per_optimizer_step(ranks, name):
    passes = (
        5 if name == "static graph" else 1
    )  # a static graph has to be the same in each backward pass
    for rank in ranks:
        assert rank[name]["reductions"] == STEPS * passes


def test_resume_is_bit_equal(tmp_path):
    base = {
        "sgd": False,
        "dropout": 0.1,
        "sigma": SIGMA,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "train_sampling_strategy": "random",
    }
    directory = str(tmp_path / "run")
    resumed = {**base, "output_dir": directory, "resume": f"{directory}/checkpoint-3"}
    results = launch({"whole": {**base, "output_dir": directory}, "resumed": resumed}, tmp_path)
    for rank in results:
        whole, again = rank["whole"], rank["resumed"]
        assert whole["losses"][3:] == again["losses"][3:]
        assert all(
            torch.equal(a, b) for a, b in zip(whole["weights"], again["weights"], strict=True)
        )


def test_one_process_is_not_taken_for_two(tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one process: the worker would say so."""
    (result,) = launch({"one": {**NSO, "max_steps": 1}}, tmp_path, processes=1)
    assert result["one"]["world_size"] == 1


def test_sharpness_is_that_of_the_global_batch(ranks, tmp_path):
    model = tiny_llama()
    args = config(
        tmp_path,
        sigma=SIGMA,
        per_device_train_batch_size=8,
        log_sharpness=True,
        lr_scheduler_type="constant",
    )
    trainer = train(
        model, token_data(48), args, optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None)
    )
    expected = [e["nso/trace_estimate"] for e in trainer.state.log_history if "loss" in e]
    # Losses of ~4 in float32 (ulp 5e-7), a few of them, over sigma^2 = 2.5e-3.
    for rank in ranks:
        assert rank["sharpness"]["traces"] == pytest.approx(expected, abs=2e-3)
    assert len(set(expected)) == STEPS and max(map(abs, expected)) > 0.1
