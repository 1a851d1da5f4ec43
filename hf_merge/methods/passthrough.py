"""Copy a model."""

from hf_merge.method import merge_method
from hf_merge.types import Merged, Models, Number, PerModel, each


@merge_method(paper="https://github.com/arcee-ai/mergekit", elementwise=True, models=1)
def passthrough(models: Models, *, scale: PerModel[Number | None] = each(None)) -> Merged:
    """Copy one model's weights, optionally scaled.

        merged = scale * model

    Args:
        scale: factor of the weights; none leaves them as they are.

    Good for:
        Copying the layers of one model, as in stacks of layers from several; by itself it merges nothing.

    In words:
        Copies the weights of {model} (scale: {scale}).
    """
    return models[0] if scale[0] is None else models[0] * scale[0]
