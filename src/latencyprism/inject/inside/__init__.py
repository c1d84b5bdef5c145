"""Scripts that run as processes of their own, with the standard library alone, so that they start in
milliseconds and depend on nothing that an injection could disturb."""
