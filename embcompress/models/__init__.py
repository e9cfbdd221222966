"""Reference CTR models over collections of tables."""

from embcompress.models.dlrm import DLRM

__all__ = ["DLRM"]
