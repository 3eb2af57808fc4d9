"""GLM-4.5 and GLM-4.6: sigmoid router with a choice bias, ungated shared expert, half rotary."""

from __future__ import annotations

from flashmoe.checkpoint.arch import Architecture, ModelConfig, all_full, read_common, read_experts
from flashmoe.checkpoint.description import DENSE, MOE
from flashmoe.config import ConfigReader


def read_config(r: ConfigReader) -> ModelConfig:
    """Return the core's numbers."""
    mc = read_common(r, partial=0.5, bias_allowed=True)
    c = mc.core
    all_full(r, c)
    c["qk_norm"] = int(r.flag("use_qk_norm", False))
    read_experts(r, c, n="n_routed_experts", width="moe_intermediate_size")
    n_shared = r.integer("n_shared_experts", 0, high=1 << 10)
    c["shared_expert_intermediate_size"] = n_shared * c["moe_intermediate_size"]
    c["router_score"] = 1
    r.expect("scoring_func", "sigmoid")
    r.expect("topk_method", "noaux_tc")
    c["norm_topk_prob"] = int(r.flag("norm_topk_prob", True))
    c["norm_topk_eps"] = 1e-20
    c["routed_scaling_factor"] = r.number("routed_scaling_factor")
    c["n_group"] = r.integer("n_group", 1, low=1)
    c["topk_group"] = r.integer("topk_group", 1, low=1)
    n_dense = r.integer("first_k_dense_replace", high=1 << 16)
    n_layers = c["num_hidden_layers"]
    c["ffns"] = [DENSE if i < n_dense else MOE for i in range(n_layers)]
    if DENSE in c["ffns"]:
        c["intermediate_size"] = r.integer("intermediate_size", low=1)
    r.ignore("intermediate_size")
    mc.extra_layers = r.integer("num_nextn_predict_layers", 0, high=16)
    return mc


ARCH = Architecture(
    name="glm4_moe",
    model_types=("glm4_moe",),
    read_config=read_config,
    shared="shared_experts",
    router_bias=True,
)
