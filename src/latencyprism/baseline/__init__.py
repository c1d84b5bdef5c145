"""How long a step should take, given its workload; learned online."""
