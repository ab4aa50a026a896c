"""On what, with what and under which conditions something was measured.

Two numbers may be put together only where nothing that could change them differs: the
``conditions`` of the environment, whose hash is the fingerprint of every row.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import vlm_latency
from vlm_latency.contents import file_sha256
from vlm_latency.options import MeasurementOptions, ModelOptions

if TYPE_CHECKING:
    from vlm_latency.models.interface import ModelArchitecture

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "safetensors")
ROOT = Path(vlm_latency.__file__).parent

# What runs while the clock does. Reports, costs and statistics may change without a new
# measurement; so may the zoo, whose entries are in the conditions themselves.
MEASURING_CODE = (
    "instrument/clock.py",
    "instrument/engines.py",
    "instrument/graphs.py",
    "instrument/intervals.py",
    "instrument/kept_cache.py",
    "instrument/lengths.py",
    "instrument/meter.py",
    "instrument/methods.py",
    "instrument/noise.py",
    "instrument/plan.py",
    "instrument/protocol.py",
    "instrument/session.py",
    "instrument/timeline.py",
    "instrument/warmup.py",
    "models/*.py",
    "models/tokenizer.json",
    "molmo/*.py",
    "reduction/*.py",
    "vqa/images.py",
)

# Settings of a measurement that change what happens to a single run.
_RUN_SETTINGS = (
    "method",
    "max_new_tokens",
    "order",
    "warmup",
    "warmup_runs",
    "warmup_max_runs",
    "lengths",
    "quiet_seconds",
    "nvtx",
)


def environment(
    model: ModelOptions,
    measurement: MeasurementOptions,
    *,
    architecture: ModelArchitecture,
    dataset: Mapping[str, object],
    template: str,
) -> dict[str, Any]:
    """Record hardware, software and settings of a measurement; nothing is loaded for it.

    Parameters
    ----------
    architecture
        What is known of the model without its weights.
    dataset
        What identifies the questions (``QuestionSource.describe()``).
    template
        The prompt around the question.

    Returns
    -------
    dict
        JSON-able: ``hardware, software, model, measurement, dataset, prompt_template, process``,
        a ``line`` in words, and ``conditions``: the part that could change a number.
    """
    about = _model(model, architecture)
    machine = hardware(about["device"])
    versions = software(about["device"])
    settings = measurement.model_dump(mode="json")
    seeds = {"model": model.seed, "measurement": measurement.seed, "dataset": dataset.get("seed")}
    code = code_hash()
    return {
        "line": _line(machine, versions, about),
        "hardware": machine,
        "software": versions,
        "model": about,
        "measurement": settings,
        "dataset": dict(dataset),
        "prompt_template": template,
        "seeds": seeds,
        "process": _process(),
        "code": {"version": vlm_latency.__version__, "sha256": code, **_commit()},
        "conditions": {
            "hardware": machine,
            "software": versions,
            "model": about,
            "measurement": {name: settings[name] for name in _RUN_SETTINGS},
            # questions are told apart by their request_id, of which there may be more next time
            "dataset": {name: dataset.get(name) for name in ("name", "source", "split")},
            "prompt_template": template,
            "code_sha256": code,
        },
    }


def fingerprint(conditions: Mapping[str, object]) -> str:
    """Hash what could change a number: 16 hexadecimal digits of SHA-256.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    return _sha256(json.dumps(conditions, sort_keys=True, default=str).encode())


@cache
def code_hash() -> str:
    """Hash the source of everything that runs while the clock does."""
    digest = hashlib.sha256()
    for pattern in MEASURING_CODE:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def _model(options: ModelOptions, architecture: ModelArchitecture) -> dict[str, Any]:
    from vlm_latency.models import dtype_name, resolve_device, thread_count, weights_kind
    from vlm_latency.models.zoo import NULL

    kind, device, dtype = weights_kind(options), resolve_device(options), dtype_name(options)
    sdpa = options.attn_implementation == "sdpa"
    config = json.dumps(architecture.config, sort_keys=True, default=str).encode()
    return {
        "name": options.name,
        "hub_id": architecture.hub_id,
        "model_type": architecture.model_type,
        "config_sha256": _sha256(config),
        "weights": kind,
        "revision": None if kind == "random" else _revision(options, architecture.hub_id),
        "zoo_sha256": _zoo(options, architecture.model_type),
        "seed": options.seed if kind == "random" else None,
        "device": device,
        "dtype": dtype,
        "attn_implementation": options.attn_implementation,
        "sdpa_backend": options.sdpa_backend,  # of the decoder
        "sdpa_backend_encoder": architecture.encoder_backend(device, dtype) if sdpa else None,
        "float32_attention": architecture.config.get("float32_attention"),  # Molmo only
        "engine": options.engine,
        "cache": "dynamic" if options.engine == "eager" else "static",
        "max_crops": options.max_crops,
        "num_threads": thread_count(options),
        "trust_remote_code": options.trust_remote_code,  # whose code runs
        "null_sleep_ms": options.null_sleep_ms if options.name == NULL else None,
    }


def _zoo(options: ModelOptions, model_type: str) -> str:
    """What the zoo, or the user's own, says of a model: prompt, tokens, settings of its processor."""
    from vlm_latency.models.zoo import load_zoo

    zoo = load_zoo(options.zoo_file)
    said = [zoo.families.get(model_type), zoo.models.get(str(options.name))]
    return _sha256(json.dumps([asdict(part) if part else None for part in said]).encode())


def _revision(options: ModelOptions, hub_id: str | None = None) -> str | None:
    """Which weights: a folder by its files' contents, a hub id by its commit.

    Every file counts: processor, tokenizer, chat template and code change numbers as well.

    A user's own file stands for the model that it makes.
    """
    from vlm_latency.models.zoo import own_file

    if own := own_file(options.name):
        return _sha256(own[0].read_bytes())
    source = str(hub_id or options.name)
    folder = Path(source)
    if folder.is_dir():
        files = sorted(p for p in folder.rglob("*") if p.is_file() and _read_by_a_model(p, folder))
        hashes = [(path.relative_to(folder).as_posix(), file_sha256(path)) for path in files]
        return _sha256(json.dumps(hashes).encode())
    from huggingface_hub import try_to_load_from_cache

    kept = try_to_load_from_cache(source, "config.json", revision=options.revision)
    return Path(kept).parent.name if isinstance(kept, str) else options.revision


def _read_by_a_model(path: Path, folder: Path) -> bool:
    """Whether a file of a checkpoint may change a number: no notes, nothing hidden, no caches."""
    parts = path.relative_to(folder).parts
    hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
    return not hidden and path.suffix.lower() != ".md"


def hardware(device: str) -> dict[str, object]:
    """Say what there is beside the device, and what the device is."""
    found: dict[str, object] = {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }
    if device.startswith("cuda"):
        import torch

        gpu = torch.cuda.get_device_properties(torch.device(device))
        found |= {
            "gpu": gpu.name,
            "gpu_memory_gib": round(gpu.total_memory / 2**30),
            "gpu_capability": f"{gpu.major}.{gpu.minor}",
            "gpu_multiprocessors": gpu.multi_processor_count,
        }
    return found


def device_name(device: str) -> str:
    """Say what a device is, with its own number where it has one."""
    if not device.startswith("cuda"):
        return _cpu_name()
    import torch

    gpu = torch.cuda.get_device_properties(torch.device(device))
    return f"{gpu.name} {getattr(gpu, 'uuid', '')}".strip()


@cache
def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def software(device: str) -> dict[str, object]:
    """Give versions, of the driver too where there is a GPU."""
    found: dict[str, object] = {"os": platform.platform(), "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if device.startswith("cuda"):
        import torch

        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
        found["nvidia_driver"] = _driver()
    return found


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # no driver library, or no permission to ask it
        return None


def _process() -> dict[str, object]:
    """The state of things at the start; it differs every time and is no condition."""
    has_load = hasattr(os, "getloadavg")
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF")
    return {
        "host": platform.node(),
        "load_average": list(os.getloadavg()) if has_load else None,
        "variables": {name: os.environ[name] for name in names if name in os.environ},
    }


@cache
def _commit() -> dict[str, object]:
    """The commit of the checkout this package lies in, and whether files differ from it."""
    unknown: dict[str, object] = {"git_commit": None, "git_dirty": None}
    checkout = ROOT.parent.parent
    if not (checkout / ".git").exists():
        return unknown
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(checkout), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return unknown
    return {"git_commit": commit, "git_dirty": bool(changes)}


def _line(
    machine: Mapping[str, object], versions: Mapping[str, object], model: Mapping[str, Any]
) -> str:
    threads = model["num_threads"]
    cores = f"{threads} of {machine['logical_cores']} cores"
    where = f"{machine['gpu']} beside {cores}" if "gpu" in machine else f"{machine['cpu']}, {cores}"
    chosen = model["sdpa_backend"]
    attention = model["attn_implementation"] + (f" ({chosen})" if chosen != "auto" else "")
    parts = [where, model["dtype"], attention, model["engine"]]
    parts += [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    return ", ".join(parts)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
