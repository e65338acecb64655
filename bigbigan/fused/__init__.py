"""The fused form of networks for inference on CPUs: the same outputs, fewer passes over memory."""

from bigbigan.fused.swap import FusedPart, check_fusible, fuse

__all__ = ["FusedPart", "check_fusible", "fuse"]
