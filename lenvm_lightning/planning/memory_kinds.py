"""Names for kinds of memory, and for phases of a training step, as plans show them."""

WEIGHTS = "weights"
GRADIENTS = "gradients"
STATES = "optimizer states"
COPIES = "weight copies"
LANGUAGE = "language model"
VISION = "vision tower"
HEAD = "value head"
RECOMPUTED = "recomputed layer"
TEMPORARY = "temporary"
BATCH = "batch"
BUCKETS = "communication buckets"
GATHERED = "gathered layers"
MASTER = "DeepSpeed's copy of its shard"
# In the order they are shown.
KINDS = (
    WEIGHTS, GRADIENTS, STATES, COPIES, LANGUAGE, VISION, HEAD, RECOMPUTED, TEMPORARY, BATCH, BUCKETS, GATHERED, MASTER
)  # fmt: skip

FORWARD = "forward"
IN_VISION_TOWER = "vision"  # part of the forward pass
BACKWARD = "backward"
RECOMPUTE = "recompute"  # part of the backward pass: what activation checkpointing computes again
OPTIMIZER = "optimizer step"
