"""Checkpoint files that a kill never leaves half written."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, forces it to the disk, and renames it.

    A name therefore holds either the file before or the whole new one, whatever ends the process; a kill leaves at most
    one hidden ``.<name>.unfinished``, which the next write to that name replaces. Lightning writes to the system's
    folder of temporary files and moves the file from there, which is a copy, and can be cut off, where that folder
    lies on another file system. `BilevelModule` puts this in place of Lightning's default. Remote paths (``s3://...``)
    are written as Lightning does.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        unfinished = final.with_name(f".{final.name}.unfinished")
        try:
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(final)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
