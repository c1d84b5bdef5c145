"""What runs inside the target that is disturbed from within: one thread, on a lease, that leaves nothing."""
