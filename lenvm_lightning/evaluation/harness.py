r"""Tasks of lm-evaluation-harness on generators of this project, with a control of the length.

lm-eval finds models in its own registry alone (no plugins; its ``--include_path`` is for tasks), so its command is run
from here, which knows one model more, ``lenvm``; all other arguments are lm-eval's own:

    pip install 'lenvm-lightning[harness]'
    python -m lenvm_lightning.evaluation.harness run --model lenvm --tasks gsm8k_cot --apply_chat_template \
        --model_args generator=Qwen/Qwen2.5-3B-Instruct,lenvm=runs/qwen2.5-1.5b/model,control=tilt:-20 \
        --gen_kwargs do_sample=True,temperature=1.0,min_p=0.01 --output_path results

The results name the control and the mean length beside the scores. lm-eval's ``--use_cache`` knows nothing of controls:
give each its own file. From Python: ``lm_eval.simple_evaluate(LenVMHarness("tiny-text", control="tilt:-5"), …)``.

A model behind a server needs nothing of this: ``lm_eval run --model local-chat-completions --model_args
base_url=http://localhost:8000/v1/chat/completions,model=NAME --apply_chat_template`` (``lm-eval[api]``) asks
``transformers serve``, vLLM, SGLang and others, without a control.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"{error}. Install it: pip install 'lenvm-lightning[harness]'") from error

from ..decoding.arguments import Arguments, RequestBatch
from ..decoding.control_text import parse_control
from ..decoding.segments import why_not_until
from ..decoding.vocabulary import stop_ids_of
from ..errors import GenerationError, LenVMError, nearest
from ..guidance import Control
from ..models import embedded
from ..models.dtypes import open_value_model
from ..models.processors import tokenizer_of
from ..models.value_model import LengthValueModel
from ..rollouts.generators.local import LocalGenerator
from ..rollouts.generators.local.loading import place_for

_log = logging.getLogger(__name__)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_KNOWN = ("do_sample", "until", "max_gen_toks", *_SAMPLING)
_GUIDED = {"top_k": 15, "top_p": 0.999}  # candidates that are scored: few, as in `generate`


class LenVMHarness(HFLM):
    """A generator as lm-eval takes one: it writes with a control of the length, and scores given texts without.

    ``generate_until`` requests, whatever their tasks and settings, are written side by side in one continuous batch:
    each ends behind its own ``until`` strings and is truncated after its own ``max_gen_toks``, its control is that of
    the model. Everything else is lm-eval's own ``hf`` model. Completions are sampled with seeds of their own, ``seed``
    plus the number of the request.

    Args:
        generator: text generator: embedded name, directory or hub id.
        lenvm: length value model of the same vocabulary; the embedded one of an embedded generator where None.
        control: as `parse_control` reads it, or a control; None is the base model.
        gamma: of a length value model whose folder does not say.
        max_gen_toks: tokens of a completion where the task does not say, the end included.
        seed: of the completions, where a task samples.
        rows: completions written side by side; chosen by memory where None.
        dtype: of the weights; where None, see `models.dtypes.usual_dtype`.
        device: a GPU if there is one, where None or where ``cuda`` names one that there is not.
        batch_size: of scoring alone.
        max_batch_size: of scoring, where batch_size is ``auto``.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Attributes:
        written: tokens of each completion so far, the end included.
        truncated: how many of them had not ended after ``max_gen_toks``.

    Raises:
        LenVMError: a model that cannot be loaded, a control that cannot be read, or one without a length value model.
    """

    def __init__(
        self,
        generator: str,
        lenvm: str | None = None,
        control: str | Control | None = None,
        *,
        gamma: float | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        rows: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = 64,
        trust_remote_code: bool = False,
    ) -> None:
        self.control = parse_control(control) if isinstance(control, str) else control
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # lm-eval's command says cuda:0 where nobody has said anything
        self.generator = LocalGenerator.load(
            generator, dtype=dtype, device=device, rows=rows, trust_remote_code=trust_remote_code
        )
        self.lenvm = None if self.control is None else _load_lenvm(lenvm, generator, gamma, dtype, device)
        if self.lenvm is not None and (
            against := why_not_until(self.control, self.lenvm.config.until, self.generator.tokenizer)
        ):
            raise GenerationError(against)
        self.written: list[int] = []
        self.truncated = 0
        self._seed, self._default_limit = seed, max_gen_toks
        super().__init__(
            pretrained=self.generator.model,
            tokenizer=tokenizer_of(self.generator.processor),
            backend="causal",
            batch_size=batch_size,
            max_batch_size=max_batch_size,
        )

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a completion where the task does not say."""
        return self._default_limit

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results: models, control, and how long the completions were."""
        lengths: dict[str, Any] = {"completions": len(self.written), "completions_truncated": self.truncated}
        if self.written:
            lengths |= {"mean_completion_tokens": sum(self.written) / len(self.written)}
        return {
            "model_num_parameters": self.model.num_parameters(),
            "generator": self.generator.fingerprint(),
            "control": repr(self.control),
            "gamma": self.lenvm.gamma if self.lenvm else None,
            **lengths,
        }

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write a completion for each request, under the control; see the class.

        Raises:
            GenerationError: a setting of generation that means nothing here, contradicts the control, or a completion
                that broke off.
        """
        settings = [read_settings(request.args[1], self.max_gen_toks, self.control) for request in requests]
        prompts = [
            self._prompt(request.args[0], own["max_tokens"]) for request, own in zip(requests, settings, strict=True)
        ]
        untils = [own["until"] for own in settings]
        if not requests:
            return []
        sampling: dict[str, Any] = {name: [own[name] for own in settings] for name in _SAMPLING}
        arguments = Arguments(
            self.model,
            self.lenvm,
            prompts,
            control=self.control,
            max_tokens=[own["max_tokens"] for own in settings],
            **sampling,
            seed=self._seed,
            eos_token_id=sorted(stop_ids_of(self.model)) or self.eot_token_id,
            ends=_ending(untils, self.tokenizer),
        )
        batch = RequestBatch(arguments)
        if batch.failed:
            number, reason = batch.failed[0]
            raise GenerationError(f"{len(batch.failed)} of {len(requests)} prompts, such as number {number}: {reason}")
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as progress:
            for row in (row for rows in batch.steps(self.generator.rows) for row in rows if row.finish_reason):
                number = row.request.key
                if row.finish_reason == "error":
                    raise GenerationError(f"completion {number}: the models gave NaN or infinite numbers")
                text = self.tokenizer.decode(row.token_ids, skip_special_tokens=True)
                texts[number] = postprocess_generated_text(text, untils[number], None)
                self.written.append(len(row.token_ids))
                self.truncated += row.finish_reason == "length"
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                progress.update()
        recent = self.written[-len(requests) :]
        _log.info("%d completions, %.1f tokens in the mean", len(recent), sum(recent) / len(recent))
        return texts

    def _prompt(self, context: str, max_tokens: int) -> list[int]:
        """Token ids of a prompt, of which the end is kept where there is no room for all, as everywhere in lm-eval."""
        room = self.max_length - max_tokens
        if room < 1:
            raise GenerationError(
                f"max_gen_toks={max_tokens} leaves no room for a prompt: {self.generator.name} holds "
                f"{self.max_length} tokens"
            )
        ids = self.tok_encode(context)
        if len(ids) > room:
            _log.warning("a prompt of %d tokens is truncated to its last %d", len(ids), room)
        return ids[-room:]


def read_settings(given: dict[str, Any], max_gen_toks: int, control: Control | None) -> dict[str, Any]:
    """What a task says about generation, in this package's words.

    Args:
        given: a request's ``gen_kwargs``.
        max_gen_toks: where it does not say.
        control: under which the likeliest 15 tokens are candidates where it does not say; all are without one.

    Returns:
        ``until`` (without empty strings), ``max_tokens``, ``temperature`` (0 unless the task samples), ``top_k``,
        ``top_p``, ``min_p``.

    Raises:
        GenerationError: a setting that this package does not have, other than at its neutral value.
    """
    settings: dict[str, Any] = dict(normalize_gen_kwargs(given, max_gen_toks))
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}
    for name in settings.keys() - set(_KNOWN):
        if settings[name] != neutral.get(name, ...):
            raise GenerationError(
                f"gen_kwargs: {name}={settings[name]!r} has no meaning here{nearest(name, _KNOWN)} (known: "
                f"{', '.join(_KNOWN)})"
            )
    candidates = _GUIDED if control is not None else {}
    return {
        "until": [text for text in settings["until"] if text],
        "max_tokens": settings["max_gen_toks"],
        "temperature": float(settings.get("temperature", 1.0)) if settings["do_sample"] else 0.0,
        "top_k": max(0, int(settings.get("top_k") or candidates.get("top_k", 0))),  # transformers' 0, vLLM's -1: all
        "top_p": float(settings.get("top_p", candidates.get("top_p", 1.0))),
        "min_p": float(settings.get("min_p") or 0.0),
    }


def _ending(untils: list[list[str]], tokenizer: Any) -> Callable[[int, list[int]], bool]:
    """Whether a completion holds one of its strings now; looked for in its last tokens only."""
    tails = [max([len(text.encode()) for text in until], default=0) + 8 for until in untils]

    def ending(row: int, ids: list[int]) -> bool:
        if not untils[row]:
            return False
        written = tokenizer.decode(ids[-tails[row] :])
        return any(text in written for text in untils[row])

    return ending


def _load_lenvm(
    source: str | None, generator: str, gamma: float | None, dtype: str | None, device: str | None
) -> LengthValueModel:
    source = source or embedded.value_model_of(generator)
    if source is None:
        raise GenerationError(
            f"a control needs lenvm=..., a length value model of {generator}'s completions (see `lenvm sample` and "
            "`lightning run`)"
        )
    place = place_for(device, dtype)
    return open_value_model(source, gamma=gamma, dtype=dtype, device=place, generator=generator)


# By its path and not as a decorator: run with `python -m`, this module would be known under two names.
model_registry.register("lenvm", target="lenvm_lightning.evaluation.harness:LenVMHarness")


def main() -> int:
    """Run lm-eval's command line, with the model ``lenvm`` known to it.

    Returns:
        Exit status: 0, or 2 for something the user can fix.
    """
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LenVMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
