"""Shape of the demo model and its config.json in the family's nested layout."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Numbers of a `qwen3_5_moe` text model.  Head sizes are those of the large family members on purpose.

    Hidden size 320 instead of a rounder 384 keeps main model plus MTP block within 64 MB of BF16.
    """

    vocab_size: int = 6144
    hidden_size: int = 320
    num_hidden_layers: int = 8
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    head_dim: int = 256
    linear_num_key_heads: int = 2
    linear_num_value_heads: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    num_experts: int = 32
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 64
    shared_expert_intermediate_size: int = 128
    full_attention_interval: int = 4
    partial_rotary_factor: float = 0.25
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    mtp_num_hidden_layers: int = 1

    @property
    def layer_types(self):
        """"linear_attention" or "full_attention" per layer."""
        return ["full_attention" if (i + 1) % self.full_attention_interval == 0 else "linear_attention"
                for i in range(self.num_hidden_layers)]

    def text_config(self):
        """The dict that stands under `text_config` in config.json."""
        half = int(self.head_dim * self.partial_rotary_factor) // 2
        names = """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
            linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim
            num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size
            full_attention_interval rms_norm_eps max_position_embeddings mtp_num_hidden_layers""".split()
        return {
            "model_type": "qwen3_5_moe_text", **{n: getattr(self, n) for n in names}, "layer_types": self.layer_types,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.partial_rotary_factor,
                "mrope_section": [(half + 2) // 3, (half + 1) // 3, half // 3], "mrope_interleaved": True},
            "hidden_act": "silu", "attention_bias": False, "attn_output_gate": True, "tie_word_embeddings": False,
            "mtp_use_dedicated_embeddings": False, "mamba_ssm_dtype": "float32", "initializer_range": 0.02,
            "dtype": "bfloat16", "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0, "use_cache": True,
        }

    def checkpoint_config(self):
        """The whole config.json of a checkpoint (text part nested, no vision part)."""
        return {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
                "text_config": self.text_config(), "tie_word_embeddings": False, "dtype": "bfloat16"}

    @classmethod
    def from_checkpoint(cls, config):
        """Read the numbers back from a config.json dict."""
        text = config.get("text_config", config)
        rope = text["rope_parameters"]
        known = {k: text[k] for k in cls.__dataclass_fields__ if k in text}
        return cls(**{**known, "rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]})
