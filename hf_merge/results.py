"""What a merge gives back: where the model or the adapter is, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, EvalResult, ModelCard

from hf_merge import hub
from hf_merge.errors import MergeError, PublishError
from hf_merge.evaluation import with_results
from hf_merge.planning import Plan
from hf_merge.progress import OnProgress
from hf_merge.sources.folder import read_json


@dataclass(frozen=True)
class MergedModel:
    """A merged model on disk, or on the Hub.

    Attributes:
        path: its folder, or its file; None if it is on the Hub only.
        plan: how it was made.
        repo_id: where it is on the Hub, if it was pushed there while it was merged.
        commit: which commit there.
        url: the page of the commit, or of the pull request.
    """

    path: Path | None
    plan: Plan = field(repr=False)
    repo_id: str | None = None
    commit: str | None = None
    url: str | None = None

    @property
    def card(self) -> ModelCard:
        """Its model card; a single file has none.

        Raises:
            MergeError: it is a single file.
        """
        if self.path is None:
            from huggingface_hub import hf_hub_download

            return ModelCard.load(hf_hub_download(str(self.repo_id), "README.md", revision=self.commit))
        if self.path.is_file():
            raise MergeError(
                f"'{self.path}' is a single file of weights: its recipe is in its metadata, it has no card."
            )
        return ModelCard.load(self.path / "README.md")

    def add_results(
        self, results: Sequence[EvalResult], *, compared: Mapping[str, Sequence[EvalResult]] | None = None
    ) -> ModelCard:
        """Put results of an evaluation on its card; what else the card says stays.

        Args:
            results: they take the place of earlier ones of the same dataset and metric.
            compared: results of other models, by name, for the table.

        Raises:
            MergeError: it is a single file or on the Hub only, or these are no results.
        """
        if self.path is None:
            raise MergeError(f"The model is on the Hub only, at {self.url}: edit its card there.")
        card = with_results(self.card, self.path.name, results, compared)
        card.save(self.path / "README.md")
        return card

    def load(self, **kwargs: Any) -> Any:
        """Load it with `from_pretrained` of its class.

        Args:
            **kwargs: of `from_pretrained`: dtype, device_map, token for a private model on the Hub, ...

        Raises:
            MergeError: it is no transformers model.
        """
        import transformers

        if not (self.plan.config if self.path is None else (self.path / "config.json").is_file()):
            place = self.path or self.repo_id
            raise MergeError(f"'{place}' has no config.json: load its tensors with safetensors.torch.load_file.")
        config = self.plan.config if self.path is None else read_json(self.path / "config.json")
        model_class = getattr(transformers, (config.get("architectures") or ["AutoModel"])[0], transformers.AutoModel)
        if self.path is None:
            return model_class.from_pretrained(str(self.repo_id), revision=self.commit, **kwargs)
        return model_class.from_pretrained(self.path, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_message: str | None = None,
        exist_ok: bool = False,
        token: str | bool | None = None,
        on_progress: OnProgress | None = None,
    ) -> CommitInfo:
        """Publish it on the Hub, as one commit; see `hf_merge.push_to_hub`.

        Raises:
            OutputExistsError: there is a model already.
            PublishError: the Hub does not take it, or it is on the Hub only.
        """
        if self.path is None:
            raise PublishError(
                f"The model is on the Hub only, at {self.url}: copy it there with `huggingface_hub.duplicate_repo`."
            )
        return hub.push_to_hub(
            self.path, repo_id, private=private, create_pr=create_pr, revision=revision,
            commit_message=commit_message, exist_ok=exist_ok, token=token, on_progress=on_progress,
        )  # fmt: skip


@dataclass(frozen=True)
class MergedAdapter(MergedModel):
    """A merge as a PEFT adapter of its base, on disk or on the Hub.

    Attributes:
        base: the model that it is loaded over: a Hub id or a folder; None for a model in memory.
        base_revision: its commit on the Hub.
        kept: for each module with factors, the share of its change's squared norm that they keep.
        left_out: the largest absolute change of each tensor that the adapter does not carry.
    """

    base: str | None = None
    base_revision: str | None = None
    kept: Mapping[str, float] = field(default_factory=dict, repr=False)
    left_out: Mapping[str, float] = field(default_factory=dict, repr=False)

    def load(self, **kwargs: Any) -> Any:
        """Load the base, with the adapter over it, as a PeftModel.

        Args:
            **kwargs: of the base's `from_pretrained`: dtype, device_map, token, ...

        Raises:
            MergeError: the base was a model in memory.
        """
        import transformers
        from peft import PeftModel

        if self.base is None:
            where = str(self.path or self.repo_id)
            raise MergeError(
                f"Where the base is, is not known: load the adapter over it with PeftModel.from_pretrained(model, "
                f"{where!r}), or a LoRA file of diffusers with pipe.load_lora_weights({where!r})."
            )
        named = self.plan.config.get("architectures")
        if not named:
            named = transformers.AutoConfig.from_pretrained(
                self.base, revision=self.base_revision or "main"
            ).architectures
        model_class = getattr(transformers, next(iter(named or ()), "AutoModel"))
        model = model_class.from_pretrained(self.base, revision=self.base_revision or "main", **kwargs)
        if self.path is None:
            token = {"token": kwargs["token"]} if "token" in kwargs else {}
            return PeftModel.from_pretrained(model, str(self.repo_id), revision=self.commit, **token)
        return PeftModel.from_pretrained(model, self.path)


@dataclass(frozen=True)
class MergedModelWithExperts(MergedModel):
    """A backbone with task experts, on disk or on the Hub.

    Attributes:
        tasks: their names.
    """

    tasks: tuple[str, ...] = ()

    def load(self, **kwargs: Any) -> Any:
        """Load it as a `RoutedModel`; see `hf_merge.load_experts`.

        Args:
            **kwargs: of `load_experts`.
        """
        from hf_merge.experts.loading import load_experts

        return load_experts(str(self.path or self.repo_id), **{"revision": self.commit, **kwargs})
