"""The demonstration: a real engine, three acts, and what the watch says about them."""
