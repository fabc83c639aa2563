"""The model that settings name, loaded as they say."""

from __future__ import annotations

from dataclasses import replace

from mlacli.cpu_count import available_cpus
from mlacli.engine import Model, load_model
from mlacli.gguf.finite import check_values
from mlacli.progress import Progress
from mlacli.settings import RunSettings


def model_for(settings: RunSettings, progress: Progress | None = None) -> Model:
    """The model, checked to the last number with --check-tensors; `progress` is told bytes.

    Raises ModelError, SpaceError, UsageError.
    """
    model = load_model(
        settings.model,
        mmap=settings.mmap,
        huge=settings.thp,
        overrides=settings.overrides,
        rope=settings.rope,
        progress=progress,
    )
    if settings.check_tensors:
        model = replace(model, notes=(*model.notes, check_values(model.file, available_cpus())))
    return model
