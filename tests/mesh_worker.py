"""Trains on eight simulated devices, and computes what a single one should find.

    python tests/mesh_worker.py OUT.json

Run by test_mesh.py in a process of its own: the number of devices is fixed when jax starts. The
oracle knows nothing of meshes: it cuts the batch and the features itself, and adds up in a loop.
"""

import json
import os
import re
import sys
from collections import Counter

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxprs import equations
from mesh_cases import CASES, LOOPS, STEPS, config_of

from s24jax import model as model_module
from s24jax.ffn import ffn24
from s24jax.model import Transformer
from s24jax.ops.relu2_ffn import relu2_ffn
from s24jax.optimizer import make_optimizer
from s24jax.train_step import make_program, token_loss

COLLECTIVES = r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"


def tokens_of(config) -> np.ndarray:
    shape = (config.batch_size, config.sequence_length + 1)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.int32)


def on_the_mesh(config, mode: str) -> dict:
    program = make_program(config)
    state, tokens = program.init(), program.place(tokens_of(config))
    start = flat(state.params)
    found = {"loss": [], "grad_norm": []}
    for _ in range(STEPS):
        state, metrics = program.train_step(state, tokens, mode=mode)
        for name, values in found.items():
            values.append(float(metrics[name]))
    return found | {
        "start": start,
        "params": flat(state.params),
        "validation": float(program.loss(state.params, tokens, mode=mode)),
        "zeros": program.probe(state.params, tokens)["zero_share"].tolist(),
        "pieces": pieces(state.params),
    }


def pieces(params) -> dict:
    """How many different pieces each parameter lies in on the devices."""
    return {
        jax.tree_util.keystr(path): len({str(shard.index) for shard in leaf.addressable_shards})
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def flat(params) -> np.ndarray:
    leaves = jax.tree.leaves(jax.device_get(params))
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def in_parts(ffn, parts: int):
    """An FFN as the sum of `parts` of its features."""

    def summed(x, w_up, w_down, **how):
        cut = zip(jnp.split(w_up, parts), jnp.split(w_down, parts), strict=True)
        return sum(ffn(x, up, down, **how) for up, down in cut)

    return summed


def zeros_of(transformer, tokens) -> list[float]:
    """The share of pre-activations that are not positive, of each layer."""
    _, inputs = transformer(tokens[:, :-1], observe=lambda _, h: h)
    ups = np.asarray(transformer.blocks.ffn.w_up[...])
    pairs = zip(np.asarray(inputs), ups, strict=True)
    return [float(np.mean(h @ up.T <= 0)) for h, up in pairs]


def oracle(config, mode: str) -> dict:
    """The recipe on each part of the batch and of the features, one after the other."""
    data, fsdp, tensor = (config.mesh[axis] for axis in ("data", "fsdp", "tensor"))
    model_module.ffn24 = in_parts(ffn24, tensor)
    model_module.relu2_ffn = in_parts(relu2_ffn, tensor)
    transformer = Transformer(config.model, rngs=nnx.Rngs(params=config.seed))
    graph, params = nnx.split(transformer)
    optimizer = make_optimizer(config.optimizer, config.steps)
    moments = optimizer.init(params)
    # optax deals a device's sequences out to its microbatches in turn.
    parts = [
        part[i :: config.accumulate]
        for part in np.split(tokens_of(config), data * fsdp)
        for i in range(config.accumulate)
    ]

    @jax.jit
    def loss_and_grads(params, tokens):
        def loss(params):
            return token_loss(nnx.merge(graph, params), tokens, mode)

        return jax.value_and_grad(loss)(params)

    start, losses, norms = flat(params), [], []
    for _ in range(STEPS):
        found = [loss_and_grads(params, part) for part in parts]
        losses.append(float(np.mean([loss for loss, _ in found])))
        grads = jax.tree.map(lambda *g: sum(g) / len(g), *(grads for _, grads in found))
        norms.append(float(optax.tree.norm(grads)))
        updates, moments = optimizer.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
    model_module.ffn24, model_module.relu2_ffn = ffn24, relu2_ffn
    validation = float(np.mean([loss_and_grads(params, part)[0] for part in parts]))
    zeros = np.mean([zeros_of(nnx.merge(graph, params), part) for part in parts], axis=0)
    return {
        "loss": losses,
        "grad_norm": norms,
        "start": start,
        "params": flat(params),
        "validation": validation,
        "zeros": zeros.tolist(),
    }


def collectives(config, mode: str) -> dict[str, int]:
    """Kind and shape of what passes between devices in a compiled step, and how often."""
    program = make_program(config)
    tokens = program.place(tokens_of(config))
    text = program.train_step.lower(program.init(), tokens, mode=mode).compile().as_text()
    found = Counter()
    for line in text.splitlines():
        match = re.search(rf"= (.*?) {COLLECTIVES}(-start)?\(", line)
        if match:
            for shape in re.findall(r"\w+\[[\d,]*\]", match.group(1)):
                found[f"{match.group(2)} {shape}"] += 1
    return dict(found)


def stacked(config, mode: str) -> list[list[int]]:
    """The shapes of what the forward pass over the layers leaves for the backward pass."""
    program = make_program(config)
    tokens = jax.ShapeDtypeStruct(tokens_of(config).shape, jnp.int32)
    traced = program.train_step.trace(program.state, tokens, mode=mode)
    # The first scan of the program; its first result is the last layer's.
    found = equations(traced.jaxpr.jaxpr)
    forward = next(equation for equation in found if equation.primitive.name == "scan")
    return [list(result.aval.shape) for result in forward.outvars[1:]]


def loops(config) -> int:
    """Of a step, as XLA is given it."""
    program = make_program(config)
    tokens = jax.ShapeDtypeStruct(tokens_of(config).shape, jnp.int32)
    lowered = program.train_step.lower(program.state, tokens, mode="dense")
    return lowered.as_text().count("stablehlo.while")


def without_arrays(found: dict) -> dict:
    return {name: value for name, value in found.items() if not isinstance(value, np.ndarray)}


def compared(config, mode: str) -> dict:
    mesh, alone = on_the_mesh(config, mode), oracle(config, mode)
    moved = alone["params"] - alone["start"]
    # Without the worst of 16 thousand: one whose gradient is nothing may move either way.
    apart = np.sort(np.abs(mesh["params"] - alone["params"]))[:-1]
    return {
        "mesh": without_arrays(mesh),
        "oracle": without_arrays(alone),
        "start": float(np.max(np.abs(mesh["start"] - alone["start"]))),
        "moved": float(np.max(np.abs(moved))),
        "moved_apart": float(np.linalg.norm(apart) / np.linalg.norm(moved)),
    }


def main(path: str) -> None:
    results = {"cases": {}, "collectives": {}, "stacked": {}, "loops": {}}
    for name, (mode, changes, meshes) in CASES.items():
        for mesh in meshes:
            results["cases"][f"{name} {mesh}"] = compared(config_of(mesh, changes), mode)
    mode, changes, _ = CASES["token-wise"]
    results["plain"] = without_arrays(oracle(config_of((1, 1, 1), changes), mode))
    for mode in ("dense", "sparse24"):
        results["collectives"][mode] = collectives(config_of((2, 2, 2), {}), mode)
        results["stacked"][mode] = stacked(config_of((2, 2, 2), {}), mode)
    for remat in ("save_y2", "full"):
        changed = config_of((1, 1, 8), {"model.remat": remat})
        results["collectives"][remat] = collectives(changed, "sparse24")
    for mesh in LOOPS:
        results["loops"][str(mesh)] = loops(config_of(mesh, {}))
    for ffn in ("swiglu", "gelu"):
        results["stacked"][ffn] = stacked(config_of((2, 2, 2), {"model.ffn": ffn}), "dense")
    with open(path, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
