"""Run by the interpreter of a vLLM: answers a file of prompts through `VLLMGenerator`, some under a control.

python vllm_generator.py REQUESTS.json ANSWERS.json
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path


def main() -> None:
    from lenvm_lightning.decoding.control_text import parse_control
    from lenvm_lightning.decoding.sampling_params import SamplingParams
    from lenvm_lightning.errors import GeneratorError
    from lenvm_lightning.rollouts.generators.interface import Prompt, PromptRequest
    from lenvm_lightning.rollouts.sample import open_generator

    requests, answers = map(Path, sys.argv[1:])
    asked = json.loads(requests.read_text(encoding="utf-8"))
    settings = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True}
    try:
        open_generator("vllm:tiny-text", max_model_length=512)
    except GeneratorError as error:
        told = {"refused": str(error)}
    generator = open_generator("vllm:tiny-text", lenvm="tiny-text-lenvm", **settings)
    found = {}
    for name, sampling in asked["samplings"].items():
        wanted = [
            PromptRequest(Prompt(one["id"], one["messages"]), tuple(one["numbers"]), parse_control(one["control"]))
            for one in asked["requests"][name]
        ]
        found[name] = [
            [answer.prompt_id, answer.number, type(answer.result).__name__, asdict(answer.result)]
            for answer in generator.sample(wanted, SamplingParams(**sampling))
        ]
    written = generator.tokens_written
    told |= {"answers": found, "fingerprint": generator.fingerprint(), "tokens_written": written}
    answers.write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
