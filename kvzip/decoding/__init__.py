"""Decoding: the one path by which tokens follow tokens, for the engine and for all who wait for an answer."""

from .choosing import NO_TOKEN, penalize, sample
from .decoder import Decoder, answers_of, tail_bytes_per_token
from .graphs import capture

__all__ = ["NO_TOKEN", "Decoder", "answers_of", "capture", "penalize", "sample", "tail_bytes_per_token"]
