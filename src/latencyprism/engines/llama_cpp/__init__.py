"""llama.cpp, in whatever carries it: its own server, xllamacpp, or a program that calls the library."""
