"""ANIRA for transformers: importing this registers the Auto classes, and makes saved models carry their code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_anira import AniraConfig
from .generation import AniraGenerateBeamOutput, AniraGenerateOutput
from .modeling_anira import AniraForCausalLM, AniraModel, AniraPreTrainedModel

AutoConfig.register("anira", AniraConfig, exist_ok=True)
AutoModel.register(AniraConfig, AniraModel, exist_ok=True)
AutoModelForCausalLM.register(AniraConfig, AniraForCausalLM, exist_ok=True)

AniraConfig.register_for_auto_class()
AniraModel.register_for_auto_class("AutoModel")
AniraForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "AniraConfig",
    "AniraForCausalLM",
    "AniraGenerateBeamOutput",
    "AniraGenerateOutput",
    "AniraModel",
    "AniraPreTrainedModel",
]
