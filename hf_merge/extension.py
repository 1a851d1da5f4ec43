"""`hf merge ...`: this environment's `hf-merge` as an extension of Hugging Face's command line."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from hf_merge import _compat
from hf_merge.errors import MergeError, OutputError, OutputExistsError

NAME = "merge"
OWNER = "hf_merge.register"
"""Says who wrote the manifest. No account of GitHub can have a dot in its name, so that `hf extensions update` finds
nothing there to put in our place."""


def register() -> Path:
    """Let `hf merge` run this environment's `hf-merge`.

    Returns:
        The manifest that hf reads; `unregister` takes it away again.

    Raises:
        OutputExistsError: hf has an extension of this name that is not ours.
        MergeError: this environment has no script to run.
    """
    folder = _ours()
    description = "Merge models: plan from headers, stream in bounded memory, repeat bit for bit."
    manifest = _compat.extension_manifest(
        OWNER,
        f"hf-{NAME}",
        NAME,
        executable=_script(),
        version=importlib.metadata.version("hf_merge"),
        description=description,
    )
    try:
        manifest.save(folder)
    except OSError as error:
        raise OutputError(f"'{folder}' cannot be written ({error.strerror}): hf looks for extensions there.") from error
    return folder / _compat.extension_file()


def unregister() -> Path:
    """Take back what `register` did.

    Returns:
        The folder that is gone.

    Raises:
        OutputExistsError: hf's extension of this name is not ours.
        MergeError: hf has none.
    """
    folder = _ours()
    if not folder.exists():
        raise MergeError(f"hf has no extension '{NAME}': there is nothing at '{folder}' to remove.")
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"'{folder}' cannot be removed ({error.strerror}): remove it by hand.") from error
    return folder


def _ours() -> Path:
    """Return the folder that hf reads the extension from, if nobody else's is there."""
    folder = _compat.extension_folder(NAME)
    if not folder.exists() and not folder.is_symlink():
        return folder
    owner, source = _compat.extension_owner(folder)
    if owner != OWNER:
        raise OutputExistsError(
            f"hf has an extension '{NAME}' from {source or 'somewhere unknown'}, in '{folder}', and it stays: "
            f"remove it with `hf extensions remove {NAME}` first, or go on with `hf-merge`."
        )
    return folder


def _script() -> Path:
    """Find the console script that was installed with this package."""
    folders = [sysconfig.get_path("scripts"), sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))]
    found = shutil.which(f"hf-{NAME}", path=os.pathsep.join(folders))
    if found is None:
        raise MergeError(
            f"There is no script 'hf-{NAME}' in {' or '.join(folders)}: install the package for {sys.executable} "
            "(`pip install hf-merge`), then register it."
        )
    return Path(found)
