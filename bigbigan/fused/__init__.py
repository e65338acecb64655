"""The fused form of networks for inference on CPUs: the same outputs, fewer passes over memory."""

from bigbigan.fused.swap import FusedPart, check_fusible, fuse
from bigbigan.pretrained import Pretrained

__all__ = ["FusedPart", "check_fusible", "fuse"]

Pretrained.fuse_network = staticmethod(fuse)  # networks may not import what is built on them
