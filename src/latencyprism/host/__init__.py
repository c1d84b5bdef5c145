"""/proc, PSI, cgroups and clocks of the machine."""
