"""Task experts: what one task adds to a merged backbone, as a folder that PEFT loads."""

import importlib


def register() -> None:
    """Make PEFT know task experts. Where `peft_method` is being imported and imports PEFT, it does so at its end."""
    importlib.import_module("hf_merge.experts.peft_method")
