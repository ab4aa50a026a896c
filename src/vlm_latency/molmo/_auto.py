"""Registration with the Auto classes of transformers; importing this module does it, once."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import AutoModel

from vlm_latency.molmo.configuration import MolmoConfig
from vlm_latency.molmo.image_processing import MolmoImageProcessor
from vlm_latency.molmo.modeling import MolmoForConditionalGeneration, MolmoModel
from vlm_latency.molmo.processing import MolmoProcessor

__all__ = [
    "MolmoConfig",
    "MolmoForConditionalGeneration",
    "MolmoImageProcessor",
    "MolmoModel",
    "MolmoProcessor",
]

AutoConfig.register("molmo", MolmoConfig)
AutoModel.register(MolmoConfig, MolmoModel)
AutoModelForImageTextToText.register(MolmoConfig, MolmoForConditionalGeneration)
AutoImageProcessor.register(MolmoConfig, image_processor_classes={"pil": MolmoImageProcessor})
AutoProcessor.register(MolmoConfig, MolmoProcessor)
