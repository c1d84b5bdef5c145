"""Finding a target process, getting into a live interpreter and out again, and what that needs."""
