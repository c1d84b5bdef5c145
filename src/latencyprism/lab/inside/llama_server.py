"""Run llama.cpp's HTTP server in this process: ``llama_server.py OPTIONS_JSON``."""

from __future__ import annotations

import json
import os
import signal
import sys

import xllamacpp


def main(options: dict) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.hostnames = ["127.0.0.1"]
    params.port = options["port"]
    params.n_parallel = options["slots"]
    params.n_ctx = options["slots"] * options["context"]
    params.n_batch = options["batch_tokens"]
    params.n_ubatch = options["batch_tokens"]
    params.cpuparams.n_threads = options["threads"]
    params.cpuparams_batch.n_threads = options["threads"]
    # One connection per client stays open; with fewer HTTP threads than clients the rest would starve.
    params.n_threads_http = options["slots"] + 4
    params.endpoint_metrics = True
    params.ui = False
    params.cache_ram_mib = 0
    params.warmup = False
    params.fit_params = False
    params.verbosity = 1
    # Blocked before the server makes its threads, so that they inherit the mask and sigwait below gets the
    # signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    server = xllamacpp.Server(params)
    sys.stderr.write(f"listening on {server.listening_address}\n")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    # The server's own destructor waits for streams to end; nothing here needs saving.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
