"""One of two ranks: `torchrun ... filling_rank.py FOLDER` spreads the folder's model and writes what this rank held of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tunedock import pipeline
from tunedock.model import world
from tunedock.model.session import find_base, trainable_policy
from tunedock.model.sharding import held, whole_size
from tunedock.train.parallel.spread import shard_weights
from tunedock.train.rehearsal import states_to_come


def main(folder: Path) -> None:
    recipe = pipeline.resolve_recipe([folder / "recipe.yaml"]).recipe
    base = find_base(recipe)
    torch.manual_seed(0)
    with world.joined(timeout_s=60) as own:
        policy = trainable_policy(base, spread=True)
        loaded = sum(p.numel() for p in policy.model.parameters() if not p.is_meta)
        shard_weights(policy, "fsdp", recipe)
        parts = {name: held(p) for name, p in policy.model.named_parameters()}
        tied = policy.model.get_input_embeddings().weight is policy.model.get_output_embeddings().weight  # type: ignore[operator]
        said = {
            "loaded": loaded,
            "kept": sum(part.numel() for part in parts.values()),
            "trained": sorted(name for name, _ in policy.trainable),
            "fused": policy.fused,
            "tied": tied,
            "whole": sum(whole_size(p) for p in policy.model.parameters()),
            "states_to_come": states_to_come(recipe, policy),
        }
        save_file({name: part.clone() for name, part in parts.items()}, folder / f"{own.number}.safetensors")
    (folder / f"{own.number}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
