"""A tiny torch model of every family, with every special feature on and weights large enough that each matters."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

VOCAB = 1001
POSITIONS = 640
ORIGINAL = 128  # the length before RoPE was scaled
WINDOW = 48

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5,
    "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 5.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 50000.0, "factor": 5.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 5.0, "original_max_position_embeddings": ORIGINAL,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0},
    "proportional": {
        "rope_type": "proportional", "rope_theta": 100000.0, "factor": 2.0, "partial_rotary_factor": 0.5,
    },
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.5, 3.0, 5.0], "partial_rotary_factor": 0.5,
    },
}  # fmt: skip

# A layer with a window and a layer without.
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}

# Each case has an architecture, and the keys of its config besides the sizes.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": ROPES["llama3"], "tie_word_embeddings": True},
    ),
    "llama-linear": ("LlamaForCausalLM", {"rope_parameters": ROPES["linear"], "hidden_act": "gelu"}),
    "mistral": ("MistralForCausalLM", {"sliding_window": WINDOW}),
    "mistral-full": ("MistralForCausalLM", {"sliding_window": None, "rope_parameters": ROPES["yarn"]}),
    "granite": (
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.4,
            "logits_scaling": 3.0, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
            "head_dim": None,
        },
    ),
    "granite4": (
        "GraniteMoeHybridForCausalLM",
        {
            "embedding_multiplier": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.4,
            "logits_scaling": 3.0, "attention_bias": True, "tie_word_embeddings": True, "head_dim": None,
            "shared_intermediate_size": 40, "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 8,
            "time_step_limit": [0.0, 8.0], "position_embedding_type": "rope", "layer_types": ["full_attention"] * 2,
        },
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        {
            "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "head_dim": None,
            "rope_parameters": ROPES["yarn"] | {"attention_factor": 1.3},
        },
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "attention_bias": True},
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        {
            "no_rope_layers": [1, 0], "attention_bias": True, "mlp_bias": True, "use_sliding_window": True,
            "sliding_window": WINDOW, "head_dim": None, "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", {"attention_bias": True, "head_dim": None}),
    "olmo3": (
        "Olmo3ForCausalLM",
        {
            "attention_bias": True, "head_dim": None, "sliding_window": WINDOW, **TWO_KINDS,
            "rope_parameters": {
                "full_attention": ROPES["yarn"] | {"rope_theta": 500000.0, "attention_factor": 1.2},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            },
        },
    ),
    "exaone4": (
        "Exaone4ForCausalLM",
        {"sliding_window": WINDOW, **TWO_KINDS, "sliding_window_pattern": "LG", "tie_word_embeddings": True},
    ),
    "hunyuan": (
        "HunYuanDenseV1ForCausalLM",
        {"rope_parameters": ROPES["dynamic"], "attention_bias": True},
    ),
    "ministral3": (
        "Ministral3ForCausalLM",
        {
            "sliding_window": WINDOW,
            "rope_parameters": ROPES["yarn"] | {"mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.5},
        },
    ),
    "lfm2": (  # as in its releases, a group of layers that repeats and begins with a run, and a rest
        "Lfm2ForCausalLM",
        {
            "num_hidden_layers": 7, "full_attn_idxs": [2, 5], "conv_bias": True, "norm_eps": 1e-5,
            "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.1, "rms_norm_eps": None,
        },
    ),
    "granite4-hybrid": (
        "GraniteMoeHybridForCausalLM",
        {
            "embedding_multiplier": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.4, "logits_scaling": 3.0,
            "tie_word_embeddings": True, "head_dim": None, "shared_intermediate_size": 40, "num_local_experts": 0,
            "mamba_n_heads": 8, "mamba_d_state": 6, "mamba_n_groups": 2, "mamba_proj_bias": True,
            "time_step_limit": [0.0, 1000.0],  # transformers does not apply it while decoding
            "position_embedding_type": "nope", "num_hidden_layers": 3,
            "layer_types": ["linear_attention"] * 2 + ["full_attention"],
        },
    ),
    # With a usual eps, the norm of the rule's outputs would magnify the roundings of outputs near zero: the logits of
    # transformers itself are then 2.5e-4 away from those in float64.
    # Theirs in float32 are 1.7e-4 away with 1e-3, where ours are 0.8e-4, and 5e-5 with 3e-3, where ours are 4e-5.
    "qwen3_5": (
        "Qwen3_5ForCausalLM",
        {
            "layer_types": ["linear_attention", "full_attention"], "attention_bias": True,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "head_dim": 16,
            "linear_value_head_dim": 12, "linear_conv_kernel_dim": 3, "rms_norm_eps": 3e-3,
            "rope_parameters": ROPES["default"] | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
        },
    ),
    "phi3": (
        "Phi3ForCausalLM",
        {
            "rope_parameters": ROPES["longrope"], "original_max_position_embeddings": ORIGINAL, "hidden_size": 48,
            "sliding_window": 200, "head_dim": None,
        },
    ),
    "phi3-mini": ("Phi3ForCausalLM", {"hidden_size": 48, "head_dim": None, "sliding_window": None}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            "sliding_window": WINDOW, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 8.0, "attention_bias": True, "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "sliding_window": WINDOW, "query_pre_attn_scalar": 20, "attention_bias": True, "tie_word_embeddings": True,
            **TWO_KINDS, "final_logit_softcapping": 8.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 5.0},
                "sliding_attention": ROPES["default"],
            },
        },
    ),
    # Layers with a window and layers without, which use their own keys, lend them, or borrow them. The eps is large
    # as for qwen3_5: with a usual one, one rounding of each weight moves logits by 7e-5.
    "gemma4": (
        "Gemma4ForCausalLM",
        {
            "num_hidden_layers": 5,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "global_head_dim": 16, "attention_bias": True,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "final_logit_softcapping": 8.0,
            "sliding_window": WINDOW, "tie_word_embeddings": True, "rms_norm_eps": 1e-3,
            "rope_parameters": {"full_attention": ROPES["proportional"], "sliding_attention": ROPES["default"]},
        },
    ),
    # As in its larger releases, without embeddings of each layer and with keys for values.
    "gemma4-keys": (
        "Gemma4ForCausalLM",
        {
            **TWO_KINDS, "attention_k_eq_v": True, "rms_norm_eps": 1e-3, "num_global_key_value_heads": 1,
            "global_head_dim": 16, "hidden_size_per_layer_input": 0, "sliding_window": WINDOW,
            "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip


def torch_model(case: str, folder: Path | None = None, **changes: Any) -> PreTrainedModel:
    """Makes transformers' model of a case with random parameters, norms and biases; saves it if a folder is given."""
    architecture, odd = CASES[case]
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    settings = {k: v for k, v in (SIZES | odd | changes).items() if k != "head_dim" or v is not None}
    config = model_class.config_class(**settings)
    config._attn_implementation = "eager"  # only this implementation applies soft caps
    model = model_class(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
        for name, scale in model.named_buffers():
            if name.endswith("layer_scalar"):
                scale.add_(0.2 * torch.randn_like(scale))
    if folder is not None:
        model.save_pretrained(folder)
    return model


# Checkpoints whose decoder is that of a case, with towers for images and sound beside it.
WRAPPED = {
    "Gemma3ForConditionalGeneration": "gemma3", "Mistral3ForConditionalGeneration": "ministral3",
    "Qwen3_5ForConditionalGeneration": "qwen3_5", "Gemma4ForConditionalGeneration": "gemma4",
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "head_dim": 8,
}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "gemma3": TOWER | {"model_type": "siglip_vision_model"},
    "ministral3": TOWER | {"model_type": "pixtral"},
    "qwen3_5": {
        "hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2, "patch_size": 14, "out_hidden_size": 32,
        "num_position_embeddings": 4,
    },
    "gemma4": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16,
    },
}  # fmt: skip
# Their decoders have two layers; transformers applies no soft cap to the logits of Gemma 3 in this class.
WRAPPED_CHANGES: dict[str, dict[str, Any]] = {
    "gemma3": TWO_KINDS | {"final_logit_softcapping": None, "model_type": "gemma3_text"},
    "ministral3": {"model_type": "ministral3"},
    "qwen3_5": {},
    "gemma4": {  # no test has the padding, which transformers looks up in place of images
        "pad_token_id": 1,
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
}
EARS = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16,
    "subsampling_conv_channels": [8, 4],
}  # fmt: skip


def wrapped_model(architecture: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Makes and saves a model with the decoder of a case, and towers in bfloat16 and of no special kind."""
    case, model_class = WRAPPED[architecture], getattr(transformers, architecture)
    changes = WRAPPED_CHANGES[case] | changes
    text = SIZES | CASES[case][1] | changes
    tied = text.get("tie_word_embeddings", False)
    others = {"image_token_id" if case == "qwen3_5" else "image_token_index": 99}
    if case == "gemma4":
        others = {"audio_config": EARS}
    config = model_class.config_class(text_config=text, vision_config=TOWERS[case], tie_word_embeddings=tied, **others)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config).eval()
    decoder = torch_model(case, **changes)
    model.get_decoder().load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    (model.model.visual if case == "qwen3_5" else model.model.vision_tower).to(torch.bfloat16)
    if case == "gemma4":
        model.model.audio_tower.to(torch.bfloat16)
    model.save_pretrained(folder)
    if case == "qwen3_5":  # releases have a head that predicts several tokens, which transformers ignores
        tensors = load_file(folder / "model.safetensors")
        save_file(
            tensors | {"mtp.fc.weight": torch.randn(8, 4).bfloat16()}, folder / "model.safetensors", {"format": "pt"}
        )
    if case == "gemma4":  # releases have keys of layers that borrow, too, which transformers ignores
        tensors, unused = (
            load_file(folder / "model.safetensors"),
            "model.language_model.layers.2.self_attn.k_proj.weight",
        )
        save_file(tensors | {unused: torch.randn(8, 4)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "AnImageProcessor"}')
    return model
