"""The benchmarks of a step's cost run, at toy size, and write what they measured."""

import json

from benchmarks import gpu, step_cost


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
