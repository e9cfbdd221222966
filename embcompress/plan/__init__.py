"""Lookup plans: which rows an id reads, and how they become its vector.

A plan is plain data. It prints, compares, hashes, goes to JSON and back, and is all that a
saved artifact, a kernel or a lowering needs to know::

    vector(id) = head( combine_t( scale_t(id) * store_t[ offset_t + address_t(id), : ] ) )
    bag        = pool over the ids of the bag

Nothing here knows about ``torch.nn``; see :mod:`embcompress.engine` for what runs a plan.
"""

from __future__ import annotations

from embcompress.plan.addresses import Address, Code, Digit, DirectAddress, Hash, MurmurHash, Slot
from embcompress.plan.consistency import Combine, Pool
from embcompress.plan.errors import PlanError, require
from embcompress.plan.heads import HashFeatures, Head, Linear, Network, TensorTrain
from embcompress.plan.lookup_plan import LookupPlan, total_bytes
from embcompress.plan.probes import Probe, Scale, Sign, Weight
from embcompress.plan.stores import (
    FLOAT_BITS,
    INT64_END,
    MOST_STORED,
    PACKED_VALUE_BITS,
    Location,
    Quantization,
    Sparsity,
    SparsityForm,
    Store,
)

__all__ = [
    "FLOAT_BITS",
    "INT64_END",
    "MOST_STORED",
    "PACKED_VALUE_BITS",
    "Address",
    "Code",
    "Combine",
    "Digit",
    "DirectAddress",
    "Hash",
    "HashFeatures",
    "Head",
    "Linear",
    "Location",
    "LookupPlan",
    "MurmurHash",
    "Network",
    "PlanError",
    "Pool",
    "Probe",
    "Quantization",
    "Scale",
    "Sign",
    "Slot",
    "Sparsity",
    "SparsityForm",
    "Store",
    "TensorTrain",
    "Weight",
    "require",
    "total_bytes",
]
