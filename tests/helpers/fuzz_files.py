"""Files of people that are fuzzed: rows, prompts, images, recipes, model directories, checkpoints."""

import contextlib
import io
import json
import math
import warnings
from pathlib import Path

import datasets
import torch
import torch.distributed.checkpoint as dcp
from fuzz_targets import Run, Target
from PIL import Image
from safetensors.torch import save_file
from scripted_server import Response, ScriptedServer, generator, said
from scripted_server import sample as ask
from value_models import wrap

from datamodules import TextRollouts, VisionRollouts
from lenvm_lightning import TextLenVM, tinyworld
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import LenVMError
from lenvm_lightning.models.backbone_config import BackboneConfig
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.pipeline.recipe import read_recipe, recipes_folder
from lenvm_lightning.rollouts.generators.interface import GeneratedText
from lenvm_lightning.rollouts.prompts import load_prompts
from lenvm_lightning.rollouts.published_format import convert
from lenvm_lightning.training.fsdp_checkpoint import INDEX, load_shards
from lenvm_lightning.training.load_checkpoint import model_of_checkpoint

QUESTION = {"role": "user", "content": "Add 3 and 4, please."}
ROW = {
    "prompt_id": "a", "number": 0, "messages": [QUESTION], "completion": "7", "token_ids": [5, 6, 2043],
    "logprob": -3.5, "finish_reason": "stop", "split": "train", "sampling": {"max_tokens": 40}, "generator": "g",
}  # fmt: skip
PUBLISHED = {
    "conversations": [{"from": "human", "value": "Add 3 and 4."}, {"from": "gpt", "value": "7"}],
    "meta_info": {"answer_token_length": 3, "lenvm_idx": "a", "split": "train", "max_tokens": 40, "temperature": 1.0},
}


def _lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def png(mode: str = "RGB", size: tuple[int, int] = (28, 28)) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def _rows(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Rollouts that training reads, with one good row beside the hostile ones."""
    datasets.disable_progress_bars()
    good = {"ours": _lines(ROW, {**ROW, "prompt_id": "b"}), "published": _lines(PUBLISHED)}
    more = _lines(*({**ROW, "prompt_id": f"good{n}", "split": "test" if n == 0 else "train"} for n in range(3)))

    def run(name: str, data: bytes) -> None:
        (folder / "rows.jsonl").write_bytes(more + data)
        module = TextRollouts(
            str(folder / "rows.jsonl"), processor="tiny-text", cache_dir=str(folder / "cache"), max_bad_share=1.0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.setup()
            for batch in module.train_dataloader():
                assert batch["remaining"].min() >= 0

    return run, good


def _images(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Images in rows that training reads."""
    datasets.disable_progress_bars()
    seen = [{"role": "user", "content": "<image>How many?"}]
    rows = [{**ROW, "prompt_id": f"p{n}", "messages": seen, "images": [f"{n % 2}.png"]} for n in range(4)]
    (folder / "rows.jsonl").write_bytes(
        _lines(*({**row, "split": "test" if n == 1 else "train"} for n, row in enumerate(rows)))
    )

    def run(name: str, data: bytes) -> None:
        (folder / "0.png").write_bytes(data)
        (folder / "1.png").write_bytes(png())
        module = VisionRollouts(
            str(folder / "rows.jsonl"), processor="tiny-vl", cache_dir=str(folder / "cache"), max_bad_share=1.0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.setup()
            for _ in module.train_dataloader():
                pass

    jpeg = io.BytesIO()
    Image.new("RGB", (28, 28), "red").save(jpeg, "JPEG")
    return run, {"png": png(), "gray": png("L"), "16 bit": png("I;16"), "palette": png("P"), "jpeg": jpeg.getvalue()}


def _prompts(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Prompts to sample."""
    good = {
        "messages": _lines({"prompt_id": "a", "messages": [QUESTION]}, {"prompt_id": "b", "messages": [QUESTION]}),
        "problems": _lines({"prompt": "3 + 4?", "prompt_id": "a", "meta": {"answer": "7"}}),
    }

    def run(name: str, data: bytes) -> None:
        (folder / "prompts.jsonl").write_bytes(data)
        for prompt in load_prompts(str(folder / "prompts.jsonl")):
            assert isinstance(prompt.prompt_id, str)

    return run, good


def _published(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Rollouts that are converted, both ways."""

    def run(name: str, data: bytes) -> None:
        (folder / "source.jsonl").write_bytes(data)
        (folder / "target.jsonl").unlink(missing_ok=True)
        convert(folder / "source.jsonl", folder / "target.jsonl", to=name)  # type: ignore[arg-type]

    return run, {"published": _lines(ROW, {**ROW, "number": 1}), "ours": _lines(PUBLISHED)}


def _recipes(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Recipes."""

    def run(name: str, data: bytes) -> None:
        (folder / "r.yaml").write_bytes(data)
        read_recipe(folder / "r.yaml", [])

    names = ("text_lenvm", "vlm_qlora", "lifebench", "qwen2.5-7b-zero2")
    return run, {name: (recipes_folder() / f"{name}.yaml").read_bytes() for name in names}


def _overrides(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Values of settings on a command line."""
    good = {
        "fit.model.optimizer.betas": b"[0.9, 0.98]", "sample.limit": b"3", "fit.data.files": b"a.jsonl",
        "evaluate.systems": b"[base, tilt:-5]", "fit.model.backbone": b"{source: tiny-text, keep_layers: 2}",
    }  # fmt: skip

    def run(name: str, data: bytes) -> None:
        read_recipe(recipes_folder() / "text_lenvm.yaml", [(name, data.decode(errors="replace"))])

    return run, good


def small_value_model() -> LengthValueModel:
    """A value model of a few kilobytes."""
    overrides = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    overrides |= {"num_key_value_heads": 1}
    model = LengthValueModel.from_backbone("tiny-text", LenVMConfig(gamma=0.99), pretrained=False, overrides=overrides)
    return wrap(model.backbone)


def _model_directories(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Files of a value model."""
    small_value_model().save_pretrained(folder / "model", load_processor("tiny-text"))
    names = ["config.json", "lenvm_config.json", "value_head.safetensors", "model.safetensors"]
    good = {name: (folder / "model" / name).read_bytes() for name in names}
    ids = torch.arange(9)[None]

    def run(name: str, data: bytes) -> None:
        for other, content in good.items():
            (folder / "model" / other).write_bytes(data if other == name else content)
        with torch.no_grad():
            LengthValueModel.from_pretrained(folder / "model")(input_ids=ids)

    return run, {name: content[:4000] if "model.safe" in name else content for name, content in good.items()}


def _tokenizers(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Files of a tokenizer."""
    load_processor("tiny-text").save_pretrained(folder / "tokenizer")
    names = [file.name for file in (folder / "tokenizer").iterdir()]
    good = {name: (folder / "tokenizer" / name).read_bytes() for name in names}

    def run(name: str, data: bytes) -> None:
        for other, content in good.items():
            (folder / "tokenizer" / other).write_bytes(data if other == name else content)
        load_processor(str(folder / "tokenizer"))

    return run, good


def _checkpoints(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """A checkpoint of training."""
    module = TextLenVM(BackboneConfig("tiny-text", pretrained=False, overrides={"num_hidden_layers": 1}), gamma=0.99)
    module.configure_model()
    state = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "epoch": 0, "global_step": 3}
    module.on_save_checkpoint(state)
    torch.save(state, folder / "good.ckpt")
    content = (folder / "good.ckpt").read_bytes()

    def run(name: str, data: bytes) -> None:
        (folder / "step-000000003.ckpt").write_bytes(data)
        model_of_checkpoint(folder / "step-000000003.ckpt")

    return run, {"checkpoint": content}


def _indexes(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """The index of a checkpoint of several ranks, which is a pickle."""
    dcp.save({"weights": torch.ones(8), "optimizer": {"lr": 0.5}}, checkpoint_id=folder / "shards", no_dist=True)

    def run(name: str, data: bytes) -> None:
        (folder / "shards" / INDEX).write_bytes(data)
        state = {"weights": torch.zeros(8), "optimizer": {"lr": 0.0}}
        load_shards(state, folder / "shards", no_dist=True)
        assert state["weights"].shape == (8,)
        assert isinstance(state["optimizer"]["lr"], float)

    return run, {"index": (folder / "shards" / INDEX).read_bytes()}


def _headers(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """The header of a value head's file, which says where the numbers lie."""
    directory = tinyworld.path("tiny-text-lenvm")
    head = {f"v_head.{key}": value for key, value in small_value_model().v_head.state_dict().items()}
    save_file(head, folder / "head.safetensors")
    whole = (folder / "head.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    small_value_model().save_pretrained(folder / "model", load_processor(str(directory)))

    def run(name: str, data: bytes) -> None:
        content = len(data).to_bytes(8, "little") + data + whole[8 + size :]
        (folder / "model" / "value_head.safetensors").write_bytes(content)
        LengthValueModel.from_pretrained(folder / "model")

    return run, {"header": whole[8 : 8 + size]}


def _replies(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Replies of a server, over HTTP, and its list of models."""
    server = ScriptedServer()
    logprobs = [("a", -0.5), ("b", -0.1)]
    good = {
        "text": said("Four.", tokens=3).body,
        "ids": said("Four.", token_ids=[7, 2], logprobs=logprobs).body,
        "models": server.pages["/v1/models"].body,
    }
    page = server.pages["/v1/models"]
    sampling = SamplingParams(max_tokens=32)

    def run(name: str, data: bytes) -> None:
        server.bodies.clear()
        if name == "models":
            server.pages["/v1/models"] = Response(data)
            with contextlib.suppress(LenVMError):
                generator(server, model=None, server="auto", processor="tiny-text", retries=0, unreachable_timeout=1)
            server.pages["/v1/models"] = page
            return
        server.act = lambda body, attempt: Response(data)
        for answer in ask(server, sampling=sampling, retries=0, unreachable_timeout=1):
            if isinstance(answer.result, GeneratedText):
                result = answer.result
                assert len(result.token_ids) <= 65
                assert all(0 <= token < 2048 for token in result.token_ids)
                assert result.logprob is None or math.isfinite(result.logprob)
                result.text.encode()

    return run, {name: json.dumps(body).encode() for name, body in good.items()}


FILES = {
    "replies of servers": Target(_replies, 0.1),
    "rows of rollouts": Target(_rows, 0.02),
    "images of rollouts": Target(_images, 0.02),
    "prompts": Target(_prompts),
    "published rollouts": Target(_published),
    "recipes": Target(_recipes, 0.5),
    "overrides": Target(_overrides),
    "model directories": Target(_model_directories, 0.1),
    "headers of safetensors": Target(_headers, 0.1),
    "tokenizers": Target(_tokenizers, 0.1),
    "checkpoints": Target(_checkpoints, 0.5),
    "indexes of shards": Target(_indexes, 0.3),
}
