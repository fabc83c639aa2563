"""A model loaded as settings say, an engine over it, and what is told meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from codegen.jit import Jit
from codegen.pool import Pool
from mlacli.cpu_count import available_cpus
from mlacli.engine import Engine, Model, load_model
from mlacli.gguf.finite import check_values
from mlacli.graph.lower import Lowering
from mlacli.machine import machine_profile
from mlacli.memory import huge_bytes, lock
from mlacli.progress import Progress, Watch
from mlacli.settings import RunSettings
from mlacli.units import GIB, size_text


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


def watched_load(settings: RunSettings, watch: Watch) -> Model:
    """The model of these settings. Raises ModelError, SpaceError, UsageError."""
    with watch("reading the model", "bytes") as progress:
        return model_for(settings, progress)


def start_engine(
    model: Model,
    settings: RunSettings,
    jit: Jit,
    n_ctx: int,
    *,
    n_out_max: int = 1,
    kernels: Mapping[str, Lowering] | None = None,
) -> Engine:
    """An engine whose -mla 3 knows this machine, with a pool of its own."""
    n_threads = max(settings.n_threads, settings.n_threads_batch)
    pool = Pool(jit, n_threads, settings.policy(batch=True))
    try:
        profile = machine_profile(jit, pool, settings)
        return Engine(
            model, settings, jit, profile,
            n_ctx=n_ctx, n_out_max=n_out_max, pool=pool, kernels=kernels,
        )  # fmt: skip
    except BaseException:
        pool.close()
        raise


def progress_lines(note: Callable[[str], None]) -> Callable[[int, int], None]:
    """A line per tenth of what -rtr copies; one alone if that is soon done."""
    shown = 0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        tenths = 10 * done // total
        if tenths > shown and (total >= GIB or tenths == 10):
            shown = tenths
            note(f"-rtr: {size_text(done)} of {size_text(total)} interleaved ({10 * tenths} %)")

    return progress


def memory_notes(model: Model, settings: RunSettings) -> Iterator[str]:
    """What came of --mlock and -thp."""
    if settings.mlock:
        files = [part.bytes for part in model.file.files]
        problem = lock(model.weights.in_use() if settings.rtr else files)
        yield f"note: --mlock: {problem}" if problem else "mlock: the weights stay in memory"
    if settings.thp:
        yield f"thp: {huge_bytes() / 2**20:.2f} MiB in huge pages so far"
