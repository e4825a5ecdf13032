"""The training benchmarks run, and say what they measured in one JSON line."""

import json
import runpy

import pytest
from forks import finish, script
from places import BENCHMARKS


def run(name: str, *words: str) -> tuple[str, dict]:
    """Everything printed, and the JSON of the last line."""
    output = finish(script(BENCHMARKS / f"{name}.py", "--quick", *words))
    return output, json.loads(output.splitlines()[-1])


def test_train_step():
    output, result = run("train_step")
    assert "same values" in output
    assert result["head_parity_max_difference"] <= 1e-5
    ratios = {"head_speedup_ratio", "head_step_memory_ratio", "bucketing_speedup_ratio"}
    units = {
        f"{model}_{what}"
        for model in ("headless", "causal_lm")
        for what in ("step_s", "step_memory_mib", "total_memory_mib")
    } | {
        f"{order}_{what}"
        for order in ("random", "bucketed")
        for what in ("padding_percent", "padding_all_rows_percent", "real_tokens_per_s")
    }
    assert ratios | units <= set(result)
    assert all(result[key] > 0 for key in ratios)
    # Deterministic, unlike the times: the planner's share of padding on 20,000 rows.
    assert result["bucketed_padding_all_rows_percent"] < 8 < 50 < result["random_padding_all_rows_percent"]


@pytest.mark.slow
def test_censoring():
    _, result = run("censoring")
    assert result["limit_tokens"] == 80
    values = {"anchored", "bootstrap", "drop", "one_sided", "as_finished", "uncut"}
    assert values | {"bins", "bins_uncut"} <= set(result["treatments"])
    for scores in result["treatments"].values():
        for group in ("rarely_cut", "often_cut"):
            assert scores[f"mre_{group}_percent"] >= abs(scores[f"bias_{group}_percent"])


@pytest.mark.slow
def test_segments(tmp_path):
    _, result = run("segments", "--out", str(tmp_path / "segments"))
    assert result["until"] == "</think>"
    systems = {row["system"] for row in result["rows"]}
    assert {"base model", "hard cut", "ramp to 10 nats", "AtMost", "EqualTo"} <= systems
    for row in result["rows"]:
        if row["system"] != "base model":
            assert row["budget"] == 24
        assert row["within"][1] <= row["within"][0] <= row["within"][2]


def test_decoding():
    _, result = run("decoding")
    _, even, mixed = result["rows"]
    assert [one["batch"] for one in result["rows"]] == [2, 3, 3]
    assert all(
        row[key] > 0
        for key in ("share_of_limit", "against_padded", "against_two_forwards", "against_copied", "share_of_unguided")
        for row in result["rows"]
        if key in row or key != "against_copied"
    )
    assert (even["prefix_tokens"], mixed["prefix_tokens"]) == (25, [60, 9, 5])
    assert mixed["guided_against_even"] > 0


def test_row_attention():
    _, result = run("row_attention")
    assert result["rows"][0]["row_groups"] == 1
    assert all(row["sdpa_over_row_groups_ratio"] > 0 for row in result["rows"])


def test_plan():
    """What was planned is what a real training run takes; the rest is workspaces, and noise of a process this small."""
    _, result = run("plan")
    assert [row["case"] for row in result["rows"]] == ["text", "vision"]
    for row in result["rows"]:
        assert 0.85 < row["planned_over_measured_ratio"] < 1.15


def test_shared_prefix():
    _, result = run("shared_prefix")
    assert [row["case"] for row in result["rows"]] == ["3x40x12", "2x30x10 + image"]
    for row in result["rows"]:
        assert row["parity_max_difference"] <= 1e-4
        assert row["speedup_ratio"] == row[f"{row['chosen']}_speedup_ratio"] > 0
        assert row["bound_ratio"] > 1


def test_packing():
    _, result = run("packing")
    assert result["parity_max_difference"] <= 1e-4 < 0.01 < result["leaking_max_difference"]
    assert result["packed_to_bucketed_ratio"] > 0
    assert result["packed_padding_all_rows_percent"] <= 2 < result["bucketed_padding_all_rows_percent"]


def test_start():
    _, result = run("start")
    assert result["rows"] == 2000
    assert 0 < result["cached_share_of_tokenising"] < 0.5


@pytest.mark.slow
def test_precision(tmp_path):
    _, result = run("precision", "--folder", str(tmp_path))
    rows = result["precisions"]
    assert list(rows) == ["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
    assert rows["32-true"]["loss"]["ratio"] == 1.0
    assert "same_curve" not in rows["32-true"]
    losses = {precision: row["loss"]["final"] for precision, row in rows.items()}
    assert losses["16-mixed"] != losses["bf16-mixed"]  # Lightning's flag would have computed both in bfloat16
    for precision in ("bf16-mixed", "16-mixed", "bf16-true"):
        assert "same_curve" in rows[precision]
        assert rows[precision]["loss"]["ratio"] != 1.0  # it did compute otherwise
        assert rows[precision]["loss"]["ratio"] == pytest.approx(1.0, abs=0.03)
        assert rows[precision]["mae_tokens/50"]["ratio"] == pytest.approx(1.0, abs=0.03)
    # Deterministic: bfloat16 has 8 bits, and most weights of a matrix are too large for a step of 2e-5.
    assert result["steps_lost_percent"]["0.001"] < 5 < 80 < result["steps_lost_percent"]["2e-05"]


def test_serving():
    _, result = run("serving")
    assert set(result["servers"]) == {"lenvm serve", "lenvm serve, with a value model", "lenvm serve, guided"}
    assert all(row["tokens_per_s"] > 0 and row["first_token_s"] > 0 for row in result["servers"].values())
    assert 14 <= result["servers"]["lenvm serve, guided"]["tokens"] <= 18
    assert result["cost_of_guidance_lenvm"] > 0


def test_makespan():
    output, result = run("makespan")
    assert "all orders wrote the same" in output
    assert result["random_tokens"] == result["predicted_tokens"] == result["oracle_tokens"] > result["aborted_tokens"]
    assert result["aborted_tokens"] >= result["aborted_kept_tokens"] > 0
    for name in ("random", "predicted", "oracle"):
        assert result[f"{name}_steps"] >= result["bound_steps"]
        assert result[f"{name}_seconds_ratio"] > 0
    for row in result["simulated"]:
        # Each is a way of beginning the same completions; whoever aborts is below the bound where a straggler is.
        assert all(row[name] >= 1 for name in ("random", "predicted", "error 0.6", "error 0.3", "oracle"))
    assert result["simulated"][0]["aborted"] < 1


def test_makespan_of_lengths():
    makespan = runpy.run_path(str(BENCHMARKS / "makespan.py"))
    assert makespan["makespan"]([3, 3, 3, 9], 2) == 12
    assert makespan["makespan"]([9, 3, 3, 3], 2) == 9 == makespan["bound"]([9, 3, 3, 3], 2)
    assert makespan["bound"]([2, 2, 2], 2) == 3
    # All side by side, it ends with the third; one more step tells those that still run.
    assert makespan["aborted_makespan"]([9, 3, 5, 4], 4, 0.75) == 6
    assert makespan["aborted_makespan"]([9, 3, 5, 4], 1, 1.0) == 21


def test_scheduling(tmp_path):
    rows = tmp_path / "rows.jsonl"
    _, result = run("scheduling", "--save-rows", str(rows))
    assert set(result["simulated"]) == {"poisson, load 0.9", "bursty, load 0.9", "at once"}
    for found in result["simulated"].values():
        assert set(found["as they come"].values()) == {1.0}
        assert found["oracle"]["mean_latency"] <= 1  # the best order there is where prompts cost next to nothing
        assert all(one["mean_latency"] > 0 for one in found.values())
    assert "longest first" in result["simulated"]["at once"]
    assert set(result["real"]) == {"12 clients", "6 clients", "1 clients"}
    for run_of in result["real"].values():
        assert run_of.pop("same_texts")  # the order changes when a text is written, and never the text
        assert set(run_of) == {"seconds", "CPU seconds of the server"}
        for policies in run_of.values():
            assert set(policies) == {"as they come", "shortest", "oracle"}
            assert all(one["throughput"] > 0 for one in policies.values())
    made = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(made) == 12
    assert all(row["quantiles"]["0.05"] < row["quantiles"]["0.95"] for row in made)
    _, again = run("scheduling", "--only", "simulated", "--rows-file", str(rows))
    assert again["simulated"] == result["simulated"]
