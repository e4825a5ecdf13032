"""Requests that tell an engine how long their answers will be, one a line as OpenAI's batch files have them.

vLLM serves requests of lower `priority` first under ``--scheduling-policy priority``: the expected length there is
shortest job first. NVIDIA Dynamo takes an expected output length as the hint `nvext.agent_hints.osl`.
"""

from typing import Any, Literal

from ..rollouts.generators.interface import Prompt
from ..rollouts.generators.server.chat import chat_messages

Engine = Literal["vllm", "dynamo"]


def scheduled_request(prompt: Prompt, expected: float, engine: Engine, model: str) -> dict[str, Any]:
    """One line of a batch file.

    Args:
        prompt: with or without images, which become data URLs.
        expected: tokens of its answer.
        engine: whose scheduler is told.
        model: as the server calls it.

    Raises:
        ValueError: an image cannot be read, or the prompt holds half a character; see `chat_messages`.
    """
    tokens = max(1, round(expected))
    told = {"priority": tokens} if engine == "vllm" else {"nvext": {"agent_hints": {"osl": tokens}}}
    return {
        "custom_id": prompt.prompt_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": model, "messages": chat_messages(prompt), **told},
    }
