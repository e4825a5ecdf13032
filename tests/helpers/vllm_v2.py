"""Run by the interpreter of a vLLM: the processor under Model Runner V2's own request states, without its kernels.

python vllm_v2.py MODEL REQUESTS.json ANSWERS.json

V2 needs Triton and a GPU to run. Its states can be built on a CPU, so what the runner would do is done here: requests
take slots and give them back, rows are in another order every step, some prompts come in two chunks, and some requests
are preempted and come again. Logits are those of transformers.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from vllm import EngineArgs, SamplingParams
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.states import RequestState

from lenvm_lightning.serving.vllm import LenVMLogitsProcessor

SLOTS, LENGTH = 4, 512
buffer_utils.is_uva_available = lambda: False  # vLLM's own way where there is no pinned memory, which it does not see


class Runner:
    """As much of a runner as the processor sees."""

    def __init__(self, place: str) -> None:
        self.config = EngineArgs(model=place, dtype="float32", max_model_len=LENGTH).create_engine_config()
        self.model = AutoModelForCausalLM.from_pretrained(place).eval()
        vocabulary = self.config.model_config.get_vocab_size()
        self.states = RequestState(
            SLOTS, LENGTH, LENGTH, 0, vocabulary, torch.device("cpu"), use_dense_all_token_ids=True
        )
        self.processor = LenVMLogitsProcessor(self.config, LogitsProcRequestState.from_request_state(self.states))

    def add(self, name: str, ids: list[int], prompt_length: int, params: SamplingParams) -> int:
        self.states.add_request(name, prompt_length, ids, 0, 100)
        slot = self.states.req_id_to_index[name]
        self.states.all_token_ids.gpu[slot, : len(ids)] = torch.tensor(ids)  # what a kernel does
        self.processor.add_request(slot, params)
        self.processor.apply_staged_writes()
        return slot

    @torch.inference_mode()
    def step(self, rows: list[tuple[int, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of some rows, slots and what they hold, before and after the processor."""
        logits = torch.stack([self.model(torch.tensor([ids])).logits[0, -1] for _, ids in rows])
        slots = torch.tensor([slot for slot, _ in rows])
        lengths = torch.tensor([len(ids) for _, ids in rows])
        context = LogitsContext(
            expanded_idx_mapping=slots,
            idx_mapping=slots,
            idx_mapping_np=slots.numpy().astype(np.int32),
            expanded_local_pos=torch.zeros_like(slots),
            input_ids=torch.tensor([ids[-1] for _, ids in rows]),
            pos=lengths - 1,
            seq_lens_upper_bound_np=lengths.numpy(),
        )
        return logits, self.processor.apply(logits.clone(), context)


def main() -> None:
    place, requests, answers = sys.argv[1:]
    asked = json.loads(Path(requests).read_text(encoding="utf-8"))
    runner = Runner(place)
    waiting = list(enumerate(asked))
    running: dict[int, dict] = {}  # by number
    done: dict[int, list[int]] = {}
    untouched = chunks = preempted = 0
    end = runner.model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    step = 0
    while waiting or running:
        while waiting and runner.states.free_indices:
            number, one = waiting.pop(0)
            ids = one.get("ids", one["prompt_ids"])
            params = SamplingParams(**one["params"])
            slot = runner.add(f"r{number}", list(ids), len(one["prompt_ids"]), params)
            running[number] = {**one, "ids": list(ids), "slot": slot, "chunk": number % 3 == 0 and "ids" not in one}
        order = sorted(running, key=lambda number: (number * 7 + step) % 5)
        rows = []
        for number in order:
            one = running[number]
            fed = one["ids"][: len(one["prompt_ids"]) // 2] if one["chunk"] else one["ids"]
            rows.append((one["slot"], fed))
        before, after = runner.step(rows)
        for row, number in enumerate(order):
            one = running[number]
            if one["chunk"]:  # half of its prompt was read: nothing is sampled
                assert torch.equal(before[row], after[row])
                one["chunk"], chunks = False, chunks + 1
                continue
            if "extra_args" not in one["params"]:
                assert torch.equal(before[row], after[row])
                untouched += 1
            else:
                assert int(after[row].isfinite().sum()) == 1
            token = int(after[row].argmax())
            slot = one["slot"]
            runner.states.all_token_ids.gpu[slot, len(one["ids"])] = token
            one["ids"].append(token)
            written = len(one["ids"]) - len(one["prompt_ids"])
            if token in ends or written == one["params"]["max_tokens"]:
                done[number] = one["ids"][len(one["prompt_ids"]) :]
                runner.states.remove_request(f"r{number}")
                del running[number]
            elif number % 4 == 1 and written == 7:  # preempted: it waits, and comes again in another slot
                runner.states.remove_request(f"r{number}")
                waiting.append((number, {name: one[name] for name in ("prompt_ids", "params", "ids")}))
                del running[number]
                preempted += 1
        step += 1
    told = {"written": [done[number] for number in range(len(asked))], "untouched": untouched, "chunks": chunks}
    Path(answers).write_text(json.dumps({**told, "preempted": preempted}), encoding="utf-8")


if __name__ == "__main__":
    main()
