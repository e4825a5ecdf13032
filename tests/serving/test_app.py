"""The server as its clients see it: the real `openai` client, and requests that no client should send."""

import asyncio
import base64
import io
import json
import socket

import openai
import pytest
from PIL import Image
from served import SEA, chat, generator_of, serving

from lenvm_lightning.cli.main import main
from lenvm_lightning.decoding.generate import generate
from lenvm_lightning.guidance import EqualTo
from lenvm_lightning.rollouts.prompting import encode_prompt
from lenvm_lightning.serving.service import Limits


def test_an_answer_of_a_controlled_length(tiny_server):
    answer = chat(tiny_server, lenvm="equal-to:40", n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(choice.finish_reason == "stop" for choice in answer.choices)
    assert 3 * 36 <= answer.usage.completion_tokens <= 3 * 42
    assert len({choice.message.content for choice in answer.choices}) == 3
    # What the embedded model expects of this prompt without a control, of three answers.
    [length] = tiny_server.ask("/v1/lengths", {"messages": SEA})[2]["data"]
    assert answer.usage.expected_completion_tokens == pytest.approx(3 * length["expected_tokens"], abs=0.2)
    assert chat(tiny_server, lenvm="equal-to:40", n=3, seed=5).choices == answer.choices
    assert chat(tiny_server, lenvm="equal-to:40", n=3, seed=6).choices != answer.choices


def test_the_same_text_as_generate_writes_with_this_seed(tiny_server):
    generator = tiny_server.service.generator
    ids, _ = encode_prompt(generator.processor, SEA, [])
    settings = {"control": EqualTo(40), "n": 2, "seed": 7, "tokenizer": generator.tokenizer}
    same = generate(generator.model, generator.lenvm, [ids], **settings)
    answer = chat(tiny_server, lenvm="equal-to:40", seed=7, n=2)
    texts = [generator.tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in same]
    assert [choice.message.content for choice in answer.choices] == texts


def test_a_stream_is_the_whole_answer_in_pieces_with_what_remains(tiny_server):
    whole = chat(tiny_server, lenvm="at-most:40", seed=1, n=2)
    pieces = list(
        chat(tiny_server, lenvm="at-most:40", seed=1, n=2, stream=True, stream_options={"include_usage": True})
    )
    texts, remaining, ended = ["", ""], [[], []], [None, None]
    for piece in pieces[:-1]:
        [choice] = piece.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.model_extra.get("lenvm"):
            remaining[choice.index].append(choice.lenvm["remaining_tokens"])
        ended[choice.index] = choice.finish_reason or ended[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert ended == [choice.finish_reason for choice in whole.choices]
    assert pieces[-1].choices == []
    assert pieces[-1].usage == whole.usage
    for some in remaining:
        assert len(some) > 10
        assert some[0] > some[-1] == 0.0


def test_completions_of_texts_and_of_ids(tiny_server):
    client = tiny_server.client()
    text = "Ann has 3 pens."
    ids = tiny_server.service.tokenizer(text)["input_ids"]
    of = {"model": "tiny-text", "max_tokens": 12, "seed": 3, "logprobs": 1}
    answers = [client.completions.create(prompt=prompt, **of) for prompt in (text, ids, [text], [ids])]
    assert all(answer.choices == answers[0].choices for answer in answers)
    [choice] = answers[0].choices
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == answers[0].usage.completion_tokens
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs)
    two = client.completions.create(prompt=[text, "Bob has 4."], n=2, **of)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0] == choice
    assert two.usage.prompt_tokens == len(ids) + len(tiny_server.service.tokenizer("Bob has 4.")["input_ids"])


def test_the_prompt_can_be_read_back_beside_what_was_written(tiny_server):
    text = "Ann has 3 pens."
    ids = tiny_server.service.tokenizer(text)["input_ids"]
    body = {"prompt": text, "max_tokens": 6, "seed": 3, "logprobs": 2}
    [plain] = tiny_server.ask("/v1/completions", body)[2]["choices"]
    [echoed] = tiny_server.ask("/v1/completions", body | {"echo": True})[2]["choices"]
    assert echoed["text"] == text + plain["text"]
    known, all_of_it = plain["logprobs"], echoed["logprobs"]
    assert all_of_it["token_logprobs"][0] is None
    assert all_of_it["top_logprobs"][0] is None
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert all_of_it[name][len(ids) :] == known[name]
    for token, logprob, best in zip(known["tokens"], known["token_logprobs"], known["top_logprobs"], strict=True):
        assert best[token] == logprob <= max(best.values())
        assert 2 <= len(best) <= 3
    starts = all_of_it["text_offset"]
    assert starts[:2] == [0, len(all_of_it["tokens"][0])]
    assert len(starts) == len(all_of_it["tokens"])
    [read] = tiny_server.ask("/v1/completions", body | {"echo": True, "max_tokens": 0})[2]["choices"]
    assert (read["text"], read["finish_reason"]) == (text, "length")
    assert read["logprobs"]["token_logprobs"] == pytest.approx(all_of_it["token_logprobs"][: len(ids)])
    [without] = tiny_server.ask("/v1/completions", {"prompt": ids, "echo": True, "max_tokens": 2})[2]["choices"]
    assert without["text"].startswith(text)
    assert "logprobs" not in without


def test_likeliest_tokens_of_a_chat(tiny_server):
    [choice] = chat(tiny_server, seed=4, max_tokens=8, logprobs=True, top_logprobs=3).choices
    [plain] = chat(tiny_server, seed=4, max_tokens=8, logprobs=True).choices
    for one, same in zip(choice.logprobs.content, plain.logprobs.content, strict=True):
        assert (one.token, one.bytes) == (same.token, same.bytes)
        assert one.logprob == pytest.approx(same.logprob, abs=1e-4)
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob >= one.logprob
        assert not same.top_logprobs


def test_a_control_in_the_words_of_the_research_server(tiny_server):
    params = {"target_length": 24, "value_constraint": "le"}
    asked = {"messages": SEA, "seed": 3}
    told = tiny_server.ask("/v1/chat/completions", asked | {"custom_params": params})[2]
    same = tiny_server.ask("/v1/chat/completions", asked | {"lenvm": "at-most:24:hard"})[2]
    assert told["choices"] == same["choices"]
    assert told["usage"]["completion_tokens"] <= 24


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(tiny_server):
    [whole] = chat(tiny_server, seed=2).choices
    text = whole.message.content
    stop = text[len(text) // 2 :][:4]
    [ended] = chat(tiny_server, seed=2, stop=[stop, "never written"]).choices
    assert ended.message.content == text.partition(stop)[0]
    assert ended.finish_reason == "stop"
    pieces = chat(tiny_server, seed=2, stop=stop, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == ended.message.content


def test_the_async_client(tiny_server):
    async def ask():
        async with tiny_server.client(openai.AsyncOpenAI) as client:
            stream = await client.chat.completions.create(
                model="tiny-text", messages=SEA, stream=True, max_tokens=9, seed=1
            )
            return [piece async for piece in stream]

    pieces = asyncio.run(ask())
    assert pieces[-1].choices[0].finish_reason == "length"


def test_images(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    image = {"type": "image_url", "image_url": {"url": url}}
    message = {"role": "user", "content": [image, {"type": "text", "text": "How many circles are there?"}]}
    with serving(generator_of("tiny-vl", rows=4), Limits(images=1)) as server:
        status, _, answer = server.ask(
            "/v1/chat/completions", {"messages": [message], "lenvm": "at-most:30", "seed": 0}
        )
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] <= 30
        status, _, answer = server.ask("/v1/chat/completions", {"messages": [message, message]})
        assert (status, answer["error"]["message"]) == (400, "2 images are more than 1")
        broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        status, _, answer = server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": [broken]}]})
        assert status == 400
        assert "cannot be read" in answer["error"]["message"]


BAD = [
    ({"messages": []}, "messages: List should have at least 1 item"),
    ({"messages": SEA, "n": 0}, "n: Input should be greater than or equal to 1"),
    ({"messages": SEA, "n": 65}, "65 completions are more than 64"),
    ({"messages": SEA, "max_tokens": 10**9}, "max_tokens=1000000000 is more than this server allows, 32768"),
    ({"messages": SEA, "max_tokens": 30000}, "more than the context window"),
    ({"messages": SEA, "temperature": -1}, "temperature: Input should be greater"),
    ({"messages": SEA, "lenvm": "equal-to:999999"}, "a target of 999999 tokens, and room for"),
    ({"messages": SEA, "lenvm": "equal-to:50", "max_tokens": 20}, "contradict each other"),
    ({"messages": SEA, "lenvm": "equal-to"}, "write it like 'equal-to:128'"),
    ({"messages": SEA, "stop": ""}, "stop"),
    ({"messages": SEA, "stream": True, "logprobs": True}, "logprobs and echo come with whole answers only"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "<image>"}]}, "send that as a part of type image_url"),
    ({"messages": SEA, "top_logprobs": 2}, "top_logprobs is told beside logprobs"),
    ({"messages": SEA, "custom_params": {"value_mode": "x"}}, "value_mode='x' is none of"),
    ({"messages": SEA, "custom_params": {"target_length": 9}, "lenvm": "at-most:9"}, "give one of them"),
    ({"messages": SEA, "lenvm": "at-most:8", "vllm_xargs": {"lenvm": "at-most:9"}}, "give one of them"),
    (b"{", "JSON decode error"),
    (b"\xff", ""),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_what_cannot_be_answered_is_refused_with_a_sentence(body, message, tiny_server):
    status, _, answer = tiny_server.ask("/v1/chat/completions", body)
    assert status == 400
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_other_models_paths_and_bodies_that_are_too_large(tiny_server):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5' here; this server has 'tiny-text'"):
        tiny_server.client().chat.completions.create(model="gpt-5", messages=SEA)
    assert [model.id for model in tiny_server.client().models.list()] == ["tiny-text"]
    assert tiny_server.ask("/v1/nothing")[0] == 404
    assert tiny_server.ask("/v1/chat/completions")[0] == 405
    with socket.create_connection(("127.0.0.1", int(tiny_server.url.rpartition(":")[2]))) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert b" 413 " in raw.recv(4096)


def test_lengths_of_prompts_and_along_an_answer(tiny_server, tmp_path, capsys):
    texts = ["What is 3 + 4?", SEA[0]["content"]]
    _, _, answer = tiny_server.ask("/v1/lengths", {"prompts": texts})
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt_id": str(i), "messages": [{"role": "user", "content": text}]} for i, text in enumerate(texts)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["predict", str(prompts)]) == 0
    told = [json.loads(line)["expected_tokens"] for line in capsys.readouterr().out.splitlines()]
    assert [one["expected_tokens"] for one in answer["data"]] == pytest.approx(told, abs=0.06)
    _, _, answer = tiny_server.ask(
        "/v1/lengths", {"prompts": [SEA[0]["content"]], "completion": "This is about the sea."}
    )
    [one] = answer["data"]
    assert "".join(token["text"] for token in one["tokens"]) == "This is about the sea."
    assert all(-1 <= token["value"] <= 0 <= token["remaining"] for token in one["tokens"])
    assert tiny_server.ask("/v1/lengths", {"prompts": ["a", "b"], "completion": "c"})[0] == 400


def test_after_an_end_token_nothing_remains(tiny_server):
    end = tiny_server.service.tokenizer.eos_token
    body = {"prompts": ["What is 3 + 4?"], "completion": f"The sea.{end}"}
    [one] = tiny_server.ask("/v1/lengths", body)[2]["data"]
    assert (one["tokens"][-1]["value"], one["tokens"][-1]["remaining"]) == (0.0, 0.0)
    assert one["tokens"][-2]["remaining"] > 0


def test_images_are_refused_unopened_by_a_model_of_text(tiny_server):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    status, _, answer = tiny_server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]})
    assert (status, answer["error"]["message"]) == (400, "the prompt has images, but tiny-text reads text only")


def test_an_error_that_nobody_expected_is_told_counted_and_logged(monkeypatch, caplog):
    with serving(generator_of(rows=2)) as server:
        monkeypatch.setattr(server.service, "prepare", lambda *_: 1 / 0)
        status, _, answer = server.ask("/v1/chat/completions", {"messages": SEA})
        assert status == 500
        assert answer["error"]["message"] == "the server failed: ZeroDivisionError: division by zero"
        assert 'status="500"} 1.0' in server.ask("/metrics")[2]
        assert "division by zero" in caplog.text


def test_without_a_length_value_model_there_is_text_and_no_control():
    with serving(generator_of(lenvm=False, rows=2)) as server:
        assert "lenvm" not in chat(server, max_tokens=5).choices[0].model_extra
        with pytest.raises(openai.BadRequestError, match="start the server with --lenvm"):
            chat(server, lenvm="at-most:9")
        assert server.ask("/v1/lengths", {"prompts": ["a"]})[0] == 400


def test_a_key_is_asked_of_every_path():
    with serving(generator_of(rows=2), key="secret") as server:
        assert chat(server, max_tokens=2).choices
        server.key = None
        assert server.ask("/health")[0] == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
            assert server.ask(path)[0] == 401
            assert server.ask(path, key="wrong")[0] == 401
        with pytest.raises(openai.AuthenticationError):
            chat(server)


def test_the_playground_is_served_and_may_fetch_from_here_alone(tiny_server):
    status, headers, page = tiny_server.ask("/")
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'self'")
    for file in ("style.css", "page.js"):
        assert f'"page/{file}"' in page
        assert tiny_server.ask(f"/page/{file}")[0] == 200
    assert tiny_server.ask("/page/../app.py")[0] == 404


def test_metrics_count_what_was_asked_expected_and_written():
    with serving(generator_of(rows=4)) as server:
        answer = chat(server, n=2, seed=0)
        server.ask("/v1/chat/completions", {"messages": []})
        text = server.ask("/metrics")[2]
        assert 'lenvm_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0' in text
        assert 'lenvm_requests_total{endpoint="/v1/chat/completions",status="400"} 1.0' in text
        assert f"lenvm_completion_tokens_sum {float(answer.usage.completion_tokens)}" in text
        assert "lenvm_expected_tokens_count 2.0" in text
        assert "lenvm_completions 0.0" in text
