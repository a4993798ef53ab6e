"""Language models: their interface, their sources, and the engine that runs them."""

from textgen_env.models.hub import MODEL_NAMES, cache_folder, load_language_model, load_pretrained, model_folder

__all__ = ["MODEL_NAMES", "cache_folder", "load_language_model", "load_pretrained", "model_folder"]
