"""The former place of vote/agreement.py, for who compares replicas with its hashes."""

from .vote.agreement import hash_parameter, hash_parameters

__all__ = ["hash_parameter", "hash_parameters"]
