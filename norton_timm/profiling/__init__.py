"""What a network costs: its MACs and parameters are counted, its latency and memory are measured."""

from norton_timm.profiling.complexity import (
    Complexity,
    LayerCost,
    count,
    count_params,
    default_input,
    layer_costs,
    layer_macs,
    make_input,
)
from norton_timm.profiling.memory import MEGABYTE, peak_memory, process_peak, reset_process_peak
from norton_timm.profiling.timing import (
    WARM_UP,
    Turns,
    channels_last,
    compare_latency,
    latencies,
    layer_latencies,
    ready_to_run,
    synchronise,
    take_turns,
)

__all__ = [
    'MEGABYTE', 'WARM_UP', 'Complexity', 'LayerCost', 'Turns', 'channels_last', 'compare_latency', 'count',
    'count_params', 'default_input', 'latencies', 'layer_costs', 'layer_latencies', 'layer_macs', 'make_input',
    'peak_memory', 'process_peak', 'ready_to_run', 'reset_process_peak', 'synchronise', 'take_turns',
]  # fmt: skip
