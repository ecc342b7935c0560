"""Small models, meshes and batches that the tests of the model path share."""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mice_jax import sharding
from mice_jax.data.loader import Arrays, empty_rows, put_sample
from mice_jax.models import hf
from mice_jax.models.checkpoint_layout import checkpoint_tensors
from mice_jax.models.families import FAMILIES
from mice_jax.models.spec import ModelSpec, Rope
from mice_jax.models.transformer import Compute, Decoder, Params, make_decoder

VOCAB = 101  # not a multiple of the vocabulary's padding or of the size of a tensor axis

# These options halve the compile time of functions that a test jits itself, which is most of the test's time.
QUICK = {"xla_backend_optimization_level": 0}

Sample = tuple[np.ndarray, np.ndarray]  # token ids, and the mask of trained ones


def mesh_of(*sizes: int, sequence: int = 1) -> Mesh:
    """Makes a (data, fsdp, tensor) mesh of these sizes from the first devices."""
    return sharding.make_mesh(*sizes, jax.devices()[: math.prod(sizes) * sequence], sequence=sequence)


def spec_of(**changes: Any) -> ModelSpec:
    """Makes the spec of a tiny Llama with every feature on: grouped queries, head_dim != d_model / heads, biases."""
    layers = changes.get("num_layers", 2)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_ff": 48, "num_layers": layers, "max_positions": 640}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 12}
    kinds = {"mixers": (None,) * layers, "ropes": (Rope(10000.0, 12, None),) * layers, "windows": (None,) * layers}
    scores = {"attention_scale": 12**-0.5, "query_scale": None, "attention_softcap": None, "qk_norm": "none"}
    scores["attention_gate"] = False
    norms = {"pre_norm": True, "post_norm": False, "norm_eps": 1e-5, "norm_offset": 0.0, "value_norm": False}
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
    factors = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logit_scale": 1.0, "logit_softcap": None}
    rest = {"activation": "silu", "tie_embeddings": False, "init_std": 0.2, "layer_scales": False, "per_layer_dim": 0}
    return ModelSpec(**(sizes | heads | kinds | scores | norms | biases | factors | rest | changes))


def random_params(decoder: Decoder, seed: int = 0) -> Params:
    """Draws all parameters, including norms and biases, so that each of them affects the result.

    It draws them with numpy, because tracing and lowering the initialisation of a decoder takes a second.
    """
    rng, spec = np.random.default_rng(seed), decoder.spec

    def drawn(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name == "scale":
            values = rng.normal(1 - spec.norm_offset, 0.2, x.shape)
        else:
            values = rng.normal(0, 0.2 if name.endswith("bias") else spec.init_std, x.shape)
        return jnp.asarray(values, x.dtype)

    return jax.tree_util.tree_map_with_path(drawn, decoder.abstract)


def llama(folder: Path | None = None, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Makes transformers' Llama with random parameters, norms and biases; saves it if a folder is given."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 640}
    rest = {"attention_bias": True, "mlp_bias": True, "initializer_range": 0.2, "rms_norm_eps": 1e-5}
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | heads | rest | ends | changes))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(0.2 * torch.randn_like(p) + (0 if name.endswith("bias") else 1))
    if folder is not None:
        model.save_pretrained(folder)
    return model


def in_float64(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Returns the model in float64 throughout, including its norms, which would compute in float32."""
    wide = copy.deepcopy(model).double()
    for parent in list(wide.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return wide


def load(folder: Path, mesh: Mesh, **changes: Any) -> tuple[Decoder, Params]:
    """Loads the decoder and parameters of a folder; `changes` replace keys of its config."""
    config = hf.read_config(folder / "config.json") | changes
    decoder = make_decoder(hf.spec_from_config(config, folder / "config.json"), mesh.shape["tensor"])
    shardings = sharding.param_shardings(decoder.abstract, decoder.axes, mesh)
    return decoder, hf.load_params(folder, decoder, config["architectures"][0], shardings)


def sample_of(n: int, trained: Sequence[int] | slice, rng: np.random.Generator, vocab: int = VOCAB) -> Sample:
    """Draws a sample of n tokens, of which those at `trained` are trained."""
    mask = np.zeros(n, bool)
    mask[trained] = True
    return rng.integers(0, vocab, n), mask


def packed(rows: Sequence[Sequence[Sample]], slots: int, loss_reduction: str = "token") -> Arrays:
    """Packs rows of samples as the loader does."""
    arrays = empty_rows(len(rows), slots)
    for r, row in enumerate(rows):
        at = 0
        for segment, (tokens, trained) in enumerate(row, 1):
            put_sample(arrays, r, at, segment, tokens, trained, loss_reduction)
            at += len(tokens)
    return arrays


def gap(a: Any, b: Any) -> float:
    """Returns the largest difference between two arrays or two trees of arrays."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)))) for x, y in pairs)


def relative_gap(a: Any, b: Any) -> float:
    """Returns the largest difference between two trees, relative to the largest entry of each leaf of b."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(gap(x, y) / float(np.max(np.abs(np.asarray(y)))) for x, y in pairs)


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two dicts of arrays have the same names, shapes, dtypes and bytes."""
    same = [a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a]
    return a.keys() == b.keys() and all(same)


def whole(folder: Path) -> dict[str, np.ndarray]:
    """Reads all tensors of all safetensors files of a folder."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def hf_arrays(params: Params, decoder: Decoder, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a tree of parameters with the names and shapes of a checkpoint."""
    for tensor in checkpoint_tensors(decoder, FAMILIES[architecture]):
        yield tensor.name, np.concatenate(list(hf._to_hf(params, tensor)))


def logits_of(decoder: Decoder, params: Params, rows: Arrays, compute: Compute) -> jax.Array:
    """Computes float32 logits [B T V] of packed rows, for use inside a jitted function."""
    model = decoder.bind(params)
    return model.logits(model.hidden(rows["tokens"], rows["positions"], rows["segment_ids"], compute))


@functools.cache
def _logits_function(decoder: Decoder, attention: str) -> Callable[[Params, Arrays], jax.Array]:
    compute = Compute(jnp.dtype("float32"), attention, "none")
    return jax.jit(lambda params, rows: logits_of(decoder, params, rows, compute), compiler_options=QUICK)


def our_logits(decoder: Decoder, params: Params, rows: Arrays, attention: str = "blockwise") -> np.ndarray:
    """Computes float32 logits [B T V] of packed rows, with one compiled program per decoder and backend."""
    return np.asarray(_logits_function(decoder, attention)(params, rows))


def uncompiled_logits(decoder: Decoder, params: Params, rows: Arrays) -> np.ndarray:
    """Computes float32 logits [B T V] of packed rows with reference attention, one operation after another.

    Operations are compiled once per shape, and models of the same size share them. This is much faster than compiling
    a program for each of many variants of a model.
    """
    compute = Compute(jnp.dtype("float32"), "reference", "none")
    # Rematerialisation would trace functions only to run them once.
    with jax.disable_jit(), mock.patch.object(jax, "checkpoint", lambda function, **_: function):
        return np.asarray(
            logits_of(decoder, jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, rows), compute)
        )


def torch_logits(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Computes logits [T V] of tokens [T] with a torch model, in its dtype."""
    with torch.no_grad():
        return model(torch.tensor(tokens)[None].long()).logits[0].numpy()
