"""What differs between OpenAI-compatible servers: how they are told to sample, and what they give back.

All of them sample with defaults of their own where a request says nothing: vLLM and SGLang take top_k and a repetition
penalty from the model's ``generation_config.json``, llama.cpp keeps its top_k of 40, ``transformers serve`` takes the
likeliest token unless the model's configuration says ``do_sample``. So every server is told everything it understands,
or the records would state settings that were not used.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ....decoding.sampling_params import SamplingParams
from ....errors import GeneratorError, nearest


@dataclass(frozen=True)
class Backend:
    """One kind of server.

    Attributes:
        name: as written in settings.
        limit: the field that caps a completion, in tokens.
        token_ids: True = it can give the generated ids back.
        logprobs: True = it gives log-probabilities to whoever asks, and no model of it refuses.
        scaled: True = its log-probabilities are those after the temperature.
        controls: how it takes a control of the length with a request, where it has a length value model: as
            ``custom_params``, or as text, in the field ``lenvm`` or inside ``vllm_xargs``; None = it takes none.
        fields: of a request beside the standard ones, for sampling parameters and the ids that end a completion.
    """

    name: str
    limit: str
    token_ids: bool
    logprobs: bool
    fields: Callable[[SamplingParams, list[int]], dict[str, Any]]
    scaled: bool = False
    controls: Literal["custom_params", "lenvm", "vllm_xargs"] | None = None


def _vllm_fields(sampling: SamplingParams, eos: list[int]) -> dict[str, Any]:
    # Older versions know only the second of the two, and only beside log-probabilities.
    fields = {**_shared_fields(sampling), "return_token_ids": True, "return_tokens_as_token_ids": True}
    return fields | ({"include_stop_str_in_output": True} if sampling.stop else {})


def _sglang_fields(sampling: SamplingParams, eos: list[int]) -> dict[str, Any]:
    fields = {**_shared_fields(sampling), "return_token_ids": True, "separate_reasoning": False}
    return fields | ({"no_stop_trim": True} if sampling.stop else {})


def _lenvm_fields(sampling: SamplingParams, eos: list[int]) -> dict[str, Any]:
    fields = {**_shared_fields(sampling), "return_token_ids": True}
    return fields | ({"include_stop_str_in_output": True} if sampling.stop else {})


def _shared_fields(sampling: SamplingParams) -> dict[str, Any]:
    return {"top_k": sampling.top_k or -1, "min_p": sampling.min_p, "repetition_penalty": 1.0}  # -1: all tokens


def _llamacpp_fields(sampling: SamplingParams, eos: list[int]) -> dict[str, Any]:
    return {"top_k": sampling.top_k, "min_p": sampling.min_p, "repeat_penalty": 1.0}


def _transformers_fields(sampling: SamplingParams, eos: list[int]) -> dict[str, Any]:
    # Any other unknown field is an error there; this one replaces the model's own generation configuration.
    config: dict[str, Any] = {"do_sample": sampling.temperature > 0, "eos_token_id": eos, "repetition_penalty": 1.0}
    if sampling.temperature > 0:
        config |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        config |= {"min_p": sampling.min_p} if sampling.min_p else {}
    return {"generation_config": json.dumps(config)}


def _openai_fields(sampling: SamplingParams, eos: list[int]) -> dict[str, Any]:
    if sampling.top_k or sampling.min_p:
        raise GeneratorError(
            f"OpenAI's servers know neither top_k (here {sampling.top_k}) nor min_p (here {sampling.min_p}). "
            "Leave both at 0 and use top_p."
        )
    return {}


def _other_fields(sampling: SamplingParams, eos: list[int]) -> dict[str, Any]:
    return {name: value for name in ("top_k", "min_p") if (value := getattr(sampling, name))}


# The newer name of the limit is the one that OpenAI's own models insist on; gateways and small servers know the older.
# A vLLM with our processor looks like any vLLM, and the research code's server, an SGLang, like any SGLang: name them.
# What the log-probabilities of the latter are of under a control it does not say, so they are not asked for.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("vllm", "max_completion_tokens", token_ids=True, logprobs=True, fields=_vllm_fields),
        Backend(
            "lenvm", "max_completion_tokens", token_ids=True, logprobs=True, fields=_lenvm_fields, controls="lenvm"
        ),
        Backend(
            "vllm-lenvm",
            "max_completion_tokens",
            token_ids=True,
            logprobs=True,
            fields=_vllm_fields,
            controls="vllm_xargs",
        ),
        Backend("sglang", "max_completion_tokens", token_ids=True, logprobs=True, fields=_sglang_fields, scaled=True),
        Backend(
            "research",
            "max_completion_tokens",
            token_ids=True,
            logprobs=False,
            fields=_sglang_fields,
            scaled=True,
            controls="custom_params",
        ),
        Backend("transformers", "max_completion_tokens", token_ids=False, logprobs=False, fields=_transformers_fields),
        Backend("openai", "max_completion_tokens", token_ids=False, logprobs=False, fields=_openai_fields),
        Backend("llamacpp", "max_tokens", token_ids=False, logprobs=True, fields=_llamacpp_fields),
        Backend("other", "max_tokens", token_ids=False, logprobs=False, fields=_other_fields),
    )
}


def find_backend(name: str, host: str, owners: list[str], paths: Callable[[], set[str]]) -> Backend:
    """Choose a kind of server.

    Args:
        name: one of ``BACKENDS``, or ``auto``.
        host: of the server's address.
        owners: the ``owned_by`` of the models that it lists, by which the common servers sign.
        paths: asks the server for the paths it serves; ``transformers serve`` is known by one of its own.

    Raises:
        GeneratorError: the name is unknown.
    """
    if name in BACKENDS:
        return BACKENDS[name]
    if name != "auto":
        known = ["auto", *BACKENDS]
        raise GeneratorError(f"unknown kind of server {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    if f".{host}".endswith((".openai.com", ".openai.azure.com")):  # gateways say `openai` is the owner of any model
        return BACKENDS["openai"]
    signed = next((owner for owner in owners if owner in ("vllm", "lenvm", "sglang", "llamacpp")), None)
    return BACKENDS[signed or ("transformers" if "/load_model" in paths() else "other")]
