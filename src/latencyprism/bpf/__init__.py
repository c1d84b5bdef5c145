"""A pure-Python bpf(2) loader, prebuilt programs, uprobes and scheduler tracepoints."""
