"""The flight ring, the capture file, the Perfetto writer."""
