"""What a person sees: terminal, report."""
