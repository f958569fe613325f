"""A decoder-only transformer whose FFN is the one pluggable part (Flax NNX).

    tokens -> embedding -> layers x [ x + attention(norm(x)); x + FFN(norm(x)) ] -> norm -> logits

RMSNorm before each part, rotary position embedding, causal attention. The layers are stacked: their
parameters have a leading axis, and one layer is traced and scanned over it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from s24jax.attention import Attention
from s24jax.errors import InvalidInput
from s24jax.ffn import SAVED_Y2, ffn24
from s24jax.mesh import SUMMED, all_but_gathered, gather, in_parts, tensor_sum
from s24jax.ops import dispatch
from s24jax.ops.relu2_ffn import SAVED_HIDDEN, relu2_ffn
from s24jax.recipe import Recipe
from s24jax.typing import Array, FFNMode, Float, Implementation, Int

FFNKind = Literal["swiglu", "gelu", "relu2", "relu2_24"]
Remat = Literal["none", "full", "save_y2"]
REMAT_POLICIES = {
    "full": None,
    "save_y2": jax.checkpoint_policies.save_only_these_names(SAVED_Y2, SAVED_HIDDEN, SUMMED),
}


class FFN(nnx.Module):
    """Feed-forward network, D -> F -> D, weights feature-major [F, D].

    swiglu    (silu(x W_gate^T) * (x W_up^T)) W_down
    gelu      gelu(x W_up^T) W_down
    relu2     relu(x W_up^T)^2 W_down
    relu2_24  `ffn24` in mode "sparse24", relu2 in mode "dense" (the warm-up)

    Args:
      width, hidden: D and F.
      kind: see above.
      recipe: of relu2_24.
      implementation: of the ops of relu2 and relu2_24; the other kinds are XLA's alone.
      up_gain, output_gain: factors on the initial w_up (and w_gate), and on w_down.
      dtype: computation; parameters are float32.

    Raises:
      InvalidInput: unknown kind, or F does not fit the recipe.
      Unsupported: swiglu or gelu with a named implementation other than "reference".
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        kind: FFNKind,
        *,
        recipe: Recipe = Recipe(),
        implementation: Implementation = "auto",
        up_gain: float = 1.0,
        output_gain: float = 1.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if kind not in get_args(FFNKind):
            raise InvalidInput(
                f"ffn kind {kind!r} does not exist; use one of {', '.join(get_args(FFNKind))}"
            )
        if kind == "relu2_24":
            check_hidden(hidden, recipe)
        elif kind != "relu2":
            only_xla = [dispatch.Candidate("reference", nnx.identity)]
            dispatch.resolve(f"ffn {kind}", implementation, only_xla)
        self.kind, self.recipe, self.implementation, self.dtype = (
            kind,
            recipe,
            implementation,
            dtype,
        )
        up = nnx.initializers.normal(up_gain * width**-0.5)
        down = nnx.initializers.normal(output_gain * hidden**-0.5)
        self.w_up = nnx.Param(up(rngs.params(), (hidden, width)))
        self.w_down = nnx.Param(down(rngs.params(), (hidden, width)))
        if kind == "swiglu":
            self.w_gate = nnx.Param(up(rngs.params(), (hidden, width)))

    def __call__(self, x: Float[Array, "... D"], mode: FFNMode = "dense") -> Float[Array, "... D"]:
        w_up, w_down = self.w_up[...].astype(self.dtype), self.w_down[...].astype(self.dtype)
        if mode not in get_args(FFNMode):
            raise InvalidInput(f"mode {mode!r} does not exist; use 'dense' or 'sparse24'")
        if mode == "sparse24":
            if self.kind != "relu2_24":
                raise InvalidInput(
                    f"mode 'sparse24' needs ffn kind 'relu2_24', this model has "
                    f"{self.kind!r}; use mode 'dense'"
                )
            return ffn24(x, w_up, w_down, recipe=self.recipe, implementation=self.implementation)
        if self.kind in ("relu2", "relu2_24"):
            return relu2_ffn(x, w_up, w_down, implementation=self.implementation)
        y1 = self.pre_activation(x)
        if self.kind == "swiglu":
            y2 = jax.nn.silu(x @ self.w_gate[...].astype(self.dtype).T) * y1
        else:
            y2 = jax.nn.gelu(y1)
        return y2 @ w_down

    def pre_activation(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Y1 = X @ W_up^T."""
        return x @ self.w_up[...].astype(self.dtype).T


def check_hidden(hidden: int, recipe: Recipe) -> None:
    """Raises InvalidInput where F cannot be pruned by this recipe."""
    if hidden % 4:
        raise InvalidInput(
            f"hidden width F={hidden} is no multiple of 4; use {hidden + -hidden % 4}"
        )
    if recipe.feature_wise:
        recipe.dense_features(hidden)


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, for every layer.

    Attributes:
      keys, values: [layers, B, S, H, C] for S tokens at most, H heads of width C.
      length: how many tokens are valid (int32 scalar).
    """

    keys: Float[Array, "layers B S H C"]
    values: Float[Array, "layers B S H C"]
    length: Int[Array, ""]


def output_gain(config) -> float:
    """Factor on the initial weights that write to the residual stream: 1 / sqrt(2 * layers).

    The stream then has about the same scale after the last layer as before the first. Source:
    Radford et al. 2019 (GPT-2), section 2.3.
    """
    return (2 * config.layers) ** -0.5


class Block(nnx.Module):
    """One layer: attention and FFN, each after a norm and around a residual path."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        norm = {"epsilon": 1e-6, "dtype": dtype, "rngs": rngs}
        self.attention_norm = nnx.RMSNorm(config.width, **norm)
        gain = output_gain(config)
        self.attention = Attention(config, output_gain=gain, dtype=dtype, rngs=rngs)
        self.ffn_norm = nnx.RMSNorm(config.width, **norm)
        self.ffn = FFN(
            config.width,
            config.hidden,
            config.ffn,
            recipe=Recipe(**config.recipe),
            implementation=config.implementation,
            up_gain=config.up_gain,
            output_gain=gain,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x_BLD: Array, *, mode: FFNMode, past=None):
        """The layer's output, the input of its FFN (after the norm), and the updated cache."""
        attended, past = self.attention(self.attention_norm(x_BLD), past)
        x_BLD = x_BLD + tensor_sum(attended)
        h_BLD = self.ffn_norm(x_BLD)
        return x_BLD + tensor_sum(self.ffn(h_BLD, mode)), h_BLD, past


class Transformer(nnx.Module):
    """The language model; `config` is the `model` part of a configuration (see configs/).

    Raises:
      InvalidInput: sizes that cannot work, or a kind, dtype or remat that does not exist.
      Unsupported: a named implementation cannot run here.
    """

    def __init__(self, config, *, rngs: nnx.Rngs):
        _check(config)
        self.config = config.copy_and_resolve_references().lock()
        self.dtype = jnp.dtype(config.dtype)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Block(config, rngs=rngs)

        embedding_init = nnx.initializers.normal(config.width**-0.5)
        self.embedding = nnx.Embed(
            config.vocabulary,
            config.width,
            dtype=self.dtype,
            embedding_init=embedding_init,
            rngs=rngs,
        )
        self.blocks = stack(rngs)
        self.norm = nnx.RMSNorm(config.width, epsilon=1e-6, dtype=self.dtype, rngs=rngs)
        if not config.tie_embedding:
            self.unembedding = nnx.Linear(
                config.width, config.vocabulary, use_bias=False, dtype=self.dtype, rngs=rngs
            )

    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        *,
        mode: FFNMode = "dense",
        observe: Callable[[FFN, Array], Any] | None = None,
    ):
        """Logits [B, L, V] in float32; with `observe`, also its result for every layer, stacked.

        Args:
          tokens_BL: token ids.
          mode: what the FFNs of kind relu2_24 do.
          observe: called in each layer with its FFN and that FFN's input [B, L, D].
        """
        graph, layers = nnx.split(self.blocks)

        def layer(x_BLD, params):
            block = nnx.merge(graph, gather(params, self.dtype, of_one_layer=True))
            x_BLD, h_BLD, _ = block(x_BLD, mode=mode)
            return x_BLD, None if observe is None else observe(block.ffn, h_BLD)

        # A loop, where one layer at a time should be held: of gathered weights, and of what
        # `observe` computes with. Else the layers are written out one after the other, as a loop
        # copies what its backward pass needs into stacks and out again: 10 % of a step where
        # everything is kept, 3 % with `save_y2`.
        in_pieces = in_parts(layers)
        unroll = observe is None and not in_pieces
        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.config.remat])
        elif in_pieces:
            layer = jax.checkpoint(layer, policy=all_but_gathered)
        x_BLD, observed = jax.lax.scan(layer, self._embed(tokens_BL), layers, unroll=unroll)
        logits_BLV = self._unembed(x_BLD)
        return logits_BLV if observe is None else (logits_BLV, observed)

    def empty_cache(self, batch: int, tokens: int) -> Cache:
        """A cache for at most `tokens` tokens a sequence."""
        c = self.config
        empty = jnp.zeros((c.layers, batch, tokens, c.heads, c.width // c.heads), self.dtype)
        return Cache(empty, empty, jnp.int32(0))

    def extend(
        self, tokens_BL: Int[Array, "B L"], cache: Cache, *, mode: FFNMode = "dense"
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Appends tokens to the cache: a prompt (prefill) or one token a sequence (decode).

        Nothing is saved for a backward pass. The caller sees to it that the cache has room.

        Returns:
          logits after the last token, float32 [B, V], and the cache that holds the new tokens.
        """
        graph, layers = nnx.split(self.blocks)

        def layer(x_BLD, scanned):
            params, keys, values = scanned
            past = (keys, values, cache.length)
            x_BLD, _, past = nnx.merge(graph, params)(x_BLD, mode=mode, past=past)
            return x_BLD, past

        scanned = (layers, cache.keys, cache.values)
        x_BLD, (keys, values) = jax.lax.scan(layer, self._embed(tokens_BL), scanned)
        cache = Cache(keys, values, cache.length + tokens_BL.shape[1])
        return self._unembed(x_BLD[:, -1:])[:, 0], cache

    def _embed(self, tokens_BL):
        # In float32, for the way back: a row's gradient is the sum over all its tokens. Where a few
        # kinds of tokens make up the text, as bytes do, a sum in bfloat16 loses most of its terms,
        # and its atomic additions cost a GPU as much as the rest of the step.
        table_VD = self.embedding.embedding[...].astype(jnp.float32)
        x_BLD = jnp.take(table_VD, tokens_BL, axis=0).astype(self.dtype)
        # The table's rows have length about 1; the residual stream starts at 1 a channel.
        return x_BLD * jnp.asarray(self.config.width**0.5, self.dtype)

    def _unembed(self, x_BLD):
        x_BLD = self.norm(x_BLD)
        if not self.config.tie_embedding:
            return self.unembedding(x_BLD).astype(jnp.float32)
        # Undoes the factor of `_embed`: without it a fresh model is sure that each token repeats.
        x_BLD *= jnp.asarray(self.config.width**-0.5, self.dtype)
        return self.embedding.attend(x_BLD).astype(jnp.float32)


def _check(config) -> None:
    for name in ("layers", "heads"):
        if config[name] < 1:
            raise InvalidInput(f"model.{name}={config[name]} must be at least 1")
    if config.width % config.heads or (config.width // config.heads) % 2:
        raise InvalidInput(
            f"model.width={config.width} does not give {config.heads} heads of an even width; "
            "make it a multiple of 2 * model.heads"
        )
    if config.remat not in get_args(Remat):
        raise InvalidInput(
            f"model.remat={config.remat!r} does not exist; use one of {', '.join(get_args(Remat))}"
        )
    if config.dtype not in ("float32", "bfloat16"):
        raise InvalidInput(
            f"model.dtype={config.dtype!r} is not supported; use float32 or bfloat16"
        )
