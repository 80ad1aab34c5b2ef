"""`@step`: a typed function becomes a component whose IR carries a command line and no source.

The IR says `python -m assay.components.runtime --component module:function --executor_input {{$}}`, so one image
serves every engine, and the function stays an ordinary importable function that a test calls by `.python_func`.
Inside a step kfp hides its authoring names (`_KFP_RUNTIME=true`), and the decorator returns the function itself.
"""

import os
from collections.abc import Callable
from typing import Any

IMAGES = {
    "data": "assay-data-python",
    "train": "assay-train-python",
    "serve": "assay-serve-python",
}
"""Image by role; the word `python` keeps kfp.local from warning. `ASSAY_IMAGE_<ROLE>` replaces one, by digest."""


def image(role: str) -> str:
    """Return the image reference of a role."""
    return os.environ.get(f"ASSAY_IMAGE_{role.upper()}", IMAGES[role])


def step(role: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a component of a typed function.

    Args:
        role: The image it runs in: `data` (no torch), `train` or `serve`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if os.environ.get("_KFP_RUNTIME") == "true":
            return function
        from kfp import dsl

        from .digest import code_digest

        component = dsl.component(function, base_image=image(role), install_kfp_package=False)
        container = component.component_spec.implementation.container
        container.command = ["python", "-m", "assay.components.runtime"]
        container.args = [
            "--component",
            f"{function.__module__}:{function.__name__}",
            "--code_digest",
            code_digest(function.__module__),
            "--executor_input",
            dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER,
        ]
        return component

    return decorate
