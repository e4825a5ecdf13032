"""How a batch with a layout is computed: which of the ways there are costs least. Planned on the host, by numbers only.

`packed` rows lie one after the other in bins. Completions of one prompt (`shared`) compute it, and its images, once, in
one of two ways:

- `cache`: the prompts run once, with gradients; their keys and values are gathered for the rows, and the completions
  run on top of them. Cheap masks, but recomputing activations drops caches.
- `tree`: prompt and completions one after the other under a mask, each completion seeing the prompt and itself. No
  padding between completions, but attention over them costs their whole length squared.

Where neither gains anything, rows are computed as `rows`, padded.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..batch import Layout, LengthBatch
from ..models.value_model import LengthValueModel
from ..tree import KINDS, attention_kinds
from .fsdp import is_in_step
from .packing import cost, pack, width_of

Way = Literal["rows", "cache", "tree", "packed"]

_MASKED_ATTENTION = ("sdpa", "eager")  # kinds of attention that take the masks of a tree
# A way must cost this part of a plainer one, or less: below that the estimate decides nothing, and plain is safe.
_CLEARLY_CHEAPER = 0.97


class LayoutPlan(NamedTuple):
    """How a batch is computed.

    Attributes:
        way: how.
        bins: what lies in each row of the forward: numbers of prompts for `tree`, of rows for `packed` and `rows`;
            empty for `cache`.
        computed: positions that the backbone runs over, padding included.
        real: tokens among them.
    """

    way: Way
    bins: list[list[int]]
    computed: int
    real: int


def rows_of_prompts(layout: Layout) -> list[list[int]]:
    """Numbers of the rows of each prompt."""
    rows: list[list[int]] = [[] for _ in range(max(layout.prompts) + 1)]
    for row, prompt in enumerate(layout.prompts):
        rows[prompt].append(row)
    return rows


# -- the cheapest way -------------------------------------------------------------------------------------------------


def make_plan(layout: Layout, ways: Sequence[Way], ordered: bool = False, flat: bool = False) -> LayoutPlan:
    """The cheapest way to compute a batch, by `cost`; one named earlier where it hardly costs more.

    Args:
        layout: of the batch.
        ways: those that are possible, at least one, the plainest first.
        ordered: True = in a tree every prompt has a row of the forward to itself, in order, as images need it.
        flat: True = packed rows go into one bin, for attention that skips what is masked.
    """
    chosen: LayoutPlan | None = None
    lowest = 0.0
    for way in ways:
        if way == "cache":
            plan, pairs = _plan_cache(layout)
        else:
            plan, pairs = _plan_bins(layout, way, one_a_row=way == "rows" or (way == "tree" and ordered), flat=flat)
        cost_of_way = cost(plan.computed, pairs)
        if chosen is None or cost_of_way < _CLEARLY_CHEAPER * lowest:
            chosen, lowest = plan, cost_of_way
    assert chosen is not None  # there is at least one way
    return chosen


def _plan_cache(layout: Layout) -> tuple[LayoutPlan, int]:
    """Prompts in one forward and completions in another; returns pairs of queries and keys, too."""
    completions = _completion_lengths(layout)
    prompts = [layout.prompt_lengths[rows[0]] for rows in rows_of_prompts(layout)]
    prompt_width = max(prompts)
    completion_width = max(completions)
    computed = len(prompts) * prompt_width + len(completions) * completion_width
    pairs_of_prompts = len(prompts) * prompt_width**2
    pairs_of_completions = len(completions) * completion_width * (prompt_width + completion_width)
    plan = LayoutPlan("cache", [], computed, real=sum(_tree_sizes(layout)))
    return plan, pairs_of_prompts + pairs_of_completions


def _plan_bins(layout: Layout, way: Way, one_a_row: bool, flat: bool) -> tuple[LayoutPlan, int]:
    """Rows or trees in bins, all padded to the fullest; returns pairs of queries and keys, too."""
    sizes = _tree_sizes(layout) if way == "tree" else layout.lengths
    if one_a_row:
        bins = [[number] for number in range(len(sizes))]
    elif flat:
        bins = [list(range(len(sizes)))]
    else:
        bins = pack(sizes)
    width = width_of(bins, sizes)
    plan = LayoutPlan(way, bins, computed=len(bins) * width, real=sum(sizes))
    return plan, len(bins) * width**2


def _completion_lengths(layout: Layout) -> list[int]:
    return [length - prompt for length, prompt in zip(layout.lengths, layout.prompt_lengths, strict=True)]


def _tree_sizes(layout: Layout) -> list[int]:
    """Tokens of each prompt with its completions, the prompt once."""
    completions = _completion_lengths(layout)
    sizes = []
    for rows in rows_of_prompts(layout):
        prompt = layout.prompt_lengths[rows[0]]
        sizes.append(prompt + sum(completions[row] for row in rows))
    return sizes


# -- ways that a model allows -----------------------------------------------------------------------------------------


def plan_batch(model: LengthValueModel, batch: LengthBatch) -> LayoutPlan:
    """How `row_logits` computes a batch that has a layout; the same whenever it is asked."""
    layout = batch["layout"]
    has_images = bool(batch["vision"])
    ways = possible_ways(model, layout, has_images, model.backbone.training)
    return make_plan(layout, ways, ordered=has_images, flat=skips_what_is_masked(model))


def possible_ways(model: LengthValueModel, layout: Layout, has_images: bool, training: bool) -> list[Way]:
    """Ways to compute batches of a layout with a model, the plainest first; empty where there is none.

    Args:
        model: its attention and its layers decide.
        layout: of the batch.
        has_images: True = there are images, given once for each prompt.
        training: True = activations may have to be computed again.
    """
    if layout.kind != "shared":
        return [layout.kind]
    nothing_to_share = len(set(layout.prompts)) == len(layout.prompts)
    if nothing_to_share:
        return ["rows"]
    # Padded rows would need the images of a prompt once for each of its rows.
    plain: list[Way] = [] if has_images else ["rows"]
    return plain + sharing_ways(model, training)


def sharing_ways(model: LengthValueModel, training: bool) -> list[Way]:
    """Ways to compute a prompt once that the model's kind of attention allows."""
    ways: list[Way] = []
    config = model.backbone.config.get_text_config()
    takes_masks = attention_of(model) in _MASKED_ATTENTION and set(attention_kinds(config)) <= set(KINDS)
    if takes_masks and model.takes_positions:
        ways.append("tree")
    # A cache takes two passes; ranks that shard weights or gradients must make as many as each other.
    drops_cache = training and recomputes(model)
    if not drops_cache and not is_in_step(model):
        ways.append("cache")
    return ways


def recomputes(model: LengthValueModel) -> bool:
    """Whether the language model computes activations again in the backward pass, which drops caches."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.backbone.get_decoder().modules())


def attention_of(model: LengthValueModel) -> str:
    """Name of the model's attention kernels, as transformers calls them."""
    return model.backbone.config.get_text_config()._attn_implementation


def skips_what_is_masked(model: LengthValueModel) -> bool:
    """Whether attention costs only what is seen, and takes packed rows in one bin only."""
    return "flash" in attention_of(model)
