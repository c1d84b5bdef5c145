"""From signals before and after an onset to a named cause with evidence."""
