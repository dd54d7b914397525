"""The policy's weights in a folder that a server can load, one for each version."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from torch import nn

from megatron_m1.checkpoint import agreement
from megatron_m1.checkpoint.weights_only import save_weights
from megatron_m1.conversion.convert import convert
from megatron_m1.conversion.jobs import ExportOptions, export_job
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.model.config import ModelConfig
from megatron_m1.rl.rollout.config import HttpConfig
from megatron_m1.rl.rollout.servers import FORMATS, Published

_SHARD_BYTES = 5 * 10**9
_HEARTBEAT = 20.0


class Publisher:
    """Writes the weights as they stand to ``folder/policy-VERSION-...``, in what the server loads.
    Calling it is collective.

    The name has a part of chance: a server that keeps what it has loaded by name must not take the
    weights of a run that was here before for those of this one. The folder of the version before
    the last is removed: no request is left that asks for it.
    """

    def __init__(
        self,
        config: HttpConfig,
        folder: Path,
        chunks: list[nn.Module],
        model: ModelConfig,
        tokenizer: Tokenizer,
    ) -> None:
        self._config, self._folder = config, folder
        self._chunks, self._model, self._tokenizer = chunks, model, tokenizer
        self._mark = agreement.on_first(lambda: uuid.uuid4().hex[:8])
        self._before: str | None = None

    def __call__(self, version: int) -> Published:
        """
        Raises:
            InputError: the format of the server's weights cannot say what the model does.
            StorageError: the disk does not take them.
        """
        name = f"policy-{version}-{self._mark}"
        out = self._folder / name
        # The same version again, where the first did not reach the servers.
        agreement.on_first(lambda: shutil.rmtree(out, ignore_errors=True))
        self._write(out)
        agreement.on_first(lambda: self._remove_all_but(name))
        self._before = name
        return Published(str(out.resolve()), name, version)

    def _write(self, out: Path) -> None:
        for chunk in self._chunks:
            if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
                # What the sharded optimizer has changed reaches other ranks in a forward pass.
                chunk.start_param_sync(force_sync=True)  # type: ignore[operator]
        if FORMATS[self._config.server] is None:
            save_weights(self._chunks, self._model, self._tokenizer, out)
            return
        ours = out.with_name(f".{out.name}")
        save_weights(self._chunks, self._model, self._tokenizer, ours)
        try:
            agreement.on_first_at_length(lambda: self._export(ours, out), _HEARTBEAT)
        finally:
            agreement.on_first(lambda: shutil.rmtree(ours, ignore_errors=True))

    def _export(self, ours: Path, out: Path) -> None:
        format = FORMATS[self._config.server] or ""
        options = ExportOptions(
            format,
            "stored",
            _SHARD_BYTES,
            permute_rope=format == "transformers",
            like=Path(self._config.like) if self._config.like else None,
            max_length=self._config.max_length,
        )
        convert(export_job(ours, out, options))

    def _remove_all_but(self, name: str) -> None:
        for folder in [*self._folder.glob("policy-*"), *self._folder.glob(".policy-*")]:
            if folder.name not in (name, self._before):
                shutil.rmtree(folder, ignore_errors=True)
