"""Clock domains, and the assembly of what probes saw into steps and their phases."""
