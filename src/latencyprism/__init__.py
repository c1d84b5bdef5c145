"""LatencyPrism: watch a serving LLM engine from outside, batch by batch."""

__version__ = "0.1.0"
