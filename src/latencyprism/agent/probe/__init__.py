"""Source of the text that runs inside a target; nothing here is imported by the tool at run time."""
