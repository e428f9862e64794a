"""The paper's reported figures of its own system: CE-CoLLM, arXiv 2411.02829.

The model has 7 billion parameters with exits at 8 and 16 of 32 layers, threshold 0.8, 100 samples a
dataset with about 100 new tokens each.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

SOURCE: Final = "https://arxiv.org/abs/2411.02829"


class Published(Struct, frozen=True, kw_only=True):
    """The sums over a dataset's 100 samples, in seconds of a clock.

    None means that it is not reported.
    """

    dataset: str
    system: str
    total_s: float
    cloud_s: float
    edge_s: float | None = None
    communication_s: float


TIMES: Final = (
    Published(dataset="alpaca", system="cloud_only", total_s=370, cloud_s=370, communication_s=0.4),
    Published(
        dataset="alpaca",
        system="naive_split",
        total_s=3372,
        cloud_s=253,
        edge_s=241,
        communication_s=2877,
    ),
    Published(
        dataset="alpaca",
        system="collaborative@0.8",
        total_s=319,
        cloud_s=113,
        edge_s=192,
        communication_s=14,
    ),
)


class PublishedClaim(Struct, frozen=True, kw_only=True):
    """One of its figures for CE-CoLLM at 0.8; shares are of 1."""

    dataset: str
    name: str
    value: float | str


CLAIMS: Final = (
    PublishedClaim(dataset="alpaca", name="less total time than cloud-only", value=0.1381),
    PublishedClaim(dataset="alpaca", name="less cloud time than cloud-only", value=0.695),
    PublishedClaim(dataset="alpaca", name="tokens asked of the cloud", value=0.4958),
    PublishedClaim(dataset="alpaca", name="tokens confident at the first exit", value=0.4789),
    PublishedClaim(
        dataset="alpaca", name="bytes an answer, naive split to CE-CoLLM", value="112 MB to 957 KB"
    ),
    PublishedClaim(dataset="xsum", name="less cloud time than cloud-only", value=0.8453),
    PublishedClaim(dataset="xsum", name="tokens asked of the cloud", value=0.2773),
    PublishedClaim(
        dataset="xsum", name="bytes an answer, naive split to CE-CoLLM", value="673 MB to 3.76 MB"
    ),
)


QUALITY: Final = {
    "boolq": (0.658, 0.646),
    "quac": (0.289, 0.291),
    "imdb": (0.724, 0.724),
    "xsum": (0.225, 0.228),
}
"""By dataset: the score of CE-CoLLM at 0.8, and of the cloud alone."""
