"""Configs: YAML data over the classes of the components. The classes are typed.py's, the rules of files files.py's."""

from lmjax.config.resume import check_resume, differences
from lmjax.config.run import InferenceConfig, RunConfig, load, load_inference, load_model
from lmjax.config.typed import dump, load_as, to_tree, to_yaml, to_yaml_text

__all__ = [
    "InferenceConfig",
    "RunConfig",
    "check_resume",
    "differences",
    "dump",
    "load",
    "load_as",
    "load_inference",
    "load_model",
    "to_tree",
    "to_yaml",
    "to_yaml_text",
]
