"""Reference CTR models over collections of tables."""

from collections.abc import Callable

from embcompress.collection import EmbeddingBagCollection
from embcompress.models.base import ClickModel
from embcompress.models.dcn import DCN
from embcompress.models.deepfm import DeepFM
from embcompress.models.dlrm import DLRM
from embcompress.models.wide_deep import WideDeep

#: What builds each model from its tables and the number of numeric features, by its name.
MODELS: dict[str, Callable[[EmbeddingBagCollection, int], ClickModel]] = {
    "dlrm": DLRM,
    "deepfm": DeepFM,
    "dcn": DCN,
    "wide_deep": WideDeep,
}

__all__ = ["DCN", "DLRM", "MODELS", "ClickModel", "DeepFM", "WideDeep"]
