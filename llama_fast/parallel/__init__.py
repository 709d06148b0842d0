"""Collectives of the transformer block: what joins its parts when the heads and the ffn are split over devices."""

from llama_fast.parallel.single import Collectives, Single

__all__ = ["Collectives", "Single"]
