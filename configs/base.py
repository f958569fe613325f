"""Every key of a configuration, with the value that most runs share. The others start from it.

Units: `steps` are optimizer steps, `batch_size` counts sequences, `sequence_length` tokens (bytes);
a step trains on batch_size * sequence_length tokens.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from s24jax.errors import InvalidInput


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "base"
    config.seed = 0  # of the initial weights, the order of the data and the sample
    config.steps = 1000
    config.batch_size = 64
    config.accumulate = 1  # equal parts of the batch whose gradients are averaged
    config.sequence_length = 1024
    config.sparse24_warmup_steps = 300  # dense steps before a relu2_24 model switches to 2:4
    config.dense_twin = False  # at the switch, go on dense as well, on the same batches

    config.mesh = ConfigDict()  # devices, see s24jax/mesh.py; -1 takes those that are left
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.model = ConfigDict()
    config.model.layers = 12
    config.model.width = 768
    config.model.heads = 12
    config.model.hidden = 3072
    config.model.vocabulary = 256
    config.model.ffn = "relu2_24"  # swiglu, gelu, relu2, relu2_24
    config.model.implementation = "auto"  # auto, reference, triton, cuda
    config.model.attention = "auto"  # auto, xla, cudnn
    config.model.tie_embedding = False  # 256 rows are not worth sharing
    config.model.up_gain = 1.0  # factor on the initial W_up, whose scale is 1 / sqrt(width)
    config.model.remat = "none"  # none, full, save_y2
    config.model.dtype = "bfloat16"
    config.model.rope_theta = 10000.0
    config.model.recipe = ConfigDict()  # s24jax.Recipe
    config.model.recipe.token_wise = True
    config.model.recipe.mask_consistency = True
    config.model.recipe.feature_wise = True
    config.model.recipe.token_grouping = "strided"
    config.model.recipe.grouping_seed = 0
    config.model.recipe.dense_share = 0.05
    config.model.recipe.dense_multiple = 128
    config.model.recipe.shared_feature_mask = True

    config.optimizer = ConfigDict()
    config.optimizer.peak_learning_rate = 1e-3
    config.optimizer.learning_rate_warmup_steps = 100
    config.optimizer.final_share = 0.1  # of the peak, where the decay ends
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0

    config.data = ConfigDict()
    config.data.source = "stdlib"  # or "python", with all packages; a folder, a glob, "tfds:NAME"
    config.data.pattern = "**/*.py"  # of the files below a folder
    config.data.validation_share = 0.05  # of the files
    config.data.data_dir = ""  # where prepared corpora live; empty: the user's cache folder
    config.data.text_feature = "text"  # of a catalogue dataset

    config.log_every = 10
    config.probe_every = 50  # sparsity of every layer
    config.validate_every = 100
    config.validation_batches = 8
    config.checkpoint_every = 200
    config.keep_checkpoints = 2  # the last ones; the best one is kept besides

    config.sample = ConfigDict()
    config.sample.prompt = "def "
    config.sample.tokens = 400
    config.sample.temperature = 0.7
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """Any configuration as a few steps of a tiny model, through every stage of a run, on a CPU."""
    config.name += "_smoke"
    config.steps = 6
    config.batch_size = 4
    config.accumulate = min(config.accumulate, 2)
    config.sequence_length = 32
    config.sparse24_warmup_steps = min(config.sparse24_warmup_steps, 3)
    config.model.layers = 2
    config.model.width = 16
    config.model.heads = 2
    config.model.hidden = 64
    config.model.dtype = "float32"
    config.model.vocabulary = 256
    config.model.recipe.dense_multiple = 16
    config.optimizer.learning_rate_warmup_steps = 2
    config.data.pattern = "json/*.py"
    config.log_every = 2
    config.probe_every = 3
    config.validate_every = 3
    config.validation_batches = 1
    config.checkpoint_every = 3
    config.sample.tokens = 8
    return config


def vary(
    config: ConfigDict, mode: str, **variants: Callable[[ConfigDict], ConfigDict]
) -> ConfigDict:
    """The variant that stands behind the colon of --config=FILE:MODE; "" is the config itself.

    Raises:
      InvalidInput: there is no such variant.
    """
    variants["smoke"] = smoke
    if mode and mode not in variants:
        raise InvalidInput(
            f"{config.name} has no variant {mode!r}; "
            f"write one of {', '.join(sorted(variants))} after the colon, or none"
        )
    return variants[mode](config) if mode else config
