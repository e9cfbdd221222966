"""Statistics of ids: what a table holds, before it is decided how to compress it."""

from embcompress.statistics.distribution import CountDistribution
from embcompress.statistics.feature import FeatureProfile
from embcompress.statistics.interrupts import ProfileInterrupted
from embcompress.statistics.pairs import Pair
from embcompress.statistics.power_law import PowerLaw
from embcompress.statistics.profiles import Profile
from embcompress.statistics.run import profile
from embcompress.statistics.settings import ProfileSettings

__all__ = [
    "CountDistribution",
    "FeatureProfile",
    "Pair",
    "PowerLaw",
    "Profile",
    "ProfileInterrupted",
    "ProfileSettings",
    "profile",
]
