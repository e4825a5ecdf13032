"""Length tokens: after which words a completion ends sooner, or goes on longer, than was expected before them.

The residual of the generated token t (Zhang et al. 2026, with the value of the state after EOS 0 by definition) is

    delta_t = -(1 - gamma) + gamma * V_t - V_{t-1}

V is minus the discounted length to come, so a positive residual says that the end came closer than one token: the text
ends sooner. A model that is right on average has residuals of mean 0 over all tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..objectives import LengthTarget
from .statistics import ratio_and_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Direction = Literal["goes on longer", "ends sooner"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
Ranking = Literal["mean", "share"]
_SHUFFLES = 20
_BROKEN = "\ufffd"  # what half a character decodes to
_UNSPACED = 0x2E80  # from here on scripts write words without spaces


def residuals(value: np.ndarray, gamma: float, ended: bool) -> np.ndarray:
    """Residual of each generated token, see the head of this module.

    Their discounted sum `sum(gamma ** (t - 1) * delta_t)` telescopes to `G_0 - V_0`: what the first state got
    wrong. A positive residual says "ends sooner".

    Args:
        value: values of the states s_0 … s_L, in [-1, 0]. Shape (L + 1,).
        gamma: discount.
        ended: True = the last token was EOS, so that the value of s_L is 0 whatever was predicted; False = it was
            truncated.

    Returns:
        Shape (L,), float64.
    """
    value = np.array(value, dtype=np.float64)
    if ended:
        value[-1] = 0.0
    return -(1.0 - gamma) + gamma * value[1:] - value[:-1]


class Words:
    r"""Splits generated ids into words.

    A token is a word of its own, but for two cases: letters that follow letters without a space continue the word
    (`W` + `ait`), and the bytes of one character belong together. Case and the spaces around a word do not count.
    White space alone is written as `\n` and `␣`; of scripts without spaces each token is a word.

    Args:
        tokenizer: of the generator.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._pieces: dict[int, str] = {}

    def split(self, ids: Sequence[int]) -> list[tuple[str, int, int, bool]]:
        """Words with the first of their tokens, the one after their last, and whether they are a special token."""
        words: list[tuple[str, int, int, bool]] = []
        for at, token in enumerate(ids):
            piece = self._piece(token)
            special = token in self._special
            text, start, stop, was_special = words[-1] if words else ("", 0, 0, True)
            if not special and not was_special:
                if text.endswith(_BROKEN):
                    words[-1] = (self._decode(ids[start : at + 1]), start, at + 1, False)
                    continue
                if _continues(text, piece):
                    words[-1] = (text + piece, start, stop + 1, False)
                    continue
            words.append((piece, at, at + 1, special))
        return [(_label(text), start, stop, special) for text, start, stop, special in words]

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            piece = self._decode([token])
            # Tokenizers with a visible space drop it where a text begins.
            raw = str(self._tokenizer.convert_ids_to_tokens(token))
            self._pieces[token] = f" {piece}" if raw.startswith("▁") and not piece.startswith(" ") else piece
        return self._pieces[token]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _continues(text: str, piece: str) -> bool:
    last, first = text[-1:], piece[:1]
    return last.isalpha() and first.isalpha() and ord(last) < _UNSPACED and ord(first) < _UNSPACED


def _label(text: str) -> str:
    stripped = text.strip()
    if stripped:
        return stripped.lower()
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t").replace(" ", "␣") or "(nothing)"


@dataclass(frozen=True)
class WordEffect:
    r"""What follows a word.

    Attributes:
        word: lower case; white space as `\n` and `␣`.
        count: how often it was written.
        prompts: in the completions of how many prompts.
        mean_residual: of all its occurrences; of one of several tokens the discounted sum of theirs.
        stderr: standard error with prompts as the unit; None where it occurs in one only.
        z: mean over standard error, to be compared with `TokenReport.chance_z`; 0 without an error.
        share_longer: share of its occurrences after which the text goes on longer by more than the threshold.
        share_sooner: share after which it ends sooner by more than that.
        special: True = a special token, such as EOS: the end itself, which no ranking lists.
    """

    word: str
    count: int
    prompts: int
    mean_residual: float
    stderr: float | None
    z: float
    share_longer: float
    share_sooner: float
    special: bool

    @property
    def direction(self) -> Direction:
        """What its mean residual says."""
        return "ends sooner" if self.mean_residual > 0 else "goes on longer"


@dataclass(frozen=True)
class TokenReport:
    """Residuals by word.

    Attributes:
        completions: number of completions.
        prompts: of how many prompts.
        tokens: generated tokens.
        threshold: residual beyond which an occurrence counts in the shares.
        minimum: prompts that a word must occur in to be ranked.
        mean_residual: over all tokens, EOS included: about 0 where the model is right on average.
        stderr: its standard error with prompts as the unit; None with a single prompt.
        chance_z: how far the most striking ranked word gets when residuals are shuffled among the words of each
            prompt: largest size of z, mean of 20 shuffles. Words below it may be chance. None where none is ranked.
        words: all of them, the most frequent first.
    """

    completions: int
    prompts: int
    tokens: int
    threshold: float
    minimum: int
    mean_residual: float
    stderr: float | None
    chance_z: float | None
    words: tuple[WordEffect, ...]

    def ranking(self, direction: Direction, by: Ranking = "mean", top: int | None = None) -> list[WordEffect]:
        """The words of a direction, the most telling first; special tokens and rare words are left out.

        Args:
            direction: `goes on longer` or `ends sooner`.
            by: `mean` = by mean residual, words whose mean says the other direction are left out; `share` = by the
                share of occurrences beyond the threshold, words without any are left out. Counts are no ranking: they
                list full stops and digits, which are everywhere.
            top: at most so many.

        Raises:
            ValueError: another direction or ranking.
        """
        if direction not in DIRECTIONS or by not in get_args(Ranking):
            raise ValueError(f"no ranking of {direction!r} by {by!r}: {', '.join(DIRECTIONS)}; mean, share")
        sooner = direction == "ends sooner"

        def key(word: WordEffect) -> float:
            if by == "share":
                return word.share_sooner if sooner else word.share_longer
            return word.mean_residual if sooner else -word.mean_residual

        ranked = [word for word in self.words if not word.special and word.prompts >= self.minimum and key(word) > 0]
        return sorted(ranked, key=lambda word: (-key(word), -word.count, word.word))[:top]


class LengthTokens:
    """Takes completions one by one and keeps one number a word.

    Args:
        tokenizer: of the generator.
        rule: target rule of the value model, `lenvm.config.rule`.
    """

    def __init__(self, tokenizer: Any, rule: LengthTarget) -> None:
        self._words, self._rule = Words(tokenizer), rule
        self._numbers: dict[tuple[str, bool], int] = {}
        self._labels: list[np.ndarray] = []
        self._effects: list[np.ndarray] = []
        self._owners: list[int] = []  # prompt of each completion
        self._prompts: dict[str, int] = {}
        self._totals: list[tuple[float, int]] = []  # sum of the residuals and tokens of each completion

    def add(self, prompt_id: str, token_ids: Sequence[int], logits: Tensor, ended: bool) -> None:
        """Add a completion.

        Args:
            prompt_id: of its prompt: the completions of one prompt are not independent of each other.
            token_ids: generated ids. L of them, at least one.
            logits: of the states s_0 … s_L. Shape (L + 1,).
            ended: True = the last id is EOS; False = truncated at the token limit.

        Raises:
            ValueError: the number of logits does not fit.
        """
        if len(logits) != len(token_ids) + 1 or not token_ids:
            raise ValueError(f"{len(token_ids)} tokens have {len(token_ids) + 1} states, at least 2; got {len(logits)}")
        delta = residuals(self._rule.value(logits.to(torch.float64)).numpy(), self._rule.gamma, ended)
        self._totals.append((float(delta.sum()), len(delta)))
        self._owners.append(self._prompts.setdefault(prompt_id, len(self._prompts)))
        words = self._words.split(token_ids)
        if ended and not words[-1][3]:  # EOS that the tokenizer does not count among its special tokens
            words[-1] = (*words[-1][:3], True)
        weight = self._rule.gamma ** np.arange(max(stop - start for _, start, stop, _ in words))
        labels = [self._numbers.setdefault((word, special), len(self._numbers)) for word, _, _, special in words]
        self._labels.append(np.array(labels))
        self._effects.append(np.array([delta[i:j] @ weight[: j - i] for _, i, j, _ in words]))

    def compute(self, threshold: float = 0.01, minimum: int = 10, seed: int = 0) -> TokenReport:
        """Sum up at least one completion.

        Args:
            threshold: residual beyond which an occurrence counts in the shares.
            minimum: prompts that a word must occur in to be ranked.
            seed: of the shuffles.

        Raises:
            ValueError: no completion was added.
        """
        if not self._totals:
            raise ValueError("there are no completions")
        labels, effects = np.concatenate(self._labels), np.concatenate(self._effects)
        owner = np.repeat(self._owners, [len(some) for some in self._labels])
        mean, stderr = ratio_and_error(*(np.bincount(self._owners, some) for some in zip(*self._totals, strict=True)))
        special = np.array([special for _, special in self._numbers])
        table = _Table(labels, owner, len(self._numbers))
        means, errors = table.means(effects)
        ranked = ~special & (table.prompts >= minimum)
        words = [
            WordEffect(
                word=word,
                count=int(table.counts[i]),
                prompts=int(table.prompts[i]),
                mean_residual=float(means[i]),
                stderr=None if np.isnan(errors[i]) else float(errors[i]),
                z=float(_z(means[i], errors[i])),
                share_longer=float(table.share(effects < -threshold)[i]),
                share_sooner=float(table.share(effects > threshold)[i]),
                special=is_special,
            )
            for i, (word, is_special) in enumerate(self._numbers)
        ]
        return TokenReport(
            completions=len(self._totals),
            prompts=len(self._prompts),
            tokens=sum(tokens for _, tokens in self._totals),
            threshold=threshold,
            minimum=minimum,
            mean_residual=mean,
            stderr=stderr,
            chance_z=_chance(table, effects, ranked, special[labels], seed) if ranked.any() else None,
            words=tuple(sorted(words, key=lambda word: (-word.count, word.word))),
        )


class _Table:
    """Which word (number) each occurrence is, and which prompt it answers. Shape (T,) each."""

    def __init__(self, labels: np.ndarray, owner: np.ndarray, words: int) -> None:
        self._labels, self._owner, self._size = labels, owner, words
        pairs, self._pair = np.unique(labels * (owner.max() + 1) + owner, return_inverse=True)
        self._word_of_pair = pairs // (owner.max() + 1)
        self._pair_counts = np.bincount(self._pair)
        self.counts = np.bincount(labels, minlength=words)
        self.prompts = np.bincount(self._word_of_pair, minlength=words)

    def means(self, effects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean of each word and its error, as `ratio_and_error`; NaN with one prompt."""
        sums = np.bincount(self._pair, effects)
        means = np.bincount(self._labels, effects, self._size) / self.counts
        spread = np.square(sums - means[self._word_of_pair] * self._pair_counts)
        total = np.bincount(self._word_of_pair, spread, self._size)
        with np.errstate(divide="ignore", invalid="ignore"):
            return means, np.sqrt(total * self.prompts / (self.prompts - 1)) / self.counts

    def share(self, holds: np.ndarray) -> np.ndarray:
        """Share of the occurrences of each word for which it holds."""
        return np.bincount(self._labels, holds, self._size) / self.counts

    def shuffled(self, effects: np.ndarray, movable: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Effects, those that may move exchanged within each prompt."""
        effects = effects.copy()
        at = np.flatnonzero(movable)
        at = at[np.argsort(self._owner[at], kind="stable")]
        effects[at] = effects[at][np.lexsort((random.random(len(at)), self._owner[at]))]
        return effects


def _z(mean: np.ndarray, stderr: np.ndarray) -> np.ndarray:
    return np.divide(mean, stderr, out=np.zeros_like(mean), where=stderr > 0)


def _chance(table: _Table, effects: np.ndarray, ranked: np.ndarray, special: np.ndarray, seed: int) -> float:
    random = np.random.default_rng(seed)
    shuffles = (table.shuffled(effects, ~special, random) for _ in range(_SHUFFLES))
    return float(np.mean([np.abs(_z(*table.means(some)))[ranked].max() for some in shuffles]))


def plot_words(
    report: TokenReport,
    notice: str = "",
    *,
    by: Ranking = "mean",
    top: int = 60,
    font: str | None = None,
) -> "Figure":
    """Draw a word cloud of each direction, side by side: the larger a word, the higher in the ranking.

    Words whose mean residual may be chance (z below the report's `chance_z`) are left out.

    Args:
        report: what to draw.
        notice: what the title begins with, such as `tiny world`.
        by: ranking that sizes the words, see `TokenReport.ranking`.
        top: at most so many words a direction.
        font: TrueType file; matplotlib's DejaVu Sans where None. Words with characters that it lacks are left out.
    """
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font
    from wordcloud import WordCloud

    from .plots import new_figure

    font = font or findfont("DejaVu Sans")
    drawable = FT2Font(font).get_charmap()
    figure, axes = new_figure(2)
    for axis, direction, colour in zip(axes, DIRECTIONS, ("#b4490f", "#1f5fa8"), strict=True):
        sooner = direction == "ends sooner"
        sizes = {
            word.word: abs(word.mean_residual) if by == "mean" else word.share_sooner if sooner else word.share_longer
            for word in report.ranking(direction, by)
            if word.direction == direction and abs(word.z) > (report.chance_z or 0.0)
            if all(ord(character) in drawable for character in word.word)
        }
        axis.set_title(f"{direction} than expected", fontsize=11)
        axis.axis("off")
        if not sizes:
            axis.text(0.5, 0.5, "no word beyond chance", ha="center", va="center")
            continue
        cloud = WordCloud(
            width=900, height=600, max_words=top, background_color="white", font_path=font, prefer_horizontal=1.0,
            relative_scaling=0.6, random_state=0, color_func=lambda *_, colour=colour, **__: colour,
        )  # fmt: skip
        axis.imshow(cloud.generate_from_frequencies(sizes).to_array(), interpolation="bilinear")
    size = "mean residual" if by == "mean" else f"share of residuals beyond {report.threshold:g}"
    about = f"{notice} · " if notice else ""
    figure.suptitle(f"{about}{report.completions:,} completions, words sized by {size}", fontsize=10)
    return figure
