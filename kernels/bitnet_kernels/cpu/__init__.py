"""Native CPU kernels: C sources, the build, and the calls."""
