"""auto-round: ``MODEL IDS OUT GROUP STEPS [states]``. W4A16, symmetric; 0 steps is plain rounding.

As shipped, auto-round hands a block's first output to the next and drops the second, which in ZAYA1
is the router state of depth averaging: from the second layer on it tunes with another router.
``states`` registers the second output with auto-round's own function.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys

from auto_round import AutoRound
from auto_round.algorithms.block_runner import register_block_output
from transformers import AutoTokenizer
from worker import load_ids, load_model

LENGTH = 256


def main() -> None:
    """Quantize and save."""
    folder, ids_file, out, group, steps = sys.argv[1:6]
    rows = load_ids(ids_file).reshape(-1, LENGTH)  # shorter rows, the same tokens
    model = load_model(folder)
    if "states" in sys.argv[6:]:
        register_block_output("ZayaDecoderLayer", ["hidden_states", "prev_router_hidden_states"])
    rounder = AutoRound(
        model, AutoTokenizer.from_pretrained(folder), scheme="W4A16", bits=4, sym=True,
        group_size=int(group), iters=int(steps), nsamples=len(rows), seqlen=LENGTH,
        dataset=[row[None] for row in rows],
        enable_torch_compile=False,  # its compiled backward pass fails on this model
    )  # fmt: skip
    rounder.quantize_and_save(out, format="auto_round")


if __name__ == "__main__":
    main()
