"""marc_jax in lmms-eval: `--model marc_jax`, for tasks of either interface."""


def manifest():
    """What lmms-eval's entry point asks for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    here = "marc_jax_lmms_eval.model"
    return ModelManifest("marc_jax", simple_class_path=f"{here}.MarcJax", chat_class_path=f"{here}.MarcJaxChat")
