"""Small synthetic folders of tables: a host that writes, kernels and copies on one or two ranks."""

import csv
import gzip
import math
import random

PERF = [
    "cycle", "pid", "hostname", "beta_pct", "function_name", "metric_name", "device", "func_type", "mu_pct",
    "sigma_pct", "duration", "interpolation_status", "anchor_name", "anchor_dur_us", "cycle_start_ts",
    "instances_count", "simple_name",
]  # fmt: skip
COUNTERS = ["counter_name", "timestamp", "value", "hostname"]
OPERATIONS = [  # function, kind, device, microseconds a call, calls, feature
    ("oncpu", "oncpu", "Host", 9.6, 120_000, "oncpu"),
    ("runq", "runq", "Host", 0.42, 120_000, "runq"),
    ("write", "disk_read_and_write", "Host", 1.2, 160_000, "write"),
    ("cudaStreamSynchronize", "cpu_sync", "Host", 900.0, 30, ""),
    ("ampere_bf16_s16816gemm_64x64", "gpu_compute", "GPU 7", 150.0, 200, "gemm"),
    ("void norm::RMSNormKernel<8u>(float*)", "gpu_compute", "GPU 7", 9.3, 900, "kernel"),
    ("Memcpy DtoD (Device -> Device)", "gpu_memcpy_d2d", "GPU 7", 5.1, 40, "d2d"),
    ("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy_d2h", "GPU 7", 2.6, 20, "d2h"),
    ("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy_h2d", "GPU 7", 2.2, 20, "h2d"),
    ("Memset (Device)", "gpu_memcpy_h2d", "GPU 7", 2.4, 20, "memset"),
]
LEVELS = {
    "host_cpu_usage": ("host_cpu", 6.0),
    "cpu_frequency": ("cpu_frequency", 3500.0),
    "gpu_sm_frequency": ("sm_frequency", 1410.0),
    "gpu_link_transmit": ("link_bytes", 0.0),
    "gpu_pcie_transmit": ("pcie_bytes", 1.5e6),
}


def perf_rows(moves, *, cycles=8, seed=0, anchor="run_batch", pid="4711"):
    rng = random.Random(seed)
    for cycle in range(1, cycles + 1):
        for function, kind, device, cost, calls, feature in OPERATIONS:
            stretch = math.exp(moves.get(feature, 0.0) + rng.gauss(0, 0.01))
            number = int(calls * rng.uniform(0.8, 1.2))  # the number of calls is nobody's fault
            for metric in ("cpu_frequency", "host_cpu_usage"):
                yield {
                    "cycle": cycle, "pid": pid, "function_name": function, "metric_name": metric,
                    "device": device, "func_type": kind, "duration": cost * stretch * number,
                    "anchor_name": anchor, "anchor_dur_us": 600_000.0, "cycle_start_ts": 1e15 + cycle * 1e6,
                    "instances_count": number, "beta_pct": cost * stretch * number / 6e3, "mu_pct": 10.0,
                    "simple_name": function,
                }  # fmt: skip


def counter_rows(moves, *, seconds=8, seed=0):
    rng = random.Random(seed)
    for name, (feature, level) in LEVELS.items():
        for second in range(seconds):
            value = level * math.exp(rng.gauss(0, 0.002))
            value = value + 3e11 if feature == "link_bytes" and feature in moves else value
            if feature != "link_bytes":
                value *= math.exp(moves.get(feature, 0.0))
            yield {"counter_name": name, "timestamp": 1e15 + second * 1e6, "value": value}


def write_table(path, columns, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def write_folder(folder, moves, *, packed=True, without=(), cycles=8, anchor="run_batch"):
    folder.mkdir(exist_ok=True)
    suffix = ".csv.gz" if packed else ".csv"
    tables = {
        "normal_perf": (PERF, perf_rows({}, cycles=10, seed=1)),
        "abnormal_perf": (PERF, perf_rows(moves, cycles=cycles, seed=2, anchor=anchor)),
        "normal_counters": (COUNTERS, counter_rows({}, seed=3)),
        "abnormal_counters": (COUNTERS, counter_rows(moves, seed=4)),
    }
    for name, (columns, rows) in tables.items():
        if name not in without:
            write_table(folder / f"{name}{suffix}", columns, rows)
    return folder
