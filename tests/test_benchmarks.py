"""The benchmarks run, at toy size, and write what they measured."""

import json
import math

import torch
from peft import LoraConfig, get_peft_model
from pytest import approx

from benchmarks import gpu, held_rise, lora_sigma, step_cost


def ratios(folder):
    (result,) = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    assert (folder / "step_cost.png").stat().st_size > 10_000
    return result


def test_every_way_of_training_is_timed(tmp_path):
    small = ["--models", "toy", "--accumulation", "2", "--batch", "2", "--length", "8"]
    step_cost.main([*small, "--steps", "2", "--rounds", "1", "--output", str(tmp_path)])
    result = ratios(tmp_path)
    assert set(result["seconds"]) == set(result["copies"]) == set(step_cost.WAYS)
    assert all(len(seconds) == 2 for seconds in result["seconds"].values())
    extra = {way: held - result["copies"]["plain"] for way, held in result["copies"].items()}
    assert abs(extra["nso, sigma 0"]) < 0.01 and extra["naive"] > 1.9
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert all(f"| {way} | " in text for way in step_cost.WAYS)


def test_the_benchmark_of_a_gpu_runs_without_one(tmp_path, capsys):
    small = ["--models", "toy", "--ways", "plain", "nso", "--batch", "2", "--length", "8"]
    gpu.main([*small, "--steps", "1", "--rounds", "1", "--output", str(tmp_path)])
    result = ratios(tmp_path)
    assert result["precision"] == "bf16" and set(result["seconds"]) == {"plain", "nso"}
    assert result["draw_ms"]["copy"] > 0 and result["draw_ms"]["normal"] > 0
    assert "x plain" in capsys.readouterr().out


def test_the_rise_over_a_training_is_measured(tmp_path, monkeypatch):
    few = held_rise.digits()[:200]
    monkeypatch.setattr(held_rise, "digits", lambda: few)
    held_rise.main(["--steps", "80", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    constant, held = results["ways"]["found at the start"]["rows"], results["ways"]["held"]["rows"]
    assert [row["step"] for row in constant] == [row["step"] for row in held] == [40, 80]
    assert constant[0]["sigma"] == constant[1]["sigma"] and held[0]["sigma"] != held[1]["sigma"]
    assert (tmp_path / "held_rise.png").stat().st_size > 10_000


def test_how_far_noise_in_the_factors_shakes_the_merged_weights():
    torch.manual_seed(0)
    base = step_cost.llama_of(64, 256, 512, 2, 4, 4, tied=False)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    moved = kept = 0.0
    for module in model.modules():
        if hasattr(module, "lora_A"):  # B is 0: the change is 2 U_B (A + U_A)
            A, W = module.lora_A["default"].weight, module.base_layer.weight
            shaken = A.square().sum() + 0.1**2 * A.numel()  # the mean of ||A + U_A||^2
            moved += 4 * 0.1**2 * W.shape[0] * shaken.item()
            kept += W.square().sum().item()
    found = lora_sigma.shaken(model, 0.1, is_relative=False)
    # 14 matrices B of at least 4 x 256 numbers each: 1/sqrt(14 * 1024) of it, three times.
    assert found == approx(math.sqrt(moved / kept), rel=0.025)
    tokens = torch.randint(64, (2, 8))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    measured = lora_sigma.measured(model, [{"input_ids": tokens, "labels": tokens}], rise=0.001)
    assert measured["absolute"]["sigma"] > 0 and measured["relative"]["shaken"] > 0
    assert {"rise, A alone", "rise, B alone"} <= measured["absolute"].keys()
