"""Run by the interpreter of a vLLM: answers a file of requests, with the logits processor or without.

python vllm_guided.py MODEL REQUESTS.json ANSWERS.json [OPTIONS]   OPTIONS: JSON of `vllm.LLM`
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    model, requests, answers, *options = sys.argv[1:]
    settings = json.loads(options[0]) if options else {}
    llm = LLM(model, enforce_eager=True, disable_log_stats=False, **settings)
    asked = json.loads(Path(requests).read_text(encoding="utf-8"))
    prompts = [{"prompt_token_ids": one["prompt_ids"]} for one in asked]
    params = [SamplingParams(**one["params"]) for one in asked]
    found = llm.generate(prompts, params, use_tqdm=False)
    told = [[(list(out.token_ids), out.finish_reason) for out in one.outputs] for one in found]
    preempted = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    Path(answers).write_text(json.dumps({"answers": told, "preempted": preempted}), encoding="utf-8")


if __name__ == "__main__":
    main()
