"""Where the metrics of a run go. The training loop talks to `FanOut` and knows no single sink."""

from megatron_m1.observe.sinks.fan_out import FanOut, open_sinks
from megatron_m1.observe.sinks.sink import Metrics, Sink

__all__ = ["FanOut", "Metrics", "Sink", "open_sinks"]
