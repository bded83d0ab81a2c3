"""Tables of transformers' routers: whose weights are shares of a softmax over all experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

# Class of a router -> whether the weights of a token's experts sum to one: always, or as the router says. Each returns
# logits, weights and ids. Routers with other scores (sigmoids, groups, biases for balance) are not among them: what an
# assignment is worth to them is not the softmax of its logit.
ROUTERS: Mapping[str, Literal["always", "as it says"]] = {
    "MixtralTopKRouter": "always",
    "MiniMaxTopKRouter": "always",
    "Qwen2MoeTopKRouter": "as it says",
    "Qwen3MoeTopKRouter": "as it says",
    "Qwen3NextTopKRouter": "as it says",
    "Qwen3VLMoeTextTopKRouter": "always",
    "Qwen3_5MoeTopKRouter": "always",
    "OlmoeTopKRouter": "as it says",
    "FlexOlmoTopKRouter": "as it says",
    "GptOssTopKRouter": "always",
}
