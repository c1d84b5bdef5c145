"""The only code that ever runs inside a target, and the assembly of it into one text."""
