"""The tiny world's tokenizer: byte-level BPE of 2048 tokens in the Qwen2 layout, trained on text made here.

It is a `Qwen2Tokenizer` because transformers 5 loads every folder of model type `qwen2` as one, whatever the folder
says. That class brings Qwen's pre-tokenisation (digits alone) and its NFC normalisation: text comes back from its
tokens byte for byte when it is in NFC form, which ordinary text is.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from lenvm_lightning.tinyworld import arithmetic, shapes, writing

VOCABULARY_SIZE = 2048
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
EOS_TOKEN, PAD_TOKEN = "<|im_end|>", "<|endoftext|>"
MAX_LENGTH = 4096  # tokens, the models' max_position_embeddings

# Qwen's layout, without a default system prompt: what is not asked for is not in the prompt.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'text' %}
{{- part['text'] }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# How much text each section of vocabulary.txt contributes: (the first word's count, how flat the fall is).
_SECTIONS = {
    "general": (18000, 12),
    "solution": (12000, 12),
    "mathematics": (6000, 20),
    "things": (1000, 60),
    "names": (1500, 60),
    "latex": (16000, 30),
}
_GENERATED = 150  # problems of each kind in the training text


def read_vocabulary() -> dict[str, list[str]]:
    """Read vocabulary.txt: the words of each section, most frequent first."""
    sections: dict[str, list[str]] = {}
    for line in (Path(__file__).parent / "vocabulary.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            words = sections[line.strip("[]")] = []
        elif line and not line.startswith("# "):
            words.extend(line.split())
    return sections


def training_text() -> Iterator[str]:
    """Yield the text the merges are learnt from: word lists with Zipf-like weights, then generated problems."""
    for section, words in read_vocabulary().items():
        first, flat = _SECTIONS[section]
        for rank, word in enumerate(words):
            times = max(1, first // (rank + flat))
            if section == "latex":
                yield from [word.replace("⏎", "\n").replace("␣", " ")] * times
                continue
            yield f" {word}" * times
            # The same word at the start of a sentence or of a line, or after an opening mark.
            yield f" {word.capitalize()}" * (times // 14)
            yield from [word.capitalize()] * (times // 10)
            yield from [word] * (times // 30)
    rng = Random(0)
    for _ in range(_GENERATED):
        for module in (arithmetic, shapes, writing):
            problem = module.draw_problem(rng)
            yield problem.prompt
            yield module.draw_solution(rng, problem)


def train() -> Tokenizer:
    """Train the BPE model; the 7 special tokens take the last ids, as Qwen's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # all 256 bytes: any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def build_tokenizer() -> Qwen2Tokenizer:
    """Train the tokenizer (about a second, the same every time) and dress it for transformers."""
    return as_qwen2(train())


def as_qwen2(tokenizer: Tokenizer) -> Qwen2Tokenizer:
    """Turn the output of `train` into the class that `AutoTokenizer` makes of the shipped folders."""
    model = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],  # type: ignore[misc]  # declared as strings, used as pairs
        chat_template=CHAT_TEMPLATE,
        added_tokens_decoder=dict(tokenizer.get_added_tokens_decoder()),
        **tokenizer_config(),
    )


def tokenizer_config() -> dict:
    """Return what tokenizer_config.json says, apart from the class."""
    return {
        "unk_token": PAD_TOKEN,
        "bos_token": None,
        "eos_token": EOS_TOKEN,
        "pad_token": PAD_TOKEN,
        "extra_special_tokens": [token for token in SPECIAL_TOKENS if token not in (EOS_TOKEN, PAD_TOKEN)],
        "model_max_length": MAX_LENGTH,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
    }
