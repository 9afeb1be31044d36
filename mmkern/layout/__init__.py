"""What the kernels know of a token sequence: attention masks, and which rows are visual."""

from mmkern.layout.row_intervals import Parts, RowIntervals
from mmkern.layout.visual_spans import VisualSpans

__all__ = ["Parts", "RowIntervals", "VisualSpans"]
