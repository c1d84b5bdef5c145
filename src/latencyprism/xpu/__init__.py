"""One module per accelerator vendor."""
