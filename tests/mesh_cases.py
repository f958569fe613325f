"""What test_mesh.py and its worker process agree on."""

from configs import lm_100m

STEPS = 2
ALL = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2), (1, 4, 2)]
# Loops over layers in a step, forward and backward, by mesh: where weights are cut along D.
LOOPS = {(8, 1, 1): 0, (1, 1, 8): 0, (1, 8, 1): 2, (2, 2, 2): 2}
# Mode of the FFN, the keys that a case changes, and the meshes (data, fsdp, tensor) it is tried on.
CASES = {
    "dense": ("dense", {}, [(2, 2, 2)]),
    "swiglu": ("dense", {"model.ffn": "swiglu"}, [(2, 2, 2)]),
    "full recipe": ("sparse24", {}, ALL),
    "token-wise": ("sparse24", {"model.recipe.feature_wise": False}, ALL[:4]),
    "tied, remat": (
        "sparse24",
        {"model.remat": "save_y2", "model.tie_embedding": True},
        [(2, 2, 2)],
    ),
    "accumulate": ("sparse24", {"accumulate": 2, "batch_size": 16}, [(2, 2, 2)]),
}


def config_of(mesh, changes):
    """Two layers in float32, D 16, F 64 and 8 heads: each of eight devices can have a part."""
    config = lm_100m.get_config("smoke")
    config.batch_size, config.sequence_length = 8, 10
    config.model.heads = 8
    config.model.recipe.dense_multiple = 2
    config.model.implementation = "reference"
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    config.update_from_flattened_dict(changes)
    return config
