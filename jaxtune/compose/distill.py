"""`distill`, beside the other ways to learn a model of models; it lives in `teach`, where transports find it too."""

from jaxtune.teach.distill import Distilled, distill

__all__ = ["Distilled", "distill"]
