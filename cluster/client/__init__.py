"""The clients of a served cluster, and how the command line makes one. Knows no Ray and no server."""
