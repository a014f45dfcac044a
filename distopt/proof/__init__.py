"""The proof that all ranks have what their layouts say, and a checksum of content that no sharding changes."""

from distopt.proof.checksum import Fingerprint, fingerprint
from distopt.proof.messages import prove
from distopt.proof.watch import before_step, prove_every

__all__ = ["Fingerprint", "before_step", "fingerprint", "prove", "prove_every"]
