"""Real engines with tiny random models, and load, for the demo, the benchmarks and the tests."""
