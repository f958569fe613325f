"""Text from a model: prefill the prompt into a cache, then decode token by token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from s24jax.data import decode, encode
from s24jax.errors import InvalidInput
from s24jax.evaluate import choose_mode, restore_run
from s24jax.model import Cache
from s24jax.typing import Array, FFNMode, Float, Int


@partial(jax.jit, static_argnames=("model_of", "mode"))
def prefill(model_of, params, tokens: Int[Array, "B L"], cache: Cache, *, mode: FFNMode):
    """Puts a whole prompt into the cache: many tokens at once, compute-bound.

    Returns logits after the prompt, float32 [B, V], and the cache.
    """
    return model_of(params).extend(tokens, cache, mode=mode)


@partial(jax.jit, static_argnames=("model_of", "mode", "tokens", "temperature"))
def decode_tokens(
    model_of,
    params,
    logits: Float[Array, "B V"],
    cache: Cache,
    rng,
    *,
    tokens: int,
    temperature: float,
    mode: FFNMode,
) -> Int[Array, "B tokens"]:
    """Draws `tokens` tokens a sequence, one step each, memory-bound; temperature 0 is greedy."""

    def step(carry, rng):
        logits, cache = carry
        if temperature:
            token_B = jax.random.categorical(rng, logits / temperature)
        else:
            token_B = jnp.argmax(logits, axis=-1)
        carry = model_of(params).extend(token_B[:, None], cache, mode=mode)
        return carry, token_B

    _, tokens_NB = jax.lax.scan(step, (logits, cache), jax.random.split(rng, tokens))
    return tokens_NB.T


def generate(
    model_of,
    params,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    rng,
    mode: FFNMode,
    context: int,
) -> str:
    """The prompt and its continuation.

    Args:
      model_of: params -> Transformer (`Program.model`).
      params: the model's parameters.
      prompt: text, at least one byte.
      tokens: how many bytes to add.
      temperature: 0 takes the likeliest byte each time.
      rng: a jax random key.
      mode: of the FFNs.
      context: sequence length that the model was trained with; the text must fit into it.

    Raises:
      InvalidInput: an empty prompt, or prompt and continuation do not fit.
    """
    check_request(prompt, tokens=tokens, temperature=temperature, context=context)
    prompt_1L = np.asarray(encode(prompt))[None]
    cache = model_of(params).empty_cache(1, prompt_1L.shape[1] + tokens)
    logits, cache = prefill(model_of, params, prompt_1L, cache, mode=mode)
    drawn = decode_tokens(
        model_of, params, logits, cache, rng, tokens=tokens, temperature=temperature, mode=mode
    )
    return prompt + decode(np.asarray(drawn[0]))


def check_request(prompt: str, *, tokens: int, temperature: float, context: int) -> None:
    """Raises InvalidInput where `generate` cannot take these values."""
    length = len(encode(prompt))
    if length == 0:
        raise InvalidInput("the prompt is empty; give at least one character")
    if tokens < 1 or length + tokens > context:
        raise InvalidInput(
            f"{length} bytes of prompt and {tokens} to sample do not fit the context of {context} "
            f"bytes; sample 1..{context - length} or shorten the prompt"
        )
    if temperature < 0:
        raise InvalidInput(f"temperature {temperature} is negative; use 0 (greedy) or more")


def sample(
    workdir,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    seed: int,
    mode: FFNMode | None = None,
    step: int | None = None,
) -> str:
    """`generate` from a run's checkpoint.

    Args:
      workdir: of the run.
      seed: of the draw.
      mode: "dense" or "sparse24"; None is the mode of the checkpoint's step.
      step: which checkpoint; None is the last.
    """
    config, program, state, own_mode = restore_run(workdir, step=step)
    return generate(
        program.model,
        state.params,
        prompt,
        tokens=tokens,
        temperature=temperature,
        rng=jax.random.key(seed),
        mode=choose_mode(mode, own_mode, config),
        context=config.sequence_length,
    )
