"""lmjax: train language models with JAX on TPU pods and GPUs."""

__version__ = "0.1.0"
