"""The proof that every rank has the shards that its layout describes, and checksums that do not depend on sharding."""

from distopt.proof.checksum import Fingerprint, fingerprint
from distopt.proof.messages import prove
from distopt.proof.watch import before_step, prove_every

__all__ = ["Fingerprint", "before_step", "fingerprint", "prove", "prove_every"]
