"""What a folder of weights holds, from its tables and configuration alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_m1.checkpoint import folders
from megatron_m1.checkpoint.beside import side_files
from megatron_m1.checkpoint.disk import readable
from megatron_m1.checkpoint.models import IMPORTED
from megatron_m1.checkpoint.unpickling import read_common
from megatron_m1.conversion import hf_folder
from megatron_m1.conversion.distributed_folder import OPTIMIZER, DistributedFolder
from megatron_m1.conversion.journal import refuse_unfinished
from megatron_m1.conversion.recognition import Recognised, checkpoint_weights, recognise
from megatron_m1.conversion.safetensors_file import Form
from megatron_m1.errors import InputError
from megatron_m1.model.config import ModelConfig

Report = dict[str, Any]


def resolve(given: Path) -> Path:
    """The checkpoint that a path means: itself, or the latest of a folder or of a run.

    Raises:
        InputError: there is none.
    """
    refuse_unfinished(given)
    return folders.given_by(str(given), key="")[0]


def inspect(path: Path, ignore: Collection[str] = ()) -> Report:
    """What a folder holds, in words and numbers.

    Args:
        ignore: keys of a foreign config.json that are not looked at.

    Raises:
        InputError: nothing that is known.
    """
    if not path.is_dir():
        raise InputError(f"{path} is no folder: give a checkpoint, a run or safetensors")
    refuse_unfinished(path)
    is_ours = folders.holds_checkpoints(path) or not (path / hf_folder.CONFIG).exists()
    if is_ours and not any(path.glob("*.safetensors*")):
        return describe_checkpoint(resolve(path))
    return describe_folder(recognise(path, without_shards=True, ignore=ignore))


def describe_folder(given: Recognised) -> Report:
    """A folder of safetensors, or an index whose shards are elsewhere."""
    folder, is_whole = given.folder, bool(given.folder.tensors)
    forms = (
        {name: stored.form for name, stored in folder.tensors.items()}
        if is_whole
        else given.likely_forms()
    )
    shards = set(folder.shards.values())
    return {
        "folder": str(folder.path),
        "format": f"safetensors, {given.family.name} ({given.family.architectures[0]})",
        **_describe_model(given.model),
        "tensors": f"{len(folder.names):,} in {_counted(len(shards), 'shard')}",
        "decays": _decays(given),
        "total_size": _total_size(given, forms),
        "shards": "all there" if is_whole else "none here: types and sizes are as the format says",
        "dtypes": _dtype_mix(forms.values()),
        "beside": ", ".join(side_files(folder.path)) or "none",
        "problems": given.problems() or "none",
    }


def _decays(given: Recognised) -> str:
    stored = len(given.decays.keys() & given.folder.names)
    return f"{_counted(stored, 'tensor')} beside the weights" if stored else "none"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _total_size(given: Recognised, forms: dict[str, Form]) -> str:
    """The bytes of the tensors, and what the index says where it says something else."""
    size, said = sum(form.size for form in forms.values()), given.folder.total_size
    if said is None or said == size:
        return f"{size:,} bytes"
    return f"{size:,} bytes, but the index says {said:,}"


def check_complete(given: Recognised) -> None:
    """
    Raises:
        InputError: tensors are missing or have other shapes, or an index without shards speaks of
            other bytes than the model of config.json has.
    """
    if problems := given.problems():
        sentences = "; ".join(problems)
        raise InputError(f"{given.folder.path}: {sentences}")
    size = sum(form.size for form in given.likely_forms().values())
    said = given.folder.total_size
    # In which type decays and routers lie beside them is not known without the shards.
    is_known = not given.folder.tensors and not given.family.has_decays
    if is_known and said not in (None, size):
        raise InputError(
            f"{given.folder.path / hf_folder.INDEX} says total_size {said:,}, but the model of "
            f"{hf_folder.CONFIG} has {size:,} bytes: they do not belong together"
        )


def describe_checkpoint(path: Path) -> Report:
    """One of our checkpoints."""
    weights = checkpoint_weights(path)
    folder, model = weights.tensors, weights.model
    assert isinstance(folder, DistributedFolder)
    config = hf_folder.read_json(path / hf_folder.CONFIG)
    forms = {name: folder.form(name) for name in folder.names}
    optimizer = [
        Form(stored.properties.dtype, tuple(stored.size))
        for name, stored in folder.metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and name.startswith(OPTIMIZER)
    ]
    files = list(path.glob("*.distcp"))
    pieces = sum(
        len(stored.chunks)
        for name, stored in folder.metadata.state_dict_metadata.items()
        if name in forms and isinstance(stored, TensorStorageMetadata)
    )
    imported = config.get(IMPORTED)
    return {
        "folder": str(path),
        "format": "Megatron-core's distributed checkpoint; any layout loads it",
        "origin": f"imported from {imported['format']}" if imported else _progress(path),
        **_describe_model(model),
        "tensors": f"{len(forms):,} in {_counted(pieces, 'piece')} in "
        f"{_counted(len(files), 'file')}",
        "weights": readable(sum(form.size for form in forms.values())),
        "optimizer": readable(sum(f.size for f in optimizer)) if optimizer else "none",
        "on disk": readable(sum(file.stat().st_size for file in path.iterdir())),
        "dtypes": _dtype_mix(forms.values()),
        "beside": ", ".join(side_files(path)) or "none",
        "problems": weights.name_problems() + weights.form_problems() or "none",
    }


def _progress(path: Path) -> str:
    progress = read_common(path)["progress"]
    return f"training, step {progress['step']:,}, {progress['tokens']:,} tokens"


def _describe_model(model: ModelConfig) -> Report:
    sizes = {key: value for key, value in asdict(model).items() if value is not None}
    numbers = (key for key, value in sizes.items() if type(value) in (int, float))
    shown = ("layer_pattern", *numbers)
    return {
        "parameters": f"{model.num_params():,}, {model.active_params():,} active",
        "model": " ".join(f"model.{key}={sizes[key]}" for key in shown),
        "rope": f"theta {model.rope_theta:,.0f} on {model.rotary_dim} of {model.head_dim}",
    }


def _dtype_mix(forms: Iterable[Form]) -> str:
    sizes: Counter[str] = Counter()
    for form in forms:
        sizes[str(form.dtype).removeprefix("torch.")] += form.size
    total = max(sum(sizes.values()), 1)
    return ", ".join(f"{name} {100 * size / total:.3g} %" for name, size in sizes.most_common())


def as_text(report: Report) -> str:
    """A line for each entry, and for each of a list."""
    lines = []
    for key, value in report.items():
        values = value if isinstance(value, list) else [value]
        lines += [f"{key if not at else '':<12}{text}" for at, text in enumerate(values)]
    return "\n".join(lines)
