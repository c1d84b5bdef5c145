"""What the kernel says about the machine and the watched processes: /proc, PSI, cgroup v1 and v2, clocks."""

from latencyprism.host.clock import ClockMap
from latencyprism.host.neighbours import Neighbour, Neighbours
from latencyprism.host.sampler import HostSampler

__all__ = ["ClockMap", "HostSampler", "Neighbour", "Neighbours"]
