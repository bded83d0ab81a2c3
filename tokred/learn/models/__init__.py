"""Small reference models whose architecture is the method: language models that spend less on some tokens.

They are no patch of another's model: Mixture-of-Recursions and Duo-LLM are trained so from the start. Each is a plain
``nn.Module`` of a few layers with its routers, its losses and its cache.
"""

from tokred.learn.models.blocks import Answer, Cache
from tokred.learn.models.duo import Duo, DuoConfig
from tokred.learn.models.mor import MoR, MoRConfig

__all__ = ["Answer", "Cache", "Duo", "DuoConfig", "MoR", "MoRConfig"]
