"""The passes of k-means over the tokens of each sample and head, and sums over clusters."""

from .errors import SpanSums, span_sums, spans_at_most
from .passes import Passes, fixed_point, passes

__all__ = ["Passes", "SpanSums", "fixed_point", "passes", "span_sums", "spans_at_most"]
