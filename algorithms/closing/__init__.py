"""Close policies: when an exchange may close without everyone."""

from starling.algorithms.closing.base import ClosePolicy, Everyone, FirstK, Grace, Quorum, Waited
from starling.algorithms.closing.coded import Decodable, OneOfEach, decoding

__all__ = ["ClosePolicy", "Decodable", "Everyone", "FirstK", "Grace", "OneOfEach", "Quorum", "Waited", "decoding"]
