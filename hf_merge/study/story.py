"""A study from its name or file to its tables: build or find the models, measure, write."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub.utils import logging

from hf_merge.errors import OutputExistsError
from hf_merge.study import report
from hf_merge.study.protocol import run
from hf_merge.study.report import Line
from hf_merge.study.spec import Dataset, Study, TaskEntry
from hf_merge.study.suite import SUITES, Suite

logger = logging.get_logger(__name__)
SPEC_FILE, TABLE_FILE, NUMBERS_FILE, PICTURE_FILE = "study.yaml", "table.md", "table.csv", "table.png"


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Attributes:
        lines: models and methods, the best first.
        folder: of tables, picture and the study itself.
        picture: nothing if matplotlib is not installed.
        seconds: how long it took, with building.
    """

    lines: list[Line]
    folder: Path
    picture: Path | None
    seconds: float

    def table(self) -> str:
        """Render it in Markdown."""
        return report.markdown(self.lines)


def run_study(
    given: str | Path, output: str | Path, *, tasks: int | None = None, quick: bool = False, seed: int = 0,
    token: str | None = None, cache_dir: str | None = None, local_files_only: bool = False,
) -> StudyResult:  # fmt: skip
    """Compare merge methods on the tasks of a study.

    Args:
        given: `vision8` or `vision30`, whose models are built once, without a network; or a file, see `spec.Study`.
        output: the folder for tables and picture; a study that lies there is replaced.
        tasks: only so many of the tasks, from all over the list.
        quick: smaller models, trained in minutes (`vision8` and `vision30`).
        seed: of models, images and methods (`vision8` and `vision30`).
        token, cache_dir, local_files_only: as from_pretrained takes them; the study's own models lie in cache_dir too.

    Returns:
        Accuracies of all, written to `table.md`, `table.csv` and, with matplotlib, `table.png`; `study.yaml` says what
        was compared.

    Raises:
        RecipeError: the file cannot be meant, or there are fewer tasks.
        OutputExistsError: the folder holds something else.
        MergeError: models or images that cannot be used.
    """
    start, folder = time.perf_counter(), Path(output).expanduser()
    _refuse_others(folder)
    suite = Suite.of(str(given), count=tasks, quick=quick, seed=seed, cache_dir=cache_dir) if given in SUITES else None
    if suite:
        suite.build()
        study = own_study(suite)
    else:
        study = Study.load(given) if tasks is None else Study.load(given).part(tasks)
    outcomes = run(study, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    lines = report.lines_of(outcomes)
    drawn = _write(folder, study, lines, f"{Path(given).stem}: {len(study.tasks)} tasks")
    return StudyResult(lines, folder, folder / PICTURE_FILE if drawn else None, time.perf_counter() - start)


def own_study(suite: Suite) -> Study:
    """Return the study of a suite's models."""
    entries = tuple(
        TaskEntry(name=name, model=str(suite.folder / name), dataset=Dataset(drawn=name)) for name in suite.tasks
    )
    return Study(base=str(suite.folder / "base"), tasks=entries, seed=suite.seed)


def _refuse_others(folder: Path) -> None:
    """Refuse a folder that holds something else, before anything is built."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SPEC_FILE).is_file():
        raise OutputExistsError(f"'{folder}' exists and holds no study: choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"'{folder}' is a file: choose a folder.")


def _write(folder: Path, study: Study, lines: list[Line], title: str) -> bool:
    """Write all files beside the folder, then move them there; tell whether there is a picture."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        said = study.model_dump(mode="json", exclude_defaults=False, exclude_none=True)
        (partial / SPEC_FILE).write_text(yaml.safe_dump(said, sort_keys=False), encoding="utf-8")
        (partial / TABLE_FILE).write_text(report.markdown(lines), encoding="utf-8")
        (partial / NUMBERS_FILE).write_text(report.comma_separated(lines), encoding="utf-8")
        if drawn := report.can_draw():
            report.picture(lines, partial / PICTURE_FILE, title)
        else:
            logger.warning("No picture is drawn without matplotlib: pip install 'hf-merge[picture]'.")
        folder.mkdir(exist_ok=True)
        for file in partial.iterdir():
            os.replace(file, folder / file.name)
        if not drawn:
            (folder / PICTURE_FILE).unlink(missing_ok=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return drawn
