"""Small length value models, and inputs for them."""

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    SmolVLMConfig,
    SmolVLMVisionConfig,
)
from transformers.models.clip import CLIPImageProcessor

from lenvm_lightning import tinyworld
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel

GAMMA = 0.997
FAMILIES = ("qwen2.5-vl", "smolvlm", "llava")
VOCABULARY = 2048
IMAGE_TOKEN = 2046  # <|image_pad|>
QUESTION = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"


def wrap(backbone) -> LengthValueModel:
    """A value model whose head says something, in eval mode."""
    model = LengthValueModel(backbone, LenVMConfig(gamma=0.997))
    nn.init.normal_(model.v_head.summary.weight)
    return model.eval()


def build(family: str) -> LengthValueModel:
    if family in ("tiny-text", "qwen2.5-vl"):
        name = "tiny-text" if family == "tiny-text" else "tiny-vl"
        return wrap(LengthValueModel.from_backbone(name, LenVMConfig(gamma=0.997), pretrained=False).backbone)
    text = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=256)
    elif family == "smolvlm":  # 16 patches, 2 x 2 of them a token: 4 tokens an image
        tower = SmolVLMVisionConfig(**vision, image_size=28, patch_size=7)
        config = SmolVLMConfig(
            text_config=LlamaConfig(**text, pad_token_id=2041), vision_config=tower, image_token_id=IMAGE_TOKEN,
            scale_factor=2, pad_token_id=2041,
        )  # fmt: skip
    else:  # 4 patches, a token each
        tower = CLIPVisionConfig(**vision, image_size=28, patch_size=14, projection_dim=16)
        config = LlavaConfig(text_config=LlamaConfig(**text), vision_config=tower, image_token_id=IMAGE_TOKEN)
    return wrap(AutoModel.from_config(config))


def pictures() -> list[Image.Image]:
    """Four pictures with something on them, of different sizes."""
    images = []
    for number, size in enumerate([(84, 84), (112, 112), (300, 180), (20, 20)]):
        image = Image.new("RGB", size, "white")
        image.paste(("red", "blue", "green", "black")[number], (size[0] // 4, size[1] // 5, size[0], size[1] // 2))
        images.append(image)
    return images


def image_inputs(family: str, side: str = "right", rows: tuple[int, ...] = (0, 1, 2, 3)) -> dict[str, Tensor]:
    """Questions of different lengths about pictures, tokenised the way the family wants it."""
    words = ["How many?", "How many red shapes are there in the picture?", "Why?", "Count them all, please."]
    texts = [QUESTION.format(words[row]) for row in rows]
    images = [pictures()[row] for row in rows]
    if family == "qwen2.5-vl":
        processor = AutoProcessor.from_pretrained(tinyworld.path("tiny-vl"))
        return dict(processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt"))
    tokenizer = AutoTokenizer.from_pretrained(tinyworld.path("tiny-text"))
    resize = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    if family == "llava":
        processor = LlavaProcessor(
            resize, tokenizer, patch_size=14, vision_feature_select_strategy="default",
            image_token="<|image_pad|>", num_additional_image_tokens=1,
        )  # fmt: skip
        return dict(processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt"))
    # SmolVLM's processor needs num2words; its inputs are one more axis of images per row.
    texts = [text.replace("<|image_pad|>", "<|image_pad|>" * 4) for text in texts]
    inputs = dict(tokenizer(texts, padding=True, padding_side=side, return_tensors="pt"))
    return inputs | {"pixel_values": resize(images, return_tensors="pt")["pixel_values"][:, None]}


def text_inputs(side: str) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(tinyworld.path("tiny-text"))
    texts = ["one two three", "So the answer is 12, because 3 * 4 = 12.", "x"]
    return dict(tokenizer(texts, padding=True, padding_side=side, return_tensors="pt"))


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def inputs_of(family: str) -> dict[str, Tensor]:
    return text_inputs("left") if family in ("tiny-text", "untied") else image_inputs(family)


def trained(family: str) -> LengthValueModel:
    """A model whose weights, head included, are not those it starts from."""
    torch.manual_seed(1)
    if family == "untied":
        model = LengthValueModel.from_backbone(
            "tiny-text", LenVMConfig(GAMMA), pretrained=False, overrides={"tie_word_embeddings": False}
        )
    else:
        model = build(family)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    nn.init.normal_(model.v_head.summary.weight)
    return model


def logits_of(model: LengthValueModel, family: str) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(family))
